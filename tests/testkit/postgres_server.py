"""Starts a PostgreSQL of Debian's package for tests, in a folder of its own, without a TCP port."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yield a SQLAlchemy URL; skips the test where the server or its driver is missing."""
    pytest.importorskip("psycopg")
    if not _FOLDERS:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        prefix: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "postgres")
            prefix = ["runuser", "-u", "postgres", "--"]

        def run(program: str, *arguments: str) -> None:
            command = [*prefix, str(_FOLDERS[-1] / program), "-D", f"{folder}/data", *arguments]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            assert done.returncode == 0, done.stderr.decode()

        run("initdb", "-A", "trust", "-U", "me", "--no-sync")
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "start")
        try:
            yield f"postgresql+psycopg://me@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
