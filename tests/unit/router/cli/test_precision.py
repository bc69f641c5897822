"""`embedyard precision`: what it prints and keeps, and what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec import structs

from engines import machine
from engines.planner import ModelStore, PrecisionStore, fast_dtypes
from engines.spec import ModelSpec, Precision
from engines.types import ModelFiles
from router.cli import doctor
from router.cli.main import cli
from router.cli.precision_offers import start_lines
from router.config.settings import VARIABLES, Settings
from router.registry.registry import parse_registry

REGISTRY = "version: 1\nmodels:\n  - {name: here, source: org/here}\n"
FILES = ModelFiles(path="/m", revision="r1", size_bytes=1)


def _measured(dtype: str = "int8") -> Precision:
    return Precision(
        dtype=dtype, worst_cosine=0.9951, median_cosine=0.997, recall_at_10=0.95, speedup=1.8, size_ratio=0.25,
        num_texts=50,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one model on disk, whose dtypes are measured at once."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setattr(ModelStore, "locate", lambda *_: FILES)
    monkeypatch.setattr(machine, "measure_dtype", lambda spec, files, dtype, texts, state: _measured(dtype))
    Path("registry.yaml").write_text(REGISTRY)


def precision(*args: str) -> Result:
    return CliRunner().invoke(cli, ["precision", *args], prog_name="embedyard")


def test_it_prints_and_keeps_what_was_measured(tmp_path: Path) -> None:
    result = precision("here", "--dtype", "int8", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["worst_cosine"] == 0.9951
    spec = ModelSpec(model_id="here", source="org/here")
    assert PrecisionStore(tmp_path).get(spec, "r1", "int8", "cpu") == _measured()


def test_a_table_says_whether_the_dtype_would_be_served() -> None:
    result = precision("here", "--dtype", "int8", "--dtype", "bfloat16")

    int8, bfloat16 = result.stdout.splitlines()[-2:]
    assert int8.split()[0] == "int8"
    assert "allowed" in int8
    assert "below min_cosine 0.999" in bfloat16


def test_what_was_measured_on_own_texts_decides_and_the_other_is_shown_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision("here", "--dtype", "int8")
    own = structs.replace(_measured(), worst_cosine=0.95, texts="own", num_texts=2)
    monkeypatch.setattr(machine, "measure_dtype", lambda *_: own)
    Path("texts.txt").write_text("one\ntwo\n")

    first, second = precision("here", "texts.txt", "--dtype", "int8").stdout.splitlines()[-2:]

    assert "own (2)" in first
    assert "below min_cosine 0.99" in first
    assert "built-in (50)" in second
    assert "your own texts decide" in second


@pytest.mark.parametrize("model", ["org/elsewhere", "./folder"])
def test_a_hub_id_or_a_folder_need_not_be_in_the_registry(model: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    result = precision(model, "--dtype", "int8")

    assert result.exit_code == 0
    assert "allowed" in result.stdout


@pytest.mark.skipif(not fast_dtypes(), reason="this CPU has no instructions for a reduced dtype")
def test_a_server_says_at_start_what_would_be_faster_or_how_to_find_out(tmp_path: Path) -> None:
    registry, settings = parse_registry(REGISTRY), Settings(state_dir=tmp_path)

    before = start_lines(registry, settings)
    precision("here", "--dtype", "int8")
    after = start_lines(registry, settings)

    assert "embedyard precision MODEL" in before[0]
    assert after == ["here: int8 would be 1.8 × as fast here, with 25% of the memory, worst cosine 0.9951: set dtype"]
    assert start_lines(parse_registry(REGISTRY.replace("}", ", dtype: int8}")), settings) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("unknown",), 2, "'unknown' not found"),
        (("here", "missing.txt"), 2, "cannot be read"),
        (("here", "--dtype", "int3"), 2, "int3"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = precision(*arguments)

    assert result.exit_code == code
    assert message in result.output


def test_a_model_that_is_not_on_disk_has_to_be_pulled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelStore, "locate", lambda *_: None)

    result = precision("here", "--dtype", "int8")

    assert result.exit_code == 1
    assert "embedyard pull here" in result.output


def test_doctor_names_the_dtypes_that_would_be_faster(tmp_path: Path) -> None:
    precision("here", "--dtype", "int8")

    findings = list(doctor.check_precision(parse_registry(REGISTRY), Settings(state_dir=tmp_path, device=("cpu",))))

    assert "here: int8 would be 1.8 × as fast here" in findings[0].detail
