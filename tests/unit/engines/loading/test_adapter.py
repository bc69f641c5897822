"""PEFT adapters: merged exactly, or refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model

from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES
from engines.description import adapter_base
from engines.errors import BadModel, BrokenFiles, UnsupportedModel
from engines.loading.adapter import merge_adapter
from engines.loading.folder import read_folder

BASE = "bert-mean-normalize-legacy"
TEXTS = list(SENTENCES[:5])
QUERY_VALUE = ["query", "value"]

Config = Callable[[], Any]

KINDS: dict[str, Config] = {
    "plain": lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=QUERY_VALUE),
    "all-linear": lambda: peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=QUERY_VALUE),
    "patterns": lambda: peft.LoraConfig(
        r=4, target_modules=QUERY_VALUE, rank_pattern={"layer.0.*query": 2}, alpha_pattern={"layer.1.*value": 3}
    ),
    "bias": lambda: peft.LoraConfig(r=4, target_modules=QUERY_VALUE, bias="lora_only"),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=QUERY_VALUE),
    "modules-to-save": lambda: peft.LoraConfig(r=4, target_modules=QUERY_VALUE, modules_to_save=["output.LayerNorm"]),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings", "value"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=QUERY_VALUE),
    "ia3": lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
}


@pytest.fixture(scope="module")
def base(kit: Kit) -> Path:
    return kit.recipe_folder(BASE)


def _write_adapter(base: Path, folder: Path, config: Any) -> Path:
    """Write an adapter whose weights change the vectors clearly."""
    torch.manual_seed(5)
    with quiet():
        model = peft.get_peft_model(AutoModel.from_pretrained(base), config)
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                torch.nn.init.normal_(tensor, mean=1.0 if "ia3" in name or "magnitude" in name else 0.0, std=0.2)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def _changed(adapter: Path, **stated: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_gives_the_vectors_of_sentence_transformers(
    kit: Kit, base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS[kind]())
    with quiet():
        model = SentenceTransformer(str(base), device="cpu")
        model[0].auto_model = peft.PeftModel.from_pretrained(model[0].auto_model, str(adapter)).eval()
    wanted = encode(model, TEXTS)

    got = embed(kit.load(base, adapter=adapter), TEXTS)

    assert_same(got, wanted)
    assert abs(got - embed(kit.engine(BASE), TEXTS)).max() > 1e-3


def test_an_adapter_that_sentence_transformers_saved_brings_its_own_modules_and_prompts(
    kit: Kit, base: Path, tmp_path: Path
) -> None:
    with quiet():
        model = SentenceTransformer(str(base), device="cpu", prompts={"query": "find: "})
        model.add_adapter(peft.LoraConfig(r=4, target_modules=QUERY_VALUE, init_lora_weights=False))
        pooling: Any = model[1]
        pooling.pooling_mode = "cls"
        model.save(str(tmp_path / "adapter"))
        reference = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert not (tmp_path / "adapter" / "config.json").exists()
    wanted = encode(reference, TEXTS, prompt_name="query")

    engine = kit.load(base, adapter=tmp_path / "adapter")

    assert_same(embed(engine, TEXTS, input_type="query"), wanted)
    assert read_folder(base, tmp_path / "adapter").prompts == {"query": "find: "}


def test_an_adapter_is_merged_into_transposed_weights(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model: Any = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    model.eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = _write_adapter(tmp_path / "base", tmp_path / "adapter", config)
    ids = torch.arange(6)[None]
    with torch.no_grad(), quiet():
        unmerged = peft.PeftModel.from_pretrained(GPT2Model.from_pretrained(tmp_path / "base"), str(adapter))
        wanted = unmerged(input_ids=ids)[0]
        merged, replaced = merge_adapter(model, adapter, 50)
        got = merged(input_ids=ids)[0]

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert type(merged) is GPT2Model and not replaced


def test_two_adapters_of_one_base_have_two_identities(kit: Kit, base: Path, tmp_path: Path) -> None:
    first = _write_adapter(base, tmp_path / "first", KINDS["plain"]())
    second = _write_adapter(base, tmp_path / "second", KINDS["patterns"]())
    got = [embed(kit.load(base, adapter=each), TEXTS) for each in (first, second)]

    assert abs(got[0] - got[1]).max() > 1e-3


@pytest.mark.parametrize("begun", ["pissa", "olora", "corda"])
def test_an_adapter_of_changed_base_weights_is_refused(kit: Kit, base: Path, tmp_path: Path, begun: str) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())
    _changed(adapter, init_lora_weights=begun)

    with pytest.raises(UnsupportedModel, match=f"init_lora_weights to '{begun}'"):
        kit.load(base, adapter=adapter)


def test_an_adapter_that_cannot_be_merged_is_refused(kit: Kit, base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
    adapter = _write_adapter(base, tmp_path / "adapter", config)

    with pytest.raises(UnsupportedModel, match="adapter"):
        kit.load(base, adapter=adapter)


def test_an_adapter_that_lacks_weights_is_refused(kit: Kit, base: Path, tmp_path: Path) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors")

    with pytest.raises(UnsupportedModel, match="belongs to another model"):
        kit.load(base, adapter=adapter)


def test_an_adapter_of_another_model_is_refused(kit: Kit, base: Path, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    BertModel(config).save_pretrained(tmp_path / "other")
    adapter = _write_adapter(tmp_path / "other", tmp_path / "adapter", KINDS["plain"]())

    with pytest.raises(UnsupportedModel) as caught:
        kit.load(base, adapter=adapter)
    assert str(tmp_path) not in str(caught.value)


def test_a_merge_that_is_not_exact_is_refused(
    kit: Kit, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda self, _: torch.zeros(48, 48))

    with pytest.raises(UnsupportedModel, match="cannot be merged exactly"):
        kit.load(base, adapter=adapter)


def test_a_broken_adapter_is_refused_without_its_path(kit: Kit, base: Path, tmp_path: Path) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())
    (adapter / "adapter_model.safetensors").unlink()

    with pytest.raises(BrokenFiles, match=r"adapter_model\.safetensors is missing") as caught:
        kit.load(base, adapter=adapter)
    assert str(tmp_path) not in str(caught.value)


def test_an_adapter_as_a_source_is_refused_with_the_key_to_use(kit: Kit, base: Path, tmp_path: Path) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, adapter / file)

    with pytest.raises(BadModel, match="`adapter`"):
        kit.load(adapter)


def test_an_adapter_names_its_base(base: Path, tmp_path: Path) -> None:
    adapter = _write_adapter(base, tmp_path / "adapter", KINDS["plain"]())

    assert adapter_base(base) is None
    assert adapter_base(adapter) == (str(base), None)
