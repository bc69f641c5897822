"""A folder with bge-m3's files gives dense vectors and lexical weights of one pass, as FlagEmbedding defines them."""

import asyncio
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.lib.engine_kit import Kit, answer, assert_same
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.errors import BrokenFiles, SelfCheckFailed
from engines.hub.file_selection import SPARSE_LINEAR
from engines.loading.loader import LoaderSettings
from engines.models.lexical import LexicalHead
from engines.models.multi_output import MultiOutputEncoder
from engines.models.outputs import Wanted
from engines.types import Outputs, OutputsCall
from tests.testkit.fake_gpu_families import texts_for

TEXTS = [*SENTENCES[:6], "the the the", "a", SENTENCES[0]]
RECIPE = "xlm-roberta-cls"


@pytest.fixture(scope="module")
def folder(kit: Kit) -> Path:
    made = kit.folder / "bge-m3"
    if not made.exists():
        shutil.copytree(kit.recipe_folder(RECIPE), made)
        generator = torch.Generator().manual_seed(11)
        head = {"weight": torch.randn(1, 48, generator=generator), "bias": torch.tensor([0.1])}
        torch.save({name: tensor.half() for name, tensor in head.items()}, made / SPARSE_LINEAR)
    return made


@pytest.fixture(scope="module")
def engine(kit: Kit, folder: Path) -> EmbeddingEngine:
    return kit.load(folder)


def lexical_weights(model: SentenceTransformer, folder: Path, texts: list[str]) -> list[dict[int, float]]:
    """Computes what `M3Embedder.encode` of FlagEmbedding returns as `lexical_weights`, in its order of steps."""
    head = torch.load(folder / SPARSE_LINEAR, weights_only=True)
    linear = torch.nn.Linear(48, 1)
    linear.load_state_dict({name: tensor.float() for name, tensor in head.items()})
    tokenizer = model.tokenizer
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    found = []
    for text in texts:
        with quiet(), torch.no_grad():
            states = model.encode(text, output_value="token_embeddings", prompt="", show_progress_bar=False)
            token_weights = torch.relu(linear(states)).squeeze(-1).tolist()
        result: dict[int, float] = {}
        for token, weight in zip(tokenizer(text)["input_ids"], token_weights, strict=True):
            if token not in unused and weight > 0:
                result[token] = max(result.get(token, 0.0), weight)
        found.append(result)
    return found


def outputs_of(engine: EmbeddingEngine, texts: list[str], *names: Any) -> Outputs:
    call = OutputsCall(model_id="m", texts=tuple(texts), outputs=names, prompt="")
    result = asyncio.run(engine.run(call))
    assert isinstance(result, Outputs)
    return result


def terms_of(found: Outputs) -> list[dict[int, float]]:
    entries, weights = found.terms()
    ends = np.cumsum(found.num_terms)
    spans = [slice(end - count, end) for end, count in zip(ends, found.num_terms, strict=True)]
    return [dict(zip(entries[span].tolist(), weights[span].tolist(), strict=True)) for span in spans]


def test_lexical_weights_are_those_of_the_definition(kit: Kit, engine: EmbeddingEngine, folder: Path) -> None:
    expected = lexical_weights(kit.reference(RECIPE), folder, TEXTS)

    found = terms_of(outputs_of(engine, TEXTS, "sparse"))

    assert [{*row} for row in found] == [{*row} for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert any(len(row) > 3 for row in found)
    assert (engine.info.outputs, engine.info.dimensions) == (("dense", "sparse"), 48)


def test_outputs_of_one_call_are_those_of_a_call_each_and_of_a_model_without_the_head(
    kit: Kit, engine: EmbeddingEngine
) -> None:
    together = outputs_of(engine, TEXTS, "dense", "sparse", "tokens")
    plain = answer(kit.engine(RECIPE), texts=tuple(TEXTS), prompt="")

    assert_same(together.array(), outputs_of(engine, TEXTS, "dense").array())
    assert_same(together.array(), plain.array())
    assert_same(together.vectors(), outputs_of(engine, TEXTS, "tokens").vectors())
    for row, wanted in zip(terms_of(together), terms_of(outputs_of(engine, TEXTS, "sparse")), strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)
    assert together.token_counts == plain.token_counts
    assert outputs_of(engine, TEXTS, "dense").array().tobytes() == answer(engine, texts=tuple(TEXTS), prompt="").vectors


def test_every_path_gives_the_same_outputs_alone_and_together(engine: EmbeddingEngine) -> None:
    assert engine._runner is not None
    encoder = engine._runner._encoder
    assert isinstance(encoder, MultiOutputEncoder)
    texts, used = texts_for(encoder), encoder.path
    expected = encoder.reference(texts)

    for path in encoder.candidate_paths():
        encoder.switch_to(path)
        assert_same(encoder.encode_batched(texts)[0].numpy(), expected.numpy())
        together = encoder.run_outputs(texts, None, Wanted(dense=True, sparse=True)).sparse
        alone = [encoder.run_outputs([text], None, Wanted(sparse=True)).sparse for text in texts]
        assert together is not None
        assert together.entries.tolist() == [e for row in alone if row is not None for e in row.entries.tolist()]
    encoder.switch_to(used)


def test_a_head_that_another_path_reads_wrongly_is_not_served(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = MultiOutputEncoder._hidden

    def changed(self: MultiOutputEncoder, texts: Any, layout: Any) -> torch.Tensor:
        states = hidden(self, texts, layout)
        if self.path in ("fused", "prepacked") and layout.needs_all:  # all tokens but those that dense vectors need
            first = states[layout.starts]
            states = states * 1.05
            states[layout.starts] = first
        return states

    monkeypatch.setattr(MultiOutputEncoder, "_hidden", changed)

    assert kit.load(folder).info.path == "packed"


def test_a_head_that_changed_since_the_first_load_is_refused(
    kit: Kit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LoaderSettings(canary_folder=tmp_path)
    kit.load(folder, settings=settings)
    made = LexicalHead.__init__

    def changed(self: LexicalHead, weight: torch.Tensor, *others: Any) -> None:
        made(self, weight * 1.01, *others)

    monkeypatch.setattr(LexicalHead, "__init__", changed)
    with pytest.raises(SelfCheckFailed, match="moved by"):
        kit.load(folder, settings=settings)


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("code of a model ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1, 47), "bias": torch.zeros(1)}, "do not fit the model"),
        ({"weight": torch.zeros(1, 48)}, "in place of weight and bias"),
        ({"weight": torch.zeros(1, 48), "bias": torch.zeros(1), "more": torch.zeros(1)}, "bias, more, weight"),
        ([torch.zeros(1)], "holds no tensors by name"),
        (_Runs(), "UnpicklingError"),
    ],
)
def test_a_head_that_is_no_linear_layer_of_the_model_is_refused_and_runs_no_code(
    kit: Kit, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    if isinstance(content, _Runs):
        (broken / SPARSE_LINEAR).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, broken / SPARSE_LINEAR)

    with pytest.raises(BrokenFiles, match=message):
        kit.load(broken)
    assert "code of a model ran" not in capsys.readouterr().out
