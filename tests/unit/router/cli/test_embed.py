"""`embedyard embed`: its outcome and exit codes, by a server over fake engines; and its memory."""

import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines.testing.engine import fake_vector
from engines.testing.outputs import fake_row
from router.bulk.journal import JobState
from router.bulk.progress import LineProgress, Meter
from router.bulk.records import Cursor, WindowAnswer
from router.bulk.sources import open_sources
from router.cli import embed
from router.cli.main import cli
from router.config.settings import VARIABLES
from tests.testkit.clocks import FakeClock
from tests.testkit.output_servers import serve_outputs
from tests.unit.router.bulk.kit import FakeEmbedder, job_of, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An input with one bad line, and no settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    (tmp_path / "in.txt").write_text("one text\nanother one\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "one text"}\n{torn\n')
    return tmp_path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_outputs() as url:
        yield url


def embed_files(*args: str) -> Result:
    return CliRunner().invoke(cli, ["embed", *args], prog_name="embedyard")


def test_a_matrix_and_its_ids_are_written(folder: Path, url: str) -> None:
    result = embed_files("dense", "in.txt", "-o", "out.npy", "--url", url)

    assert result.exit_code == 0, result.output
    expected = np.stack([fake_vector("dense", text) for text in ("one text", "another one")])
    assert np.array_equal(np.load("out.npy"), expected)
    assert Path("out.npy.ids.jsonl").read_text() == '{"id":1}\n{"id":2}\n'
    assert result.stderr.endswith("out.npy: 2 texts, 8 tokens\n")
    assert sorted(path.name for path in folder.iterdir()) == [
        "bad.jsonl", "in.txt", "out.npy", "out.npy.ids.jsonl",
    ]  # fmt: skip


def test_several_outputs_of_one_pass_are_written_as_the_server_gives_them(folder: Path, url: str) -> None:
    outputs = "dense,sparse,multi_vector"
    result = embed_files("bge-m3", "in.txt", "-o", "out.jsonl", "--url", url, "--output", outputs)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]

    assert result.exit_code == 0, result.output
    for row, text in zip(rows, ("one text", "another one"), strict=True):
        expected = fake_row(text)
        assert np.array_equal(np.array(row["embedding"], np.float32), fake_vector("bge-m3", text))
        assert row["sparse_embedding"]["indices"] == expected.entries.tolist()
        assert np.array_equal(np.array(row["multi_vector_embedding"], np.float32), expected.vectors)


def test_refused_lines_change_the_exit_code(folder: Path, url: str) -> None:
    result = embed_files("dense", "bad.jsonl", "-o", "out.jsonl", "--url", url)

    assert result.exit_code == 1
    assert "1 refused: out.jsonl.errors.jsonl" in result.stderr
    assert json.loads(Path("out.jsonl.errors.jsonl").read_text())["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["in.txt", "-o", "in.txt"], "the format of in.txt is unknown: name it with --output-format"),
        (["none.txt", "-o", "out.jsonl"], "none.txt is not a file"),
        (["in.txt", "-o", "bad.jsonl"], "bad.jsonl exists: --overwrite replaces it"),
        (["in.txt", "-o", "none/out.jsonl"], "none is not a folder"),
        (["in.txt", "-o", "out.npy", "--output", "dense,sparse"], ".npy holds dense vectors only"),
        (["in.txt", "-o", "out.jsonl", "--prompt", "a", "--input-type", "query"], "--prompt cannot be combined"),
        (["in.txt", "-o", "out.jsonl", "--output", "dens"], "'dens' is not one of dense, sparse, multi_vector"),
        (["in.txt", "-o", "out.jsonl", "--ray", "local"], "--ray cannot be combined with --url"),
        (["in.txt", "-o", "out.jsonl", "--dtype", "int8"], "has no calibration on that server"),
    ],
)
def test_what_must_be_corrected_is_said(folder: Path, url: str, args: list[str], words: str) -> None:
    result = embed_files("bge-m3", *args, "--url", url)

    assert result.exit_code == 2
    assert words in result.stderr
    assert not Path("out.jsonl").exists()


def test_standard_input_is_refused_on_a_cluster(folder: Path) -> None:
    result = embed_files("dense", "-", "--format", "lines", "-o", "out.jsonl", "--ray", "local")

    assert result.exit_code == 2
    assert "standard input (-) cannot be read with --ray" in result.stderr


def test_without_ray_the_remedy_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("os.environ", dict(os.environ))  # the module sets some
    result = embed_files(str(folder) + "/", "in.txt", "-o", "out.jsonl", "--ray", "local")

    assert result.exit_code == 2
    assert result.stderr == "--ray needs Ray Data, which is not installed: pip install 'embedyard[ray]'\n"


def test_an_interrupted_job_says_how_to_go_on(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(*_: object) -> JobState:
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "_run", interrupt)
    monkeypatch.setattr("sys.argv", ["embedyard", "embed", "m", "in.txt", "-o", "a b.jsonl", "--api-key", "sk-secret"])
    result = embed_files("dense", "in.txt", "-o", "out.jsonl", "--url", url)

    assert result.exit_code == 130
    assert "go on with: embedyard embed m in.txt -o 'a b.jsonl' --api-key KEY" in result.stderr
    assert "sk-secret" not in result.stderr


def test_progress_says_rates_and_the_time_left_once_a_minute(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x" * 1000)
    clock, lines = FakeClock(), list[str]()
    progress = LineProgress(Meter(open_sources([str(tmp_path / "in.txt")], None), clock), lines.append, clock=clock)
    progress.begin(JobState(cursor=Cursor(offset=200, number=4), rows=4, tokens=40))
    for step in range(1, 5):
        clock.advance(30.0)
        progress.advance(
            JobState(
                cursor=Cursor(offset=200 + 100 * step), rows=4 + 30 * step, tokens=40 + 300 * step, refused=step - 1
            )
        )

    assert lines == [
        "goes on behind record 4",
        "40.0%, 64 texts, 1 refused: 1.0 texts/s, 10 tokens/s, 0:03:00 left",
        "60.0%, 124 texts, 3 refused: 1.0 texts/s, 10 tokens/s, 0:02:00 left",
    ]


class ForgetfulEmbedder(FakeEmbedder):
    """Keeps no texts."""

    async def embed(self, texts: list[str]) -> WindowAnswer:
        self.windows.clear()
        return await super().embed(texts)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 10_000}) + "\n"

    def peak_of(lines: int) -> int:
        (tmp_path / "in.jsonl").write_text(line * lines)
        tracemalloc.start()
        try:
            run(job_of(tmp_path / "in.jsonl", tmp_path / f"{lines}.npy", window_texts=8), ForgetfulEmbedder())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak_of(64), peak_of(320)

    assert large < 1.2 * small
    assert large < 16e6 / 3  # of a file of 16 MB
