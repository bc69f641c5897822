"""`embedyard plan`: on this machine without a server, and on a running server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from benchmarks.lib.hub import LoopbackHub, not_found
from engines.host import Host, HostConfig
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, fake_runtime
from engines.types import Budget
from router.app import create_app
from router.backends.local import LocalBackend
from router.cli.main import cli
from router.config.settings import VARIABLES, Settings
from router.registry.registry import Registry
from tests.testkit.model_folders import plain_model, sentence_model, tensors
from tests.testkit.servers import serving_in_thread

ELEMENTS = 1_000_000
WEIGHTS_MB = 4.0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with one model, a folder with another, and a registry of both; without this process's settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "registry.yaml").write_text(
        "version: 1\nmemory: {budget: 1GiB}\nmodels:\n"
        "  - {name: remote, source: org/remote, aliases: [far]}\n"
        "  - {name: local, source: ./local}\n"
        "  - {name: gpu, source: ./local, device: cuda}\n"
        "  - {name: lost, source: org/lost}\n"
    )
    sentence_model(tmp_path / "local", tensors(ELEMENTS))
    with LoopbackHub() as hub:
        hub.add("org/remote", plain_model(tmp_path / "remote", tensors(ELEMENTS)))
        hub.add("org/lost", tmp_path / "remote")
        hub.fail("org/lost", not_found())
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"  # made of the endpoint at import
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def plan(*args: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *args], prog_name="embedyard")


def test_a_model_that_is_not_here_is_sized_by_the_hubs_headers(hub: LoopbackHub) -> None:
    result = plan("far", "--json")
    (found,) = json.loads(result.stdout)

    assert result.exit_code == 0
    assert (found["model_id"], found["state"], found["fits"]) == ("remote", "absent", True)
    assert found["need_bytes"] == pytest.approx(WEIGHTS_MB * 1e6 + 512 * 2**20, rel=0.01)
    assert found["free_bytes"] == 2**30
    assert hub.downloads("org/remote", "model.safetensors") == 1, "its header, and no more"


def test_several_are_summed_up(hub: LoopbackHub) -> None:
    result = plan("remote", "local")
    cells = [line.split("\t") for line in result.stdout.splitlines()]

    assert [(row[0], row[1], row[2], row[5]) for row in cells] == [
        ("remote", "cpu", "absent", "yes"),
        ("local", "cpu", "cold", "yes"),
    ]
    assert result.stderr.startswith("together 520 MiB of 1.0 GiB: they fit at once")


def test_a_model_of_the_hub_need_not_be_in_the_registry(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/unlisted", tmp_path / "remote")
    result = plan("org/unlisted", "--json")
    (found,) = json.loads(result.stdout)

    assert (result.exit_code, found["model_id"]) == (0, "unlisted")


def test_the_sum_over_devices_is_no_room_on_one_of_them(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The banner places model by model; so does the plan."""
    monkeypatch.setattr("router.cli.plan._devices", lambda settings: ("cpu", "cuda:0"))
    monkeypatch.setattr("engines.planner.read_device", half)
    result = plan("remote", "local")

    assert result.stderr.startswith("together 520 MiB of 954 MiB: they take turns")


def half(device: str, budget: Budget) -> object:
    from engines.planner import Device

    return Device(name=device, budget_bytes=500_000_000)


def test_what_can_never_fit_says_so_and_exits_1(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY_BUDGET", "16MiB")
    big = plan("local", "remote", "--json")
    monkeypatch.setattr("engines.planner.read_device", tiny)
    result = plan("local")

    assert big.exit_code == 0, "a guess of the workspace keeps nobody out"
    assert result.exit_code == 1
    assert "needs 3.8 MiB of a budget of 977 KiB: it can never fit" in result.stdout


def tiny(device: str, budget: Budget) -> object:
    from engines.planner import Device

    return Device(name=device, budget_bytes=1_000_000)


def test_a_model_for_another_device_does_not_fit(hub: LoopbackHub) -> None:
    result = plan("gpu")

    assert result.exit_code == 1
    assert "requires device cuda, which is not in DEVICE" in result.stdout


def test_an_unknown_size_is_a_question_mark(hub: LoopbackHub) -> None:
    cells = plan("lost").stdout.split("\t")

    assert (cells[3], cells[5]) == ("?", "?")
    for args in (["lost"], ["lost", "local"]):
        assert plan(*args).stderr.startswith("size not known of lost: the files are not on this machine")
        assert "embedyard pull lost downloads them" in plan(*args).stderr
    assert plan("remote", "lost", "local").stderr.startswith(
        "together 520 MiB of 1.0 GiB: they fit at once, without lost\nsize not known of lost: "
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "embedyard models lists those of the registry"),
        (["remotee"], "did you mean remote"),
        (["remotee"], "embedyard add ORG/NAME"),
        (["remote", "--registry", "nowhere.yaml"], "no file nowhere.yaml"),
        (["remote", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["remote", "--url", "nonsense"], "no server answers at nonsense"),
    ],
)
def test_a_mistake_exits_2_and_says_what_to_do(hub: LoopbackHub, args: list[str], words: str) -> None:
    result = plan(*args)

    assert result.exit_code == 2
    assert words in result.stderr


@pytest.fixture
def server() -> Iterator[str]:
    """A server with memory for one of two models, the first of which is loaded; the admin key is `boss`."""
    specs = {name: ModelSpec(model_id=name, source=f"fake/{name}") for name in ("org/a", "b")}
    config = HostConfig(host_id="cpu", budget=Budget(size_bytes=1100), workspace_bytes=100)
    host = Host(config, specs, FakeFiles(), FakeLoader(), fake_runtime())
    settings = Settings(admin_api_key="boss")
    with (
        capture_logs(),
        serving_in_thread(create_app(settings, Registry(models=specs), LocalBackend([host], specs))) as url,
    ):
        yield url


def test_a_server_reports_which_models_a_load_would_evict(
    hub: LoopbackHub, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_API_KEY", "boss")
    before = plan("org/a", "b", "--url", server, "--json")

    assert before.exit_code == 0
    assert [(p["model_id"], p["state"], p["need_bytes"], p["evict"]) for p in json.loads(before.stdout)] == [
        ("org/a", "cold", 1100, []),
        ("b", "cold", 1100, []),
    ]


@pytest.mark.parametrize(
    ("key", "words"), [("wrong", "set ADMIN_API_KEY or API_KEY"), ("boss", "Model 'nobody' not found")]
)
def test_a_servers_refusal_is_printed(
    hub: LoopbackHub, server: str, monkeypatch: pytest.MonkeyPatch, key: str, words: str
) -> None:
    monkeypatch.setenv("ADMIN_API_KEY", key)
    result = plan("nobody", "--url", server)

    assert result.exit_code == 2
    assert words in result.stderr


def test_a_server_that_is_not_embedyard_is_reported(hub: LoopbackHub) -> None:
    result = plan("remote", "--url", hub.url)

    assert result.exit_code == 2
    assert "is it Embedyard?" in result.stderr
