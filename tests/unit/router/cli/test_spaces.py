"""`embedyard spaces`: lists the spaces of registries and servers, and says which indexes must be rebuilt."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.lib.models import edit_json
from engines.host import Host, HostConfig
from engines.space import Ingredients
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, fake_runtime
from engines.types import Budget
from router.app import create_app
from router.backends.local import LocalBackend
from router.cli.main import cli
from router.cli.space_comparison import Compared, ModelSide, compare
from router.config.settings import VARIABLES, Settings
from router.registry.registry import Registry
from tests.testkit.model_folders import sentence_model, tensors
from tests.testkit.servers import serving_in_thread
from tests.testkit.sparse_models import save_splade

MODEL = "  - {name: NAME, source: ./FOLDER, prompts: {query: 'q: '}}\n"


@pytest.fixture(autouse=True)
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model, its copy with other weights, and no settings of this process."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("DEVICE", "cpu")
    sentence_model(tmp_path / "one", dense=True)
    sentence_model(tmp_path / "two", tensors(seed=1), dense=True)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")


def registry(name: str, **folders: str) -> str:
    models = [MODEL.replace("NAME", model).replace("FOLDER", folder) for model, folder in folders.items()]
    Path(name).write_text("version: 1\nmodels:\n" + "".join(models))
    return name


def spaces(*args: str) -> Result:
    return CliRunner().invoke(cli, ["spaces", *args], prog_name="embedyard")


def rows(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


def test_a_registrys_spaces_are_listed_from_the_files() -> None:
    result = spaces(registry("a.yaml", m="one", gone="none"))

    assert result.exit_code == 0
    assert [row[:4] for row in rows(result)] == [
        ["m", "dense", "-", "4"], ["m", "dense", "query", "4"], ["gone", "", "", ""],
    ]  # fmt: skip
    assert len({row[4] for row in rows(result)[:2]}) == 2
    assert "not on disk" in rows(result)[2][4] or "does not exist" in rows(result)[2][4]


def test_the_same_models_keep_their_indexes_wherever_they_are() -> None:
    result = spaces(registry("a.yaml", m="one", old="two"), registry("b.yaml", m="copy", new="two", more="one"))

    assert result.exit_code == 0
    assert rows(result) == [
        ["m", "same", ""], ["old", "same", "named new in B"], ["new", "only in B", ""], ["more", "only in B", ""],
    ]  # fmt: skip


def test_another_model_under_the_same_name_is_changed_and_says_what() -> None:
    result = spaces(registry("a.yaml", m="one"), registry("b.yaml", m="two"))

    ((name, verdict, why),) = rows(result)
    assert (result.exit_code, name, verdict) == (1, "m", "changed")
    assert why.startswith("weights ")
    assert ";" not in why


def test_a_prompt_that_changed_is_named_alone() -> None:
    first = registry("a.yaml", m="one")
    Path("b.yaml").write_text(Path("a.yaml").read_text().replace("q: ", "Q: "))
    result = spaces(first, "b.yaml")

    assert result.exit_code == 1
    assert rows(result) == [
        ["m", "changed", "4 dimensions with the prompt 'query': another prompt, width or normalization"]
    ]


def test_what_is_missing_or_unknown_is_no_success() -> None:
    a, b = registry("a.yaml", m="one", lost="two", gone="none"), registry("b.yaml", m="one", gone="none")

    result = spaces(a, b)

    assert result.exit_code == 1
    assert [row[:2] for row in rows(result)] == [["m", "same"], ["lost", "only in A"], ["gone", "unknown"]]


def test_auto_means_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    name = registry("a.yaml", m="one")

    assert spaces(name).stdout == spaces(name, "--device", "cpu").stdout
    assert spaces(name).stdout != spaces(name, "--device", "cuda").stdout


@pytest.mark.parametrize("args", [("none.yaml",), ("a.yaml", "none.yaml"), ("a.yaml", "http://127.0.0.1:9")])
def test_what_cannot_be_read_is_a_mistake(args: tuple[str, ...]) -> None:
    registry("a.yaml", m="one")

    result = spaces(*args)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_json_has_the_ingredients_and_the_verdicts() -> None:
    a, b = registry("a.yaml", m="one"), registry("b.yaml", m="two")

    listed, compared = json.loads(spaces(a, "--json").stdout), json.loads(spaces(a, b, "--json").stdout)

    assert {"weights", "config", "pooling", "max_tokens", "numeric"} <= listed["m"]["ingredients"]["values"].keys()
    assert (compared[0]["model"], compared[0]["verdict"]) == ("m", "changed")


@pytest.fixture
def server() -> Iterator[str]:
    """A server of fakes with `m` in memory and `cold` on disk."""
    specs = {name: ModelSpec(model_id=name, source=f"fake/{name}", preload=name == "m") for name in ("m", "cold")}
    host = Host(
        HostConfig(host_id="cpu", budget=Budget(size_bytes=10**6)), specs, FakeFiles(), FakeLoader(), fake_runtime()
    )
    app = create_app(Settings(), Registry(models=specs, default_model="m"), LocalBackend([host], specs))
    with serving_in_thread(app) as url:
        yield url


def test_a_servers_spaces_are_those_of_the_models_in_memory(server: str) -> None:
    listed = rows(spaces(server))

    assert [row[:4] for row in listed] == [["m", "dense", "-", "16"], ["cold", "", "", ""]]
    assert listed[0][4].startswith("s1-")
    assert "preload it" in listed[1][4]


def test_servers_and_registries_are_compared_with_each_other(server: str) -> None:
    same, other = spaces(server, server), spaces(registry("a.yaml", m="one"), server)

    assert [row[:2] for row in rows(same)] == [["m", "same"], ["cold", "unknown"]]
    assert (same.exit_code, other.exit_code) == (1, 1)
    assert "weights" in rows(other)[0][2]


def test_without_ingredients_the_digits_say_which_part_differs() -> None:
    a = ModelSide(spaces={"": {"8": "s1-aaaabbbbcccc-0123456789abcdef"}})
    b = ModelSide(spaces={"": {"8": "s1-aaaaffffcccc-fedcba9876543210"}}, ingredients=Ingredients({"weights": "x"}))
    old = ModelSide(spaces={"": {"8": "s0-old"}})
    none = ModelSide(spaces={"": {"4": "s1-aaaabbbbcccc-0123456789abcdef"}})

    assert compare({"m": a}, {"m": b}) == [
        Compared(model="m", verdict="changed", why=("8 dimensions without a prompt: another tokenizer or modules",))
    ]
    assert compare({"m": a}, {"m": old})[0].why == (
        "8 dimensions without a prompt: fingerprints of different versions",
    )
    assert compare({"m": a}, {"m": none})[0].why == ("8 dimensions without a prompt: not in B",)


def test_b_may_have_more_prompts_than_a() -> None:
    row = {"8": "s1-aaaabbbbcccc-0123456789abcdef"}

    assert compare({"m": ModelSide(spaces={"": row})}, {"m": ModelSide(spaces={"": row, "new": row})})[0].is_good


def test_a_head_for_another_output_changes_the_model_whose_dense_vectors_are_the_same() -> None:
    registry("a.yaml", m="one")
    for folder, content in (("one", b"a head"), ("copy", b"another head")):
        (Path(folder) / "colbert_linear.pt").write_bytes(content)
    registry("b.yaml", m="copy")
    registry("c.yaml", renamed="copy")

    changed, renamed = spaces("a.yaml", "b.yaml"), spaces("a.yaml", "c.yaml")

    assert [row[:2] for row in rows(changed)] == [["m", "changed"]]
    assert rows(changed)[0][2].startswith("multi_vector:weights")
    assert changed.exit_code == 1
    assert [row[:2] for row in rows(renamed)] == [["m", "only in A"], ["renamed", "only in B"]]


def test_models_without_dense_vectors_are_compared_by_what_decides_theirs(tmp_path: Path) -> None:
    save_splade(tmp_path / "one-sparse")
    shutil.copytree(tmp_path / "one-sparse", tmp_path / "same-sparse")
    shutil.copytree(tmp_path / "one-sparse", tmp_path / "sum")
    edit_json(tmp_path / "sum" / "1_SpladePooling" / "config.json", pooling_strategy="sum")
    for name, folder in (("a", "one-sparse"), ("b", "same-sparse"), ("c", "sum")):
        registry(f"{name}.yaml", m=folder)
    Path("d.yaml").write_text(Path("b.yaml").read_text().replace("q: ", "find: "))

    same, pooled, prompted = (spaces("a.yaml", f"{name}.yaml") for name in "bcd")

    assert (rows(same)[0][:2], same.exit_code) == (["m", "same"], 0)
    assert (rows(pooled)[0][:2], pooled.exit_code) == (["m", "changed"], 1)
    assert "SpladePooling" in rows(pooled)[0][2]
    assert rows(prompted) == [
        ["m", "changed", "sparse with the prompt 'query': another prompt, width or normalization"]
    ]


def test_the_spaces_of_sparse_outputs_are_listed_by_side_and_known_under_another_name() -> None:
    save_splade(Path("sparse"))
    shutil.copytree("sparse", "same")
    registry("a.yaml", m="sparse")
    registry("b.yaml", renamed="same")

    listed, compared = rows(spaces("a.yaml")), rows(spaces("a.yaml", "b.yaml"))

    assert [row[:4] for row in listed] == [
        ["m", f"sparse of a {side}", prompt, "-"] for prompt in ("-", "query") for side in ("query", "document")
    ]
    assert len({row[4] for row in listed}) == 4
    assert compared == [["m", "same", "named renamed in B"], ["renamed", "only in B", ""]]


def test_the_vectors_of_tokens_are_compared_where_a_server_tells_no_ingredients() -> None:
    space, other = "s1-aaaabbbbcccc-0123456789abcdef", "s1-aaaaffffcccc-fedcba9876543210"
    dense = {"": {"8": space}}
    a, b = (ModelSide(spaces=dense, output_spaces={"sparse": {"": {"query": each}}}) for each in (space, other))
    none, old = ModelSide(spaces=dense), ModelSide(spaces=dense, output_spaces=None)

    assert compare({"m": a}, {"m": b}) == [
        Compared(model="m", verdict="changed", why=("sparse without a prompt: another tokenizer or modules",))
    ]
    assert compare({"m": a}, {"m": none})[0].why == ("sparse without a prompt: not in B",)
    assert compare({"m": a}, {"m": old})[0].is_good, "a server of before does not list them"
    assert compare({"m": none}, {"m": a})[0].is_good
