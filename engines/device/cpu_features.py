"""Tells which number formats this machine's CPU multiplies fast. Needs no torch.

Read from Linux's list of flags; elsewhere nothing is known, and nothing is offered.
"""

from functools import cache
from pathlib import Path

_BFLOAT16 = {"amx_bf16", "avx512_bf16"}
_INT8 = {"amx_int8", "avx512_vnni", "avx_vnni"}


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the CPU's flags as Linux names them; none where they cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def has_fast_bfloat16(flags: frozenset[str] | None = None) -> bool:
    """Whether products in bfloat16 have instructions of their own (AMX or AVX512); without them they are slower."""
    return bool(_BFLOAT16 & (cpu_flags() if flags is None else flags))


def has_fast_int8(flags: frozenset[str] | None = None) -> bool:
    """Whether products in int8 have instructions of their own (VNNI or AMX); without them sums may saturate."""
    return bool(_INT8 & (cpu_flags() if flags is None else flags))


def fast_dtypes() -> tuple[str, ...]:
    """Returns the reduced dtypes that this CPU has instructions for."""
    known = {"bfloat16": has_fast_bfloat16(), "int8": has_fast_int8()}
    return tuple(dtype for dtype, is_fast in known.items() if is_fast)
