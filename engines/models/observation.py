"""Observes one pass of a few tokens through a loaded model, independently of the names of its parts.

The pass shows how wide the hidden states are, how many positions the tables have, and which tokens attend to each other
in every layer.

The masks that a model makes in its own forward pass show which tokens its layers attend to, up to any length:
transformers makes them from a function of two positions. Packed attention has no masks; it knows only what a layer's
call states (causal or not, a window). Where both agree for every pair of positions that the model can read, packing
hides the right tokens beyond the few dozen that `engines/models/verification.py` compares; where they do not, or where
that cannot be found out, texts are padded.
"""

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import structlog
import torch
from msgspec import Struct, structs
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from engines.device.torch_runtime import reserve_for_onnxruntime
from engines.layers.attention import PACKED, resolve_causal
from engines.models.adapters import layers_of, switch_attention

log = structlog.get_logger(__name__)

OBSERVED = "embedyard_observed"

_NUM_TOKENS = 5
_ROWS = 16
_PATTERN = "embedyard_pattern"
_MAX_POSITIONS = 1 << 17

_WINDOWS = re.compile(r"^(?!max_|num_).*(window|local_attention|chunk_size|block_size)(?!.*(layer|pattern|type))")
"""Config keys whose number may be the window of a layer: neither `max_window_layers` nor `sliding_window_pattern`."""

NOT_UNDERSTOOD = "padded: its masks (windows, chunks or direction) hide tokens that packed attention would not hide"

BOUNDED_ROWS = "padded: it limits the tokens of a row, even when they belong to several texts"

Pattern = Callable[[int, int], Tensor]
"""(position of a query, number of keys) → the keys that it attends to, bool `[keys]`."""


class Call(NamedTuple):
    """One attention call of a layer, and its mask.

    Args:
        causal: as the call states.
        window: as the call states.
        own: the mask where the model made one itself, bool `[queries, keys]`.
        pattern: the mask where transformers made one. Both are None without any mask.
    """

    causal: bool
    window: int | None
    own: Tensor | None
    pattern: Pattern | None


class Observed(Struct, frozen=True):
    """The result of an observed pass.

    Args:
        width: of the hidden states, None where the pass failed.
        position_limit: the number of tokens that the smallest table of positions has rows for, None without a table.
        calls: the attention calls, None where they cannot be observed.
        windows: numbers of the config that may be windows.
        has_bounded_rows: whether the model refuses rows of more tokens than a text may have, whatever their positions.
    """

    width: int | None = None
    position_limit: int | None = None
    calls: tuple[Call, ...] | None = None
    windows: tuple[int, ...] = ()
    has_bounded_rows: bool = False

    def why_not_packed(self, max_tokens: int) -> tuple[str, ...]:
        """Returns the reasons against packing texts of up to `max_tokens`; none where nothing was found."""
        if self.has_bounded_rows:
            return (BOUNDED_ROWS,)
        has_windows = any(window < max_tokens for window in self.windows)
        if self.calls is None:
            return (NOT_UNDERSTOOD,) if has_windows else ()
        num_tokens = min(max_tokens, _MAX_POSITIONS)
        different = {(call.causal, call.window, call.pattern or index): call for index, call in enumerate(self.calls)}
        fits = all(_hides_the_same(call, num_tokens, has_windows=has_windows) for call in different.values())
        return () if fits else (NOT_UNDERSTOOD,)


class KnownObservation(Struct, frozen=True):
    """What an earlier pass of the same model showed, without the calls themselves.

    Args:
        width, position_limit, windows, has_bounded_rows: see `Observed`.
        reasons: what `Observed.why_not_packed` returned, by the number of tokens that it was asked for, as a text.
    """

    width: int | None
    position_limit: int | None
    windows: tuple[int, ...]
    has_bounded_rows: bool
    reasons: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, observed: Observed, reasons: dict[str, tuple[str, ...]]) -> "KnownObservation":
        """Returns what is kept of a pass."""
        return cls(observed.width, observed.position_limit, observed.windows, observed.has_bounded_rows, reasons)

    def observed(self) -> Observed:
        """Returns the observation, which knows no calls: ask `reasons` what is to be packed."""
        return Observed(self.width, self.position_limit, None, self.windows, self.has_bounded_rows)


@torch.inference_mode()
def observe(model: Any, vocab_size: int, device: torch.device) -> Observed:
    """Runs a row of one token repeated a few times through the model and returns what it shows.

    It uses one core: starting threads for so little work takes 150 ms beside busy threads, instead of 6 ms.

    Raises:
        OutOfMemoryError: torch's.
    """
    with reserve_for_onnxruntime():
        return _observe(model, vocab_size, device)


def _observe(model: Any, vocab_size: int, device: torch.device) -> Observed:
    windows = tuple(_stated_windows(model.config.get_text_config().to_dict()))
    ids = torch.full((1, _NUM_TOKENS), _plain_token(model, vocab_size), device=device)
    own = model.config._attn_implementation
    if model._can_set_attn_implementation():
        switch_attention(model, OBSERVED)
        try:
            seen = _run_pass(model, ids, windows)
            return structs.replace(seen, has_bounded_rows=_has_bounded_rows(model, ids, seen.position_limit))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  # architectures fail in their own ways: observe less then
            log.info("model.attention_not_observed", reason=type(error).__name__)
        finally:
            switch_attention(model, own)
    try:
        return _run_pass(model, ids, windows, with_calls=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # the self-check reports what is wrong with such a model
        log.info("model.not_observed", reason=type(error).__name__)
        return Observed(windows=windows)


def _run_pass(model: Any, ids: Tensor, windows: tuple[int, ...], *, with_calls: bool = True) -> Observed:
    tables = _PositionTables()
    with _OBSERVED_CALLS.collecting() as calls, tables:
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return Observed(
        width=int(hidden.shape[-1]),
        position_limit=min(tables.limits, default=None),
        calls=tuple(calls) if with_calls else None,
        windows=windows,
    )


class _FirstLayerReached(Exception):
    """Ends a pass at its first layer."""


def _has_bounded_rows(model: Any, ids: Tensor, limit: int | None) -> bool:
    """Whether the model limits the tokens of a row, whatever their positions, as CLIP's text model does.

    Only the part before the layers runs.
    """
    layers = layers_of(model)
    if limit is None or not layers or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    row = ids[:, :1].expand(1, limit + 1)
    switch_attention(model, PACKED)  # makes no mask

    def stop(*_: Any) -> None:
        raise _FirstLayerReached

    hook = layers[0].register_forward_pre_hook(stop)
    try:
        model(input_ids=row, attention_mask=None, position_ids=torch.zeros_like(row))
    except _FirstLayerReached:
        return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  # each family raises its own error
        return True
    finally:
        hook.remove()
    return False


def _plain_token(model: Any, vocab_size: int) -> int:
    """Returns a token that is not the padding token, to which some models give no position."""
    token = vocab_size // 2
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return token + 1 if token == padding and token + 1 < vocab_size else token


def _stated_windows(config: dict[str, Any]) -> Iterator[int]:
    """Yields the numbers of a config that may be windows."""
    for key, value in config.items():
        if _WINDOWS.search(key):
            numbers = value if isinstance(value, list) else [value]
            yield from (number for number in numbers if type(number) is int and number > 0)


class _PositionTables(TorchFunctionMode):
    """Finds tables of positions: those that are indexed with as many consecutive rows as there are tokens.

    Attributes:
        limits: the number of tokens that each has rows for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is embedding:
            self._check(args[1].shape[0], args[0])
        elif func is torch.gather and len(args) > 2 and args[1] == 1 and args[2].ndim == 3:
            self._check(args[0].shape[1], args[2][..., 0])
        elif func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            self._check_indices(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        return func(*args, **(kwargs or {}))

    def _check_indices(self, table: Tensor, index: tuple[Any, ...]) -> None:
        if isinstance(index[0], Tensor):
            self._check(table.shape[0], index[0])
        for size, part in zip(table.shape, index, strict=False):
            if not isinstance(part, slice):
                return
            start, stop = part.start or 0, part.stop
            if isinstance(stop, int) and stop - start == _NUM_TOKENS < size:
                self.limits.append(size - start)

    def _check(self, num_rows: int, ids: Tensor) -> None:
        if ids.numel() != _NUM_TOKENS or ids.is_floating_point():
            return
        first, *others = ids.flatten().tolist()
        if others == list(range(first + 1, first + _NUM_TOKENS)):
            self.limits.append(num_rows - first)


class _ObservedCalls(threading.local):
    """The attention calls of the pass that is observed on this thread, for functions that transformers calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @contextmanager
    def collecting(self) -> Iterator[list[Call]]:
        """Collects the calls of the pass inside the block."""
        self.calls = []
        try:
            yield self.calls
        finally:
            self.calls = []


_OBSERVED_CALLS = _ObservedCalls()


def _observed_mask(**options: Any) -> Tensor:
    """Makes transformers' own mask, and attaches the function that computes its rows."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**options)
    assert mask is not None, "no skip is allowed"
    mask_options = {name: options[name] for name in ("mask_function", "use_vmap", "device") if name in options}

    def pattern(query: int, num_keys: int) -> Tensor:
        row = sdpa_mask(
            batch_size=1, q_length=1, kv_length=num_keys, q_offset=query, allow_is_causal_skip=False, **mask_options
        )
        assert row is not None, "no skip is allowed"
        return row.reshape(num_keys)

    setattr(mask, _PATTERN, pattern)
    return mask


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Records the call and returns zeros: only shapes matter here."""
    causal = resolve_causal(module, options.get("is_causal"))
    pattern = getattr(attention_mask, _PATTERN, None)
    own = None if attention_mask is None or pattern is not None else _visible(attention_mask)
    _OBSERVED_CALLS.calls.append(Call(causal, options.get("sliding_window"), own, pattern))
    batch, heads, length, _ = query.shape
    return query.new_zeros(batch, length, heads, value.shape[-1]), None


def _visible(mask: Tensor) -> Tensor:
    """Converts a mask of any kind to bool `[queries, keys]`."""
    mask = mask.reshape(-1, *mask.shape[-2:])[0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float16).min / 2


def _hides_the_same(call: Call, num_tokens: int, *, has_windows: bool) -> bool:
    """Whether packed attention, as this call states it, hides the tokens that the mask hides."""
    if call.pattern is not None:
        try:
            return all(_same_row(call, call.pattern, row, num_tokens) for row in _sampled_rows(num_tokens))
        except Exception as error:  # noqa: BLE001  # a mask that depends on more than two positions
            log.info("model.mask_not_understood", reason=type(error).__name__)
            return False
    if call.own is None:
        return call.window is None or call.window >= num_tokens
    rows = range(len(call.own))
    is_same = all(
        torch.equal(call.own[row], _packed_mask(call, row, call.own.shape[-1], call.own.device)) for row in rows
    )
    return is_same and not has_windows


def _sampled_rows(num_tokens: int) -> list[int]:
    """Returns the queries whose keys are compared: the first, the last, and some between."""
    return sorted({round(index * (num_tokens - 1) / (_ROWS - 1)) for index in range(_ROWS)})


def _same_row(call: Call, pattern: Pattern, row: int, num_tokens: int) -> bool:
    found = pattern(row, num_tokens)
    return torch.equal(found, _packed_mask(call, row, num_tokens, found.device))


def _packed_mask(call: Call, row: int, num_keys: int, device: torch.device) -> Tensor:
    """Returns the keys that a query attends to in packed attention (`engines/layers/attention.py`), bool `[keys]`."""
    distance = row - torch.arange(num_keys, device=device)
    window = num_keys if call.window is None else call.window
    visible = distance.abs() < window
    return visible & (distance >= 0) if call.causal else visible


AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, _observed_mask)
