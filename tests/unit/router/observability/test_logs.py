"""Log lines have one format for all libraries, and no variables in tracebacks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from router.observability.console import ConsoleRenderer

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

    assert re.fullmatch(r"\d\d:\d\d:\d\d 200 0\.0ms id=r-1", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d error request\.crashed thing=.+", lines[1])
    assert lines[2].startswith("Traceback")
    assert "RuntimeError: broken" in lines
    assert lines[-1].endswith("warning slow network logger=huggingface_hub")


REQUEST = {
    "timestamp": "12:30:01", "level": "info", "event": "request.done", "method": "POST", "route": "/v1/embeddings",
    "status": 200, "ms": 53.2, "texts": 2, "tokens": 12, "forward_ms": 50.1, "request_id": "r-1", "model": "mini",
}  # fmt: skip


def console(line: dict[str, object], *, has_colors: bool = False) -> str:
    return ConsoleRenderer(has_colors=has_colors)(None, "", dict(line))


def test_a_request_is_told_in_the_order_in_which_people_read() -> None:
    assert console(REQUEST) == "12:30:01 POST /v1/embeddings 200 53ms model=mini texts=2 tokens=12 id=r-1"


def test_a_refusal_says_what_the_caller_was_told() -> None:
    refused = REQUEST | {
        "status": 400, "ms": 1.24, "code": "invalid_value", "param": "dimensions", "message": 'above "384"',
        "level": "warning", "texts": 0, "tokens": 0,
    }  # fmt: skip

    assert console(refused) == (
        "12:30:01 warning POST /v1/embeddings 400 1.2ms model=mini code=invalid_value param=dimensions "
        'message="above \\"384\\"" id=r-1'
    )


def test_nothing_that_a_client_sends_ends_a_line_or_moves_the_cursor() -> None:
    evil = REQUEST | {"route": "", "path": "/a\n12:30:02 GET /\x1b[2J\u202e", "message": "a\r\nb"}
    shown = console(evil)

    assert shown.isprintable()
    assert r"POST /a\n12:30:02 GET /\x1b[2J\u202e 200" in shown
    assert console({"event": "two\nlines", "other": ["a b", "c"]}) == r'two\nlines other="a b",c'


def test_memory_is_shown_in_gib() -> None:
    devices = [{"device": "cpu", "budget_bytes": 12 * 2**30, "total_bytes": 16 * 2**30}]

    assert console({"event": "server.ready", "devices": devices}) == (
        'server.ready devices="cpu, budget 12.0 GiB, total 16.0 GiB"'
    )


def test_a_terminal_gets_colors_and_the_same_words() -> None:
    colored = console(REQUEST, has_colors=True)

    assert "\x1b[32m200\x1b[0m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == console(REQUEST)


STRAYS = """
import logging, sys, threading, warnings
from router.observability.logs import configure_logging

early = logging.getLogger("huggingface_hub")
early.addHandler(logging.StreamHandler())
early.propagate = False
configure_logging("json", "info")
late = logging.getLogger("transformers")
late.addHandler(logging.StreamHandler())
late.propagate = False
early.warning("early")
late.warning("late")
late.info("chatter")
warnings.warn("old api", DeprecationWarning, stacklevel=1)
print("10%\\r100%", file=sys.stderr)
print("a tool", file=sys.stderr)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
configure_logging("json", "info")
print("\\udc80", file=sys.stderr)
raise RuntimeError("the end")
"""


def test_json_means_every_line_also_those_of_others() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", STRAYS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]

    assert [(line["event"], line["level"], line.get("logger", line.get("text"))) for line in lines] == [
        ("early", "warning", "huggingface_hub"),
        ("late", "warning", "transformers"),
        ("python.warning", "warning", None),
        ("stderr", "warning", "100%"),
        ("stderr", "warning", "a tool"),
        ("python.uncaught", "critical", None),
        ("stderr", "warning", "\udc80"),
        ("python.uncaught", "critical", None),
    ]
    assert (lines[2]["category"], lines[2]["message"]) == ("DeprecationWarning", "old api")
    assert "ZeroDivisionError" in lines[5]["exception"]
    assert "RuntimeError: the end" in lines[7]["exception"]
    assert list(lines[0])[:3] == ["timestamp", "level", "event"]


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
