"""`embedyard calibrate`: computes the range of each component of a model's vectors, for the registry."""

from pathlib import Path

import click
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from router.cli.client import RemoteError, get
from router.cli.texts import read_texts
from router.config.settings import SettingsError, load_settings

EXIT_INVALID = 2
"""Exit code for an invalid text file, model or address."""

FEW_TEXTS = 100
_TEXTS_PER_REQUEST = 64
_TIMEOUT_S = 900.0
"""The first request may wait for the model to be loaded, and a large model on a CPU takes minutes for 64 texts."""

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
@click.option("--url", default=_URL, show_default=True, help="Server that runs the model.")
@click.option("--dimensions", type=click.IntRange(1), help="Dimensions that clients request; default: all.")
@click.option("--input-type", help="Input type that clients send, e.g. document.")
def command(model: str, texts: Path, url: str, dimensions: int | None, input_type: str | None) -> None:
    """Print the `calibration` of MODEL for the registry: ranges for `output_dtype` int8 and uint8.

    TEXTS has one text per line, at least a few hundred, similar to those that will be embedded. A running server
    embeds them.

    Exit code 0: success; 2: invalid text file, model or address.
    """
    try:
        lines = read_texts(texts)
        settings = load_settings()
        key = settings.api_key or settings.admin_api_key
        request_fields = {"model": model, "dimensions": dimensions, "input_type": input_type}
        blocks = [lines[start : start + _TEXTS_PER_REQUEST] for start in range(0, len(lines), _TEXTS_PER_REQUEST)]
        responses = [
            get(url, "/v1/embeddings", _Rows, key, body=request_fields | {"input": block}, timeout_s=_TIMEOUT_S)
            for block in blocks
        ]
    except (SettingsError, RemoteError, ValueError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    vectors = np.array([row.embedding for response in responses for row in response.data], np.float32)
    if len(lines) < FEW_TEXTS:
        click.echo(f"warning: {len(lines)} texts are too few for the ranges of {vectors.shape[1]} components", err=True)
    click.echo(f"    # of {responses[0].model}, from {len(lines)} texts; add to its entry in the registry")
    click.echo("    calibration:")
    click.echo(f"      lowest: {_yaml_list(vectors.min(axis=0))}")
    click.echo(f"      highest: {_yaml_list(vectors.max(axis=0))}")


def _yaml_list(numbers: NDArray[np.float32]) -> str:
    """Format one line of YAML, which parses `1e-05` as a string; five decimals are finer than the 256 steps."""
    return f"[{', '.join(f'{number:.5f}' for number in numbers)}]"
