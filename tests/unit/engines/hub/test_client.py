"""Tests the hub client against the faults of a hub. Real sockets, a hub on loopback."""

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from benchmarks.lib import hub as loopback
from benchmarks.lib.hub import LISTING, LoopbackHub
from engines.errors import (
    AccessDenied,
    BrokenFiles,
    EngineError,
    HubUnreachable,
    OfflineMode,
    ShuttingDown,
    SourceNotFound,
)
from engines.hub.client import HubClient, HubConfig
from engines.hub.partial_file import FileEntry

REPO = "org/model"
BIG = "model.safetensors"
BIG_BYTES = 3_500_000
SMALL = "config.json"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / BIG).write_bytes(os.urandom(BIG_BYTES))
    (folder / SMALL).write_text('{"model_type": "bert"}')
    with LoopbackHub() as server:
        server.add(REPO, folder)
        yield server


class Open(Protocol):
    """Opens a client of the hub; the fixture closes it when the test ends."""

    def __call__(self, *, token: str | bool = False, timeout_s: float = 5.0, **options: Any) -> HubClient: ...


@pytest.fixture
def open_hub(server: LoopbackHub) -> Iterator[Open]:
    with contextlib.ExitStack() as stack:

        def open_hub(*, token: str | bool = False, timeout_s: float = 5.0, **options: Any) -> HubClient:
            given = {"endpoint": server.url, "backoff_s": 0.0, **options}
            hub = HubClient(HubConfig(token=token, timeout_s=timeout_s, **given))
            stack.callback(hub.close)
            return hub

        yield open_hub


@pytest.fixture
def hub(open_hub: Open) -> HubClient:
    return open_hub()


class Downloading:
    """Downloads one file to `path` and counts its bytes."""

    def __init__(self, hub: HubClient, tmp_path: Path, name: str = BIG) -> None:
        self.hub = hub
        self.path = tmp_path / "part"
        self.steps: list[int] = []
        self.listing = hub.listing(REPO, "main")
        self.file = self.listing.files[name]

    def run(self) -> None:
        self.hub.download(self.listing, self.file, self.path, self.steps.append)

    @property
    def counted(self) -> int:
        return sum(self.steps)


def commit_of(server: LoopbackHub) -> str:
    repo = server.repo(REPO)
    assert repo is not None
    return repo.refs["main"]


def content_of(server: LoopbackHub, name: str = BIG) -> bytes:
    repo = server.repo(REPO)
    assert repo is not None
    return repo.commits[repo.refs["main"]][name].path.read_bytes()


def test_a_listing_has_the_commit_and_sizes_and_hashes_of_all_files(server: LoopbackHub, hub: HubClient) -> None:
    listing = hub.listing(REPO, "main")

    content = content_of(server)
    small = content_of(server, SMALL)
    git = hashlib.sha1(b"blob %d\0" % len(small) + small, usedforsecurity=False).hexdigest()
    assert listing.commit == commit_of(server)
    assert listing.files == {
        BIG: FileEntry(name=BIG, size_bytes=BIG_BYTES, etag=hashlib.sha256(content).hexdigest()),
        SMALL: FileEntry(name=SMALL, size_bytes=len(small), etag=git),
    }


def test_a_commit_and_a_branch_with_a_slash_resolve(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / SMALL).write_text("{}")
    commit = server.add(REPO, other, revision="refs/pr/7")

    assert hub.listing(REPO, "refs/pr/7").commit == commit
    assert hub.listing(REPO, commit).commit == commit
    assert hub.listing(REPO, "main").commit != commit


@pytest.mark.parametrize("name", [BIG, SMALL])
def test_a_file_arrives_whole_with_progress(server: LoopbackHub, hub: HubClient, tmp_path: Path, name: str) -> None:
    download = Downloading(hub, tmp_path, name)

    download.run()

    assert download.path.read_bytes() == content_of(server, name)
    assert download.counted == download.file.size_bytes
    assert server.downloads(REPO) == 1
    if name == BIG:
        assert len(download.steps) >= 3


def test_an_empty_file_needs_no_request(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / SMALL).touch()
    server.add(REPO, folder)
    download = Downloading(hub, tmp_path, SMALL)

    download.run()

    assert download.path.read_bytes() == b""
    assert server.downloads(REPO) == 0


def test_the_token_goes_to_the_hub_and_never_to_its_cdn(server: LoopbackHub, open_hub: Open, tmp_path: Path) -> None:
    hub = open_hub(token="hf_secret")

    Downloading(hub, tmp_path).run()

    assert {request.has_token for request in server.requests if not request.is_cdn} == {True}
    assert [request.has_token for request in server.requests if request.is_cdn] == [False]


def test_a_cut_connection_is_resumed_where_it_broke(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    server.fail(REPO, loopback.Cut(after_bytes=2_500_000), file=BIG, times=1)
    download = Downloading(hub, tmp_path)

    download.run()

    ranges = [request.range for request in server.requests if request.is_content]
    assert download.path.read_bytes() == content_of(server)
    assert download.counted == BIG_BYTES
    assert ranges[0] is None
    assert ranges[1] is not None
    assert 2_000_000 <= int(ranges[1].removeprefix("bytes=").split("-")[0]) <= 2_500_000


def test_what_an_earlier_run_left_is_kept_and_checked(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    download = Downloading(hub, tmp_path)
    download.path.write_bytes(content_of(server)[:1_000_000])

    download.run()

    assert [request.range for request in server.requests if request.is_content] == [f"bytes=1000000-{BIG_BYTES - 1}"]
    assert download.path.read_bytes() == content_of(server)
    assert download.counted == BIG_BYTES


def test_a_complete_part_is_only_hashed(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    download = Downloading(hub, tmp_path)
    download.path.write_bytes(content_of(server))

    download.run()

    assert server.downloads(REPO) == 0
    assert download.counted == BIG_BYTES


@pytest.mark.parametrize("left", [b"wrong" * 1000, b"x" * (BIG_BYTES + 5)], ids=["corrupt", "too long"])
def test_a_bad_part_is_thrown_away(server: LoopbackHub, hub: HubClient, tmp_path: Path, left: bytes) -> None:
    download = Downloading(hub, tmp_path)
    download.path.write_bytes(left)

    download.run()

    assert download.path.read_bytes() == content_of(server)
    assert download.counted == BIG_BYTES


def test_a_hub_without_ranges_sends_the_whole_again(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    server.fail(REPO, loopback.IgnoreRange(), file=BIG)
    download = Downloading(hub, tmp_path)
    download.path.write_bytes(content_of(server)[:1_000_000])

    download.run()

    assert download.path.read_bytes() == content_of(server)
    assert download.counted == BIG_BYTES
    assert server.downloads(REPO, BIG) == 1


def test_a_connection_that_keeps_breaking_gets_there_while_it_brings_something(
    server: LoopbackHub, open_hub: Open, tmp_path: Path
) -> None:
    server.fail(REPO, loopback.Cut(after_bytes=1_200_000), file=BIG)
    download = Downloading(open_hub(attempts=2), tmp_path)

    download.run()

    assert download.path.read_bytes() == content_of(server)
    assert server.downloads(REPO, BIG) == 3


def test_a_connection_that_brings_next_to_nothing_is_given_up(
    server: LoopbackHub, open_hub: Open, tmp_path: Path
) -> None:
    server.fail(REPO, loopback.Cut(after_bytes=1000), file=BIG)
    download = Downloading(open_hub(attempts=3), tmp_path)

    with pytest.raises(HubUnreachable, match="broke while reading"):
        download.run()

    assert server.downloads(REPO, BIG) == 3
    assert download.path.stat().st_size == 3000


def test_a_request_that_cannot_succeed_is_sent_once(server: LoopbackHub, hub: HubClient) -> None:
    server.fail(REPO, loopback.not_found(), file=LISTING)

    with pytest.raises(SourceNotFound):
        hub.listing(REPO, "main")

    assert len(server.requests) == 1


def test_a_corrupt_file_is_fetched_once_more(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    server.fail(REPO, loopback.Corrupt(at_byte=1_234_567), file=BIG, times=1)
    download = Downloading(hub, tmp_path)

    download.run()

    assert download.path.read_bytes() == content_of(server)
    assert server.downloads(REPO, BIG) == 2
    assert download.counted == BIG_BYTES


@pytest.mark.parametrize("fault", [loopback.Corrupt(), loopback.Shorter(by_bytes=1)], ids=["corrupt", "wrong size"])
@pytest.mark.parametrize("name", [BIG, SMALL])
def test_a_file_that_stays_wrong_is_named_and_removed(
    server: LoopbackHub, hub: HubClient, tmp_path: Path, name: str, fault: loopback.Fault
) -> None:
    server.fail(REPO, fault, file=name)
    download = Downloading(hub, tmp_path, name)

    with pytest.raises(BrokenFiles, match=name) as caught:
        download.run()

    assert caught.value.file == name
    assert not download.path.exists()
    assert download.counted == 0


def test_a_small_file_is_read_whole_and_checked(server: LoopbackHub, hub: HubClient) -> None:
    listing = hub.listing(REPO, "main")
    server.fail(REPO, loopback.Corrupt(), file=SMALL, times=1)

    assert hub.read_file(listing, SMALL) == content_of(server, SMALL)

    server.fail(REPO, loopback.Corrupt(), file=SMALL)

    with pytest.raises(BrokenFiles, match=SMALL):
        hub.read_file(listing, SMALL)


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_range_is_read_without_the_rest(server: LoopbackHub, hub: HubClient, *, has_ranges: bool) -> None:
    if not has_ranges:
        server.fail(REPO, loopback.IgnoreRange())

    piece = hub.read_range(hub.listing(REPO, "main"), BIG, 1000, 3000)

    assert piece == content_of(server)[1000:3000]


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_transient_fault_is_waited_out(server: LoopbackHub, hub: HubClient, tmp_path: Path, code: int) -> None:
    server.fail(REPO, loopback.server_error(code), times=2, file=LISTING)
    server.fail(REPO, loopback.server_error(code), times=2, file=BIG)
    download = Downloading(hub, tmp_path)

    download.run()

    assert download.counted == BIG_BYTES


Refusal = tuple[str, loopback.Fault, type[EngineError], str]

REFUSALS: list[Refusal] = [
    ("gated", loopback.gated(), AccessDenied, "accept its licence at http://.*/org/model and set HF_TOKEN"),
    ("private or unknown", loopback.unauthorized(), AccessDenied, "does not exist .* or is private.*HF_TOKEN"),
    ("forbidden", loopback.Status(403), AccessDenied, "may not read org/model"),
    ("unknown", loopback.not_found(), SourceNotFound, "no repository org/model"),
    ("no revision", loopback.Status(404, "RevisionNotFound"), SourceNotFound, "no revision"),
    ("no file", loopback.Status(404, "EntryNotFound"), SourceNotFound, "no file"),
    ("disabled", loopback.Status(403, message="Access to this resource is disabled."), AccessDenied, "disabled"),
    ("too many", loopback.too_many_requests(), HubUnreachable, "429"),
    ("wait long", loopback.too_many_requests(retry_after_s=300), HubUnreachable, "asks to wait 300 s"),
    ("broken", loopback.server_error(500), HubUnreachable, "answered 500"),
    ("down", loopback.server_error(503), HubUnreachable, "answered 503"),
    ("teapot", loopback.Status(418), HubUnreachable, "answered 418"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=[row[0] for row in REFUSALS])
@pytest.mark.parametrize("file", [LISTING, BIG])
def test_every_refusal_says_what_to_do(
    server: LoopbackHub, hub: HubClient, tmp_path: Path, file: str, refusal: Refusal
) -> None:
    _, fault, error, message = refusal
    server.fail(REPO, fault, file=file)

    with pytest.raises(error, match=message) as caught:
        Downloading(hub, tmp_path).run()

    assert type(caught.value) is error
    assert str(tmp_path) not in str(caught.value)


class Pauses(threading.Event):
    """Replaces a client's `_closed` event: records the timeouts of its waits and is never set."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


def test_pauses_double_and_a_hub_that_asks_for_more_gets_it(server: LoopbackHub, tmp_path: Path) -> None:
    hub = HubClient(HubConfig(endpoint=server.url, token=False, backoff_s=0.5, attempts=5))
    pauses = hub._closed = Pauses()
    server.fail(REPO, loopback.too_many_requests(retry_after_s=7), times=1)
    server.fail(REPO, loopback.server_error(), times=3)

    hub.listing(REPO, "main")

    assert pauses.waits == [0.5, 1.0, 2.0, 7.0]


def test_a_refused_token_and_a_missing_one_have_different_errors(server: LoopbackHub, open_hub: Open) -> None:
    server.fail(REPO, loopback.Status(401, message="Invalid credentials in Authorization header"))
    hub = open_hub(token="hf_old_secret")

    with pytest.raises(AccessDenied, match="refuses the token in HF_TOKEN") as caught:
        hub.listing(REPO, "main")

    assert "hf_old_secret" not in str(caught.value)


def test_a_private_repository_opens_with_its_token(server: LoopbackHub, open_hub: Open, tmp_path: Path) -> None:
    server.add("org/private", tmp_path / "repo", token="hf_right")

    assert open_hub(token="hf_right").listing("org/private", "main").files
    with pytest.raises(SourceNotFound):
        open_hub(token="hf_wrong").listing("org/private", "main")
    with pytest.raises(AccessDenied):
        open_hub().listing("org/private", "main")


def test_a_gated_repository_lists_files_and_refuses_them(server: LoopbackHub, open_hub: Open, tmp_path: Path) -> None:
    server.add("org/gated", tmp_path / "repo", token="hf_right", is_gated=True)
    for token in (False, "hf_wrong"):
        hub = open_hub(token=token)
        listing = hub.listing("org/gated", "main")

        with pytest.raises(AccessDenied, match="accept its licence"):
            hub.read_file(listing, SMALL)


def test_a_silent_hub_is_given_up_on_within_its_time(server: LoopbackHub, open_hub: Open) -> None:
    server.fail(REPO, loopback.Hold())
    hub = open_hub(timeout_s=0.1)
    begin = time.monotonic()

    with pytest.raises(HubUnreachable, match=r"sent nothing of org/model for 0\.1 s"):
        hub.listing(REPO, "main")

    assert time.monotonic() - begin < 2


def test_a_stalled_download_is_given_up_and_resumed_later(server: LoopbackHub, open_hub: Open, tmp_path: Path) -> None:
    server.fail(REPO, loopback.Hold(after_bytes=2_200_000), file=BIG, times=1)
    server.fail(REPO, loopback.Hold(after_bytes=0), file=BIG)
    server.fail(REPO, loopback.Hold(after_bytes=2_200_000), file=BIG, times=1)
    hub = open_hub(timeout_s=0.5)
    download = Downloading(hub, tmp_path)

    with pytest.raises(HubUnreachable, match=f"sent nothing of org/model/{BIG}"):
        download.run()
    kept = download.path.stat().st_size
    server.heal()
    download.run()

    assert kept >= 2_000_000
    assert download.path.read_bytes() == content_of(server)


def test_no_hub_at_all_is_said_so(open_hub: Open) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://user:password@127.0.0.1:{taken.getsockname()[1]}"
        hub = open_hub(endpoint=endpoint, timeout_s=1.0)

        with pytest.raises(HubUnreachable, match="cannot be reached") as caught:
            hub.listing(REPO, "main")

    assert "password" not in str(caught.value)


def test_a_name_that_does_not_resolve_is_said_so(open_hub: Open) -> None:
    hub = open_hub(endpoint="http://hub.invalid", timeout_s=1.0)

    with pytest.raises(HubUnreachable, match=r"http://hub\.invalid cannot be reached"):
        hub.listing(REPO, "main")


def test_a_captive_portal_is_not_a_hub(server: LoopbackHub, hub: HubClient) -> None:
    server.fail(REPO, loopback.NotAHub())

    with pytest.raises(HubUnreachable, match="does not answer like a model hub"):
        hub.listing(REPO, "main")


def test_offline_sends_no_request(server: LoopbackHub, tmp_path: Path) -> None:
    hub = HubClient(HubConfig(endpoint=server.url, offline=True))

    with pytest.raises(OfflineMode, match="HF_HUB_OFFLINE"):
        hub.listing(REPO, "main")

    assert server.requests == []


@pytest.mark.parametrize("bad", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\x"])
def test_names_that_leave_the_folder_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, server: LoopbackHub, hub: HubClient, bad: str
) -> None:
    add_to_listing(monkeypatch, server, bad)

    assert set(hub.listing(REPO, "main").files) == {BIG, SMALL}


def test_a_hash_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, server: LoopbackHub, hub: HubClient) -> None:
    add_to_listing(monkeypatch, server, "x.json", oid="../../../x")

    with pytest.raises(HubUnreachable, match="does not answer like a model hub"):
        hub.listing(REPO, "main")


def test_closing_ends_a_running_download(server: LoopbackHub, hub: HubClient, tmp_path: Path) -> None:
    hold = loopback.Hold(after_bytes=2_000_000)
    server.fail(REPO, hold, file=BIG)
    download = Downloading(hub, tmp_path)
    errors: list[BaseException] = []
    thread = threading.Thread(target=lambda: errors.append(caught(download.run)))
    thread.start()
    assert hold.reached.wait(5)

    hub.close()
    hold.release.set()
    thread.join(5)

    assert [type(error) for error in errors] == [ShuttingDown]
    with pytest.raises(ShuttingDown):
        hub.listing(REPO, "main")


def test_a_configuration_does_not_show_its_token() -> None:
    assert "hf_secret" not in repr(HubConfig(token="hf_secret"))


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except EngineError as error:
        return error
    raise AssertionError("no error")


def add_to_listing(monkeypatch: pytest.MonkeyPatch, server: LoopbackHub, name: str, oid: str = "0" * 40) -> None:
    """Adds a file to the hub's listing."""
    repo = server.repo(REPO)
    assert repo is not None
    commit = repo.refs["main"]
    first = next(iter(repo.commits[commit].values()))
    odd = loopback.HubFile(name, first.path, 1, oid, None)
    monkeypatch.setitem(repo.commits, commit, {**repo.commits[commit], name: odd})
