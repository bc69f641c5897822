"""Tests the width of vectors as read from files against what sentence-transformers computes."""

from pathlib import Path

import pytest

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES
from engines.planner import Forecaster, Measurements, native_width
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, fake_specs


@pytest.mark.parametrize("name", RECIPES)
def test_the_files_say_how_wide_the_vectors_are(kit: Kit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = kit.recipe_folder(name)
    spec = ModelSpec(**{"model_id": "m", "source": str(folder), **RECIPES[name].spec})
    model = kit.reference(name)
    monkeypatch.setattr(model, "truncate_dim", None)  # other tests have the same model

    assert native_width(folder, spec) == model.encode(["x"], show_progress_bar=False).shape[1]


def test_the_registrys_pooling_counts(kit: Kit) -> None:
    spec = ModelSpec(model_id="m", source="s", pooling=("cls", "mean", "max"))

    assert native_width(kit.recipe_folder("bert-cls"), spec) == 3 * 48


@pytest.mark.parametrize("content", ["", "{}", '{"hidden_size": "wide"}', "[]"])
def test_files_that_do_not_say_give_no_width(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)

    assert native_width(tmp_path, ModelSpec(model_id="m", source="s")) is None


def test_no_files_give_no_width(tmp_path: Path) -> None:
    assert native_width(tmp_path / "nothing", ModelSpec(model_id="m", source="s")) is None


@pytest.mark.parametrize(("device", "workspace_bytes"), [("cpu", 512 * 2**20), ("cuda:1", 1024 * 2**20)])
def test_a_forecast_counts_the_batches_that_run_at_once(device: str, workspace_bytes: int) -> None:
    need = Forecaster(FakeFiles(), Measurements(), device).forecast(fake_specs("a")["a"]).need

    assert need is not None
    assert need.workspace_bytes == workspace_bytes
