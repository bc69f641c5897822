"""The check at load: a wrong path is not used, a wrong model is refused, and a right one stores its canary."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, ViTConfig, ViTModel

from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.device.scheduler import DeviceScheduler
from engines.errors import DeviceDown, OutOfMemory, SelfCheckFailed, UnsupportedModel
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.layers import decoder, fused
from engines.layers.attention import PACKED, packed_attention
from engines.layers.fused import FusedLayer
from engines.layers.packing import PackedLayout
from engines.loading import builders
from engines.loading.loader import LoaderSettings
from engines.models import adapters, prepacked, transformer
from engines.models.base import FIRST_WAIT_S, LONGEST_WAIT_S, Attention, PathFallback, PathForm, Size, attention_of
from engines.models.base import ForwardPath as Way
from engines.models.cuda_graphs import fill_row
from engines.models.prepacked import Inputs, PrepackedEncoder, ScriptedEncoder
from engines.models.transformer import TransformerEncoder
from engines.models.verification import Canaries, distance, probe_inputs, select_forward_path
from engines.models.weight_forms import WeightForm
from tests.testkit.clocks import FakeClock

TEXTS = list(SENTENCES)


@pytest.fixture
def replace_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Replaces the packed attention function."""

    def replace(function: Callable[..., Any]) -> None:
        AttentionInterface.register(PACKED, function)
        monkeypatch.setattr(fused, "packed_attention", function)
        monkeypatch.setattr(decoder, "packed_attention", function)

    yield replace
    AttentionInterface.register(PACKED, packed_attention)


@pytest.fixture
def packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 models keep their weights packed, as bfloat16 ones do."""
    monkeypatch.setattr(builders, "weight_form", lambda *_: WeightForm())


def _hotter(*args: Any, **options: Any) -> Any:
    return packed_attention(*args, **{**options, "scaling": options["scaling"] * 1.05})


def _one_wider(*args: Any, **options: Any) -> Any:
    window = options.get("sliding_window")
    return packed_attention(*args, **{**options, "sliding_window": window and window + 1})


def _no_window(*args: Any, **options: Any) -> Any:
    return packed_attention(*args, **{**options, "sliding_window": None})


def _looks_ahead(*args: Any, **options: Any) -> Any:
    return packed_attention(*args, **{**options, "is_causal": False})


def _mixes_neighbours(*args: Any, **options: Any) -> Any:
    """Swaps the context of texts of the same length."""
    out, _ = packed_attention(*args, **options)
    group = options["packed_layout"].groups[0]
    first = out[:, : group.end].view(1, group.count, group.length, *out.shape[2:]).flip(1).flatten(1, 2)
    return torch.cat([first, out[:, group.end :]], dim=1), None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bert-cls", _hotter),
        ("bert-mean-normalize-legacy", _mixes_neighbours),
        ("modernbert-cls", _one_wider),
        ("gemma3-bidirectional", _no_window),
        ("mistral-last", _one_wider),
        ("qwen3-last", _hotter),
        ("llama-mean", _looks_ahead),
        ("t5-mean-dense", _hotter),
    ],
)
def test_a_packed_path_that_is_slightly_wrong_is_not_used(
    kit: Kit, replace_attention: Callable[[Callable[..., Any]], None], name: str, wrong: Callable[..., Any]
) -> None:
    replace_attention(wrong)
    engine = kit.load(kit.recipe_folder(name))

    assert engine.info.attention == "padded"
    assert engine.info.notes[-1].startswith("padded: the packed path is")
    assert_same(embed(engine, TEXTS), encode(kit.reference(name), TEXTS))


def test_a_wrong_bias_of_mpnet_is_found(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(*args: Any, **options: Any) -> Any:
        return packed_attention(*args, **{**options, "position_bias": None})

    monkeypatch.setattr(fused, "packed_attention", unbiased)
    assert kit.load(kit.recipe_folder("mpnet-mean")).info.attention == "packed", "the fused path only is wrong"
    monkeypatch.setattr(adapters, "packed_attention", unbiased)
    assert kit.load(kit.recipe_folder("mpnet-mean")).info.attention == "padded"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (NotImplementedError("soft caps have no packed form"), "padded: soft caps have no packed form"),
        (RuntimeError("see /home/secret/file.py"), "padded: RuntimeError in the forward pass"),
    ],
)
def test_a_packed_path_that_fails_is_not_used_and_the_note_names_no_file(
    kit: Kit, replace_attention: Callable[[Callable[..., Any]], None], error: Exception, note: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    replace_attention(fail)

    assert kit.load(kit.recipe_folder("eurobert-mean")).info.notes == (note,)


def test_fused_layers_that_are_wrong_are_replaced_by_the_plain_ones(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "packed_attention", _hotter)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert engine.info.attention == "packed"
    assert [note.split(" path is")[0] for note in engine.info.notes] == ["fused: the prepacked", "packed: the fused"]
    assert_same(embed(engine, TEXTS), encode(kit.reference("bert-cls"), TEXTS))


@pytest.mark.parametrize("variant", ["few", "many"])
@pytest.mark.parametrize(("name", "left"), [("bert-cls", ["prepacked", "fused"]), ("mpnet-mean", ["fused"])])
def test_fused_layers_are_checked_in_every_variant(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, variant: str, left: list[str], name: str
) -> None:
    """The number of threads changes while a model serves."""
    right = getattr(FusedLayer, variant)
    assert kit.load(kit.recipe_folder(name)).info.notes == ()
    monkeypatch.setattr(FusedLayer, variant, lambda self, *args: right(self, *args) * 1.01)

    assert _left(kit.load(kit.recipe_folder(name))) == left


@pytest.mark.parametrize("num_threads", [1, 2])
def test_prepacked_layers_are_checked_on_one_thread_and_on_several(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    right = PrepackedEncoder.__call__

    def wrong(self: PrepackedEncoder, *args: Any) -> Any:
        return right(self, *args) * np.float32(1.01 if self.num_threads == num_threads else 1.0)

    monkeypatch.setattr(DeviceScheduler, "num_threads", 2)
    assert kit.load(kit.recipe_folder("bert-cls")).info.notes == ()
    monkeypatch.setattr(PrepackedEncoder, "__call__", wrong)

    assert _left(kit.load(kit.recipe_folder("bert-cls"))) == ["prepacked"]


def test_prepacked_layers_are_checked_with_several_texts_too(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pad texts of several lengths to one, and attention must hide the padding."""
    right = PrepackedEncoder.__call__

    def unmasked(self: PrepackedEncoder, row: Inputs, *args: Any) -> Any:
        lengths = np.full_like(row["lengths"], row["lengths"].max())
        return right(self, row | {"lengths": lengths}, *args)

    monkeypatch.setattr(PrepackedEncoder, "__call__", unmasked)

    assert _left(kit.load(kit.recipe_folder("bert-cls"))) == ["prepacked"]


@pytest.mark.usefixtures("packed_weights")
def test_packed_layers_are_checked(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ScriptedEncoder.__call__
    assert kit.load(kit.recipe_folder("bert-cls")).info.notes == ()
    monkeypatch.setattr(ScriptedEncoder, "__call__", lambda self, *args: right(self, *args) * 1.01)

    assert _left(kit.load(kit.recipe_folder("bert-cls"))) == ["prepacked"]


@pytest.mark.usefixtures("packed_weights")
def test_packed_layers_are_checked_with_several_texts_too(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pad texts of similar lengths to one, and attention must hide the padding."""
    right = ScriptedEncoder.blocks

    def unmasked(self: ScriptedEncoder, layout: PackedLayout) -> Any:
        blocks, places = right(self, layout)
        return blocks, [torch.ones_like(place) if place.is_floating_point() else place for place in places]

    monkeypatch.setattr(ScriptedEncoder, "blocks", unmasked)

    assert _left(kit.load(kit.recipe_folder("bert-cls"))) == ["prepacked"]


@pytest.mark.usefixtures("packed_weights")
def test_packed_layers_that_fail_leave_the_fused_ones(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ScriptedEncoder, "embed", fail)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert engine.info.notes == ("fused: RuntimeError in the forward pass",)
    assert_same(embed(engine, TEXTS), encode(kit.reference("bert-cls"), TEXTS))


@pytest.mark.parametrize(
    ("owner", "part", "next_paths"),
    [(FusedLayer, "few", ("fused", "packed")), (prepacked, "PrepackedEncoder", ("fused",))],
)
def test_a_part_that_fails_disables_the_paths_that_need_it_and_no_other(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, owner: object, part: str, next_paths: tuple[str, ...]
) -> None:
    """The variant for few tokens is on both fused paths, the copy of the weights on one."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(owner, part, fail)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert engine.info.notes == tuple(f"{path}: RuntimeError in the forward pass" for path in next_paths)
    assert engine.info.attention == "packed"
    assert_same(embed(engine, TEXTS), encode(kit.reference("bert-cls"), TEXTS))


def test_a_padded_path_that_is_wrong_is_replaced_by_batches_of_one_length(
    kit: Kit, replace_attention: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TransformerEncoder._padded
    replace_attention(_hotter)
    monkeypatch.setattr(TransformerEncoder, "_padded", lambda self, *args: right(self, *args) * 1.02)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert engine.info.attention == "unpadded"
    assert [note.split(" path is")[0] for note in engine.info.notes] == [
        "fused: the prepacked", "packed: the fused", "padded: the packed", "unpadded: the padded"
    ]  # fmt: skip
    assert_same(embed(engine, TEXTS), encode(kit.reference("bert-cls"), TEXTS))


def test_when_every_path_is_wrong_the_model_is_refused(
    kit: Kit, replace_attention: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TransformerEncoder._batch

    def wrong(self: TransformerEncoder, texts: Sequence[Ids]) -> Tensor:
        return right(self, texts) * (1.0 if self._model.config._attn_implementation == "eager" else 1.02)

    replace_attention(_hotter)
    message = r"the unpadded path is .* in cosine from the reference forward pass"
    with monkeypatch.context() as patch, pytest.raises(SelfCheckFailed, match=message):
        patch.setattr(TransformerEncoder, "_batch", wrong)
        kit.load(kit.recipe_folder("bert-cls"))
    assert kit.load(kit.recipe_folder("bert-dense-identity")).info.attention == "padded"


def test_a_model_with_random_vectors_is_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random projections, for example, the same text twice in one batch gets two vectors."""
    right = TransformerEncoder._batch
    monkeypatch.setattr(
        TransformerEncoder, "_batch", lambda self, texts: (out := right(self, texts)) + 1e-4 * torch.randn_like(out)
    )

    with pytest.raises(SelfCheckFailed, match="one text gets two vectors"):
        kit.load(kit.recipe_folder("deberta-v2-mean"))


def test_a_path_that_fails_later_is_replaced_and_the_batch_runs_again(
    kit: Kit, replace_attention: Callable[[Callable[..., Any]], None]
) -> None:
    """A model may count the tokens of a row of several texts, and refuse long rows (CLIP's text model)."""

    def narrow(*args: Any, **options: Any) -> Any:
        if options["packed_layout"].num_tokens > 200:
            raise ValueError("Sequence length must be less than max_position_embeddings")
        return packed_attention(*args, **options)

    replace_attention(narrow)
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=LoaderSettings(max_prepacked_bytes=0))
    wanted = encode(kit.reference("bert-cls"), TEXTS)

    assert engine.info.attention == "packed"
    assert_same(embed(engine, TEXTS), wanted)
    assert engine._runner is not None
    assert engine._runner._encoder.attention == "unpadded"
    assert_same(embed(engine, TEXTS), wanted)


class TransientFault:
    """Packed attention that a test can make fail or be wrong."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.factor = 1.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.failures:
            raise self.failures.pop()
        out, weights = packed_attention(*args, **options)
        return out * self.factor, weights


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The fake clock of the models that a test loads."""
    time = FakeClock()
    monkeypatch.setattr(transformer, "PathFallback", partial(PathFallback, clock=time))
    return time


@pytest.fixture
def fault(replace_attention: Callable[[Callable[..., Any]], None]) -> TransientFault:
    attention = TransientFault()
    replace_attention(attention)
    return attention


def _load_packed(kit: Kit) -> EmbeddingEngine:
    return kit.load(kit.recipe_folder("bert-cls"), settings=LoaderSettings(max_prepacked_bytes=0))


def test_after_one_passing_error_the_fast_path_comes_back(kit: Kit, clock: FakeClock, fault: TransientFault) -> None:
    engine = _load_packed(kit)
    chosen = engine.info
    wanted = encode(kit.reference("bert-cls"), TEXTS)

    fault.failures.append(ValueError("a transient error"))
    assert_same(embed(engine, TEXTS), wanted)
    left = engine.info
    clock.advance(FIRST_WAIT_S + 1)
    assert_same(embed(engine, TEXTS), wanted)

    assert (left.attention, left.path, left.is_fallback) == ("unpadded", "unpadded", True)
    assert left.notes == (f"unpadded: ValueError on the {chosen.path} path, which is tried again in 30 s",)
    assert engine.info == chosen
    assert not chosen.is_fallback


def test_a_path_whose_vectors_have_become_wrong_does_not_come_back(
    kit: Kit, clock: FakeClock, fault: TransientFault
) -> None:
    engine = _load_packed(kit)
    wanted = encode(kit.reference("bert-cls"), TEXTS)

    fault.failures.append(ValueError("a transient error"))
    fault.factor = 1.01
    embed(engine, TEXTS)
    for _ in range(5):
        clock.advance(2 * FIRST_WAIT_S + 1)
        assert_same(embed(engine, TEXTS), wanted)
    assert engine.info.is_fallback

    fault.factor = 1.0
    clock.advance(LONGEST_WAIT_S)
    assert_same(embed(engine, TEXTS), wanted)
    assert not engine.info.is_fallback


@pytest.mark.parametrize("is_retry", [False, True], ids=["while it is used", "while it is tried again"])
def test_no_path_is_replaced_because_the_device_failed(
    kit: Kit, clock: FakeClock, fault: TransientFault, is_retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit.scheduler, "_loss", "")
    engine = _load_packed(kit)
    if is_retry:
        fault.failures.append(ValueError("a transient error"))
        embed(engine, TEXTS)
        clock.advance(FIRST_WAIT_S + 1)
    fault.failures = [torch.AcceleratorError("CUDA error: device-side assert triggered")] * 9

    with pytest.raises(DeviceDown, match="device-side assert"):
        embed(engine, TEXTS)
    assert kit.scheduler.health().loss == "device-side assert"
    assert engine.info.is_fallback == is_retry


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_path_is_replaced_for_lack_of_memory(
    kit: Kit, clock: FakeClock, fault: TransientFault, error: Exception
) -> None:
    engine = _load_packed(kit)

    fault.failures.append(error)

    assert_same(embed(engine, TEXTS), encode(kit.reference("bert-cls"), TEXTS))
    assert engine.info.attention == "packed"


def test_weights_that_are_not_finite_are_refused(kit: Kit, tmp_path: Path) -> None:
    folder = _with_weights(kit, tmp_path, lambda weight: weight.fill_(float("nan")))

    with pytest.raises(SelfCheckFailed, match="not finite in float32; set another `dtype`"):
        kit.load(folder)


def test_a_model_that_is_not_for_text_is_refused(kit: Kit, tmp_path: Path) -> None:
    folder = _with_weights(kit, tmp_path, lambda weight: weight)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ViTModel(config).save_pretrained(folder)

    with pytest.raises(UnsupportedModel, match=r"config\.json describes a vit, which has no token embedding table"):
        kit.load(folder, pooling=("mean",))


# The canary.


def test_the_first_good_vectors_are_kept_and_compared(kit: Kit, tmp_path: Path) -> None:
    settings = LoaderSettings(canary_folder=tmp_path / "canaries")
    folder = kit.recipe_folder("bert-cls")
    kit.load(folder, settings=settings)
    (canary,) = (tmp_path / "canaries").iterdir()
    kept = canary.read_text()

    kit.load(folder, settings=settings)
    assert canary.read_text() == kept
    vectors = np.asarray(json.loads(kept))
    vectors[0, 0] += 0.1
    canary.write_text(json.dumps(vectors.tolist()))

    with pytest.raises(SelfCheckFailed, match=f"delete the canary {canary.name} in STATE_DIR"):
        kit.load(folder, settings=settings)
    canary.unlink()
    kit.load(folder, settings=settings)
    assert canary.read_text() == kept


def test_changed_weights_under_the_same_revision_are_found(kit: Kit, tmp_path: Path) -> None:
    settings = LoaderSettings(canary_folder=tmp_path / "canaries")
    folder = _with_weights(kit, tmp_path, lambda weight: weight)
    kit.load(folder, settings=settings)
    _with_weights(kit, tmp_path, lambda weight: weight.mul_(1.3))

    with pytest.raises(SelfCheckFailed, match=r"moved by .* in cosine since it was first loaded"):
        kit.load(folder, settings=settings)
    assert kit.load(folder, settings=settings, revision="another").info.attention == "packed"


@pytest.mark.parametrize("spec", [{"dtype": "bfloat16"}, {"pooling": ("mean",)}, {"max_tokens": 20}])
def test_settings_that_change_vectors_have_another_canary(kit: Kit, tmp_path: Path, spec: dict[str, Any]) -> None:
    settings = LoaderSettings(canary_folder=tmp_path)
    kit.load(kit.recipe_folder("bert-cls"), settings=settings)
    kit.load(kit.recipe_folder("bert-cls"), settings=settings, **spec)

    assert len(list(tmp_path.iterdir())) == 2


def test_a_canary_of_another_shape_is_a_difference(tmp_path: Path) -> None:
    canaries = Canaries(tmp_path)
    canaries.compare("key", np.ones((3, 4), dtype=np.float32), "float32")

    with pytest.raises(SelfCheckFailed, match="moved by inf"):
        canaries.compare("key", np.ones((3, 5), dtype=np.float32), "float32")


@pytest.mark.parametrize(("age_s", "is_kept"), [(-10.0, False), (10.0, True)])
def test_a_canary_that_is_older_than_verified_files_is_replaced(tmp_path: Path, age_s: float, is_kept: bool) -> None:
    """It may come from a file that was damaged then, and has been fetched again."""
    canaries, good, bad = Canaries(tmp_path), np.ones((3, 4), np.float32), np.full((3, 4), 1.04, np.float32)
    canaries.compare("key", bad, "float32")
    (path,) = tmp_path.iterdir()
    written_s = path.stat().st_mtime - age_s

    if is_kept:
        with pytest.raises(SelfCheckFailed, match="moved"):
            canaries.compare("key", good, "float32", written_s)
    else:
        canaries.compare("key", good, "float32", written_s)

    kept = canaries.known("key")
    assert kept is not None
    assert np.array_equal(kept, bad if is_kept else good)


@pytest.mark.parametrize("content", [b"[[1.0, ", b"{}", b"[{}]", b"[\xff]", b"[" * 100_000])
def test_an_unreadable_canary_is_replaced(tmp_path: Path, content: bytes) -> None:
    canaries = Canaries(tmp_path)
    vectors = np.ones((3, 4), dtype=np.float32)
    canaries.compare("key", vectors, "float32")
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(content)

    canaries.compare("key", vectors, "float32")

    assert json.loads(kept.read_text()) == vectors.tolist()


def test_a_model_serves_where_its_canary_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    Canaries(tmp_path / "file").compare("key", np.ones((3, 4), dtype=np.float32), "float32")


def _left(engine: EmbeddingEngine) -> list[str]:
    """Returns the paths that were not taken because they are wrong."""
    return [note.split("the ")[1].split(" path")[0] for note in engine.info.notes]


# The probes, the measure, and encoders that are scripted.


class Scripted:
    """An encoder whose paths give what they are told to."""

    def __init__(self, expected: Tensor, **paths: Tensor | Exception) -> None:
        self.dimensions = 2
        self.path: Way = "padded"
        self.window: int | None = None
        self.notes: tuple[str, ...] = ()
        self.num_references = 0
        self.sizes: tuple[Size, ...] = ()
        self._expected = expected
        self._paths = paths

    def encode(self, texts: Sequence[Ids]) -> Tensor:
        found = self._paths[self.path]
        if isinstance(found, Exception):
            raise found
        return found[: len(texts)]

    def reference(self, texts: Sequence[Ids]) -> Tensor:
        self.num_references += 1
        if isinstance(self._expected, Exception):
            raise self._expected
        return self._expected

    @property
    def attention(self) -> Attention:
        return attention_of(self.path)

    def candidate_paths(self) -> tuple[Way, ...]:
        return tuple(self._paths)  # type: ignore[arg-type]  # named as the paths are

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        yield PathForm(range(len(texts)), self.encode(texts))
        yield PathForm([0], self.encode(texts[:1]))
        for size in self.sizes:
            rows = fill_row(size, texts)
            vectors = self.encode_fixed([texts[row] for row in rows], size)
            yield PathForm(rows, vectors, f", in a row of {size.tokens} tokens,")

    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        return self.encode(texts)

    def switch_to(self, path: Way) -> None:
        self.path = path


GOOD = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
MEMORY = torch.OutOfMemoryError("no memory")


def _tokenizer(kit: Kit) -> Tokenizer:
    engine: EmbeddingEngine = kit.engine("bert-cls")
    return engine._tokenizer


@pytest.mark.parametrize(
    ("packed", "attention"),
    [
        (GOOD, "packed"),
        (GOOD + 1e-6, "packed"),
        (GOOD + torch.tensor([[0.0], [1e-4], [0.0], [0.0]]), "padded"),
        (GOOD * 1.01, "padded"),
        (-GOOD, "padded"),
        (GOOD.flip(0), "padded"),
        (GOOD * float("nan"), "padded"),
        (ValueError(), "padded"),
    ],
)
def test_the_fastest_path_that_is_right_is_taken(kit: Kit, packed: Tensor | Exception, attention: str) -> None:
    encoder = Scripted(GOOD, packed=packed, padded=GOOD)
    vectors, notes = select_forward_path(encoder, _tokenizer(kit), "float32")

    assert encoder.attention == attention
    assert (len(notes) == 0) == (attention == "packed")
    assert np.abs(vectors - GOOD.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "factor", "is_fine"), [("float32", 1.01, False), ("bfloat16", 1.01, True), ("bfloat16", 1.1, False)]
)
def test_tolerance_depends_on_the_dtype(kit: Kit, dtype: str, factor: float, is_fine: bool) -> None:
    encoder = Scripted(GOOD, packed=GOOD * factor, padded=GOOD)
    select_forward_path(encoder, _tokenizer(kit), dtype)

    assert (encoder.attention == "packed") == is_fine


@pytest.mark.parametrize(
    ("known", "packed", "attention", "num_references"),
    [
        (GOOD, GOOD, "packed", 0),
        (GOOD, GOOD * 1.01, "padded", 0),
        (GOOD, ValueError(), "padded", 0),
        (GOOD * 1.01, GOOD, "packed", 1),
        (GOOD * float("nan"), GOOD, "packed", 1),
        (GOOD[:2], GOOD, "packed", 1),
        (None, GOOD, "packed", 1),
    ],
    ids=["the canary", "padded gives it", "packed fails", "another canary", "no numbers", "of another shape", "none"],
)
def test_a_path_that_gives_the_canary_again_needs_no_reference(
    kit: Kit, known: Tensor | None, packed: Tensor | Exception, attention: str, num_references: int
) -> None:
    encoder = Scripted(GOOD, packed=packed, padded=GOOD)
    vectors, _ = select_forward_path(encoder, _tokenizer(kit), "float32", None if known is None else known.numpy())

    assert (encoder.attention, encoder.num_references) == (attention, num_references)
    assert np.abs(vectors - GOOD.numpy()).max() < 1e-5


@pytest.mark.parametrize("encoder", [Scripted(MEMORY, padded=GOOD), Scripted(GOOD, packed=MEMORY, padded=GOOD)])  # type: ignore[arg-type]  # raised
def test_a_device_without_memory_is_no_reason_to_fall_back(kit: Kit, encoder: Scripted) -> None:
    with pytest.raises(OutOfMemory):
        select_forward_path(encoder, _tokenizer(kit), "float32")


LOSS = torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("encoder", [Scripted(LOSS, padded=GOOD), Scripted(GOOD, packed=LOSS, padded=GOOD)])  # type: ignore[arg-type]  # raised
def test_a_device_that_has_failed_says_nothing_about_the_model(kit: Kit, encoder: Scripted) -> None:
    with pytest.raises(torch.AcceleratorError):
        select_forward_path(encoder, _tokenizer(kit), "float32")


def test_a_forward_pass_that_fails_is_refused_without_telling_paths(kit: Kit) -> None:
    encoder = Scripted(KeyError("/home/secret"), padded=GOOD)  # type: ignore[arg-type]  # raised

    with pytest.raises(SelfCheckFailed, match=r"fails on plain text \(KeyError in the forward pass\)"):
        select_forward_path(encoder, _tokenizer(kit), "float32")


def test_vectors_of_another_width_than_promised_are_refused(kit: Kit) -> None:
    encoder = Scripted(torch.ones(4, 5), padded=GOOD)

    with pytest.raises(SelfCheckFailed, match=r"5 wide, but config\.json says 2"):
        select_forward_path(encoder, _tokenizer(kit), "float32")


def test_probes_have_two_lengths_and_two_of_one(kit: Kit) -> None:
    one, again, two, long = probe_inputs(_tokenizer(kit))

    assert len(one) == len(two) < len(long)
    assert one.tolist() == again.tolist() != two.tolist()
    assert (one[0], one[-1]) == (two[0], two[-1])


@pytest.mark.parametrize(
    ("window", "length"), [(None, None), (8, 24), (100, 116), (128, 144), (129, None), (4096, None)]
)
def test_the_longest_probe_reaches_beyond_a_window_that_is_not_too_large(
    kit: Kit, window: int | None, length: int | None
) -> None:
    tokenizer = _tokenizer(kit)

    assert len(probe_inputs(tokenizer, window)[-1]) == (length or len(probe_inputs(tokenizer)[-1]))


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (Size(4, 9), [1, 2]),
        (Size(7, 9), [2, 3]),
        (Size(9, 9), [1, 2, 3]),
        (Size(11, 9), [0, 1, 2, 3]),
        (Size(22, 9), [0, 0, 1, 1, 2, 2, 3, 3]),
        (Size(24, 9), [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (Size(1000, 9), [0, 0, 1, 1, 2, 2, 3, 3, 3]),
    ],
)
def test_a_row_of_a_fixed_size_is_checked_with_as_many_probes_as_it_takes(size: Size, rows: list[int]) -> None:
    probes = [np.arange(length) for length in (2, 2, 2, 5)]

    assert fill_row(size, probes) == rows


def test_each_size_must_be_right(kit: Kit) -> None:
    encoder = Sized(GOOD, graphed=GOOD, packed=GOOD)
    encoder.sizes = (Size(64, 32), Size(128, 64))
    vectors, notes = select_forward_path(encoder, _tokenizer(kit), "float32")
    assert (encoder.path, notes) == ("graphed", ())
    assert np.abs(vectors - GOOD.numpy()).max() == 0
    encoder.wrong = encoder.sizes[1]

    _, (note,) = select_forward_path(encoder, _tokenizer(kit), "float32")

    assert encoder.path == "packed"
    assert note.startswith("packed: the graphed path, in a row of 128 tokens, is")


def test_a_path_that_cannot_be_taken_up_is_left(kit: Kit) -> None:
    encoder = Sized(GOOD, graphed=GOOD, packed=GOOD)
    encoder.refused = "graphed"

    assert select_forward_path(encoder, _tokenizer(kit), "float32")[1] == ("packed: ValueError in the forward pass",)


class Sized(Scripted):
    """An encoder that has rows of fixed sizes on its graphed path, of which one may be wrong."""

    wrong: Size | None = None
    refused: Way | None = None

    def switch_to(self, path: Way) -> None:
        super().switch_to(path)
        if path == self.refused:
            raise ValueError
        if path != "graphed":
            self.sizes = ()

    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """Encode by length: short texts in the first rows, long ones in the last."""
        longest = max(len(ids) for ids in texts)
        lines = [GOOD[3] if len(ids) == longest else self._line_of(ids, texts) for ids in texts]
        return torch.stack(lines) * (1.01 if size == self.wrong else 1.0)

    def _line_of(self, ids: Ids, texts: Sequence[Ids]) -> Tensor:
        return GOOD[0] if np.array_equal(ids, texts[0]) else GOOD[2]


def test_probes_stay_inside_a_short_model(kit: Kit) -> None:
    assert max(len(ids) for ids in probe_inputs(_tokenizer(kit).limited_to(5), 100)) == 5


@pytest.mark.parametrize(
    ("other", "expected"),
    [(GOOD, 0.0), (-GOOD, 2.0), (GOOD * 2, 0.2), (torch.zeros(4, 2), 1.0)],
)
def test_the_distance_sees_direction_and_length(other: Tensor, expected: float) -> None:
    assert distance(GOOD, other) == pytest.approx(expected)


def test_two_zero_vectors_are_the_same() -> None:
    assert distance(torch.zeros(1, 2), torch.zeros(1, 2)) == 0.0


def test_the_distance_of_vectors_of_one_length_is_one_minus_the_cosine() -> None:
    a, b = (
        torch.nn.functional.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(s)), dim=1)
        for s in (1, 2)
    )

    assert distance(a, b) == pytest.approx(1 - float(torch.cosine_similarity(a, b)), abs=1e-6)


def _with_weights(kit: Kit, tmp_path: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a small BERT with one matrix changed."""
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "changed", dirs_exist_ok=True))
    weights = load_file(folder / "model.safetensors")
    change(weights["encoder.layer.0.output.dense.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
