"""Runs a model on every path that it has on the fake GPU, and keeps what was found; and what is meant to be found."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES
from engines.batching.engine import EmbeddingEngine
from engines.inputs.token_ids import TYPE_SHIFT
from engines.inputs.tokenizer import Ids
from engines.models.base import Encoder, ForwardPath, attention_of
from engines.models.transformer import TransformerEncoder
from engines.types import ModelInfo
from tests.testkit.fake_gpu import Finding, Kind, twin
from tests.testkit.fake_gpu_kit import FakeGpuKit

VARIANTS = {
    "bert-bare-folder", "bert-lower-case", "bert-default-width",
    "bert-cls-mean", "bert-max", "bert-mean-normalize-legacy", "bert-mean-sqrt", "bert-three-legacy", "bert-weighted",
    "bert-dense-identity",
}  # fmt: skip
"""Recipes that run no operation on a GPU that another one does not: they differ from it in their files or tokenizer,
or their pooling is one of those of `bert-instructor` and `qwen2-last`, their Dense as in `bert-dense-residual` and
`t5-mean-dense`. On the CPU all of them run."""

NAMES = sorted(RECIPES.keys() - VARIANTS)

LENGTHS = (8, 9, 9, 40)
"""Tokens of the texts: the first alone fits a recorded row, all together do not; the first three share a batch."""


class Intended(NamedTuple):
    """Findings that are right as they are.

    Attributes:
        place: pattern of `Finding.place` (`fnmatch`).
        on: the attention of the paths on which they are.
    """

    kind: Kind
    place: str
    reason: str
    on: tuple[str, ...] = ("packed", "padded", "unpadded")

    def covers(self, finding: Finding, attention: str) -> bool:
        return finding.kind == self.kind and attention in self.on and fnmatch(finding.place, self.place)


_PADDED = ("padded", "unpadded")

INTENDED = (
    Intended("float32", "engines/models/head.py:EmbeddingHead.run", "the head is float32, and so are vectors"),
    Intended("float32", "engines/layers/pooling.py:*", "sums over a text's tokens: bfloat16 has 8 bits"),
    Intended("float32", "engines/loading/modules.py:*", "modules after pooling run on one row a text, in float32"),
    Intended("float32", "engines/models/cuda_graphs.py:_Graph.__call__", "vectors, copied from where graphs put them"),
    Intended("float32", "transformers/models/*RMSNorm.*", "the mean square of a norm; transformers computes it so"),
    Intended("float32", "transformers/models/t5/*:T5LayerNorm.forward", "the same, under T5's name"),
    Intended("float32", "transformers/models/*RotaryEmbedding.forward", "angles: bfloat16 has no exact position > 256"),
    Intended("float32", "transformers/models/modernbert/*:apply_rotary_pos_emb", "ModernBERT rotates in float32"),
    Intended("float32", "transformers/models/modernbert/*:rotate_half", "as above"),
    Intended("float32", "transformers/models/*relative_position_bucket", "logarithms of distances, for a table"),
    Intended("float32", "transformers/models/deberta_v2/*:make_log_bucket_position", "as above"),
    Intended("float32", "transformers/models/*:eager_attention_forward", "softmax, where SDPA cannot be used", _PADDED),
    Intended("float32", "transformers/models/jamba/*:JambaMambaMixer.*", "a state summed over a whole text", _PADDED),
    Intended("float32", "transformers/models/jamba/*:mamba_selective_scan", "as above", _PADDED),
    Intended("float32", "transformers/models/jamba/*:JambaTopKRouter.*", "softmax over a few experts", _PADDED),
    Intended(
        "sync", "transformers/masking_utils.py:_ignore_*_mask_sdpa", "transformers runs without a mask if all is text",
        _PADDED,
    ),
    Intended(
        "sync", "transformers/masking_utils.py:create_recurrent_attention_mask", "the same for Jamba's state", _PADDED,
    ),
    Intended(
        "sync", "transformers/masking_utils.py:or_masks.<locals>.or_mask", "masks of Gemma 3 start on the host", _PADDED
    ),
    Intended(
        "sync", "transformers/models/deberta_v2/*:make_log_bucket_position", "DeBERTa makes a constant on the host",
        _PADDED,
    ),
)  # fmt: skip
"""What passes of the parity table's families are found to do, and why it stays. Packed paths never wait."""


def unintended(findings: Iterable[Finding], attention: str, intended: Iterable[Intended] = INTENDED) -> list[Finding]:
    """Returns the findings on a path with this attention that nothing of what is intended covers, each once."""
    items = tuple(intended)
    return [finding for finding in sorted(set(findings)) if not any(item.covers(finding, attention) for item in items)]


class OnePath(Struct, frozen=True):
    """What a path gave: float32 vectors `[n, D]` by what was run; or why it cannot run."""

    findings: tuple[Finding, ...] = ()
    vectors: dict[str, NDArray[np.float32]] = {}
    refused: str = ""


class Family(Struct, frozen=True):
    """A recipe's model on the fake GPU.

    Attributes:
        info: once it is loaded and checked; `paths` have run since.
        loaded: what was found while it was loaded and checked.
        texts: what ran, sorted by length.
        paths: by path; none for a model without a transformer.
    """

    engine: EmbeddingEngine
    info: ModelInfo
    loaded: tuple[Finding, ...]
    texts: tuple[Ids, ...]
    paths: dict[ForwardPath, OnePath]


class Families:
    """Recipes on the fake GPU, each run when it is first asked for.

    Attributes:
        skipped: paths that are not run.
    """

    skipped: tuple[ForwardPath, ...] = ()

    def __init__(self, fake: FakeGpuKit, kit: Kit) -> None:
        self._fake, self._kit = fake, kit
        self._known: dict[str, Family] = {}

    def __getitem__(self, name: str) -> Family:
        if name not in self._known:
            self._known[name] = self._run(name)
        return self._known[name]

    def source(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Returns the folder of a model, and the registry's fields for it."""
        return self._kit.recipe_folder(name), RECIPES[name].spec

    def on_cpu(self, name: str) -> EmbeddingEngine:
        """Returns the model on the CPU, in float32."""
        return self._kit.engine(name)

    def _run(self, name: str) -> Family:
        self._fake.gpu.take()
        folder, spec = self.source(name)
        engine = self._fake.load(folder, **spec)
        loaded, encoder, info = tuple(self._fake.gpu.take()), encoder_of(engine), engine.info
        texts = texts_for(encoder)
        if isinstance(encoder, TransformerEncoder):
            paths = {
                path: self._on(encoder, path, texts) for path in encoder.candidate_paths() if path not in self.skipped
            }
        else:
            paths = {encoder.path: self._passes(encoder, texts, is_half=False)}
        return Family(engine, info, loaded, texts, paths)

    def _on(self, encoder: TransformerEncoder, path: ForwardPath, texts: tuple[Ids, ...]) -> OnePath:
        try:
            self._fake.call(lambda: encoder.switch_to(path))
            if path == "packed":  # the plainest that can fail
                self._fake.call(lambda: encoder.encode_single(texts[0]))
        except NotImplementedError as error:
            return OnePath(refused=str(error))
        return self._passes(encoder, texts)

    def _passes(self, encoder: Encoder, texts: tuple[Ids, ...], *, is_half: bool = True) -> OnePath:
        run = self._fake.passes if is_half else self._fake.call
        runs = _runs(encoder, texts)
        if encoder.path != "graphed":  # to the others a text alone is nothing special
            del runs["alone"]
        vectors = {what: twin(run(each)).numpy() for what, each in runs.items()}
        return OnePath(tuple(self._fake.gpu.take()), vectors)

    def expected(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Returns what `OnePath.vectors` is on the CPU, in float32."""
        encoder = encoder_of(self.on_cpu(name))
        return {what: run().numpy() for what, run in _runs(encoder, self[name].texts).items()}

    def used(self) -> set[Intended]:
        """Returns the items of `INTENDED` that something of all families is covered by."""
        found = {
            (finding, attention_of(path))
            for name in NAMES
            for path, one in self[name].paths.items()
            for finding in one.findings
        }
        return {item for item in INTENDED if any(item.covers(*pair) for pair in found)}


def _runs(encoder: Encoder, texts: tuple[Ids, ...]) -> dict[str, Callable[[], Tensor]]:
    """Returns the passes that are run on a path."""
    runs: dict[str, Callable[[], Tensor]] = {
        "together": lambda: encoder(texts),
        "alone": lambda: encoder(texts[:1]),
    }
    if isinstance(encoder, TransformerEncoder) and getattr(encoder._chain, "excludes_prompt", False):
        runs["without prompts"] = lambda: encoder(texts, [2, 0, 3, 3])
    return runs


def encoder_of(engine: EmbeddingEngine) -> Encoder:
    """Returns what an engine runs."""
    assert engine._runner is not None, "the engine has not been closed"
    return engine._runner._encoder


def texts_for(encoder: Encoder) -> tuple[Ids, ...]:
    """Returns texts of random ids that the encoder knows, sorted by length; with types where it reads them."""
    size = encoder._model.config.get_text_config().vocab_size if isinstance(encoder, TransformerEncoder) else 100
    random = np.random.default_rng(len(LENGTHS))
    texts = [random.integers(5, size, length) for length in LENGTHS]
    if isinstance(encoder, TransformerEncoder) and encoder._has_types:
        for ids in texts:
            ids[len(ids) // 2 :] |= 1 << TYPE_SHIFT
    return tuple(texts)
