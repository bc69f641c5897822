"""Log lines have one format for all libraries, and no variables in tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SCRIPT = """
import logging, sys
import structlog
from router.observability.logs import configure_logging

configure_logging(sys.argv[1], sys.argv[2])
log = structlog.get_logger("any")
log.debug("too.quiet")
with structlog.contextvars.bound_contextvars(request_id="r-1"):
    log.info("request.done", status=200)
def fail(key):
    raise RuntimeError("broken")
try:
    fail("hunter" + "2")
except RuntimeError as error:
    log.error("request.crashed", exc_info=error, thing=object())
logging.getLogger("uvicorn.error").info("chatter")
logging.getLogger("huggingface_hub").warning("slow %s", "network")
"""


def run(log_format: str, log_level: str) -> list[str]:
    """Return the stderr of a process; logging is configured once per process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, log_format, log_level], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_a_line_is_one_json_object_when_nobody_watches(log_format: str) -> None:
    done, crashed, foreign = [json.loads(line) for line in run(log_format, "info")]

    assert (done["event"], done["status"], done["request_id"], done["level"]) == ("request.done", 200, "r-1", "info")
    assert done["timestamp"].endswith("Z")
    assert crashed["exception"].startswith("Traceback")
    assert "RuntimeError: broken" in crashed["exception"]
    assert (foreign["event"], foreign["level"], foreign["logger"]) == ("slow network", "warning", "huggingface_hub")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_variables(log_format: str) -> None:
    assert "hunter2" not in "\n".join(run(log_format, "info"))


def test_a_console_line_is_for_eyes() -> None:
    lines = run("console", "info")

    assert "request.done" in lines[0]
    assert "status=200" in lines[0]
    assert any("RuntimeError: broken" in line for line in lines)
    assert "slow network" in lines[-1]


def test_a_level_silences_what_is_below_it() -> None:
    assert [json.loads(line)["event"] for line in run("json", "error")] == ["request.crashed"]


CHATTER = """
import logging, structlog
from router.observability.logs import configure_logging

configure_logging("json", "info")
log, other = structlog.get_logger(), logging.getLogger("other")
input()
for number in range(1000):
    log.info("line", number=number, text="ü" * 100)
    other.warning("line %d", number)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_several_processes_are_not_glued_together(unbuffered: str) -> None:
    reading, writing = os.pipe()
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    talkers = [
        subprocess.Popen([sys.executable, "-c", CHATTER], cwd=ROOT, env=environ, stdin=subprocess.PIPE, stderr=writing)
        for _ in range(3)
    ]
    os.close(writing)
    for talker in talkers:
        assert talker.stdin is not None
        talker.stdin.write(b"go\n")
        talker.stdin.close()
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    for talker in talkers:
        talker.wait(20)

    assert len(lines) == 3 * 2000
    assert all(json.loads(line)["event"].startswith("line") for line in lines)
