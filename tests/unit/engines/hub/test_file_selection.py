"""The files of a repository that are fetched: those of further outputs among them, and none that run code."""

import json

from engines.hub.file_selection import description_files, select

PLAIN = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md", "onnx/model.onnx")


def files(*more: str) -> tuple[str, ...]:
    return select((*PLAIN, *more), lambda name: b"{}", source="org/model", with_code=False).files


def test_the_projection_of_vectors_of_tokens_is_fetched() -> None:
    assert "colbert_linear.pt" in files("colbert_linear.pt", "another.pt")
    assert "another.pt" not in files("colbert_linear.pt", "another.pt")


def test_the_settings_of_stanfords_colbert_are_fetched_and_describe_it() -> None:
    names = (*PLAIN, "artifact.metadata", "colbert_linear.pt")

    assert "artifact.metadata" in files("artifact.metadata")
    assert set(description_files(names, lambda name: b"{}")) == {
        "README.md", "artifact.metadata", "config.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_modules_of_a_model_of_late_interaction_are_fetched() -> None:
    kinds = {"": "Transformer", "1_Dense": "Dense", "2_MultiVectorMask": "MultiVectorMask", "3_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.x.{kind}"} for path, kind in kinds.items()]
    inside = ("1_Dense/config.json", "1_Dense/model.safetensors", "2_MultiVectorMask/config.json")

    found = select(
        (*PLAIN, "modules.json", *inside), lambda name: json.dumps(modules).encode(), source="org/m", with_code=False
    )

    assert {*inside} <= {*found.files}
    assert found.weights == ("1_Dense/model.safetensors", "model.safetensors")
