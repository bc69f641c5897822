"""Checks every engine before it serves: its fast path must give what the plain forward pass gives.

A handful of fixed texts, the probes, runs twice: together (and one of them alone) through the path that will serve, and
by length through the reference attention. Beyond tolerance the engine falls back to padded batches; still beyond, it
refuses to serve. The first good vectors of a (revision, dtype, device kind) are kept as its canary, and every later
load must give them again: a broken file or library update is found before a client finds it. A load whose fast path
gives its canary again is as certain as the one that wrote it, and spares the reference, which takes most of the check's
time.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import EngineError, OutOfMemory, SelfCheckFailed, is_device_error, is_out_of_memory
from engines.inputs.pairs import PairTokenizer
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.models.base import ForwardPaths
from engines.storage import write_atomically
from engines.types import fingerprint

log = structlog.get_logger(__name__)

# Cosine distance that rounding may cause, by dtype of the weights. int8: two paths round bfloat16 inputs of products
# to other levels here and there, which moves MiniLM by 1.6e-3; each product itself is held to plain arithmetic
# (`engines/layers/product_check.py`).
TOLERANCE = {"float32": 1e-7, "bfloat16": 1e-3, "float16": 1e-3, "int8": 5e-3, "int4": 5e-3}

OutputKind = Literal["vectors", "scores"]

# The same for logits of scores: 1e-4 in float32, and 0.1 in 16 bits, of a logit of 1.
_SCORE_TOLERANCE = {"float32": 1e-8, "bfloat16": 1e-2, "float16": 1e-3}

# Rows of one text that is in a batch twice may differ this much (as `distance`): rounding, and no more.
_TWICE = {"float32": 1e-11, "bfloat16": 1e-5, "float16": 1e-5, "int8": 1e-5, "int4": 1e-5}

# Rows of one path before and after its weights were moved (as `distance`): the number of threads may differ.
WOKEN_TOLERANCE = {dtype: 10 * apart for dtype, apart in _TWICE.items()}

# Paths treat texts of one length and of two lengths differently; each further length would cost every load a pass.
_SHORT = "The yard keeps."
_LONG = "Über den Dächern, 两个人."

_BEYOND_WINDOW = 16
_LARGEST_PROBED_WINDOW = 128

# Canaries of other texts are other canaries.
_MARK = fingerprint([_SHORT, _LONG, _BEYOND_WINDOW, _LARGEST_PROBED_WINDOW])[:8]


class SideTokenizers(NamedTuple):
    """What reads the probes of a model that reads queries in a way of their own."""

    own: Tokenizer
    queries: Tokenizer

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens."""
        return self.own.max_tokens


ProbeTokenizer = Tokenizer | PairTokenizer | SideTokenizers
"""What reads the probes: a tokenizer of texts, two where queries are read otherwise, or one of pairs."""


def probe_inputs(tokenizer: ProbeTokenizer, window: int | None = None) -> list[Ids]:
    """Returns the probes as ids, sorted by length: a short text twice, its words backwards, and a longer one; or pairs.

    Args:
        window: of the model's sliding attention; where a short text can be longer than it, the longest probe is.
    """
    if isinstance(tokenizer, PairTokenizer):
        return _probe_pairs(tokenizer, window)
    if isinstance(tokenizer, SideTokenizers):
        short, long = tokenizer.queries.encode((_SHORT, _LONG), PromptTemplate(), "end").ids
        return sorted((*probe_inputs(tokenizer.own, window), short, short, long), key=len)
    short, long = tokenizer.encode((_SHORT, _LONG), PromptTemplate(), "end").ids
    first, behind = len(tokenizer.limits.prefix), len(short) - len(tokenizer.limits.suffix)
    backwards = np.concatenate([short[:first], short[first:behind][::-1], short[behind:]])
    wanted = min((window or 0) + _BEYOND_WINDOW, tokenizer.max_tokens)
    if window is not None and window <= _LARGEST_PROBED_WINDOW and len(long) < wanted:
        long = np.resize(long, wanted)
    return sorted((short, short, backwards, long), key=len)


def _probe_pairs(pairs: PairTokenizer, window: int | None) -> list[Ids]:
    """Returns a short pair twice, the same with its texts exchanged, and longer ones; lengths even and odd."""
    queries, texts = (_SHORT, _SHORT, _LONG, _SHORT), (_SHORT, _LONG, _SHORT, f"{_LONG} {_SHORT} a")
    short, *others, long = pairs.encode(queries, texts).ids
    wanted = min((window or 0) + _BEYOND_WINDOW, pairs.max_tokens)
    if window is not None and window <= _LARGEST_PROBED_WINDOW and len(long) < wanted:
        long = np.resize(long, wanted)
    return sorted((short, short, *others, long), key=len)


def select_forward_path(
    paths: ForwardPaths, tokenizer: ProbeTokenizer, dtype: str, known: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Selects the fastest path that is right, and leaves it in use.

    Args:
        known: the canary; a path that gives it again is right. Where none does, the reference decides, as without it.

    Returns:
        The probes' vectors `[n, D]` through that path, and what fell back and why.

    Raises:
        SelfCheckFailed: no path reproduces the reference, or the reference itself is no good.
        OutOfMemory: the device cannot run even these few texts.
    """
    kind = kind_of(tokenizer)
    try:
        probes = probe_inputs(tokenizer, paths.window)
        if known is not None and known.shape == (len(probes), paths.dimensions):
            with suppress(SelfCheckFailed):
                return _fastest(paths, probes, _Expected("its canary", torch.from_numpy(known), dtype, kind))
        return _fastest(paths, probes, _reference(paths, probes, dtype, kind))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("the device has no memory to run the first texts; other models or a batch fill it") from error


def check_forms(paths: ForwardPaths, tokenizer: ProbeTokenizer, dtype: str, vectors: NDArray[np.float32]) -> None:
    """Compares the path in use with the vectors of the check at load.

    Raises:
        SelfCheckFailed: it does not give them.
    """
    truth = _Expected("what the check at load found", torch.from_numpy(vectors), dtype, kind_of(tokenizer))
    _checked(paths, probe_inputs(tokenizer, paths.window), truth)


def confirm_canary(
    paths: ForwardPaths, tokenizer: ProbeTokenizer, dtype: str, known: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compares the fastest path, which is in use from then on, with the canary in the first of its forms.

    Returns:
        The probes' vectors `[n, D]`.

    Raises:
        SelfCheckFailed: it does not give the canary.
    """
    probes = probe_inputs(tokenizer, paths.window)
    if known.shape != (len(probes), paths.dimensions):
        raise SelfCheckFailed(f"its canary is {known.shape}, not {(len(probes), paths.dimensions)}")
    paths.switch_to(paths.candidate_paths()[0])
    truth = _Expected("its canary", torch.from_numpy(known), dtype, kind_of(tokenizer))
    return _checked(paths, probes, truth, num_forms=1)


class _Expected(NamedTuple):
    """What the probes' vectors must be, `[n, D]`, and where they are from."""

    source: str
    vectors: Tensor
    dtype: str
    kind: OutputKind = "vectors"


def _fastest(
    paths: ForwardPaths, probes: Sequence[Ids], truth: _Expected
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    *fast, last = paths.candidate_paths()
    notes = paths.notes
    for path in fast:
        try:
            paths.switch_to(path)
            return _checked(paths, probes, truth), notes
        except Exception as error:  # architectures fail in their own ways; each means: not this path
            if is_device_error(error):
                raise
            following = paths.candidate_paths()[paths.candidate_paths().index(path) + 1]
            notes = (*notes, f"{following}: {_reason(error)}")
            log.warning("model.path_not_taken", path=path, reason=str(error))
    paths.switch_to(last)
    return _checked(paths, probes, truth), notes


def _reference(paths: ForwardPaths, probes: Sequence[Ids], dtype: str, kind: OutputKind) -> _Expected:
    try:
        expected = paths.reference(probes)
    except Exception as error:
        if is_device_error(error):
            raise
        raise SelfCheckFailed(
            f"the model's forward pass fails on plain text ({_reason(error)}); config.json may describe a model that "
            "is not for text, or that the installed transformers does not run"
        ) from error
    if not bool(torch.isfinite(expected).all()):
        raise SelfCheckFailed(
            f"the model's {kind} are not finite in {dtype}; set another `dtype` in the registry (float32 is safest), "
            "or fetch the model again"
        )
    if expected.shape[-1] != paths.dimensions:
        raise SelfCheckFailed(
            f"the model's vectors are {expected.shape[-1]} wide, but config.json says {paths.dimensions}; such a "
            "model is not supported"
        )
    return _Expected("the reference forward pass", expected, dtype, kind)


def _reason(error: Exception) -> str:
    """Describes an error for clients: messages of libraries may hold file names, our own do not."""
    is_ours = isinstance(error, EngineError | NotImplementedError)
    return str(error) if is_ours else f"{type(error).__name__} in the forward pass"


def _checked(
    paths: ForwardPaths, probes: Sequence[Ids], truth: _Expected, num_forms: int | None = None
) -> NDArray[np.float32]:
    """Compares the forms of the path in use, or the first of them, with what they must give."""
    got: Tensor | None = None
    for where, group in groupby(islice(paths.forms(probes), num_forms), lambda form: form.where):
        forms = list(group)
        got = forms[0].vectors if got is None else got
        expected = truth.vectors.to(got.device)
        wanted = torch.cat([expected[list(form.rows)] for form in forms])
        _compare(f"the {paths.path} path{where}", torch.cat([form.vectors for form in forms]), wanted, truth)
    assert got is not None, "a path has a form"
    twice = [row for row, ids in enumerate(probes) if np.array_equal(ids, probes[0])]
    apart = distance(got[twice[0], None], got[twice[-1], None], truth.kind)
    if not apart <= _TWICE[truth.dtype]:
        raise SelfCheckFailed(
            f"on the {paths.path} path one text gets two {truth.kind}, {apart:.1e} apart: neighbours or chance show"
        )
    return got.cpu().numpy()


def _compare(what: str, got: Tensor, expected: Tensor, truth: _Expected) -> None:
    far, dtype = distance(got, expected, truth.kind), truth.dtype
    allowed = tolerance(dtype, truth.kind)
    if not far <= allowed:
        measure = "in cosine " if truth.kind == "vectors" else ""
        raise SelfCheckFailed(
            f"{what} is {far:.1e} {measure}from {truth.source}, more than the {allowed:.0e} that {dtype} explains"
        )


def kind_of(tokenizer: ProbeTokenizer) -> OutputKind:
    """Returns what a model with such inputs computes."""
    return "scores" if isinstance(tokenizer, PairTokenizer) else "vectors"


def tolerance(dtype: str, kind: OutputKind) -> float:
    """Returns the `distance` that rounding may cause."""
    return (TOLERANCE if kind == "vectors" else _SCORE_TOLERANCE)[dtype]


def distance(a: Tensor, b: Tensor, kind: OutputKind = "vectors") -> float:
    """Returns the worst `|a - b|² / (|a|² + |b|²)` over the rows of two `[n, D]`.

    That is `1 - cosine` where lengths are equal, more where they are not, and NaN where a row is not finite. Scores may
    be near 0 by chance, where rounding is all that is left; they are compared with a scale of at least 1.
    """
    a, b = a.double(), b.double()
    scale = (a.square() + b.square()).sum(-1).clamp(min=1e-300 if kind == "vectors" else 1.0)
    return float(((a - b).square().sum(-1) / scale).max())


class Canaries:
    """Keeps the first good vectors on disk, one file for each key.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def known(self, key: str) -> NDArray[np.float32] | None:
        """Returns the kept vectors of `key`; None when there are none, or none that can be read."""
        return None if self._folder is None else _read_vectors(self._path(self._folder, key))

    def compare(
        self,
        key: str,
        vectors: NDArray[np.float32],
        dtype: str,
        written_s: float = 0.0,
        kind: OutputKind = "vectors",
    ) -> None:
        """Compares vectors with the kept ones of `key`, or keeps them when there are none.

        Args:
            written_s: when the model's files were written last, where their hashes are known to be right (Unix time).
                Kept vectors that are older may be those of a file that was damaged, and are replaced.

        Raises:
            SelfCheckFailed: they differ beyond the dtype's tolerance.
        """
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        kept = _read_vectors(path)
        if kept is None:
            _write_vectors(path, vectors)
            return
        is_same_shape = kept.shape == vectors.shape
        far = distance(torch.from_numpy(vectors), torch.from_numpy(kept), kind) if is_same_shape else np.inf
        if not far <= tolerance(dtype, kind):
            if written_s > path.stat().st_mtime:
                log.warning("canary.replaced", file=path.name, distance=float(far))
                _write_vectors(path, vectors)
                return
            measure = " in cosine" if kind == "vectors" else ""
            raise SelfCheckFailed(
                f"the model's {kind} moved by {far:.1e}{measure} since it was first loaded, "
                f"more than {tolerance(dtype, kind):.0e}; its files or a library changed. If that is meant, delete the "
                f"canary {path.name} in STATE_DIR"
            )

    def _path(self, folder: Path, key: str) -> Path:
        return folder / f"{key}-{_MARK}.json"


def _read_vectors(path: Path) -> NDArray[np.float32] | None:
    try:
        return np.asarray(json.loads(path.read_text()), dtype=np.float32)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError, OSError) as error:
        log.warning("canary.unreadable", file=path.name, reason=str(error))
        return None


def _write_vectors(path: Path, vectors: NDArray[np.float32]) -> None:
    """Writes a canary; a disk that cannot be written is logged, as a model that is right may serve without one."""
    try:
        write_atomically(path, json.dumps(vectors.tolist()).encode(), is_durable=False)
    except OSError as error:
        log.warning("canary.not_kept", file=path.name, reason=str(error))
