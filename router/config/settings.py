"""Reads the environment and `.env` into a frozen `Settings`. No other module reads `os.environ` for settings.

`VARIABLES` lists every variable with its parser; the defaults are in `Settings`.
"""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dotenv.parser import parse_stream
from msgspec import Struct, field

from engines.affinity import num_usable_cores
from engines.types import Budget
from router.config import setting_values as values
from router.config.quantities import parse_budget, parse_host_budget
from router.config.setting_values import is_loopback
from router.config.unknown_settings import warn_unknown

DOTENV = Path(".env")
DEFAULT_REGISTRY = Path("registry.yaml")
_STATE_DIR = "~/.cache/embedyard"
_OF_COMPOSE = ("BIND",)
"""Variables in `.env` that docker-compose.yml reads."""
_EXPOSED = (
    "HOST={host} is reachable from other machines, but no key is set: set API_KEY (or ADMIN_API_KEY, or KEYS_FILE), "
    "set HOST=127.0.0.1, or set ALLOW_ANONYMOUS=true to serve everyone without a key"
)
_SAME_KEYS = "ADMIN_API_KEY equals API_KEY, so every client would be an admin: use another key, or unset it"


class Settings(Struct, frozen=True, kw_only=True):
    """The server's settings, named after their variables, with `_s` added to times without a unit.

    `None` means off, or chosen elsewhere (`max_batch_tokens` by the device, `memory_budget`, `host_memory_budget` and
    `backend` by the registry).
    """

    host: str = "127.0.0.1"
    port: int = 6008
    registry: Path = DEFAULT_REGISTRY
    api_key: str | None = None
    admin_api_key: str | None = None
    keys_file: Path | None = None
    allow_anonymous: bool = False
    models: tuple[str, ...] = ()
    model_path: str | None = None
    device: tuple[str, ...] = ("auto",)
    backend: str | None = None
    cpu_hosts: int = 1
    memory_budget: Budget | None = None
    host_memory_budget: Budget | None = None
    target_dim: int | None = None
    max_concurrent_requests: int = 1024
    concurrency_timeout_s: float = 30.0
    max_batch_size: int = 512
    max_batch_tokens: int | None = None
    batch_timeout_s: float = 0.0
    max_queue_size: int = 8192
    thread_pool_size: int = field(default_factory=num_usable_cores)
    rate_limit_requests: int | None = None
    rate_limit_tokens: int | None = None
    rate_limit_window_s: int = 60
    rate_limit_storage: str = "async+memory://"
    rate_limit_on_error: str = "open"
    load_timeout_s: float = 300.0
    grace_seconds: float = 30.0
    watchdog_seconds: float = 120.0
    log_format: str = "auto"
    log_level: str = "info"
    otlp_endpoint: str | None = None
    replay_trace: Path | None = None
    state_dir: Path = field(default_factory=lambda: Path(_STATE_DIR).expanduser())
    max_body_bytes: int = 64 * 2**20
    cors_origins: tuple[str, ...] = ()
    forwarded_allow_ips: tuple[str, ...] = ()
    skins: tuple[str, ...] = values.SKINS
    data_dir: Path | None = None
    batch_database: str | None = None
    batch_concurrency: int = 32
    max_file_bytes: int = 2 * 2**30
    max_files_per_key: int = 1000
    max_bytes_per_key: int = 20 * 2**30
    max_stored_bytes: int = 100 * 2**30
    file_retention_s: float = 30 * 86400.0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def __repr__(self) -> str:
        shown = (
            f"{variable.field}={'***' if variable.is_secret and value is not None else repr(value)}"
            for variable, value in ((variable, getattr(self, variable.field)) for variable in VARIABLES)
        )
        return f"Settings({', '.join(shown)})"


class Variable(Struct, frozen=True):
    """One environment variable, its parser, and the field of `Settings` that it sets."""

    name: str
    read: Callable[[str], object]
    field: str
    is_secret: bool = False
    default: str = ""

    @classmethod
    def of(cls, name: str, read: Callable[[str], object], *, unit: str = "", **more: Any) -> "Variable":
        return cls(name, read, name.lower() + unit, **more)


VARIABLES = (
    Variable.of("HOST", values.host),
    Variable.of("PORT", values.integer(0, 65535)),
    Variable.of("REGISTRY", values.path),
    Variable.of("API_KEY", values.key, is_secret=True),
    Variable.of("ADMIN_API_KEY", values.key, is_secret=True),
    Variable.of("KEYS_FILE", values.path),
    Variable.of("ALLOW_ANONYMOUS", values.boolean),
    Variable.of("MODELS", values.names),
    Variable.of("MODEL_PATH", str),
    Variable.of("DEVICE", values.devices),
    Variable.of("BACKEND", values.one_of("local", "process", "ray")),
    Variable.of("CPU_HOSTS", values.integer(1, 256)),
    Variable.of("MEMORY_BUDGET", parse_budget),
    Variable.of("HOST_MEMORY_BUDGET", parse_host_budget),
    Variable.of("TARGET_DIM", values.integer(1)),
    Variable.of("MAX_CONCURRENT_REQUESTS", values.integer(1)),
    Variable.of("CONCURRENCY_TIMEOUT", values.duration_s(0.0, 3600.0), unit="_s"),
    Variable.of("MAX_BATCH_SIZE", values.integer(1)),
    Variable.of("MAX_BATCH_TOKENS", values.integer(1)),
    Variable.of("BATCH_TIMEOUT", values.duration_s(0.0, 10.0), unit="_s"),
    Variable.of("MAX_QUEUE_SIZE", values.integer(1)),
    Variable.of("THREAD_POOL_SIZE", values.integer(1, 1024)),
    Variable.of("RATE_LIMIT_REQUESTS", values.or_off(values.integer(1))),
    Variable.of("RATE_LIMIT_TOKENS", values.or_off(values.integer(1))),
    Variable.of("RATE_LIMIT_WINDOW", values.window_s, unit="_s"),
    Variable.of("RATE_LIMIT_STORAGE", values.storage, is_secret=True),  # a Redis URI may hold a password
    Variable.of("RATE_LIMIT_ON_ERROR", values.one_of("open", "closed")),
    Variable.of("LOAD_TIMEOUT", values.duration_s(1.0), unit="_s"),
    Variable.of("GRACE_SECONDS", values.duration_s()),
    Variable.of("WATCHDOG_SECONDS", values.duration_s(1.0)),
    Variable.of("LOG_FORMAT", values.one_of("auto", "console", "json")),
    Variable.of("LOG_LEVEL", values.one_of("debug", "info", "warning", "error")),
    Variable("OTEL_EXPORTER_OTLP_ENDPOINT", values.web_address, "otlp_endpoint"),
    Variable.of("REPLAY_TRACE", values.path),
    Variable.of("STATE_DIR", values.path, default=_STATE_DIR),
    Variable.of("MAX_BODY_BYTES", values.size_bytes),
    Variable.of("CORS_ORIGINS", values.origins),
    Variable.of("FORWARDED_ALLOW_IPS", values.networks),
    Variable.of("SKINS", values.skins),
    Variable.of("DATA_DIR", values.path),
    Variable.of("BATCH_DATABASE", values.database, is_secret=True),  # its URL may hold a password
    Variable.of("BATCH_CONCURRENCY", values.integer(1, 4096)),
    Variable.of("MAX_FILE_BYTES", values.size_bytes),
    Variable.of("MAX_FILES_PER_KEY", values.integer(1)),
    Variable.of("MAX_BYTES_PER_KEY", values.size_bytes),
    Variable.of("MAX_STORED_BYTES", values.size_bytes),
    Variable.of("FILE_RETENTION", values.duration_s(3600.0), unit="_s"),
)


class SettingsError(Exception):
    """All mistakes in the environment and `.env`, one sentence each; none shows a key."""

    def __init__(self, mistakes: tuple[str, ...]) -> None:
        self.mistakes = mistakes
        noun = "invalid setting" if len(mistakes) == 1 else "invalid settings"
        super().__init__("\n".join([f"{len(mistakes)} {noun}:", *(f"  {mistake}" for mistake in mistakes)]))


def load_settings(dotenv: Path = DOTENV, flags: Mapping[str, str] = MappingProxyType({})) -> Settings:
    """Read the settings of this process. `flags`: command-line options by variable name, which override all others.

    Raises:
        SettingsError: with every mistake.
    """
    return read_settings({**os.environ, **flags}, dotenv)


def export_hub_variables(dotenv: Path = DOTENV) -> None:
    """Copy the `HF_*` and `OTEL_*` variables of `.env` into the environment, where their libraries read them."""
    for name, text in _read_dotenv(dotenv)[0].items():
        if name.startswith(("HF_", "OTEL_")):
            os.environ.setdefault(name, text)


def unknown_settings(environ: Mapping[str, str] = os.environ, dotenv: Path | None = DOTENV) -> tuple[str, ...]:
    """Return one warning for each variable of `.env` or the environment that is most likely a misspelt setting."""
    others = ("HF_", "OTEL_", "COMPOSE_", "DOCKER_")
    from_file = [name for name in _read_dotenv(dotenv)[0] if not name.startswith(others)]
    return warn_unknown(environ, from_file, (*(variable.name for variable in VARIABLES), *_OF_COMPOSE))


def read_settings(environ: Mapping[str, str], dotenv: Path | None = None) -> Settings:
    """Read the settings. `environ` overrides `.env`; an empty value counts as not set.

    Raises:
        SettingsError: with every mistake.
    """
    from_file, mistakes = _read_dotenv(dotenv)
    texts = {**from_file, **environ}
    found: dict[str, Any] = {}
    for variable in VARIABLES:
        text = texts.get(variable.name, "").strip() or variable.default
        if not text:
            continue
        try:
            found[variable.field] = variable.read(text)
        except ValueError as error:
            shown = variable.name if variable.is_secret else f"{variable.name}={text}"
            mistakes.append(f"{shown}: needs {error}")
    is_keyed = any(texts.get(name, "").strip() for name in ("API_KEY", "ADMIN_API_KEY", "KEYS_FILE"))
    mistakes += _cross_checks(found, is_keyed=is_keyed)
    if mistakes:
        raise SettingsError(tuple(mistakes))
    return Settings(**found)


def _cross_checks(found: Mapping[str, Any], *, is_keyed: bool) -> list[str]:
    mistakes = []
    if not is_keyed and not found.get("allow_anonymous") and not is_loopback(found.get("host", "127.0.0.1")):
        mistakes.append(_EXPOSED.format(host=found["host"]))
    if found.get("api_key") and found.get("api_key") == found.get("admin_api_key"):
        mistakes.append(_SAME_KEYS)
    return mistakes


def _read_dotenv(path: Path | None) -> tuple[dict[str, str], list[str]]:
    """Read the variables of the file, and its mistakes, without interpolation: a `$` in a key is a `$`."""
    if path is None or not path.is_file():
        return {}, []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path.name} cannot be read: {type(error).__name__}"]
    bindings = list(parse_stream(io.StringIO(text)))
    mistakes = [f"{path.name}, line {b.original.line}: needs NAME=value" for b in bindings if b.error]
    return {b.key: b.value or "" for b in bindings if b.key and not b.error}, mistakes
