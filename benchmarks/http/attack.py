"""Measures what one client can do to the others: attacks on our server, one after the other, each on a fresh one.

While an attack runs, `/health` is asked every 10 ms, a second client embeds a passage every 50 ms, and the memory of
the server and its workers is sampled. Everything is bounded in count and time and goes to loopback only.

    python -m benchmarks.http.attack                            all attacks on the working tree
    python -m benchmarks.http.attack --against f78e53a          beside the same on another commit
    python -m benchmarks.http.attack --only keep-alive ids
"""

import argparse
import hashlib
import http.client
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import psutil
from msgspec import Struct, structs

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import ROOT, Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import own, serving, write_registry
from benchmarks.offline.regression import unpack
from router.loadgen.http_client import Target

MODEL = "minilm"
HEALTH_EVERY_S = 0.01
PASSAGE_EVERY_S = 0.05
MEMORY_EVERY_S = 0.02
ANSWER_S = 60.0
"""Timeout of an answer."""

ATTACKER, VICTIM = "attackers-key", "victims-key"
PASSAGE = "Which of these engines is ready, and which of them is still on its way? " * 16
"""1,152 characters: long enough to be tokenised on a thread."""


class Site(Struct, frozen=True):
    """A running server under attack."""

    port: int
    pid: int

    def connect(self, *, buffer_bytes: int | None = None, timeout_s: float = ANSWER_S) -> socket.socket:
        """Open a connection; `buffer_bytes`: the size of the kernel's buffer for an unread answer."""
        client = socket.socket()
        if buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        client.settimeout(timeout_s)
        client.connect(("127.0.0.1", self.port))
        return client


class Outcome(Struct, frozen=True, kw_only=True):
    """The effect of an attack on the other clients.

    `stall_s`: the slowest answer of `/health`. `memory_bytes`: the highest resident memory above that of the quiet
    server; `held_bytes`: the part of it still held two seconds after. `passage_s`: the slowest answer to the second
    client; `refused`: the number of its requests with another status than 200.
    """

    stall_s: float
    memory_bytes: int
    held_bytes: int
    passage_s: float
    passages: int
    refused: int
    result: str


Strike = Callable[[Site], str]
"""Runs an attack and returns its result as text."""


class Attack(Struct, frozen=True):
    """One attack: its name, the line of the issue it belongs to, the strike, and settings of the server."""

    name: str
    number: int
    strike: Strike
    variables: dict[str, str] = {}


# ---- the attacks ----


def request(body: bytes, key: str = ATTACKER, *, length: int | None = None) -> bytes:
    """Return a request for vectors; `length` is its Content-Length, where that differs from the body's length."""
    head = (
        "POST /v1/embeddings HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}",
        "Content-Type: application/json", f"Content-Length: {len(body) if length is None else length}",
    )  # fmt: skip
    return "\r\n".join((*head, "", "")).encode() + body


def body(**fields: object) -> bytes:
    """Return a body in JSON."""
    return json.dumps({"model": MODEL, **fields}).encode()


def ask_once(site: Site, wanted: bytes) -> str:
    """Send one request and wait for its answer."""
    with site.connect() as client:
        started_s = time.perf_counter()
        client.sendall(request(wanted))
        status = _status(client)
        return f"{status} after {time.perf_counter() - started_s:.1f} s"


def leave_early(site: Site, wanted: bytes, clients: int, after_s: float) -> str:
    """Send the same request from `clients` connections at once, and close them."""
    connections = [site.connect() for _ in range(clients)]
    for client in connections:
        threading.Thread(target=_send_all, args=(client, request(wanted)), daemon=True).start()
    time.sleep(after_s)
    for client in connections:
        client.close()
    started_s = time.perf_counter()
    with site.connect() as client:
        client.sendall(request(body(input=PASSAGE), VICTIM))
        _status(client)
    return f"a passage sent right after they left: {time.perf_counter() - started_s:.1f} s"


def never_read(site: Site, seconds: float) -> str:
    """Request large answers with a key that may have one at a time, and read none of them."""
    wanted, begun = request(body(input=["a"] * 2048)), 0
    held: list[socket.socket] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until and len(held) < 100:
        client = site.connect(buffer_bytes=4096)
        client.sendall(wanted)
        begun += client.recv(15, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        held.append(client)
    for client in held:
        client.close()
    return f"{begun} answers begun"


def read_slowly(site: Site, bytes_per_s: int) -> str:
    """Read a large answer slowly, and without a pause."""
    with site.connect(buffer_bytes=64 * 1024) as client:
        client.sendall(request(body(input=["a"] * 2048)))
        answer, started_s = http.client.HTTPResponse(client), time.monotonic()
        answer.begin()
        size, read = int(answer.headers["content-length"]), 0
        step = bytes_per_s // 10
        while read < size:
            try:
                piece = client.recv(min(step, size - read)) if read else answer.read1(step)
            except OSError:
                break
            if not piece:
                break
            read += len(piece)
            time.sleep(max(0.0, read / bytes_per_s - (time.monotonic() - started_s)))
        return f"{read / 1e6:.1f} of {size / 1e6:.1f} MB in {time.monotonic() - started_s:.0f} s"


def trickle(site: Site, connections: int, seconds: float) -> str:
    """Send the bodies of many requests at a byte every 50 ms; send refused ones again until they hold a place."""
    held = [_begin_body(site) for _ in range(connections)]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)
        for index, client in enumerate(held):
            if _is_answered(client):
                client.close()
                held[index] = _begin_body(site)
    for client in held:
        client.close()
    return f"{connections} bodies, a byte every 50 ms"


def _begin_body(site: Site) -> socket.socket:
    client = site.connect()
    client.sendall(request(b"{", length=1000))
    client.setblocking(False)
    return client


def _is_answered(client: socket.socket) -> bool:
    """Send one more byte; return whether the server has answered or closed the connection."""
    try:
        client.send(b" ")
        client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def stop_the_worker(site: Site, seconds: float) -> str:
    """Stop the worker process, and abandon large requests one after the other meanwhile."""
    workers = psutil.Process(site.pid).children(recursive=True)
    worker = max(workers, key=lambda process: process.memory_info().rss)
    wanted, sent = request(body(input=["word " * 50] * 2000)), 0
    worker.send_signal(signal.SIGSTOP)
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with site.connect() as client:
                _send_all(client, wanted)
                time.sleep(0.05)
            sent += 1
    finally:
        worker.send_signal(signal.SIGCONT)
    started_s = time.perf_counter()
    with site.connect() as client:
        client.sendall(request(body(input=PASSAGE), VICTIM))
        status = _status(client)
    return f"{sent} abandoned; then {status} after {time.perf_counter() - started_s:.1f} s"


def _status(client: socket.socket) -> str:
    try:
        first = client.recv(1 << 16)
    except OSError:
        return "no answer"
    return first[9:12].decode() or "no answer"


def _send_all(client: socket.socket, wanted: bytes) -> None:
    with suppress(OSError):
        client.sendall(wanted)


def attacks() -> list[Attack]:
    """Return all attacks, in the order of the issue."""
    words = "word " * 1800
    ids = json.dumps([101, *range(2000, 6500), 102])
    many_ids = b'{"model":"%s","input":[%s]}' % (MODEL.encode(), ",".join([ids] * 2048).encode()[: 58 << 20])
    many_ids = many_ids[: many_ids.rindex(b"],[") + 1] + b"]}"
    return [
        Attack("keep-alive", 1, partial(ask_once, wanted=body(input="a", keep_alive="1" * 16_000 + "x"))),
        Attack("prompt", 2, partial(ask_once, wanted=body(input=["a"] * 1000, prompt=words))),
        Attack("large-prompt", 2, partial(ask_once, wanted=body(input=["a"] * 1000, prompt=words * 111))),
        Attack("unbroken", 3, partial(leave_early, wanted=body(input="x" * 8_000_000), clients=4, after_s=2.0)),
        Attack("ids", 4, partial(ask_once, wanted=many_ids)),
        Attack("never-read", 5, partial(never_read, seconds=9.0)),
        Attack("slow-reader", 6, partial(read_slowly, bytes_per_s=90_000)),
        Attack("trickle", 7, partial(trickle, connections=40, seconds=10.0), {"MAX_CONCURRENT_REQUESTS": "32"}),
        Attack("stopped-worker", 8, partial(stop_the_worker, seconds=15.0), {"BACKEND": "process"}),
    ]


# ---- the other clients ----


class Prober:
    """Sends the same request repeatedly, on a thread, and records the latency of each answer."""

    def __init__(self, site: Site, every_s: float, method: str, path: str, wanted: bytes | None = None) -> None:
        self.latencies_s: list[float] = []
        self.refused = 0
        self._ask = (method, path, wanted, {"Authorization": f"Bearer {VICTIM}", "Content-Type": "application/json"})
        self._site, self._every_s = site, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop after the request in flight."""
        self._ended.set()
        self._thread.join(2 * ANSWER_S)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._site.port, timeout=ANSWER_S)
        while not self._ended.is_set():
            started_s = time.perf_counter()
            try:
                connection.request(*self._ask)
                answer = connection.getresponse()
                answer.read()
                self.refused += answer.status != http.client.OK
            except (OSError, http.client.HTTPException):
                self.refused += 1
                connection.close()
            self.latencies_s.append(time.perf_counter() - started_s)
            self._ended.wait(self._every_s)


class MemoryWatch:
    """Samples the resident memory of a process and its descendants, on a thread."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before_bytes = self.peak_bytes = self.read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self) -> int:
        """Return the current bytes."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                total += process.memory_info().rss
        return total

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(MEMORY_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, self.read())


def watch(attack: Attack, site: Site) -> Outcome:
    """Run an attack and measure its effect on the other clients."""
    memory = MemoryWatch(site.pid)
    health = Prober(site, HEALTH_EVERY_S, "GET", "/health")
    passages = Prober(site, PASSAGE_EVERY_S, "POST", "/v1/embeddings", body(input=PASSAGE))
    time.sleep(0.5)
    result = attack.strike(site)
    for prober in (health, passages):
        prober.end()
    time.sleep(2.0)
    memory.end()
    return Outcome(
        stall_s=max(health.latencies_s),
        memory_bytes=memory.peak_bytes - memory.before_bytes,
        held_bytes=memory.read() - memory.before_bytes,
        passage_s=max(passages.latencies_s),
        passages=len(passages.latencies_s),
        refused=passages.refused,
        result=result,
    )


# ---- servers and the table ----


def write_keys(path: Path) -> Path:
    """Two keys: the attacker's may have one request at a time where that is the point, else as many as it likes."""
    digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in (ATTACKER, VICTIM)}
    path.write_text(
        "".join(f"- id: {key}\n  sha256: '{digest}'\n  scopes: [embed]\n" for key, digest in digests.items())
    )
    return path


@contextmanager
def under_attack(attack: Attack, folder: Path, tree: Path) -> Iterator[Site]:
    """Run a fresh server of a tree until the block ends."""
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder})
        keys = write_keys(Path(draft) / "keys.yaml")
        if attack.strike.func is never_read:  # type: ignore[attr-defined]  # every strike is a partial
            keys.write_text(keys.read_text().replace("[embed]\n", "[embed]\n  max_concurrent: 1\n", 1))
        variables = {"KEYS_FILE": str(keys), "PYTHONPATH": str(tree)} | attack.variables
        plan = structs.replace(own(registry, MODEL, **variables), folder=tree)
        with serving(plan, first=_answers_a_passage) as server:
            yield Site(int(server.target.url.rsplit(":", 1)[1]), server.pid)


def _answers_a_passage(target: Target) -> None:
    site = Site(int(target.url.rsplit(":", 1)[1]), 0)
    with site.connect() as client:
        client.sendall(request(body(input=PASSAGE), VICTIM))
        if (status := _status(client)) != "200":
            raise OSError(f"the first passage got {status}")


def run(folder: Path, names: Sequence[str], commit: str | None) -> Report:
    """Run the attacks, on the commit's tree first where one is given."""
    watched = Watch()
    warn_if_busy(watched.machine)
    chosen = [attack for attack in attacks() if not names or attack.name in names]
    outcomes: dict[str, dict[str, Outcome]] = {attack.name: {} for attack in chosen}
    with tempfile.TemporaryDirectory() if commit else nullcontext() as draft:
        trees = {unpack(commit, Path(draft)): Path(draft)} if commit and draft else {}
        trees["now"] = ROOT
        for attack in chosen:
            for label, tree in trees.items():
                with under_attack(attack, folder, tree) as site:
                    outcome = outcomes[attack.name][label] = watch(attack, site)
                print(f"{attack.number} {attack.name}, {label}: {outcome.result}", flush=True)
        machine = watched.machine
    return Report(
        name="attack",
        title="What one client can do to everybody else",
        machine=machine,
        settings={"model": folder.name, "commit": commit or "none"},
        header=(
            "attack",
            "tree",
            "/health, worst s",
            "memory, MiB",
            "held, MiB",
            "passage, worst s",
            "refused",
            "result",
        ),
        rows=[row(attack, label, outcome) for attack in chosen for label, outcome in outcomes[attack.name].items()],
        samples={name: {label: structs.asdict(one) for label, one in by.items()} for name, by in outcomes.items()},
        notes=(
            "memory: the peak above the quiet server, of it and its workers; held: what was left two seconds after",
        ),
    )


def row(attack: Attack, label: str, outcome: Outcome) -> tuple[str, ...]:
    """Return one row of the table."""
    return (
        f"{attack.number} {attack.name}",
        label,
        f"{outcome.stall_s:.2f}",
        f"{outcome.memory_bytes / 2**20:,.0f}",
        f"{outcome.held_bytes / 2**20:,.0f}",
        f"{outcome.passage_s:.2f}",
        f"{outcome.refused} of {outcome.passages}",
        outcome.result,
    )


def main() -> None:
    """Print the table."""
    names = [attack.name for attack in attacks()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http.attack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--against", help="a commit to attack as well")
    parser.add_argument("--only", nargs="*", default=[], choices=names, metavar="ATTACK", help=", ".join(names))
    add_save_option(parser)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.only, asked.against), asked.results)


if __name__ == "__main__":
    main()
