"""The memory of a process that embeds a file, as the system counts it: pyarrow's buffers are no memory of Python's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
TEXT = "word " * 400
ROWS = 40_000
"""80 MB."""

_RUN = """
import asyncio, sys
from pathlib import Path
import psutil
from tests.unit.router.bulk.kit import FakeEmbedder, Silent, job_of
from router.bulk.job import EmbedderRunner, run_job
if sys.argv[1].endswith("parquet") or sys.argv[2].endswith("parquet"):
    import pyarrow.parquet

class Forgetful(FakeEmbedder):
    async def embed(self, texts):
        self.windows.clear()
        return await super().embed(texts)

class Begun(Silent):
    def begin(self, state):
        self.rss = psutil.Process().memory_info().rss

begun, job = Begun(), job_of(Path(sys.argv[1]), Path(sys.argv[2]), window_texts=2048)
state = asyncio.run(run_job(job, EmbedderRunner(job, Forgetful()), begun))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(state.rows, int(peak.split()[1]) * 1024 - begun.rss)
"""


@pytest.mark.parametrize(("source", "out", "limit_mb"), [
    ("in.jsonl", "out.npy", 24), ("in.parquet", "out.npy", 60), ("in.jsonl", "out.parquet", 100),
])  # fmt: skip
def test_the_memory_of_a_job_is_bounded(tmp_path: Path, source: str, out: str, limit_mb: int) -> None:
    if source.endswith("parquet"):
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pa.table({"text": [f"{row} {TEXT}" for row in range(ROWS)]})
        parquet.write_table(table, tmp_path / source, row_group_size=ROWS, use_dictionary=False, compression="none")
    else:
        with (tmp_path / source).open("w") as file:
            file.writelines(json.dumps({"text": f"{row} {TEXT}"}) + "\n" for row in range(ROWS))
    words = [sys.executable, "-c", _RUN, str(tmp_path / source), str(tmp_path / out)]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    rows, growth = map(int, printed.split())
    assert rows == ROWS
    assert (tmp_path / source).stat().st_size > 80e6
    assert growth < limit_mb * 1e6
