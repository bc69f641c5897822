"""`embedyard serve`: settings and registry in, a running server out."""

import shlex
import socket
from pathlib import Path

import click

from engines.errors import InvalidValue
from engines.types import HostSnapshot
from router.auth.key_file import read_keys
from router.cli.capacity import plan_capacity
from router.config.settings import Settings, SettingsError, load_settings
from router.config.yaml_document import FileError
from router.registry.registry import Registry, open_registry

MISTAKES = 2
"""The exit code when something must be put right."""


@click.command(
    epilog="""
\b
Examples:
  embedyard serve                             what registry.yaml names, on http://127.0.0.1:6008
  embedyard serve --port 8080
  MODEL_PATH=./my-model embedyard serve       one folder
"""
)
@click.option("--registry", type=click.Path(path_type=Path), help="Another file than REGISTRY names.")
@click.option("--host", help="Where to listen, instead of HOST.")
@click.option("--port", help="On which port, instead of PORT; 0 takes a free one.")
def command(registry: Path | None, host: str | None, port: str | None) -> None:
    """Serve the models of the registry until SIGTERM or Ctrl+C, then finish what was begun.

    Exit code 0 after such an end; 2: the registry, the settings or the address must be put right.
    """
    given = {"REGISTRY": registry and str(registry), "HOST": host, "PORT": port}
    try:
        settings = load_settings(flags={name: text for name, text in given.items() if text})
        found = open_registry(settings)
        _check_door(settings)
        with _listener(settings) as listener:
            _serve(settings, found, listener)
    except (SettingsError, FileError, InvalidValue) as error:
        click.echo(str(error), err=True)
        raise SystemExit(MISTAKES) from None


def _check_door(settings: Settings) -> None:
    """Keys and the storage of limits are opened with the app; their mistakes are told before anything slow begins."""
    from router.limits.store import open_store

    if settings.keys_file is not None:
        read_keys(settings.keys_file)
    open_store(settings)


def _listener(settings: Settings) -> socket.socket:
    from router.server.uvicorn_server import listen

    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        reason = f"HOST={settings.host}, PORT={settings.port}: {error.strerror}; choose another, or stop what uses it"
        raise SettingsError((reason,)) from None


def _serve(settings: Settings, registry: Registry, listener: socket.socket) -> None:
    # Late: these bring torch and the server, and mistakes above should be told at once.
    from router.app import create_app
    from router.backends.factory import open_backend
    from router.observability.logs import configure_logging
    from router.server.uvicorn_server import run_server

    configure_logging(settings.log_format, settings.log_level)
    backend = open_backend(settings, registry)
    port = listener.getsockname()[1]

    def announce() -> None:
        click.echo(banner(settings, registry, backend.snapshots(), port))

    run_server(create_app(settings, registry, backend, watch_registry=True), listener, announce)


def banner(settings: Settings, registry: Registry, hosts: tuple[HostSnapshot, ...], port: int) -> str:
    """What is served, where, with how much memory, and a request to try."""
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    names = [f"{name} (default)" if name == registry.default_model else name for name in registry.models]
    devices = [f"{host.device}: {_gib(host.budget_bytes)} of {_gib(host.total_bytes)} for models" for host in hosts]
    example = registry.default_model or next(iter(registry.models), "")
    lines = [f"Embedyard serves {url}  (documentation: {url}/docs)", *map("  model   {}".format, names)]
    outlook = plan_capacity(registry, hosts)
    memory = [f"memory  {outlook}"] if outlook.num_known else []
    lines += [f"  {line}" for line in (*map("device  {}".format, devices), *memory)]
    return "\n".join([*lines, "Try:", f"  {_curl(settings, url, example)}"])


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _curl(settings: Settings, url: str, model_id: str) -> str:
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.api_key or settings.keys_file else ""
    body = shlex.quote(f'{{"model": "{model_id}", "input": "The cat sits outside"}}')
    return f"curl {url}/v1/embeddings{key} -H 'Content-Type: application/json' -d {body}"
