"""`embedyard keys`: creates, lists and revokes keys in `KEYS_FILE`. A key is shown once, when it is created."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args

import click
import msgspec
from msgspec import structs

from router.auth.key_editor import edit_file, entry_text, with_key, without_key
from router.auth.key_file import KeysError, read_id, read_keys, read_pattern
from router.auth.keys import Key, Scope, digest_of, new_secret
from router.cli.completion import key_ids
from router.cli.output import print_rows
from router.config.settings import SettingsError, load_settings
from router.config.yaml_editing import EditError

EXIT_INVALID = 2
"""Exit code for an invalid command or key file."""
COLUMNS = ("id", "scopes", "models", "requests/min", "tokens/min", "at once")

_APPLIED_SOON = "A running server applies it within two seconds."


def _checked_by(read: Callable[[object], str]) -> Callable[..., tuple[str, ...] | str]:
    """Create a click callback that validates with the key file's own reader."""

    def callback(_: click.Context, __: click.Parameter, given: tuple[str, ...] | str) -> tuple[str, ...] | str:
        try:
            return read(given) if isinstance(given, str) else tuple(map(read, given))
        except ValueError as error:
            raise click.BadParameter(f"needs {error}") from None

    return callback


_FILE = click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="Key file, instead of KEYS_FILE.")


@click.group(
    epilog="""
\b
Examples:
  embedyard keys create web                          prints the key once; adds its hash to KEYS_FILE
  embedyard keys create web > key.txt                only the key, for another program
  embedyard keys create lab --model "BAAI/*" --tokens-per-minute 1000000
  embedyard keys create ops --scope embed --scope admin
  embedyard keys list
  embedyard keys revoke web
"""
)
def command() -> None:
    """Create, list and revoke the keys of KEYS_FILE, which holds only their hashes.

    Exit code 0: success; 2: invalid command or key file.
    """


@command.command("create")
@click.argument("key_id", metavar="NAME", callback=_checked_by(read_id))
@click.option("--scope", "scopes", type=click.Choice(get_args(Scope)), multiple=True, help="Default: embed.")
@click.option(
    "--model",
    "models",
    multiple=True,
    callback=_checked_by(read_pattern),
    help='Pattern such as "BAAI/*". Default: all.',
)
@click.option("--requests-per-minute", type=click.IntRange(1), help="Default: what the server's settings say.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Default: what the server's settings say.")
@click.option("--max-concurrent", type=click.IntRange(1), help="Concurrent requests. Default: no limit per key.")
@click.option(
    "--keep-alive/--no-keep-alive",
    default=None,
    help="Whether its requests may set `keep_alive`. Default: with the scope admin, or as the only key.",
)
@click.option("--print", "is_printed", is_flag=True, help="Print the entry instead of writing it.")
@_FILE
def create(  # noqa: PLR0913 - one argument an option
    key_id: str,
    scopes: tuple[Scope, ...],
    models: tuple[str, ...],
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_concurrent: int | None,
    file: Path | None,
    *,
    keep_alive: bool | None,
    is_printed: bool,
) -> None:
    """Create the key NAME: print it, and add its hash to the file.

    Only the key goes to standard output, everything else to standard error.
    """
    secret = new_secret()
    key = Key(
        id=key_id,
        digest=digest_of(secret),
        scopes=frozenset(scopes or ("embed",)),
        models=models or ("*",),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        keep_alive=keep_alive,
    )
    path = None if is_printed else _path(file)
    if path is None:
        click.echo(f"Entry for KEYS_FILE:\n\n{entry_text(key)}", err=True)
    else:
        _change(path, lambda text: with_key(text, key))
        click.echo(f"Added {key_id} to {path}. {_APPLIED_SOON}", err=True)
    click.echo("The key, which is not stored and not shown again:", err=True)
    click.echo(secret)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with all fields except the hash.")
@_FILE
def show(file: Path | None, *, as_json: bool) -> None:
    """List the keys with their scopes, models and limits."""
    try:
        keys = read_keys(_required(file))
    except KeysError as error:
        _fail(str(error))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode([_record(key) for key in keys]), indent=2))
    else:
        print_rows(COLUMNS, [_cells(key) for key in keys])


@command.command("revoke")
@click.argument("key_id", metavar="NAME", shell_complete=key_ids)
@_FILE
def revoke(key_id: str, file: Path | None) -> None:
    """Remove the key NAME from the file. Its running requests are finished."""
    path = _required(file)
    _change(path, lambda text: without_key(text, key_id), may_make=False)
    click.echo(f"Removed {key_id} from {path}. {_APPLIED_SOON}", err=True)


def _path(given: Path | None) -> Path | None:
    """Return the path of the key file; None when none is set."""
    if given is not None:
        return given
    try:
        return load_settings().keys_file
    except SettingsError as error:
        _fail(str(error))


def _required(given: Path | None) -> Path:
    path = _path(given)
    if path is None:
        _fail("no key file: set KEYS_FILE, or pass --file")
    return path


def _change(path: Path, change: Callable[[str], str], *, may_make: bool = True) -> None:
    try:
        edit_file(path, change, may_make=may_make)
    except (EditError, KeysError, ValueError) as error:
        _fail(f"{path}: {error}")
    except OSError as error:
        _fail(f"{path} cannot be written: {error.strerror}")


def _record(key: Key) -> dict[str, object]:
    record = structs.asdict(key)
    del record["digest"]
    return record | {"scopes": sorted(key.scopes)}


def _cells(key: Key) -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
    shown = ("" if limit is None else str(limit) for limit in limits)
    return key.id, ", ".join(sorted(key.scopes)), ", ".join(key.models), *shown


def _fail(message: str) -> NoReturn:
    click.echo(message, err=True)
    raise SystemExit(EXIT_INVALID)
