"""`embedyard keys`: make, list and revoke the keys of `KEYS_FILE`. A key itself is shown once, when it is made."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import msgspec
from msgspec import structs

from router.auth.key_editor import EditError, edit_file, entry_text, with_key, without_key
from router.auth.key_file import KeysError, read_id, read_keys, read_pattern
from router.auth.keys import Key, Scope, digest_of, new_secret
from router.cli.completion import key_ids
from router.cli.output import print_rows
from router.config.settings import SettingsError, load_settings

MISTAKES = 2
"""The exit code when something must be put right."""
COLUMNS = ("id", "scopes", "models", "requests/min", "tokens/min", "at once")

_SOON = "A running server knows it within two seconds."


def _checked_by(read: Callable[[object], str]) -> Callable[..., tuple[str, ...] | str]:
    """A click callback that lets the keys file's own reader judge."""

    def callback(_: click.Context, __: click.Parameter, given: tuple[str, ...] | str) -> tuple[str, ...] | str:
        try:
            return read(given) if isinstance(given, str) else tuple(map(read, given))
        except ValueError as error:
            raise click.BadParameter(f"needs {error}") from None

    return callback


_FILE = click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="Another file than KEYS_FILE.")


@click.group(
    epilog="""
\b
Examples:
  embedyard keys create web                          the key, once; its entry goes into KEYS_FILE
  embedyard keys create web > key.txt                the key alone, for another program
  embedyard keys create lab --model "BAAI/*" --tokens-per-minute 1000000
  embedyard keys create ops --scope embed --scope admin
  embedyard keys list
  embedyard keys revoke web
"""
)
def command() -> None:
    """Make, list and revoke the keys of KEYS_FILE, which holds their hashes only.

    Exit code 0, or 2: the file or the command must be put right.
    """


@command.command("create")
@click.argument("key_id", metavar="NAME", callback=_checked_by(read_id))
@click.option("--scope", "scopes", type=click.Choice(["embed", "admin"]), multiple=True, help="Default: embed.")
@click.option("--model", "models", multiple=True, callback=_checked_by(read_pattern), help='As "BAAI/*". Default: all.')
@click.option("--requests-per-minute", type=click.IntRange(1), help="Default: what the server's settings say.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Default: what the server's settings say.")
@click.option("--max-concurrent", type=click.IntRange(1), help="Requests at once. Default: no limit of its own.")
@click.option(
    "--keep-alive/--no-keep-alive",
    default=None,
    help="Whether its requests may say how long a model stays. Default: with the scope admin, or as the only key.",
)
@click.option("--print", "is_printed", is_flag=True, help="Show the entry instead of writing it.")
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
    """Make the key NAME: print it, and put its hash into the file.

    The key alone goes to standard output, everything else to standard error.
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
        click.echo(f"Its entry for KEYS_FILE:\n\n{entry_text(key)}", err=True)
    else:
        _change(path, lambda text: with_key(text, key))
        click.echo(f"{key_id} stands in {path}. {_SOON}", err=True)
    click.echo("The key, which is nowhere stored and never shown again:", err=True)
    click.echo(secret)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON list with every field but the hash.")
@_FILE
def show(file: Path | None, *, as_json: bool) -> None:
    """Show who has a key, and what it opens."""
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
    """Take the key NAME out of the file: it opens nothing any more. Its running requests are finished."""
    path = _required(file)
    _change(path, lambda text: without_key(text, key_id), may_make=False)
    click.echo(f"{key_id} is out of {path}. {_SOON}", err=True)


def _path(given: Path | None) -> Path | None:
    """Where the keys are; None when no file is named anywhere."""
    if given is not None:
        return given
    try:
        return load_settings().keys_file
    except SettingsError as error:
        _fail(str(error))


def _required(given: Path | None) -> Path:
    path = _path(given)
    if path is None:
        _fail("there is no keys file: set KEYS_FILE, or name one with --file")
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
    raise SystemExit(MISTAKES)
