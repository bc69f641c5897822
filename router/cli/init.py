"""`embedyard init`: writes a first registry."""

from pathlib import Path

import click

from router.config.settings import SettingsError, load_settings
from router.config.yaml_editing import EditError
from router.registry.editor import create_file
from router.registry.opening import is_demo_installed
from router.registry.starter import INSTALL_DEMO, starter_text

EXIT_INVALID = 2
"""Exit code when the file exists or cannot be written, or for invalid settings."""


@click.command(
    epilog="""
\b
Examples:
  embedyard init                     writes registry.yaml
  embedyard init config/models.yaml
  embedyard init && embedyard add BAAI/bge-m3 && embedyard serve
"""
)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
def command(file: Path | None) -> None:
    """Write a first registry to FILE (default: from the settings), with comments; never overwrites one.

    It lists the embedded model where that is installed. Exit code 0: written; 2: the file exists or cannot be written.
    """
    try:
        path = file or load_settings().registry
        has_embedded = is_demo_installed()
        create_file(path, starter_text(has_embedded=has_embedded))
    except (SettingsError, EditError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{file or 'the registry'} cannot be written: {error.strerror}")
    click.echo(f"Wrote {path}, with {'the embedded model' if has_embedded else 'no model yet'}.")
    if not has_embedded:
        click.echo(f"For a small English model without a download: {INSTALL_DEMO}")
    option = f" --registry {path}" if file else ""
    click.echo(f"Next: embedyard add BAAI/bge-m3{option}, then embedyard serve{option}")


def _fail(message: str) -> None:
    click.echo(message, err=True)
    raise SystemExit(EXIT_INVALID)
