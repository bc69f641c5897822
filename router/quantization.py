"""Quantizes vectors as sentence-transformers does: ranges of 256 steps, or one bit for each component."""

import numpy as np
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration
from router.schemas.inference import OutputDtype

Matrix = NDArray[np.float32] | NDArray[np.int8] | NDArray[np.uint8]


def quantize(vectors: NDArray[np.float32], dtype: OutputDtype, calibration: Calibration | None = None) -> Matrix:
    """Quantize `vectors`, `[n, width]`.

    int8, uint8: each component's range is divided into 256 steps; values outside it are clipped.
    binary, ubinary: one bit per component (1 if positive), packed into bytes, the last byte padded with zeros:
    `[n, ceil(width / 8)]`.

    Raises:
        InvalidValue: the calibration has another width.
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
    """Return the lowest and highest value of each component, float32 `[width]` each."""
    width = vectors.shape[1]
    if not calibration.covers(width):
        known = max(len(calibration.lowest), len(calibration.highest))
        raise InvalidValue(
            f"The calibration of this model has {known} components, the vectors have {width}: omit dimensions, or use "
            "float, binary or ubinary",
            param="output_dtype",
        )
    starts, ends = (
        np.broadcast_to(np.array(side, np.float32), width) for side in (calibration.lowest, calibration.highest)
    )
    return starts, ends
