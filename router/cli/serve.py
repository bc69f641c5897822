"""`embedyard serve`: runs the server with the settings and the registry."""

import errno
import os
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path

import click
import structlog
from msgspec import structs

from engines.collection import no_collection
from engines.errors import InvalidValue
from engines.types import HostSnapshot
from router.auth.key_file import read_keys
from router.cli.capacity import plan_capacity
from router.cli.completion import model_names
from router.cli.precision_offers import start_lines
from router.cli.start_warnings import start_warnings
from router.config.settings import DEFAULT_REGISTRY, Settings, SettingsError, load_settings
from router.config.yaml_document import FileError, Mistake
from router.registry.opening import ModelChoiceError, is_embedded_only, missing_sources, open_registry
from router.registry.registry import Registry

_MAX_LISTED = 10
"""Models with a line of their own in the start message."""

EXIT_INVALID = 2
"""Exit code for an invalid registry, settings or address."""

_NOTHING_TO_SERVE = (
    "there is no {file} here, and for the embedded model {reason}\n"
    "  or name a model: embedyard serve BAAI/bge-m3; or write a registry: embedyard init"
)

_MORE_MODELS = """\
More models (there is no {file} here, so the embedded one is served):
  embedyard add BAAI/bge-m3      writes a {file} with it, which this server reads at once
  embedyard serve BAAI/bge-m3    serves it without one"""


@click.command(
    epilog="""
\b
Examples:
  embedyard serve                             the models of registry.yaml, on http://127.0.0.1:6008
  embedyard serve BAAI/bge-m3                 a model of the hub, without a registry
  embedyard serve ./my-model bge-m3           a folder, and a model of the registry; the first is the default
  embedyard serve --port 8080
"""
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=model_names)
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
@click.option("--host", help="Address to listen on, instead of HOST.")
@click.option("--port", help="Port to listen on, instead of PORT; 0 takes a free one.")
def command(models: tuple[str, ...], registry: Path | None, host: str | None, port: str | None) -> None:
    """Serve the models of the registry, or only MODELs, until SIGTERM or Ctrl+C; then finish running requests.

    MODEL is a name of the registry, a hub id or a folder. The first one is the default model, and loaded at start.
    Without a registry file and without MODELs, the embedded model is served.

    Exit code 0: shut down by a signal; 1: forced exit with unfinished requests; 2: invalid registry, settings or
    address.
    """
    given = {"REGISTRY": registry and str(registry), "HOST": host, "PORT": port}
    try:
        settings = load_settings(flags={name: text for name, text in given.items() if text})
        settings = structs.replace(settings, models=models or settings.models)
        found = open_registry(settings)
        _check_sources(settings, found)
        _check_keys_and_limits(settings)
        with _listener(settings) as listener:
            _serve(settings, found, listener)
    except (SettingsError, FileError, InvalidValue) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None


def _check_sources(settings: Settings, registry: Registry) -> None:
    """Refuse to start without the embedded model where it is the only one, and with named folders that hold no model.

    Models of a registry that are not on this machine are no reason to refuse the others.
    """
    missing = missing_sources(registry.models.values())
    if missing and is_embedded_only(registry):
        reason = next(iter(missing.values()))
        raise ModelChoiceError((Mistake((), _NOTHING_TO_SERVE.format(file=DEFAULT_REGISTRY, reason=reason)),))
    if missing and settings.models:
        raise ModelChoiceError(tuple(Mistake((), reason) for reason in missing.values()))


def _check_keys_and_limits(settings: Settings) -> None:
    """Validate the key file and the limit storage early; the app opens them after slow imports."""
    from router.limits.store import open_store

    if settings.keys_file is not None:
        read_keys(settings.keys_file)
    open_store(settings)


def _listener(settings: Settings) -> socket.socket:
    from router.server.uvicorn_server import listen

    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = (
                f"PORT={settings.port} is in use on {settings.host}: choose another, or stop the process that has it"
            )
        else:
            reason = f"HOST={settings.host}, PORT={settings.port}: {os.strerror(error.errno or 0)}; choose another"
        raise SettingsError((reason,)) from None


def _serve(settings: Settings, registry: Registry, listener: socket.socket) -> None:
    with no_collection():
        # late: these import torch and the server, and the mistakes above are reported first
        from router.app import create_app
        from router.backends.factory import open_backend
        from router.observability.logs import configure_logging
        from router.server.uvicorn_server import run_server

        configure_logging(settings.log_format, settings.log_level)
        backend = open_backend(settings, registry)
        app = create_app(settings, registry, backend, watch_registry=True)
    port = listener.getsockname()[1]

    def announce() -> None:
        if settings.log_format != "json":  # else the output is for programs, and the log says it all
            hosts = backend.snapshots()
            on_cpu = any(host.device == "cpu" for host in hosts)
            click.echo(banner(settings, registry, hosts, port, start_lines(registry, settings) if on_cpu else ()))
            if is_embedded_only(registry):
                click.echo(_MORE_MODELS.format(file=settings.registry))
        for warning in start_warnings(settings, registry):
            structlog.get_logger().warning("start.warning", reason=warning)

    run_server(app, listener, announce)


def banner(
    settings: Settings, registry: Registry, hosts: tuple[HostSnapshot, ...], port: int, offers: Iterable[str] = ()
) -> str:
    """Format the start message: address, models, devices, memory, an example request.

    Args:
        offers: what a reduced dtype would bring.
    """
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    devices = [f"{host.device}: {_gib(host.budget_bytes)} of {_gib(host.total_bytes)} for models" for host in hosts]
    example = registry.default_model or next(iter(registry.models), "")
    lines = [f"Embedyard serves {url}  (documentation: {url}/docs)", *_model_lines(registry, hosts)]
    capacity = plan_capacity(registry, hosts)
    memory = [f"memory  {capacity}"] if capacity.num_known else []
    lines += [f"  {line}" for line in (*map("device  {}".format, devices), *memory, *map("dtype   {}".format, offers))]
    return "\n".join([*lines, "Try:", f"  {_curl(settings, url, example)}"])


def _model_lines(registry: Registry, hosts: tuple[HostSnapshot, ...]) -> list[str]:
    """Format the models: a line each for the default one and those on disk, and one line for all others."""
    on_disk = {status.model_id for host in hosts for status in host.models if status.state != "absent"}
    listed = [name for name in registry.models if name in on_disk or name == registry.default_model]
    lines = [
        f"  model   {name}{' (default)' if name == registry.default_model else ''}" for name in listed[:_MAX_LISTED]
    ]
    if len(listed) > _MAX_LISTED:
        lines.append(f"  models  {len(listed) - _MAX_LISTED} more on disk")
    num_absent = len(registry.models) - len(listed)
    if num_absent:
        more = f"{num_absent} more" if listed else str(num_absent)
        lines.append(f"  models  {more}, downloaded when first asked for (embedyard models lists them)")
    return lines


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _curl(settings: Settings, url: str, model_id: str) -> str:
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.api_key or settings.keys_file else ""
    body = shlex.quote(f'{{"model": "{model_id}", "input": "The cat sits outside"}}')
    return f"curl {url}/v1/embeddings{key} -H 'Content-Type: application/json' -d {body}"
