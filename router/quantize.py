"""Vectors → codes of one byte or one bit a component, as sentence-transformers' `quantize_embeddings` defines them.

Scalar codes (int8, uint8) need the range of every component: of the model's `calibration` in the registry, so that a
code means the same in every request; else of the vectors of the request itself. Knows no engine and no JSON.
"""

from collections.abc import Iterable
from typing import Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration, ModelSpec
from router.schema import OutputDtype

Matrix = NDArray[np.float32] | NDArray[np.int8] | NDArray[np.uint8]
Scalar = Literal["int8", "uint8"]


def is_scalar(dtype: str | None) -> TypeGuard[Scalar]:
    """Whether codes of this kind divide a range."""
    return dtype in ("int8", "uint8")


def check_ranges(spec: ModelSpec, dtypes: Iterable[str | None], num_items: int, normalize: bool | None) -> None:
    """Before any work is done: will there be ranges for what is asked?

    Raises:
        InvalidValue: a single vector of a model without calibration, or vectors of another length than it was made of.
    """
    scalar = next(filter(is_scalar, dtypes), None)
    if scalar is None:
        return
    if spec.calibration is None and num_items < 2:
        raise InvalidValue(
            f"{scalar} takes its ranges from the vectors of the request: 1 input was sent, at least 2 are needed. Send "
            "more, ask for binary or ubinary, or have `calibration` set for this model in the registry",
            param="output_dtype",
        )
    if spec.calibration is not None and normalize not in (None, spec.normalize):
        raise InvalidValue(
            f"{scalar} takes its ranges from this model's calibration, which is of vectors with normalize "
            f"{str(spec.normalize).lower()}: leave normalize out, or ask for float",
            param="output_dtype",
        )


def quantize(vectors: NDArray[np.float32], dtype: OutputDtype, calibration: Calibration | None = None) -> Matrix:
    """The codes of `vectors`, `[n, width]`.

    int8, uint8: each component's range is cut into 256 steps; what lies outside gets the code of the nearest end.
    binary, ubinary: one bit a component (is it positive), eight to a byte, the last byte filled with zeros:
    `[n, ceil(width / 8)]`.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if dtype == "float":
        return vectors
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        signed: NDArray[np.int8] = np.bitwise_xor(bits, 0x80).view(np.int8)
        return bits if dtype == "ubinary" else signed
    starts, ends = (vectors.min(axis=0), vectors.max(axis=0)) if calibration is None else _ranges(calibration, vectors)
    steps = (ends - starts) / 255
    steps[steps == 0] = 1
    codes: NDArray[np.float32] = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return codes.astype(np.uint8) if dtype == "uint8" else (codes - 128).astype(np.int8)


def _ranges(calibration: Calibration, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Float32 `[width]` each."""
    width = vectors.shape[1]
    if not calibration.covers(width):
        known = max(len(calibration.lowest), len(calibration.highest))
        raise InvalidValue(
            f"this model is calibrated for vectors of {known} components, and these have {width}: leave dimensions "
            "out, or ask for float, binary or ubinary",
            param="output_dtype",
        )
    starts, ends = (
        np.broadcast_to(np.array(side, np.float32), width) for side in (calibration.lowest, calibration.highest)
    )
    return starts, ends
