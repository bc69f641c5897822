"""Log lines: one form for all libraries, and no variables in tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import logging, sys
import structlog
from router.telemetry import configure_logging

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
    """What a process writes to stderr; logging is configured once for a whole process."""
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
