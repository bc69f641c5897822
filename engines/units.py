"""Bytes as people read them, and the part of a device that may be used. A leaf: it knows no device.

How people write quantities is the edge's business (`router/units.py`).
"""

from msgspec import Struct


class Budget(Struct, frozen=True):
    """How much of a device's memory models may take: a part of it, or that many bytes. Exactly one is not None."""

    fraction: float | None = None
    size_bytes: int | None = None

    def of(self, total_bytes: int) -> int:
        """The budget in bytes on a device that has `total_bytes`; never more than it has."""
        if self.size_bytes is not None:
            return min(self.size_bytes, total_bytes)
        return int(total_bytes * (self.fraction or 0.0))

    def __str__(self) -> str:
        if self.size_bytes is None:
            return f"{(self.fraction or 0.0) * 100:g}%"
        return f"{self.size_bytes / 2**30:.2f} GiB"


def format_bytes(size_bytes: int) -> str:
    """About three digits and a decimal unit, as device makers count: `9.1 GB`, `512 B`."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
