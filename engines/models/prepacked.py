"""Runs short texts in ONNX Runtime, from second copies of the weights that are prepacked in the order of reading.

A product of few rows is bound by reading the weights. torch's library reorders (packs) them in every call; here that
happens once, when the model loads. Besides, all layers are one call, where torch, transformers and Python take
hundreds, and its threads share a product of a dozen rows well, which torch's do not. The copies cost memory: models
above `MAX_PREPACKED_BYTES` have none.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor, cat, float32, from_numpy, nn

from engines.device.torch_runtime import usable_threads
from engines.inputs.token_ids import ID_MASK, TYPE_SHIFT
from engines.layers import encoder_script
from engines.layers.fused import FusedLayer
from engines.layers.packed_linear import Int8Embedding
from engines.layers.packing import KernelVariant, PackedLayout, TokenChoice, attention_blocks
from engines.layers.products import rounded_rows
from engines.models.int8_encoder import ScriptedInt8Encoder
from engines.models.onnx_graph import SLOW_FUSIONS, Shape, Weights, encoder_graph

_MODELS = ({"embeddings", "encoder"}, {"embeddings", "transformer"})
"""The modules of a supported model, as named by BERT and by DistilBERT."""

_LIBRARY = "transformers.models."
"""The package of the library's own models; code that comes with a model may do more than its modules show."""

_TABLES = ("word_embeddings", "position_embeddings")
_TOKEN_TYPES, _NORM = "token_type_embeddings", "LayerNorm"

_EMBEDDINGS = (*_TABLES, _TOKEN_TYPES, _NORM)
"""The modules of supported embeddings; token types are optional."""


def _embedding_parts(model: nn.Module) -> dict[str, Any]:
    """Returns the modules of the model's embeddings, without dropout.

    Returns none where the embeddings are more than tables and the norm of their sum, or the model more than embeddings
    and layers.
    """
    parts = {name: part for name, part in model.named_children() if name != "pooler"}  # `drop_pooler` has replaced it
    if set(parts) not in _MODELS or not type(model).__module__.startswith(_LIBRARY):
        return {}
    stacks = [type(child) for name, part in parts.items() if name != "embeddings" for child in part.children()]
    active: dict[str, Any] = {
        name: part for name, part in parts["embeddings"].named_children() if not isinstance(part, nn.Dropout)
    }
    kinds: dict[str, type] = {name: nn.LayerNorm if name == _NORM else nn.Embedding for name in _EMBEDDINGS}
    if type(active.get(_TABLES[0])) is Int8Embedding:
        kinds[_TABLES[0]] = Int8Embedding
    are_known = all(type(part) is kinds.get(name) for name, part in active.items())
    are_all = {*_EMBEDDINGS} - {*active} <= {_TOKEN_TYPES}
    return active if are_known and are_all and stacks == [nn.ModuleList] else {}


MAX_PREPACKED_BYTES = 192 * 2**20
"""The most bytes of copies: enough for two copies of twelve layers 384 wide, not for one of twelve layers 768 wide."""

COPY_SHARE = 16
"""The copies may take one of this many parts of a device's budget: where memory is short, models come first."""

MAX_SHARED_THREADS = 4
"""The most threads that share a layer: a product of a dozen rows has no work for more."""

PART_TOKENS = 1
"""Tokens of the smallest part of a batch that is worth a thread of its own: any text is."""

_TOKEN_LAYERS = 512
"""Tokens × layers of one call. A thread that returns to Python waits for the interpreter's lock, which the event loop
holds; but a pass can be preempted only between two calls."""

_MAX_TEXT_TOKENS = 256
"""Most tokens of a text: attention here runs on padded batches, and keeps the scores of all pairs."""

_MAX_PADDED_RATIO = 1.5
"""A padded batch may have this many times as many places as tokens."""

_SKIP_TOKENS = 128
"""Rows of fewer tokens run the last layer in full. Without the other tokens in it, MiniLM is 1.07 to 1.20 times as fast
with rows of 128 to 1,000 tokens (one core), and 0.90 times with 12, as torch is slower with a few rows."""

_SWITCH = np.array(False), np.array(True)

Inputs = dict[str, NDArray[Any]]
"""Inputs of a session, by name."""

onnxruntime.set_default_logger_severity(3)


def is_suitable(layout: PackedLayout) -> bool:
    """Whether the texts of a row are short and similar in length."""
    are_similar = layout.longest * len(layout.lengths) <= _MAX_PADDED_RATIO * layout.num_tokens
    return layout.longest <= _MAX_TEXT_TOKENS and are_similar


def layers_at_once(layout: PackedLayout) -> int:
    """Returns the number of layers that a call should run on a row."""
    return max(1, _TOKEN_LAYERS // layout.num_tokens)


def row_inputs(ids: Tensor, positions: Tensor, layout: PackedLayout, types: Tensor | None = None) -> Inputs:
    """Returns the inputs that all calls of a pass share, from ids, positions and token types `[T]` of a packed row."""
    spread, lengths, picked = layout.padded_places
    row = {"ids": ids.numpy(), "positions": positions.numpy()} | ({} if types is None else {"types": types.numpy()})
    return row | {"spread": spread, "lengths": lengths, "picked": picked}


class PrepackedEncoder:
    """Runs a post-norm encoder in ONNX Runtime.

    Args:
        tables: embeddings of words and positions, `[*, H]`.
        weights: float32 on the CPU, as `engines.models.onnx_graph.encoder_graph` names them; they must neither change
            nor be freed while the encoder lives.
        num_threads: that run a call: the caller's thread, and threads of the session.

    Attributes:
        tables: views of the given tables, passed to each call: a session would copy them.
    """

    def __init__(
        self, tables: tuple[Tensor, Tensor], weights: Weights, shape: Shape, num_layers: int, num_threads: int
    ) -> None:
        self.num_threads = num_threads
        words, places = (table.detach().numpy() for table in tables)
        self.tables = {"words": words, "places": places}
        self._switches = [f"runs{index}" for index in range(num_layers)]
        self._nothing = np.empty((0, shape.heads * shape.width), np.float32)
        self._session = _session(weights, shape, num_layers, num_threads)

    def __call__(self, row: Inputs, hidden: NDArray[np.float32] | None, layers: range) -> NDArray[np.float32]:
        """Runs some layers of a row, from hidden states `[T, H]` (None: from its ids) to hidden states `[T, H]`."""
        switches = {name: _SWITCH[index in layers] for index, name in enumerate(self._switches)}
        so_far = {"x": self._nothing if hidden is None else hidden, "begins": _SWITCH[hidden is None]}
        found: NDArray[np.float32] = self._session.run(None, self.tables | row | switches | so_far)[0]
        return found


class ScriptedEncoder:
    """Runs a post-norm encoder whose products are packed, by TorchScript (`engines/layers/encoder_script.py`).

    Args:
        tables: embeddings of words and positions, scale and shift of the norm of their sum, and what is added to it.
        layers: the tensors of each.

    Attributes:
        longest: the most tokens of a text.
    """

    longest = _MAX_TEXT_TOKENS

    def __init__(self, tables: Sequence[Tensor], layers: Sequence[Sequence[Tensor]], shape: Shape) -> None:
        self._script: Any = encoder_script.compiled()
        self._tables = [table.detach() for table in tables]
        self._layers = [tensor.detach() for layer in layers for tensor in layer]
        self._shape, self._activation, self._eps = shape, shape.activation.lower(), list(shape.eps)
        self._is_rounded = self._tables[0].dtype is not float32  # its kernels are made for each shape

    def blocks(self, layout: PackedLayout) -> tuple[list[list[int]], list[Tensor]]:
        """Returns the blocks of a row's texts in which attention runs."""
        return attention_blocks(layout, self._shape.heads, is_rounded=self._is_rounded)

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Turns ids, positions and types `[T]` into states `[T, H]`."""
        found: Tensor = self._script.embed(ids, positions, types, self._tables, self._eps[0])
        return found

    def __call__(self, x: Tensor, blocks: tuple[list[list[int]], list[Tensor]], layers: range) -> Tensor:
        """Runs some layers, `[T, H]` to `[T, H]`, on as many cores as torch uses."""
        shape, (first, last) = self._shape, (layers.start, layers.stop)
        found: Tensor = self._script.run_layers(
            x, self._layers, *blocks, first, last, shape.heads, shape.width, self._activation, self._eps
        )
        return found


class PrepackedWeights:
    """Holds the prepacked copies of one model's weights, by kernel variant; or runs from the weights themselves, where
    these are packed already.

    Args:
        model: the transformer.
        layers: its fused layers; none where they could not be fused.
        has_types: whether ids carry token types; else all tokens have the first.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FusedLayer], *, has_types: bool = False) -> None:
        self._layers = layers
        self._has_types = has_types
        self._embeddings = _embedding_parts(model)
        self._encoders: dict[KernelVariant, PrepackedEncoder] = {}
        self._scripted: ScriptedEncoder | ScriptedInt8Encoder | None = None

    @property
    def can_run_packed(self) -> bool:
        """Whether the layers' own products are packed, and no copies are needed."""
        are_packed = bool(self._layers) and all(layer.script_weights for layer in self._layers)
        return (are_packed or self._is_int8) and bool(self._embeddings) and encoder_script.compiled() is not None

    @property
    def _is_int8(self) -> bool:
        """Whether all products, and the table of words, are int8."""
        words = self._embeddings.get(_TABLES[0])
        return isinstance(words, Int8Embedding) and all(layer.int8_products for layer in self._layers)

    def needs_onnxruntime(self, layout: PackedLayout) -> bool:
        """Whether a row runs from copies, in which torch's threads have no part."""
        return self._scripted is None and self.supports(layout, None)

    def size_bytes(self, largest: int, num_threads: int) -> int:
        """Returns the bytes of the copies for so many threads; 0 where there can be none or they exceed `largest`."""
        if not self._layers or not self._embeddings or not all(layer.can_be_prepacked for layer in self._layers):
            return 0
        size = sum(layer.product_bytes for layer in self._layers) * (2 if num_threads > 1 else 1)
        return size if size <= largest else 0

    def make(self, num_threads: int) -> None:
        """Makes the copies: one for passes on one thread, and one for passes that several share. With 0, frees them."""
        if self.can_run_packed:
            self._scripted = self._scripted_encoder() if num_threads else None
            return
        if num_threads and self._encoders:
            return
        variants: list[tuple[KernelVariant, int]] = [("prepacked", 1)] if num_threads else []
        if num_threads > 1:
            variants.append(("shared", min(num_threads, MAX_SHARED_THREADS)))
        self._encoders = {}
        if not variants:
            return
        with ThreadPoolExecutor(len(variants), thread_name_prefix="prepack") as threads:  # without the GIL, mostly
            made = [threads.submit(self._encoder, num) for _, num in variants]
        self._encoders = {variant: future.result() for (variant, _), future in zip(variants, made, strict=True)}

    def supports(self, layout: PackedLayout, variant: KernelVariant | None) -> bool:
        """Whether a row can run from copies in this variant; with None, whether it is faster in one of them."""
        if layout.num_visible is not None:
            return False
        if self._scripted is not None:
            return variant in ("prepacked", "shared") or (variant is None and layout.longest <= self._scripted.longest)
        return variant in self._encoders or (variant is None and bool(self._encoders) and is_suitable(layout))

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        variant: KernelVariant | None,
        pause: Callable[[], None],
        kept: TokenChoice = "all",
    ) -> Tensor:
        """Runs a packed row, ids (with their types) and positions `[T]`, to hidden states `[T, H]`; `[n, H]` of one
        token of each text where the last layer can leave out the others.

        Args:
            variant: None selects, for each call, the one for the cores that this thread may use by then.
            pause: called before each of the session's calls.
            kept: the tokens of each text whose hidden states are read.
        """
        ids, types = (ids & ID_MASK, ids >> TYPE_SHIFT) if self._has_types else (ids, None)
        is_short = self._is_shorter(layout, kept)
        parts = _parts(len(self._layers) - is_short, layers_at_once(layout))
        if self._scripted is not None:
            pause()
            ids, positions, types = (
                _padded_row(ids),
                _padded_row(positions),
                None if types is None else _padded_row(types),
            )
            blocks, whole = self._scripted.blocks(layout), self._scripted.embed(ids, positions, types)
            for number, layers in enumerate(parts):
                if number:
                    pause()
                whole = self._scripted(whole, blocks, layers)
            whole = whole[: layout.num_tokens]
        else:
            row, hidden = row_inputs(ids, positions, layout, types), None
            for layers in parts:
                pause()
                hidden = self._encoders[variant or self._fastest_variant()](row, hidden, layers)
            whole = from_numpy(hidden)
        return self._layers[-1].one_token(whole, layout, kept) if is_short else whole

    def _is_shorter(self, layout: PackedLayout, kept: TokenChoice) -> bool:
        """Whether the last layer runs for one token of each text, by torch: see `FusedLayer.one_token`."""
        return layout.num_tokens >= _SKIP_TOKENS and len(self._layers) > 1 and kept in self._layers[-1].skips

    def _fastest_variant(self) -> KernelVariant:
        shared = self._encoders.get("shared")
        return "shared" if shared is not None and shared.num_threads <= usable_threads() else "prepacked"

    def _encoder(self, num_threads: int) -> PrepackedEncoder:
        words, places = (self._embeddings[name].weight for name in _TABLES)
        return PrepackedEncoder((words, places), self._weights(), self._shape(), len(self._layers), num_threads)

    def _scripted_encoder(self) -> ScriptedEncoder | ScriptedInt8Encoder:
        norm, token_types = self._embeddings[_NORM], self._embeddings.get(_TOKEN_TYPES)
        tables = [*(self._embeddings[name].weight for name in _TABLES), norm.weight, norm.bias]
        if token_types is not None:
            tables.append(token_types.weight if self._has_types else token_types.weight[0])
        if self._is_int8:
            return ScriptedInt8Encoder(tables, self._embeddings[_TABLES[0]].scale, self._layers, self._shape())
        return ScriptedEncoder(tables, [layer.script_weights for layer in self._layers], self._shape())

    def _weights(self) -> dict[str, Tensor]:
        """Returns the weights under their names in `engines/models/onnx_graph.py`."""
        token_types, norm = self._embeddings.get(_TOKEN_TYPES), self._embeddings[_NORM]
        before: dict[str, Tensor] = {"g0": norm.weight, "e0": norm.bias}
        if token_types is not None and self._has_types:
            before["kinds"] = token_types.weight
        elif token_types is not None:
            before["kind"] = token_types.weight[0]
        parts = enumerate(layer.parts.items() for layer in self._layers)
        return before | {f"{name}{index}": weight for index, items in parts for name, weight in items}

    def _shape(self) -> Shape:
        first = self._layers[0]
        return Shape(first.heads, first.head_width, first.operator, (self._embeddings[_NORM].eps, *first.eps))


def _padded_row(row: Tensor) -> Tensor:
    """Repeats the first of ids, positions or types `[T]` behind them: see `rounded_rows`."""
    return cat([row, row[:1].expand(rounded_rows(len(row)) - len(row))])


def _parts(num_layers: int, at_once: int) -> list[range]:
    """Returns the layers of each call."""
    return [range(first, min(first + at_once, num_layers)) for first in range(0, num_layers, at_once)]


def _session(weights: Weights, shape: Shape, num_layers: int, num_threads: int) -> onnxruntime.InferenceSession:
    """Opens a session that reads the given weights without copying them, and makes its own prepacked copies of them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # other tasks need the cores between two calls
    options.enable_cpu_mem_arena = False  # it would keep the largest memory that each session has ever needed
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.detach().numpy()) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    graph = encoder_graph(weights, shape, num_layers).SerializeToString()
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(graph, options, providers, disabled_optimizers=[*SLOW_FUSIONS])
