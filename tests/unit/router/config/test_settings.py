"""Tests the settings: precedence of environment and `.env`, refused values, and that keys stay secret."""

import ast
import os
from pathlib import Path

import pytest

from engines.types import Budget
from router.config.settings import (
    VARIABLES,
    Settings,
    SettingsError,
    export_hub_variables,
    load_settings,
    read_settings,
    unknown_settings,
)

ROOT = Path(__file__).parents[4]
CONTRACT = {
    "HOST": "10.0.0.1",
    "PORT": "8080",
    "REGISTRY": "/etc/embedyard/registry.yaml",
    "API_KEY": "sk-one",
    "ADMIN_API_KEY": "sk-two",
    "KEYS_FILE": "keys.yaml",
    "MODELS": "BAAI/bge-m3, ./mine",
    "MODEL_PATH": "BAAI/bge-m3",
    "DEVICE": "cuda:0, cuda:1",
    "BACKEND": "Process",
    "CPU_HOSTS": "3",
    "MEMORY_BUDGET": "20GiB",
    "HOST_MEMORY_BUDGET": "30%",
    "TARGET_DIM": "256",
    "MAX_CONCURRENT_REQUESTS": "7",
    "CONCURRENCY_TIMEOUT": "1m",
    "MAX_BATCH_SIZE": "64",
    "MAX_BATCH_TOKENS": "16384",
    "BATCH_TIMEOUT": "5ms",
    "MAX_QUEUE_SIZE": "4096",
    "THREAD_POOL_SIZE": "3",
    "RATE_LIMIT_REQUESTS": "100",
    "RATE_LIMIT_WINDOW": "1m",
    "RATE_LIMIT_TOKENS": "1000000",
    "RATE_LIMIT_STORAGE": "async+redis://cache:6379",
    "RATE_LIMIT_ON_ERROR": "Closed",
    "LOAD_TIMEOUT": "10m",
    "ALLOW_ANONYMOUS": "yes",
    "WATCHDOG_SECONDS": "90s",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
    "REPLAY_TRACE": "/var/log/day.jsonl",
    "GRACE_SECONDS": "5",
    "LOG_FORMAT": "JSON",
    "LOG_LEVEL": "Warning",
    "STATE_DIR": "/var/lib/embedyard",
    "MAX_BODY_BYTES": "1MiB",
    "CORS_ORIGINS": "https://a.example, http://localhost:3000/",
    "FORWARDED_ALLOW_IPS": "127.0.0.1, 10.0.0.0/8, fd00::/8",
    "SKINS": "Ollama, tei",
    "DATA_DIR": "/var/lib/embedyard/data",
    "BATCH_DATABASE": "postgresql+psycopg://me:secret@db/embedyard",
    "BATCH_CONCURRENCY": "8",
    "MAX_FILE_BYTES": "1GiB",
    "MAX_FILES_PER_KEY": "50",
    "MAX_BYTES_PER_KEY": "5GiB",
    "MAX_STORED_BYTES": "50GiB",
    "FILE_RETENTION": "48h",
}


def mistakes(environ: dict[str, str], dotenv: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        read_settings(environ, dotenv)
    return caught.value.mistakes


def test_every_variable_is_read() -> None:
    settings = read_settings(CONTRACT)

    assert settings == Settings(
        host="10.0.0.1",
        port=8080,
        registry=Path("/etc/embedyard/registry.yaml"),
        api_key="sk-one",
        admin_api_key="sk-two",
        keys_file=Path("keys.yaml"),
        models=("BAAI/bge-m3", "./mine"),
        model_path="BAAI/bge-m3",
        device=("cuda:0", "cuda:1"),
        backend="process",
        cpu_hosts=3,
        memory_budget=Budget(size_bytes=20 * 2**30),
        host_memory_budget=Budget(fraction=0.3),
        target_dim=256,
        max_concurrent_requests=7,
        concurrency_timeout_s=60.0,
        max_batch_size=64,
        max_batch_tokens=16384,
        batch_timeout_s=0.005,
        max_queue_size=4096,
        thread_pool_size=3,
        rate_limit_requests=100,
        rate_limit_window_s=60,
        rate_limit_tokens=1_000_000,
        rate_limit_storage="async+redis://cache:6379",
        rate_limit_on_error="closed",
        load_timeout_s=600.0,
        allow_anonymous=True,
        watchdog_seconds=90.0,
        otlp_endpoint="http://collector:4318",
        replay_trace=Path("/var/log/day.jsonl"),
        grace_seconds=5.0,
        log_format="json",
        log_level="warning",
        state_dir=Path("/var/lib/embedyard"),
        max_body_bytes=2**20,
        cors_origins=("https://a.example", "http://localhost:3000"),
        forwarded_allow_ips=("127.0.0.1", "10.0.0.0/8", "fd00::/8"),
        skins=("tei", "ollama"),
        data_dir=Path("/var/lib/embedyard/data"),
        batch_database="postgresql+psycopg://me:secret@db/embedyard",
        batch_concurrency=8,
        max_file_bytes=2**30,
        max_files_per_key=50,
        max_bytes_per_key=5 * 2**30,
        max_stored_bytes=50 * 2**30,
        file_retention_s=48 * 3600.0,
    )


def test_the_contract_the_fields_and_the_variables_are_one_list() -> None:
    assert {variable.name for variable in VARIABLES} == set(CONTRACT)
    assert sorted(variable.field for variable in VARIABLES) == sorted(Settings.__struct_fields__)


def test_nothing_set_gives_the_defaults_of_the_contract() -> None:
    settings = read_settings({})

    assert settings == Settings()
    assert (settings.host, settings.port, settings.registry) == ("127.0.0.1", 6008, Path("registry.yaml"))
    assert (settings.device, settings.max_concurrent_requests, settings.max_batch_size) == (("auto",), 1024, 512)
    assert (settings.max_queue_size, settings.load_timeout_s, settings.rate_limit_window_s) == (8192, 300.0, 60)
    assert settings.thread_pool_size == len(os.sched_getaffinity(0))
    assert settings.state_dir == Path.home() / ".cache" / "embedyard"


def test_an_empty_value_counts_as_not_set() -> None:
    assert read_settings(dict.fromkeys(CONTRACT, " ")) == Settings()


def test_the_environment_wins_over_dotenv(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text('\ufeff# a comment\nPORT=7000\nexport LOG_LEVEL="debug"\nAPI_KEY=sk-$HOME-${PATH}\n')

    settings = read_settings({"PORT": "7001"}, dotenv)

    assert (settings.port, settings.log_level, settings.api_key) == (7001, "debug", "sk-$HOME-${PATH}")


def test_a_missing_dotenv_is_no_mistake(tmp_path: Path) -> None:
    assert read_settings({}, tmp_path / ".env") == Settings()


def test_all_mistakes_come_at_once_and_each_names_its_variable(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=99999\nthis is no setting\n")

    found = mistakes({"DEVICE": "gpu", "MEMORY_BUDGET": "20", "LOG_LEVEL": "loud", "BATCH_TIMEOUT": "50"}, dotenv)

    assert [mistake.partition(":")[0] for mistake in found] == [
        ".env, line 2",
        "PORT=99999",
        "DEVICE=gpu",
        "MEMORY_BUDGET=20",
        "BATCH_TIMEOUT=50",
        "LOG_LEVEL=loud",
    ]
    assert found[1] == "PORT=99999: needs a whole number from 0 to 65535"
    assert "cuda:0,cuda:1" in found[2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "-1"),
        ("PORT", "6008.0"),
        ("TARGET_DIM", "0"),
        ("MAX_BATCH_SIZE", "1_000"),
        ("MAX_QUEUE_SIZE", "٣"),
        ("RATE_LIMIT_REQUESTS", "0"),
        ("RATE_LIMIT_WINDOW", "1500ms"),
        ("RATE_LIMIT_WINDOW", "0"),
        ("LOAD_TIMEOUT", "-1"),
        ("LOAD_TIMEOUT", "0"),
        ("GRACE_SECONDS", "soon"),
        ("ALLOW_ANONYMOUS", "maybe"),
        ("DEVICE", "cuda:0,cuda:0"),
        ("DEVICE", "auto,cpu"),
        ("DEVICE", "cpu,"),
        ("MAX_BODY_BYTES", "0"),
        ("HOST", "http://0.0.0.0"),
        ("HOST", "localhost:6008"),
        ("FORWARDED_ALLOW_IPS", "*"),
        ("FORWARDED_ALLOW_IPS", "proxy.example.com"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1/8"),
        ("FORWARDED_ALLOW_IPS", "127.0.0.1,"),
        ("CORS_ORIGINS", "example.com"),
        ("SKINS", "openai"),
        ("SKINS", "none, tei"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("LOG_FORMAT", "pretty"),
    ],
)
def test_a_value_out_of_bounds_is_refused(name: str, text: str) -> None:
    found = mistakes({name: text, "API_KEY": "sk-one"})

    assert len(found) == 1
    assert found[0].startswith(f"{name}={text}: needs ")


def test_a_sync_storage_is_refused_without_showing_its_password() -> None:
    found = mistakes({"RATE_LIMIT_STORAGE": "redis://user:hunter2@cache"})

    assert "async+redis://" in found[0]
    assert "hunter2" not in found[0]


@pytest.mark.parametrize("name", ["API_KEY", "ADMIN_API_KEY"])
def test_a_refused_key_is_never_shown(name: str) -> None:
    found = mistakes({name: "hunter2 hunter2"})

    assert found == (f"{name}: needs printable ASCII characters without spaces",)


def test_repr_hides_the_keys() -> None:
    secret = {"API_KEY": "sk-one", "ADMIN_API_KEY": "sk-two", "RATE_LIMIT_STORAGE": "async+redis://:sk-three@cache"}
    settings = read_settings(secret)

    for shown in (repr(settings), str(settings), f"{settings!r:>10}"):
        assert "sk-" not in shown
        assert "api_key=***" in shown
        assert "port=6008" in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "192.168.1.5", "server.example.com"])
def test_a_reachable_host_without_a_key_is_refused_with_the_remedy(host: str) -> None:
    found = mistakes({"HOST": host})

    assert len(found) == 1
    for remedy in ("API_KEY", "KEYS_FILE", "HOST=127.0.0.1", "ALLOW_ANONYMOUS=true"):
        assert remedy in found[0]


@pytest.mark.parametrize(
    "opening",
    [{"API_KEY": "sk"}, {"ADMIN_API_KEY": "sk"}, {"KEYS_FILE": "keys.yaml"}, {"ALLOW_ANONYMOUS": "true"}],
)
def test_a_reachable_host_with_a_key_or_allow_anonymous_is_served(opening: dict[str, str]) -> None:
    settings = read_settings({"HOST": "0.0.0.0", **opening})

    assert not settings.is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_needs_no_key(host: str) -> None:
    assert read_settings({"HOST": host}).is_loopback


def test_an_unreadable_key_is_not_also_called_missing() -> None:
    assert len(mistakes({"HOST": "0.0.0.0", "API_KEY": "a b"})) == 1


def test_one_key_for_clients_and_admins_is_refused() -> None:
    assert "ADMIN_API_KEY equals API_KEY" in mistakes({"API_KEY": "sk", "ADMIN_API_KEY": "sk"})[0]


def test_off_switches_a_limit_off() -> None:
    assert read_settings({"RATE_LIMIT_REQUESTS": "off", "RATE_LIMIT_TOKENS": "none"}) == Settings()


def test_a_user_without_a_home_is_asked_for_a_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", homeless)

    assert mistakes({})[0].startswith("STATE_DIR=~/.cache/embedyard: needs a path without ~")
    assert read_settings({"STATE_DIR": "/state"}).state_dir == Path("/state")


def test_an_unreadable_dotenv_is_one_mistake(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"API_KEY=\xff\xfe\n")

    assert mistakes({}, dotenv) == (".env cannot be read: UnicodeDecodeError",)


def test_hub_variables_of_dotenv_reach_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("HF_TOKEN=from-file\nHF_HOME=/from/file\nPORT=1\nOTEL_SERVICE_NAME=vectors\n")
    monkeypatch.setenv("HF_HOME", "/from/environment")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("PORT", raising=False)

    export_hub_variables(dotenv)

    assert os.environ.pop("HF_TOKEN") == "from-file"
    assert os.environ.pop("OTEL_SERVICE_NAME") == "vectors"
    assert os.environ["HF_HOME"] == "/from/environment"
    assert "PORT" not in os.environ


def test_the_process_environment_is_read_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "7007")

    assert load_settings(tmp_path / ".env").port == 7007
    assert load_settings(tmp_path / ".env", flags={"PORT": "7008"}).port == 7008


def test_no_other_module_of_the_router_reads_the_environment() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "router").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    }

    assert readers == {"router/config/settings.py", "router/backends/ray/environment.py"}, (
        "the second sets what Ray reads, and no more"
    )


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("MAX_QUE_SIZE", "did you mean MAX_QUEUE_SIZE?"),
        ("BATCH_SIZE", "did you mean MAX_BATCH_SIZE?"),
        ("EMBEDYARD_PORT", "did you mean PORT?"),
        ("port", "did you mean PORT?"),
        ("MAX_CLIENTS", "docs/configuration.md lists all settings"),
    ],
)
def test_a_name_in_dotenv_that_is_likely_meant_as_a_setting_is_a_warning(line: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"{line}=7\n")

    assert unknown_settings({}, tmp_path / ".env") == (f"{line} is not a setting, and is ignored: {meant}",)


def test_variables_of_other_programs_are_no_misspelt_settings(tmp_path: Path) -> None:
    foreign = ["GEMINI_API_KEY", "XAI_API_KEY", "HOSTNAME", "HF_TOKEN", "OTEL_SERVICE_NAME", "POST", "BIND", "PATH"]
    (tmp_path / ".env").write_text("".join(f"{name}=7\n" for name in foreign))
    linked = dict.fromkeys(
        [*foreign, "EMBEDYARD_PORT", "BATCH_SIZE", "MAX_CLIENTS", "LOG_DIR", "REDIS_PORT", "MODEL"], "x"
    )

    assert unknown_settings(linked, tmp_path / ".env") == ()
    assert unknown_settings({"MAX_QUE_SIZE": "7"}, None) == (
        "MAX_QUE_SIZE is not a setting, and is ignored: did you mean MAX_QUEUE_SIZE?",
    )
    assert unknown_settings(CONTRACT, ROOT / ".env.example") == ()
