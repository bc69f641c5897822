"""Measures what a reduced dtype of a model costs and gains against float32 on this machine.

At the first load of a reduced dtype both forms are built, and calibration texts run through both. What was found is
kept, and refuses the model where it is not near enough; later loads read it and build one form.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import structlog
import torch
import transformers
from msgspec import structs

from engines.device.memory import device_memory
from engines.errors import OutOfMemory, UnsupportedModel, is_device_error
from engines.form_cache import FormCache
from engines.hub.content_digests import ContentDigests
from engines.hub.weight_files import count_weights, read_range
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.loading.builders import build
from engines.loading.calibration_texts import CALIBRATION_TEXTS
from engines.loading.folder import Folder, read_files
from engines.loading.form_keeping import FormLoad
from engines.loading.ingredients import list_weights, read_ingredients
from engines.loading.score_forms import score_form
from engines.models.base import EncoderConfig, ForwardPaths, LoadedEncoder, weight_bytes
from engines.models.prepacked import MAX_PREPACKED_BYTES
from engines.models.verification import select_forward_path
from engines.precision import REDUCED, PrecisionStore, compare, is_compared_at_load, why_refused
from engines.spec import ModelSpec, Precision
from engines.types import ModelFiles, format_bytes

log = structlog.get_logger(__name__)

_UNKNOWN = "\U00013000"
"""A hieroglyph: its tokens mark what a vocabulary cannot represent."""

_MAX_UNKNOWN_SHARE = 0.2

_FEWEST_TEXTS = 12

_TIMED_TOKENS = 512
_ROUNDS = 3


class MeasuredState(NamedTuple):
    """Where a command keeps the quantised form of weights, and the hashes of files."""

    kept: FormCache
    digests: ContentDigests


NO_STATE = MeasuredState(FormCache(None), ContentDigests(None))

Seconds = Callable[[], float]
"""Returns seconds of this thread's own work so far."""


def calibration_ids(tokenizer: Tokenizer, texts: Sequence[str] = CALIBRATION_TEXTS) -> list[Ids]:
    """Returns texts as ids, sorted by length, without those that the vocabulary cannot represent.

    Where hardly any is left, all are returned: they are compared as what the model reads of them.
    """
    unknown = set(map(int, tokenizer.encode_bare([_UNKNOWN])[0]))
    num_special = len(tokenizer.limits.prefix) + len(tokenizer.limits.suffix)
    read = [tokenizer.encode((text,), PromptTemplate(), "end").ids[0] for text in texts]
    rows = [ids for ids in read if len(ids) > num_special]
    known = [ids for ids in rows if np.isin(ids, list(unknown)).mean() <= _MAX_UNKNOWN_SHARE]
    return sorted(known if len(known) >= _FEWEST_TEXTS else rows, key=len)


def measure(
    full: LoadedEncoder, reduced: LoadedEncoder, dtype: str, texts: Sequence[Ids], seconds: Seconds
) -> Precision:
    """Compares two forms of a model. `reduced` runs by the path in use, which the self-check has chosen."""
    expected = full.paths.reference(texts).float().cpu().numpy()
    found = np.concatenate([reduced(part).float().cpu().numpy() for part in _parts(texts)])
    worst, median, recall = compare(found, expected)
    _take_fastest_path(full.paths, texts[:1])
    timed = _timed_row(texts)
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(1 + _ROUNDS):  # the first warms up
        for index, encoder in enumerate((full, reduced)):
            begun_s = seconds()
            encoder(timed)
            times[index].append(seconds() - begun_s)
    return Precision(
        dtype=dtype,
        worst_cosine=worst,
        median_cosine=median,
        recall_at_10=recall,
        speedup=min(times[0][1:]) / max(min(times[1][1:]), 1e-9),
        size_ratio=_held_bytes(reduced) / max(1, weight_bytes(full)),
        num_texts=len(texts),
    )


def _take_fastest_path(paths: ForwardPaths, texts: Sequence[Ids]) -> None:
    """Takes the fastest path that runs: what has no packed form, as soft-capped scores, shows only when it runs. Its
    vectors are not used, so that nothing checks them."""
    *fast, last = paths.candidate_paths()
    for path in fast:
        try:
            paths.switch_to(path)
            next(paths.forms(texts))
        except Exception as error:
            if is_device_error(error):
                raise
        else:
            return
    paths.switch_to(last)


def measure_dtype(
    spec: ModelSpec, files: ModelFiles, dtype: str, texts: Sequence[str] | None, state: MeasuredState = NO_STATE
) -> Precision:
    """Builds a model in float32 and in a reduced dtype on the CPU, and compares them; for commands without a server.

    Args:
        texts: to compare on; None for the built-in ones.
        state: keeps the form of its weights, so that the next load need not read float32 ones.

    Raises:
        BadModel: the model cannot be loaded, or has no reduced form that is measured, as static and scoring ones.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped upstream
    folder = read_files(files)
    config = EncoderConfig(num_threads=torch.get_num_threads(), max_prepacked_bytes=MAX_PREPACKED_BYTES)
    if score_form(folder, spec) is not None:
        raise UnsupportedModel(f"{spec.model_id} gives scores: precision is measured of models that embed")
    full, tokenizer, *_ = build(folder, structs.replace(spec, dtype="float32"), config)
    reduced_spec = msgspec.convert({**structs.asdict(spec), "dtype": dtype}, ModelSpec)
    read = partial(read_ingredients, folder, reduced_spec, list_weights(folder), state.digests)
    forms = FormLoad(state.kept, reduced_spec, files.revision, read)
    reduced, _, found, *_ = forms.build(partial(build, folder, reduced_spec, config))
    if found != dtype:
        raise UnsupportedModel(f"{spec.model_id} has no weights to reduce: it always runs in {found}")
    with forms.accepting(waits=True):
        select_forward_path(reduced.paths, tokenizer, dtype)
        ids = calibration_ids(tokenizer, CALIBRATION_TEXTS if texts is None else texts)
        measured = measure(full, reduced, dtype, ids, time.perf_counter)
    return measured if texts is None else structs.replace(measured, texts="own")


def _held_bytes(encoder: LoadedEncoder) -> int:
    return weight_bytes(encoder) + encoder.extra_bytes()


def _float32_bytes(folder: Folder) -> int:
    """Returns the bytes of the folder's weights in float32; also those that are built before they are rounded."""
    files = list(folder.weights.glob("*.safetensors")) or list(folder.weights.glob("pytorch_model*.bin"))
    sizes = {path.name: path.stat().st_size for path in files}
    return count_weights(sizes, list(sizes), partial(read_range, folder.weights)).bytes_in("float32")


def _parts(texts: Sequence[Ids]) -> list[Sequence[Ids]]:
    """Returns the texts in batches of about the usual size."""
    parts, start, tokens = [], 0, 0
    for index, ids in enumerate(texts):
        if tokens and tokens + len(ids) > _TIMED_TOKENS:
            parts.append(texts[start:index])
            start, tokens = index, 0
        tokens += len(ids)
    return [*parts, texts[start:]]


def _timed_row(texts: Sequence[Ids]) -> list[Ids]:
    """Returns texts of a full batch: the longest ones, again and again."""
    row: list[Ids] = []
    index = len(texts)
    while sum(map(len, row)) < _TIMED_TOKENS:
        index = index - 1 if index else len(texts) - 1
        row.append(texts[index])
    return sorted(row, key=len)


class PrecisionGate:
    """Admits one model in a reduced dtype, or refuses it.

    Args:
        store: what was measured before; None neither measures nor refuses.
        spec: the model.
        revision: of its files.
        device: where it runs.

    Attributes:
        known: what was measured before, if anything.
    """

    def __init__(self, store: PrecisionStore | None, spec: ModelSpec, revision: str, device: torch.device) -> None:
        self._store, self._spec, self._revision, self._device = store, spec, revision, device.type
        self._full: LoadedEncoder | None = None
        self.known: Precision | None = None
        if store is not None:
            store.refresh()
        if store is not None and spec.dtype in REDUCED:
            self.known = store.get(spec, revision, spec.dtype, device.type)

    def prepare(self, folder: Folder, config: EncoderConfig) -> None:
        """Builds the float32 form to measure with, where nothing is known and a bound is set; on the loading thread.

        Raises:
            UnsupportedModel: what is known is below the model's bound.
            OutOfMemory: there is no memory for both forms.
        """
        self._refuse_or_accept()
        if self._store is None or self.known is not None or not is_compared_at_load(self._spec):
            return
        needed_bytes = 2 * _float32_bytes(folder)
        ceiling_bytes = device_memory(self._device).read().ceiling_bytes
        if ceiling_bytes is not None and ceiling_bytes < needed_bytes:
            raise OutOfMemory(
                f"comparing {self._spec.dtype} with float32 at the first load needs {format_bytes(needed_bytes)}, but "
                f"{format_bytes(ceiling_bytes)} are free; free memory, or set `min_cosine: 0` in the registry to serve "
                "it without"
            )
        self._full, *_ = build(folder, structs.replace(self._spec, dtype="float32"), config)

    def check(self, encoder: LoadedEncoder, tokenizer: Tokenizer, dtype: str, seconds: Seconds) -> Precision | None:
        """Measures the model, if it was prepared; on a device thread, after the self-check. Frees the float32 form.

        Returns:
            What is known of the dtype.

        Raises:
            UnsupportedModel: it is below the model's bound.
        """
        full, self._full = self._full, None
        if self._store is None:
            return None
        if full is not None and dtype in REDUCED:
            self.known = measure(full, encoder, dtype, calibration_ids(tokenizer), seconds)
            self._store.put(self._spec, self._revision, self.known, self._device)
            log.info("model.precision", model=self._spec.model_id, **structs.asdict(self.known))
        self._refuse_or_accept()
        if dtype == "float32":
            for offer in self._store.offers(self._spec, self._revision, self._device):
                log.info("model.precision_offer", model=self._spec.model_id, offer=offer)
        return self.known

    def _refuse_or_accept(self) -> None:
        refusal = "" if self.known is None else why_refused(self.known, self._spec.min_cosine)
        if refusal:
            raise UnsupportedModel(refusal)
