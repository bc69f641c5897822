"""Tells what the processor and the GPUs of this machine can do, for `doctor`. Reads files of Linux only."""

from collections.abc import Collection
from pathlib import Path

from msgspec import Struct

CPUINFO = Path("/proc/cpuinfo")
PCI_DEVICES = Path("/sys/bus/pci/devices")

_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
"""Flags of /proc/cpuinfo (x86 and ARM), and as vendors write them."""


class Processor(Struct, frozen=True, kw_only=True):
    """A processor's name and those of its vector instructions that matter here."""

    name: str
    instructions: tuple[str, ...]


def read_processor(cpuinfo: Path = CPUINFO) -> Processor | None:
    """Read the first processor of /proc/cpuinfo; None on other systems."""
    try:
        text = cpuinfo.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    }
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found = dict.fromkeys(name for flag, name in _INSTRUCTIONS.items() if flag in flags)
    return Processor(name=fields.get("model name", "processor"), instructions=tuple(found))


def bfloat16_effect(instructions: Collection[str]) -> str:
    """Tell what `dtype: bfloat16` brings on a processor: half the memory always, speed by the instructions."""
    if "AMX-BF16" in instructions:
        return "`dtype: bfloat16` halves a model's memory and runs on AMX, the fastest unit here"
    if {"AVX512-BF16", "BF16"} & set(instructions):
        return "`dtype: bfloat16` halves a model's memory, and its products run in hardware; no AMX"
    return "`dtype: bfloat16` halves a model's memory but is slow: neither AMX nor AVX512-BF16"


def count_nvidia_gpus(devices: Path = PCI_DEVICES) -> int:
    """Count the NVIDIA GPUs on the PCI bus, whether or not a driver is installed."""
    return sum(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY_CLASS)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
