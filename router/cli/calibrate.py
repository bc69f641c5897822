"""`embedyard calibrate`: the range of each component of a model's vectors, to be pasted into the registry."""

from pathlib import Path

import click
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from router.cli.client import RemoteError, get
from router.config.settings import SettingsError, load_settings

MISTAKES = 2
"""The exit code when the texts, the model or the address must be put right."""

FEW_TEXTS = 100
_AT_ONCE = 64
_URL = "http://127.0.0.1:6008"


class _Row(Struct):
    embedding: list[float]


class _Rows(Struct):
    data: list[_Row]
    model: str


@click.command(
    epilog="""
\b
Examples:
  embedyard calibrate all-MiniLM-L6-v2 texts.txt
  embedyard calibrate bge-m3 texts.txt --dimensions 256 --url http://gpu-box:6008
"""
)
@click.argument("model")
@click.argument("texts", type=click.Path(path_type=Path))
@click.option("--url", default=_URL, show_default=True, help="The server that runs the model.")
@click.option("--dimensions", type=click.IntRange(1), help="The width that clients ask for, if not the full one.")
@click.option("--input-type", help="The prompt that clients ask for, such as document.")
def command(model: str, texts: Path, url: str, dimensions: int | None, input_type: str | None) -> None:
    """Print the `calibration` of MODEL for the registry: ranges for `output_dtype` int8 and uint8.

    TEXTS holds one text a line, a few hundred at least, like those that will be embedded. A running server embeds them.

    Exit code 0, or 2: the texts, the model or the address must be put right.
    """
    try:
        lines = _read(texts)
        settings = load_settings()
        key = settings.api_key or settings.admin_api_key
        asked = {"model": model, "dimensions": dimensions, "input_type": input_type}
        blocks = [lines[start : start + _AT_ONCE] for start in range(0, len(lines), _AT_ONCE)]
        answers = [get(url, "/v1/embeddings", _Rows, key, body=asked | {"input": block}) for block in blocks]
    except (SettingsError, RemoteError, ValueError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(MISTAKES) from None
    vectors = np.array([row.embedding for answer in answers for row in answer.data], np.float32)
    if len(lines) < FEW_TEXTS:
        click.echo(f"warning: {len(lines)} texts hardly show the ranges of {vectors.shape[1]} components", err=True)
    click.echo(f"    # of {answers[0].model}, from {len(lines)} texts; goes into its entry in the registry")
    click.echo("    calibration:")
    click.echo(f"      lowest: {_shown(vectors.min(axis=0))}")
    click.echo(f"      highest: {_shown(vectors.max(axis=0))}")


def _read(path: Path) -> list[str]:
    """The lines that are not blank.

    Raises:
        ValueError: saying what is wrong with the file.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if len(lines) < 2:
        raise ValueError(f"{path} has {len(lines)} lines with text, and a range needs at least 2")
    return lines


def _shown(numbers: NDArray[np.float32]) -> str:
    """One line of YAML, which takes `1e-05` for a text; five decimals are finer than the 256 steps that they make."""
    return f"[{', '.join(f'{number:.5f}' for number in numbers)}]"
