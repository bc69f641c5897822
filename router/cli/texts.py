"""Reads files of texts, one per line."""

from pathlib import Path


def read_texts(path: Path) -> list[str]:
    """Read the non-blank lines.

    Raises:
        ValueError: the file is unreadable or too short.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if len(lines) < 2:
        raise ValueError(f"{path} has {len(lines)} lines with text; at least 2 are required")
    return lines
