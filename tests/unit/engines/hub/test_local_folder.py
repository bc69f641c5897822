"""Tests that changes to a local folder do not affect a loaded model, and that the next load uses the changed folder."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lib.engine_kit import Kit, embed
from benchmarks.lib.small_memory import RealServer, Truth, build_truths, real_server, specs_of
from engines.hub.store import ModelStore
from engines.loading.builders import read_model
from engines.pool.slot import PoolPolicy
from engines.spec import ModelSpec
from engines.types import ModelFiles

NAME, OTHER = "bert-cls", "mpnet-mean"
RECIPES = ("bert-cls", "t5-mean-dense", "static", "bert-pickled")
WEIGHTS = "model.safetensors"
TEXTS = ["one text", "and another one"]
CHILD = """
import asyncio, sys
from pathlib import Path
from benchmarks.lib.engine_kit import Kit, embed

kit = Kit(Path("unused"))
loaded = [kit.load(Path(folder)) for folder in sys.argv[1:]]
for _ in range(2):
    for engine in loaded:
        print(embed(engine, {texts!r}).tobytes().hex(), flush=True)
    sys.stdin.readline()
for engine in loaded:
    engine.close()
kit.close()
"""


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    return build_truths(tmp_path_factory.mktemp("folders"), [NAME, OTHER])


def _copy(kit: Kit, name: str, target: Path) -> Path:
    folder = Path(shutil.copytree(kit.recipe_folder(name.replace("bert-pickled", "bert-cls")), target))
    if name == "bert-pickled":
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    return folder


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]


def _vectors(child: "subprocess.Popen[str]") -> dict[str, str]:
    """Returns the vectors that the process prints next, in hex, by the model; empty of those at which it has died."""
    assert child.stdout is not None
    return {name: child.stdout.readline() for name in RECIPES}


def test_weights_that_are_truncated_in_place_neither_end_the_process_nor_bend_a_vector(
    kit: Kit, tmp_path: Path
) -> None:
    """All models in one process, whose imports take 4 s."""
    folders = [_copy(kit, name, tmp_path / name) for name in RECIPES]
    command = [sys.executable, "-c", CHILD.format(texts=TEXTS), *map(str, folders)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        before = _vectors(child)
        for path in (path for folder in folders for path in _weight_files(folder)):
            os.truncate(path, 0)
        child.stdin.write("go on\n" * 2)
        child.stdin.flush()
        after = _vectors(child)

    assert child.returncode == 0
    assert before == after
    assert all(before.values())


@pytest.mark.parametrize("name", RECIPES)
def test_weights_that_are_written_over_in_place_do_not_bend_a_vector(kit: Kit, tmp_path: Path, name: str) -> None:
    folder = _copy(kit, name, tmp_path / "m")
    engine = kit.load(folder)
    before = embed(engine, TEXTS)

    for path in _weight_files(folder):
        with path.open("r+b") as file:
            file.write(b"\x01" * path.stat().st_size)

    assert np.array_equal(embed(engine, TEXTS), before)


def test_a_model_whose_weights_are_read_takes_as_many_bytes_as_a_mapped_one(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy(kit, NAME, tmp_path / "m")
    read_bytes = kit.load(folder).weight_bytes
    monkeypatch.setattr("engines.loading.pretrained.is_writable_in_place", lambda source: False)

    assert kit.load(folder).weight_bytes == read_bytes


def _replace(folder: Path, other: Path) -> None:
    """Replaces the folder's files by those of another model, under the same names."""
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


async def _ask(server: RealServer, truth: Truth) -> None:
    answer = await server.embed(NAME, truth.texts[:3])
    assert answer.status_code == 200, answer.text
    truth.check(range(3), answer.json()["data"])


def _folder_of(truths: dict[str, Truth], tmp_path: Path) -> tuple[Path, dict[str, ModelSpec]]:
    folder = Path(shutil.copytree(truths[NAME].folder, tmp_path / "m"))
    spec = specs_of({NAME: truths[NAME]}, source=str(folder))[NAME]
    return folder, {NAME: spec}


async def test_a_folder_that_changed_while_its_model_was_out_of_memory_is_served_as_it_is(
    truths: dict[str, Truth], tmp_path: Path
) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    async with real_server(specs, state=tmp_path / "state") as server:
        await _ask(server, truths[NAME])
        before = (await server.slot(NAME))["revision"]
        await server.client.post(f"/admin/models/{NAME}/evict", json={})
        _replace(folder, truths[OTHER].folder)

        await _ask(server, truths[OTHER])
        slot = await server.slot(NAME)

    assert slot["revision"] != before
    assert (slot["state"], slot["last_error"]) == ("ready", None)


async def test_a_folder_that_changed_before_its_first_load_is_served_as_it_is(
    truths: dict[str, Truth], tmp_path: Path
) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    async with real_server(specs, state=tmp_path / "state") as server:
        await server.until(NAME, state="cold")
        _replace(folder, truths[OTHER].folder)

        await _ask(server, truths[OTHER])


class Loads:
    """Intercepts the reading of models and runs a callback during each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.during: list[Callable[[], None]] = []
        self.num = 0
        monkeypatch.setattr("engines.loading.builders.read_model", self._read)

    def _read(self, *args: object, **options: object) -> object:
        self.num += 1
        model = read_model(*args, **options)  # type: ignore[arg-type]  # handed on
        if self.during:
            self.during.pop(0)()
        return model


async def test_a_folder_that_changes_during_a_load_is_loaded_once_more(
    truths: dict[str, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    loads = Loads(monkeypatch)
    loads.during = [lambda: _replace(folder, truths[OTHER].folder)]
    async with real_server(specs, state=tmp_path / "state") as server:
        await _ask(server, truths[OTHER])

    assert loads.num == 2


async def test_a_folder_that_goes_on_changing_is_said_to_and_served_later(
    truths: dict[str, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    loads = Loads(monkeypatch)
    loads.during = [lambda: os.utime(folder / WEIGHTS)] * 2
    async with real_server(specs, state=tmp_path / "state", rules=PoolPolicy(retry_s=(0.2, 0.2))) as server:
        answer = await server.embed(NAME)
        while (later := await server.embed(NAME)).status_code != 200:
            assert later.status_code == 503
            await asyncio.sleep(0.1)
        await _ask(server, truths[NAME])

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "model_load_failed")
    assert "files_changed" in error["message"]
    assert str(tmp_path) not in error["message"]


async def test_a_folder_that_has_gone_is_said_so_and_served_when_it_is_back(
    truths: dict[str, Truth], tmp_path: Path
) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    async with real_server(specs, state=tmp_path / "state", rules=PoolPolicy(retry_denied_s=(0.2, 0.2))) as server:
        await server.until(NAME, state="cold")
        shutil.move(folder, tmp_path / "away")
        gone = await server.embed(NAME)
        shutil.move(tmp_path / "away", folder)
        await asyncio.sleep(0.25)
        await _ask(server, truths[NAME])

    assert gone.status_code == 503
    assert "does not exist" in gone.json()["error"]["message"]


def test_files_are_current_until_one_of_them_is_written(truths: dict[str, Truth], tmp_path: Path) -> None:
    folder, specs = _folder_of(truths, tmp_path)
    store = ModelStore()
    files = store.locate(specs[NAME])
    assert isinstance(files, ModelFiles)

    before = store.is_current(specs[NAME], files)
    os.utime(folder / "tokenizer.json")
    after = store.is_current(specs[NAME], files)
    (folder / WEIGHTS).unlink()

    assert (before, after) == (True, False)
    assert not store.is_current(specs[NAME], files)
