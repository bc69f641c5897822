"""Tests that a source yields complete files or an error that names the remedy. A hub on loopback, real sockets."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from msgspec import structs

from benchmarks.lib import hub as loopback
from benchmarks.lib.hub import LISTING, LoopbackHub
from engines.errors import (
    AccessDenied,
    BadModel,
    BrokenFiles,
    DiskFull,
    FilesChanged,
    HubUnreachable,
    OfflineMode,
    ShuttingDown,
    SourceError,
    SourceNotFound,
    UnsupportedModel,
)
from engines.hub.cache import RepoCache
from engines.hub.client import HubConfig
from engines.hub.partial_file import FileEntry
from engines.hub.repository import FreeBytes
from engines.hub.store import ModelStore, free_disk_bytes
from engines.spec import ModelSpec
from engines.types import ModelFiles
from tests.testkit.model_folders import (
    POOLING,
    TRANSFORMER,
    adapter_folder,
    plain_model,
    sentence_model,
    sharded_model,
    tensors,
    write_json,
    write_modules,
)

REPO = "org/model"
WEIGHTS = "model.safetensors"
SENTENCE_FILES = {
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "config.json",
    "config_sentence_transformers.json", "model.safetensors", "modules.json", "sentence_bert_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Stores:
    """Opens stores on one hub and one cache; each represents a process."""

    def __init__(self, server: LoopbackHub, cache: Path) -> None:
        self._server = server
        self._cache = cache
        self._open: list[ModelStore] = []

    def open(self, *, offline: bool = False, free_bytes: FreeBytes = free_disk_bytes) -> ModelStore:
        config = HubConfig(
            endpoint=self._server.url,
            cache_dir=str(self._cache),
            token=False,
            timeout_s=5.0,
            backoff_s=0.0,
            offline=offline,
        )
        store = ModelStore(config, free_bytes=free_bytes)
        self._open.append(store)
        return store

    def close(self) -> None:
        for store in self._open:
            store.close()


@pytest.fixture
def stores(server: LoopbackHub, cache: Path) -> Iterator[Stores]:
    stores = Stores(server, cache)
    yield stores
    stores.close()


@pytest.fixture
def store(stores: Stores) -> ModelStore:
    return stores.open()


def spec(source: str | Path = REPO, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSpec:
    return ModelSpec(model_id="m", source=str(source), revision=revision, trust_remote_code=trust_remote_code)


def quiet(done_bytes: int, total_bytes: int) -> None:
    """Ignores the progress."""


def names(files: ModelFiles) -> set[str]:
    root = Path(files.path)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def content(files: ModelFiles, name: str = WEIGHTS) -> bytes:
    return (Path(files.path) / name).read_bytes()


def repo_folder(cache: Path) -> Path:
    return cache / "models--org--model"


def test_only_the_files_of_the_model_are_fetched(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    commit = server.add(REPO, sentence_model(tmp_path / "repo", dense=True))

    files = store.fetch(spec(), quiet)

    assert names(files) == SENTENCE_FILES
    assert files.revision == commit
    assert files.size_bytes == sum((tmp_path / "repo" / name).stat().st_size for name in SENTENCE_FILES)
    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()


def test_what_was_fetched_is_located_without_the_hub(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))

    before = store.locate(spec())
    files = store.fetch(spec(), quiet)
    asked = len(server.requests)

    assert before is None
    assert store.locate(spec()) == files
    assert store.fetch(spec(), quiet) == files
    assert store.locate(spec(revision=files.revision)) is None
    assert store.locate(spec("org/other")) is None
    assert len(server.requests) == asked


def test_a_pinned_commit_is_fetched_and_located(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    old = server.add(REPO, plain_model(tmp_path / "old"))
    server.add(REPO, plain_model(tmp_path / "new", tensors(seed=1)))

    files = store.fetch(spec(revision=old), quiet)

    assert files.revision == old
    assert content(files) == (tmp_path / "old" / WEIGHTS).read_bytes()
    assert store.locate(spec(revision=old)) == files
    assert store.locate(spec()) is None


def test_a_moved_branch_stays_until_it_is_refreshed(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    old = server.add(REPO, plain_model(tmp_path / "old"))
    store.fetch(spec(), quiet)
    new = server.add(REPO, plain_model(tmp_path / "new", tensors(seed=1)))

    assert store.fetch(spec(), quiet).revision == old
    assert store.fetch(spec(), quiet, refresh=True).revision == new
    files = store.locate(spec())
    assert files is not None
    assert files.revision == new
    # Only the weights differ: the other files are blobs of the old commit.
    assert server.downloads(REPO, WEIGHTS) == 2
    assert server.downloads(REPO, "vocab.txt") == 1


def test_a_refresh_says_when_the_hub_cannot_be_asked(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    pinned = store.fetch(spec(revision=files.revision), quiet)
    server.fail(REPO, loopback.server_error())

    with pytest.raises(HubUnreachable):
        store.fetch(spec(), quiet, refresh=True)

    assert store.fetch(spec(), quiet) == files
    assert store.fetch(spec(revision=files.revision), quiet, refresh=True) == pinned


def test_abandoned_partial_files_are_removed(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "old", tensors(seed=3)))
    server.fail(REPO, loopback.Cut(after_bytes=100), file=WEIGHTS)
    with pytest.raises(HubUnreachable):
        store.fetch(spec(), quiet)
    left = list(repo_folder(cache).rglob("*.part"))
    server.heal()
    server.add(REPO, plain_model(tmp_path / "new"))

    store.fetch(spec(), quiet)

    assert len(left) == 1
    assert list(repo_folder(cache).rglob("*.part")) == []


def test_huggingface_hub_finds_what_was_fetched(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)

    found = hf_hub_download(REPO, WEIGHTS, cache_dir=cache, local_files_only=True)

    assert Path(found) == Path(files.path) / WEIGHTS
    assert Path(found).is_symlink()


def test_shards_are_fetched_with_their_index(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sharded_model(tmp_path / "repo"))
    (tmp_path / "repo" / "model-extra.safetensors").write_bytes(b"not in the index")
    server.add(REPO, tmp_path / "repo")

    files = store.fetch(spec(), quiet)

    weights = {name for name in names(files) if name.startswith("model")}
    assert weights == {
        "model.safetensors.index.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    }  # fmt: skip


def test_a_transformer_may_lie_in_a_folder_of_its_own(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "repo")
    plain_model(folder / "0_Transformer")
    write_modules(folder, [("0_Transformer", TRANSFORMER), ("1_Pooling", POOLING)])
    server.add(REPO, folder)

    files = names(store.fetch(spec(), quiet))

    assert {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"} <= files
    assert {"0_Transformer/config.json", "0_Transformer/vocab.txt", f"0_Transformer/{WEIGHTS}"} <= files
    assert WEIGHTS not in files


def test_pickled_weights_are_taken_where_there_is_nothing_better(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    folder = sentence_model(tmp_path / "repo")
    (folder / WEIGHTS).unlink()
    server.add(REPO, folder)

    files = store.fetch(spec(), quiet)

    assert "pytorch_model.bin" in names(files)
    assert "onnx/model.onnx" not in names(files)


def test_code_comes_along_only_where_it_is_trusted(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    plain = store.fetch(spec(), quiet)

    assert "model.py" not in names(plain)
    assert store.locate(spec(trust_remote_code=True)) is None
    trusted = store.fetch(spec(trust_remote_code=True), quiet)
    assert "model.py" in names(trusted)
    # A spec without `trust_remote_code` does not remove the code that another spec needs.
    store.fetch(spec(), quiet, refresh=True)
    assert store.locate(spec(trust_remote_code=True)) == trusted


def test_progress_counts_all_files_while_one_is_on_its_way(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo", {"big": np.zeros(3_000_000, np.float32)}))
    hold = loopback.Hold(after_bytes=8_000_000)
    server.fail(REPO, hold, file=WEIGHTS)
    steps: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        steps.append((done, total))
        if 8_000_000 <= done < total:
            hold.release.set()

    files = store.fetch(spec(), on_progress)

    assert hold.release.is_set()
    assert steps[-1] == (files.size_bytes, files.size_bytes)
    assert {total for _, total in steps} == {files.size_bytes}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


FAULTS: list[tuple[loopback.Fault, type[BadModel]]] = [
    (loopback.unauthorized(), AccessDenied),
    (loopback.gated(), AccessDenied),
    (loopback.not_found(), SourceNotFound),
    (loopback.too_many_requests(), HubUnreachable),
    (loopback.server_error(500), HubUnreachable),
    (loopback.server_error(503), HubUnreachable),
    (loopback.Cut(after_bytes=10), HubUnreachable),
    (loopback.Corrupt(at_byte=4000), BrokenFiles),
    (loopback.Shorter(by_bytes=8), BrokenFiles),
]


@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=[repr(fault)[:30] for fault, _ in FAULTS])
def test_after_a_fault_nothing_is_whole_and_healing_is_enough(
    server: LoopbackHub, store: ModelStore, tmp_path: Path, fault: loopback.Fault, error: type[BadModel]
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    server.fail(REPO, fault, file=WEIGHTS)

    with pytest.raises(error) as caught:
        store.fetch(spec(), quiet)
    located = store.locate(spec())
    server.heal()
    files = store.fetch(spec(), quiet)

    assert type(caught.value) is error
    assert str(tmp_path) not in str(caught.value)
    assert located is None
    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()


def test_a_killed_download_is_not_whole_and_is_gone_on_with(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo", {"big": np.arange(2_000_000, dtype=np.float32)}))
    hold = loopback.Hold(after_bytes=5_000_000)
    server.fail(REPO, hold, file=WEIGHTS)
    code = (
        "from engines.hub.store import ModelStore, HubConfig; from engines.spec import ModelSpec;"
        f"ModelStore(HubConfig(endpoint={server.url!r}, cache_dir={str(cache)!r}, token=False))"
        f".fetch(ModelSpec(model_id='m', source={REPO!r}), print)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert hold.reached.wait(30)
        assert child.stdout is not None
        while int(child.stdout.readline().split()[0]) < 4_000_000:
            pass
        child.send_signal(signal.SIGKILL)
    server.heal()

    located = store.locate(spec())
    files = store.fetch(spec(), quiet)

    assert located is None
    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()
    resumed = [request.range for request in server.requests if request.is_content and request.file == WEIGHTS]
    assert resumed[-1] is not None
    assert int(resumed[-1].removeprefix("bytes=").split("-")[0]) >= 4_000_000
    assert list(repo_folder(cache).rglob("*.part")) == []


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_its_download(
    server: LoopbackHub, stores: Stores, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo", {"big": np.zeros(1_000_000, np.float32)}))
    store = stores.open(free_bytes=lambda path: 3_999_999)

    with pytest.raises(DiskFull, match=r"needs 3\.8 MiB more on disk, but 3\.8 MiB are free"):
        store.fetch(spec(), quiet)

    assert server.downloads(REPO, WEIGHTS) == 0
    assert store.locate(spec()) is None


def test_a_disk_that_fills_up_on_the_way_is_said_so_and_freed(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))

    def full(part: object, chunk: bytes) -> None:
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr("engines.hub.partial_file.PartialFile.append", full)

    with pytest.raises(DiskFull, match="filled up") as caught:
        store.fetch(spec(), quiet)

    assert "/secret" not in str(caught.value)
    assert list(repo_folder(cache).rglob("*.part")) == []


def test_a_cache_that_is_no_folder_is_said_so(server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    cache.write_text("a file")

    with pytest.raises(SourceError, match="cannot be written") as caught:
        stores.open().fetch(spec(), quiet)

    assert str(tmp_path) not in str(caught.value)


def test_a_repository_that_holds_a_broken_file_is_named(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "repo")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    server.add(REPO, folder)

    with pytest.raises(BrokenFiles, match="truncated or corrupt") as caught:
        store.fetch(spec(), quiet)

    assert caught.value.file == WEIGHTS
    assert store.locate(spec()) is None


def test_a_shard_that_the_repository_lacks_is_named(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    folder = sharded_model(tmp_path / "repo")
    (folder / "model-00002-of-00003.safetensors").unlink()
    server.add(REPO, folder)

    with pytest.raises(BrokenFiles, match=r"model-00002-of-00003\.safetensors is missing") as caught:
        store.fetch(spec(), quiet)

    assert caught.value.file == "model-00002-of-00003.safetensors"


def test_a_repository_without_weights_is_no_model(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "repo")
    (folder / WEIGHTS).rename(folder / "model.gguf")
    server.add(REPO, folder)

    with pytest.raises(UnsupportedModel, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        store.fetch(spec(), quiet)


@pytest.mark.parametrize("source", ["a/b/c", "org/../x", "with space", "org--name/x", ""])
def test_what_is_no_hub_id_is_refused(store: ModelStore, source: str) -> None:
    with pytest.raises(SourceNotFound, match="neither a hub id"):
        store.fetch(spec(source), quiet)

    assert store.locate(spec(source)) is None


def test_a_revision_cannot_leave_the_cache(store: ModelStore, server: LoopbackHub) -> None:
    with pytest.raises(SourceNotFound, match="is not a valid revision"):
        store.fetch(spec(revision="../../x"), quiet)

    assert server.requests == []


@pytest.mark.parametrize("damage", ["shorter", "header", "missing", "dangling", "text"])
def test_damage_on_the_disk_is_seen_and_mended(
    server: LoopbackHub, store: ModelStore, tmp_path: Path, damage: str
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    shown = Path(files.path) / WEIGHTS
    match damage:
        case "shorter":
            os.truncate(shown.resolve(), 100)
        case "header":
            with shown.resolve().open("r+b") as weights:
                weights.write(b"\xff" * 8)
        case "missing":
            shown.unlink()
        case "dangling":
            shown.resolve().unlink()
        case "text":
            os.truncate(Path(files.path) / "vocab.txt", 3)

    located = store.locate(spec())
    mended = store.fetch(spec(), quiet)

    assert located is None
    assert structs.replace(mended, stamp=files.stamp) == files
    assert content(mended) == (tmp_path / "repo" / WEIGHTS).read_bytes()
    assert content(mended, "vocab.txt") == (tmp_path / "repo" / "vocab.txt").read_bytes()
    assert server.downloads(REPO, WEIGHTS) == (1 if damage in {"missing", "text"} else 2)


def test_a_discarded_file_is_fetched_anew_and_the_others_are_verified(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    vocab = (Path(files.path) / "vocab.txt").resolve()
    vocab.write_bytes(b"?" * vocab.stat().st_size)  # the size is right, the content is not

    discarded = store.discard(spec(), WEIGHTS)
    located = store.locate(spec())
    mended = store.fetch(spec(), quiet)

    assert discarded
    assert located is None
    assert content(mended, "vocab.txt") == (tmp_path / "repo" / "vocab.txt").read_bytes()
    assert server.downloads(REPO, WEIGHTS) == 2
    assert server.downloads(REPO, "vocab.txt") == 2
    assert server.downloads(REPO, "tokenizer.json") == 1


def test_all_files_can_be_discarded(server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    store.fetch(spec(), quiet)

    assert store.discard(spec(), None)
    assert store.locate(spec()) is None
    assert list((repo_folder(cache) / "blobs").iterdir()) == []
    assert store.discard(spec(), None)


def test_discarding_follows_links_within_the_cache_and_no_further(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    blob = (Path(files.path) / WEIGHTS).resolve()
    elsewhere = tmp_path / "elsewhere"
    shutil.move(blob, elsewhere)
    blob.symlink_to(elsewhere)

    store.discard(spec(), WEIGHTS)

    assert elsewhere.exists()
    assert not blob.is_symlink()


def test_a_damaged_manifest_means_verifying_again(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    (repo_folder(cache) / ".embedyard" / "main.json").write_text("{")

    located = store.locate(spec())

    assert located is None
    assert store.fetch(spec(), quiet) == files
    assert server.downloads(REPO, WEIGHTS) == 1


def test_a_cache_that_takes_no_manifest_still_serves(
    server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    snapshot_download(REPO, cache_dir=cache, endpoint=server.url, token=False)

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("engines.hub.cache.write_atomically", refuse)
    store = stores.open(offline=True)
    files = store.fetch(spec(), quiet)

    assert store.locate(spec()) == files
    assert stores.open().locate(spec()) is None


def test_a_cache_of_other_tools_is_verified_and_used(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    snapshot_download(REPO, cache_dir=cache, endpoint=server.url, token=False)
    before = server.downloads(REPO)

    steps: list[tuple[int, int]] = []
    files = store.fetch(spec(), lambda done, total: steps.append((done, total)))

    assert server.downloads(REPO) - before == 1  # modules.json, which lists the needed modules
    assert steps[-1] == (files.size_bytes, files.size_bytes)
    assert store.locate(spec()) == files


def test_a_corrupt_cache_of_other_tools_is_mended(
    server: LoopbackHub, store: ModelStore, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    path = Path(hf_hub_download(REPO, WEIGHTS, cache_dir=cache, endpoint=server.url, token=False)).resolve()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    steps: list[tuple[int, int]] = []

    files = store.fetch(spec(), lambda done, total: steps.append((done, total)))

    assert steps[-1] == (files.size_bytes, files.size_bytes)
    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("why", ["offline", "unreachable"])
@pytest.mark.parametrize("with_list", [True, False])
def test_a_whole_snapshot_needs_no_hub(
    server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path, why: str, *, with_list: bool
) -> None:
    commit = server.add(REPO, plain_model(tmp_path / "repo"))
    snapshot_download(REPO, cache_dir=cache, endpoint=server.url, token=False)
    if not with_list:
        shutil.rmtree(repo_folder(cache) / "trees")
    server.fail(REPO, loopback.server_error())

    files = stores.open(offline=why == "offline").fetch(spec(), quiet)

    assert files.revision == commit
    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()
    assert stores.open(offline=True).locate(spec()) == files


def test_a_snapshot_without_its_list_of_modules_is_not_taken_for_whole(
    server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", WEIGHTS):
        hf_hub_download(REPO, name, cache_dir=cache, endpoint=server.url, token=False)
    offline = stores.open(offline=True)

    with pytest.raises(OfflineMode, match="embedyard pull"):
        offline.fetch(spec(), quiet)

    hf_hub_download(REPO, "modules.json", cache_dir=cache, endpoint=server.url, token=False)
    with pytest.raises(OfflineMode):  # 1_Pooling is still missing
        offline.fetch(spec(), quiet)

    for name in ("1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        hf_hub_download(REPO, name, cache_dir=cache, endpoint=server.url, token=False)
    assert offline.fetch(spec(), quiet).size_bytes > 0


def test_a_file_known_not_to_exist_is_not_missed(
    server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    for name in ("config.json", "tokenizer.json", "modules.json", WEIGHTS):
        with contextlib.suppress(OSError):  # modules.json does not exist, and the cache records that
            hf_hub_download(REPO, name, cache_dir=cache, endpoint=server.url, token=False)

    files = stores.open(offline=True).fetch(spec(), quiet)

    assert names(files) >= {"config.json", "tokenizer.json", WEIGHTS}


def test_a_corrupt_snapshot_is_not_adopted(server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    root = Path(snapshot_download(REPO, cache_dir=cache, endpoint=server.url, token=False))
    vocab = (root / "vocab.txt").resolve()
    vocab.write_bytes(b"?" * vocab.stat().st_size)

    with pytest.raises(OfflineMode):
        stores.open(offline=True).fetch(spec(), quiet)


def test_offline_with_an_empty_cache_says_so(server: LoopbackHub, stores: Stores) -> None:
    with pytest.raises(OfflineMode, match="HF_HUB_OFFLINE"):
        stores.open(offline=True).fetch(spec(), quiet)

    assert server.requests == []


def test_a_cache_without_links_works_too(
    server: LoopbackHub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))

    def refuse(path: Path, target: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)

    files = store.fetch(spec(), quiet)

    assert content(files) == (tmp_path / "repo" / WEIGHTS).read_bytes()
    assert not (Path(files.path) / WEIGHTS).is_symlink()
    assert store.locate(spec()) == files
    assert store.fetch(spec(), quiet, refresh=True) == files


def test_many_callers_share_one_download_and_all_see_its_progress(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo", {"big": np.zeros(2_000_000, np.float32)}))
    hold = loopback.Hold(after_bytes=3_000_000)
    server.fail(REPO, hold, file=WEIGHTS)
    in_the_middle = [threading.Event() for _ in range(5)]
    seen: list[list[int]] = [[] for _ in range(5)]

    def fetch(index: int) -> ModelFiles:
        def on_progress(done: int, total: int) -> None:
            seen[index].append(done)
            if done > 1_000_000:
                in_the_middle[index].set()

        return store.fetch(spec(), on_progress)

    with ThreadPoolExecutor(5) as threads:
        outcomes = [threads.submit(fetch, index) for index in range(5)]
        assert all(event.wait(5) for event in in_the_middle)
        hold.release.set()
        files = {outcome.result(5).path for outcome in outcomes}

    assert len(files) == 1
    assert server.downloads(REPO, WEIGHTS) == 1
    assert all(len(steps) >= 2 for steps in seen)


def test_all_callers_get_the_error_and_the_next_call_starts_anew(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    hold = loopback.Hold()
    server.fail(REPO, loopback.gated(), file=WEIGHTS)
    server.fail(REPO, hold, file=LISTING, times=1)

    with ThreadPoolExecutor(3) as threads:
        outcomes = [threads.submit(store.fetch, spec(), quiet) for _ in range(3)]
        assert hold.reached.wait(5)
        hold.release.set()
        errors = [type(outcome.exception(5)) for outcome in outcomes]
    server.heal()

    assert set(errors) == {AccessDenied}
    assert store.fetch(spec(), quiet).size_bytes > 0


def test_a_caller_that_leaves_does_not_end_the_download(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    hold = loopback.Hold(after_bytes=1000)
    server.fail(REPO, hold, file=WEIGHTS)

    def leave(done: int, total: int) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError):
        store.fetch(spec(), leave)
    hold.release.set()
    files = store.fetch(spec(), quiet)

    assert server.downloads(REPO, WEIGHTS) == 1
    assert store.locate(spec()) == files


def test_two_processes_download_once(server: LoopbackHub, stores: Stores, cache: Path, tmp_path: Path) -> None:
    """Two stores represent two processes: they share nothing but the cache and its lock."""
    server.add(REPO, plain_model(tmp_path / "repo"))
    hold = loopback.Hold(after_bytes=1000)
    server.fail(REPO, hold, file=WEIGHTS)
    one, other = stores.open(), stores.open()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(one.fetch, spec(), quiet)
        assert hold.reached.wait(5)
        second = threads.submit(other.fetch, spec(), quiet)
        while sum(request.file == LISTING for request in server.requests) < 2:
            pass
        hold.release.set()

        assert first.result(10) == second.result(10)

    assert server.downloads(REPO, WEIGHTS) == 1


def test_a_file_that_is_put_in_place_again_is_never_missed(tmp_path: Path) -> None:
    cache = RepoCache(tmp_path, REPO, "main", {})
    file = FileEntry(name="vocab.txt", size_bytes=1, etag="0" * 40)
    shown = cache.path("c", file.name)
    is_over = threading.Event()

    def put() -> None:
        part = cache.partial_path(file)
        part.write_bytes(b"x")
        cache.commit_blob(part, "c", file)

    def count_misses() -> int:
        misses = 0
        while not is_over.is_set():
            misses += not shown.exists()
        return misses

    put()
    with ThreadPoolExecutor(1) as threads:
        misses = threads.submit(count_misses)
        for _ in range(500):
            put()
        is_over.set()

    assert misses.result() == 0


def test_closing_the_store_ends_its_downloads(server: LoopbackHub, stores: Stores, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repo", {"big": np.zeros(1_000_000, np.float32)}))
    hold = loopback.Hold(after_bytes=2_000_000)
    server.fail(REPO, hold, file=WEIGHTS)
    store = stores.open()

    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(store.fetch, spec(), quiet)
        assert hold.reached.wait(5)
        store.close()
        hold.release.set()

        assert isinstance(outcome.exception(5), ShuttingDown)


@pytest.fixture
def local() -> Iterator[ModelStore]:
    """A store that must not use the network."""
    store = ModelStore(HubConfig(endpoint="http://hub.invalid", offline=True))
    yield store
    store.close()


def test_a_folder_is_located_and_fetched_as_it_is(local: ModelStore, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "m", dense=True)
    steps: list[tuple[int, int]] = []

    files = local.locate(spec(folder))
    fetched = local.fetch(spec(folder), lambda done, total: steps.append((done, total)))

    assert files is not None
    assert fetched == files
    assert files.path == str(folder)
    assert files.size_bytes == sum((folder / name).stat().st_size for name in SENTENCE_FILES)
    assert steps == [(files.size_bytes, files.size_bytes)]


def test_a_folder_may_be_relative_or_at_home(
    local: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_model(tmp_path / "models" / "m")
    monkeypatch.chdir(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {local.fetch(spec(source), quiet).path for source in ("./m", "../models/m", "~/models/m")}

    assert {os.path.realpath(path) for path in paths} == {os.path.realpath(tmp_path / "models" / "m")}


def test_a_folders_revision_changes_with_its_files_alone(local: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "m")
    first = local.fetch(spec(folder), quiet).revision
    (folder / "README.md").write_text("new words")
    same = local.fetch(spec(folder), quiet).revision
    os.utime(folder / WEIGHTS, (1, 1))
    other = local.fetch(spec(folder), quiet).revision

    assert len(first) == 40
    assert first == same
    assert first != other


def test_a_package_is_read_without_importing_it(
    local: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_model(tmp_path / "packaged_model" / "files" / "m")
    (tmp_path / "packaged_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    files = local.fetch(spec("package:packaged_model/files/m"), quiet)

    assert files.path == str(tmp_path / "packaged_model" / "files" / "m")
    assert "packaged_model" not in sys.modules
    assert local.discard(spec("package:packaged_model/files/m"), WEIGHTS) is False


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "the folder in 'source' of m does not exist"),
        ("package:no_such_package/m", "'no_such_package', which is not installed"),
        ("package:", "is not installed"),
        ("package:a.b/c", "is not installed"),
        ("package:numpy/../../secret", "points outside the package"),
        ("package:numpy/no_such_folder", "does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_said_so(local: ModelStore, source: str, message: str) -> None:
    with pytest.raises(SourceNotFound, match=message) as caught:
        local.fetch(spec(source), quiet)

    assert "/" not in str(caught.value).replace("package:", "")
    assert local.locate(spec(source)) is None
    assert local.weight_bytes(spec(source), "cpu") is None


def broken_folders() -> dict[str, tuple[Callable[[Path], object], str]]:
    return {
        "truncated": (lambda m: os.truncate(m / WEIGHTS, (m / WEIGHTS).stat().st_size - 3), WEIGHTS),
        "header": (lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 100), WEIGHTS),
        "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
        "no pooling": (lambda m: shutil.rmtree(m / "1_Pooling"), "1_Pooling/config.json"),
        "no dense": (lambda m: (m / "2_Dense" / WEIGHTS).unlink(), f"2_Dense/{WEIGHTS}"),
        "bad dense": (lambda m: (m / "2_Dense" / WEIGHTS).write_bytes(b""), f"2_Dense/{WEIGHTS}"),
        "modules": (lambda m: (m / "modules.json").write_text("[{]"), "modules.json"),
        "no list": (lambda m: (m / "modules.json").write_text("{}"), "modules.json"),
        "no path": (lambda m: write_json(m / "modules.json", [{"type": TRANSFORMER}]), "modules.json"),
        "no map": (lambda m: replace_by_index(m, {}), f"{WEIGHTS}.index.json"),
        "no shard": (lambda m: replace_by_index(m, {"a": "gone.safetensors"}), "gone.safetensors"),
    }


def replace_by_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / WEIGHTS).unlink()
    write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": weight_map})


@pytest.mark.parametrize("damage", broken_folders())
def test_a_broken_folder_names_the_file(local: ModelStore, tmp_path: Path, damage: str) -> None:
    folder = sentence_model(tmp_path / "m", dense=True)
    do_damage, file = broken_folders()[damage]
    do_damage(folder)

    with pytest.raises(BrokenFiles) as caught:
        local.fetch(spec(folder), quiet)

    assert caught.value.file == file
    assert file in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert local.locate(spec(folder)) is None
    assert local.discard(spec(folder), file) is False


def test_a_file_that_vanishes_meanwhile_is_named(
    local: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_model(tmp_path / "m")

    def gone(path: Path, file: str, start: int, end: int) -> bytes:
        raise FileNotFoundError(2, "No such file or directory", str(path / file))

    monkeypatch.setattr("engines.hub.local_folder.read_range", gone)

    with pytest.raises(BrokenFiles, match=f"{WEIGHTS} of m cannot be read: No such file") as caught:
        local.fetch(spec(folder), quiet)

    assert str(tmp_path) not in str(caught.value)


def test_a_module_may_lie_at_a_dot(local: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "m")
    write_modules(folder, [("./", TRANSFORMER)])

    assert local.fetch(spec(folder), quiet).size_bytes > 0


def test_weights_are_counted_before_any_download(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo", dense=True))

    on_cpu, on_cuda = store.weight_bytes(spec(), "cpu"), store.weight_bytes(spec(), "cuda:0")
    asked = len(server.requests)
    again = store.weight_bytes(spec(), "cpu")

    assert on_cpu == (1000 + 40) * 4 + 16 * 8
    assert on_cuda == (1000 + 40) * 2 + 16 * 8
    assert again == on_cpu
    assert len(server.requests) == asked
    assert store.locate(spec()) is None


def test_counting_reads_headers_and_not_weights(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repo", {"big": np.zeros(1_000_000, np.float32)}))

    assert store.weight_bytes(spec(), "cpu") == 4_000_000
    ranges = [request.range for request in server.requests if request.file == WEIGHTS and request.is_content]
    assert ranges == ["bytes=0-131071"]


def test_weights_here_are_counted_from_their_headers(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, sharded_model(tmp_path / "repo"))
    remote = store.weight_bytes(spec(), "cpu")
    store.fetch(spec(), quiet)
    asked = len(server.requests)

    assert store.weight_bytes(spec(), "cpu") == remote == 300 * 4
    assert store.weight_bytes(spec(tmp_path / "repo"), "cpu") == remote
    assert len(server.requests) == asked


def test_pickled_weights_are_estimated(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "repo")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    write_json(folder / "config.json", {"torch_dtype": "float16"})
    server.add(REPO, folder)

    assert store.weight_bytes(spec(), "cpu") == 2000
    assert store.weight_bytes(spec(folder), "cuda") == 1000


@pytest.mark.parametrize("fault", [loopback.gated(), loopback.server_error(), loopback.Corrupt(at_byte=3)])
def test_what_cannot_be_counted_is_unknown_and_asked_again(
    server: LoopbackHub, store: ModelStore, tmp_path: Path, fault: loopback.Fault
) -> None:
    server.add(REPO, plain_model(tmp_path / "repo"))
    server.fail(REPO, fault)

    unknown = store.weight_bytes(spec(), "cpu")
    server.heal()

    assert unknown is None
    assert store.weight_bytes(spec(), "cpu") == 1000 * 4 + 16 * 8


def test_a_fetch_does_not_wait_again_for_a_hub_that_just_timed_out(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    spec = ModelSpec(model_id="m", source=REPO)
    server.add(REPO, sentence_model(tmp_path / "model"))
    server.fail(REPO, loopback.server_error(503), file=LISTING)
    assert store.weight_bytes(spec, "cpu") is None
    num_asked = len(server.requests)

    with pytest.raises(HubUnreachable, match="answered 503"):
        store.fetch(spec, lambda done, total: None)
    assert len(server.requests) == num_asked

    server.heal()
    assert store.fetch(spec, lambda done, total: None).size_bytes > 0


def test_importing_the_store_brings_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "safetensors")
    code = f"import sys, engines.hub.store; print([m for m in {heavy} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_environment_is_huggingface_hubs() -> None:
    code = (
        "from engines.hub.client import HubConfig; c = HubConfig();"
        "print([c.endpoint, c.cache_dir, c.offline, c.timeout_s])"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": "https://mirror.example", "HF_HOME": "/models", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "77",
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert json.loads(done.stdout.replace("'", '"').replace("True", "true")) == [
        "https://mirror.example", "/models/hub", True, 77.0,
    ]  # fmt: skip


# ---- damage that only a hash detects ----


def damage(files: ModelFiles, name: str = WEIGHTS) -> None:
    """Changes one byte of the data and keeps size, header and mtime, as a failing disk does."""
    blob = (Path(files.path) / name).resolve()
    stat = blob.stat()
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([content(files, name)[-1] ^ 0xFF]))
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_damaged_file_is_named_no_longer_located_and_fetched_again(
    server: LoopbackHub, store: ModelStore, tmp_path: Path, name: str
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    files = store.fetch(spec(), quiet)
    store.verify(spec(), files)
    damage(files, name)

    with pytest.raises(BrokenFiles, match="damaged") as caught:
        store.verify(spec(), files, is_anew=True)
    is_current, located = store.is_current(spec(), files), store.locate(spec())
    mended = store.fetch(spec(), quiet)
    store.verify(spec(), mended, is_anew=True)

    assert caught.value.file == name
    assert str(tmp_path) not in str(caught.value)
    assert (is_current, located) == (False, None)
    assert content(mended, name) == (tmp_path / "repo" / name).read_bytes()
    assert store.locate(spec()) == mended
    assert server.downloads(REPO, name) == 2
    assert server.downloads(REPO, "vocab.txt") == 1


def test_a_file_that_was_written_to_is_hashed_before_it_is_served(
    server: LoopbackHub, stores: Stores, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    store = stores.open()
    files = store.fetch(spec(), quiet)
    blob = (Path(files.path) / WEIGHTS).resolve()
    os.utime(blob, ns=(1, 1))
    touched = store.locate(spec())
    damage(files)
    os.utime(blob, ns=(2, 2))

    assert touched is not None
    assert not store.is_current(spec(), files)
    assert store.locate(spec()) is None
    assert content(store.fetch(spec(), quiet)) == (tmp_path / "repo" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_refresh_mends_what_was_damaged(server: LoopbackHub, stores: Stores, tmp_path: Path, is_pinned: bool) -> None:
    commit = server.add(REPO, sentence_model(tmp_path / "repo"))
    wanted = spec(revision=commit if is_pinned else None)
    files = stores.open().fetch(wanted, quiet)
    damage(files)

    mended = stores.open().fetch(wanted, quiet, refresh=True)

    assert content(mended) == (tmp_path / "repo" / WEIGHTS).read_bytes()


def test_a_refresh_without_a_hub_does_not_call_damaged_files_good(
    server: LoopbackHub, stores: Stores, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    files = stores.open().fetch(spec(), quiet)
    damage(files)
    store = stores.open(offline=True)

    with pytest.raises(OfflineMode):
        store.fetch(spec(), quiet, refresh=True)

    assert store.locate(spec()) is None


def test_a_file_that_another_process_has_mended_is_another_one(
    server: LoopbackHub, stores: Stores, tmp_path: Path
) -> None:
    server.add(REPO, sentence_model(tmp_path / "repo"))
    store = stores.open()
    files = store.fetch(spec(), quiet)
    damage(files)
    stores.open().fetch(spec(), quiet, refresh=True)

    with pytest.raises(FilesChanged):
        store.verify(spec(), files)

    found = store.locate(spec())
    assert found is not None
    store.verify(spec(), found)


def test_a_branch_that_moved_on_makes_nothing_of_what_is_in_memory_wrong(
    server: LoopbackHub, stores: Stores, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "old"))
    store = stores.open()
    files = store.fetch(spec(), quiet)
    server.add(REPO, plain_model(tmp_path / "new", tensors(seed=1)))
    stores.open().fetch(spec(), quiet, refresh=True)

    store.verify(spec(), files)

    assert store.is_current(spec(), files)


def test_a_local_folder_has_no_known_hashes(local: ModelStore, tmp_path: Path) -> None:
    files = local.fetch(spec(sentence_model(tmp_path / "m")), quiet)

    local.verify(spec(tmp_path / "m"), files, is_anew=True)


def _with_adapter(adapter: str | Path = "org/adapter") -> ModelSpec:
    return structs.replace(spec(), adapter=str(adapter))


def test_a_model_and_its_adapter_are_fetched_and_located_together(
    server: LoopbackHub, store: ModelStore, tmp_path: Path
) -> None:
    server.add(REPO, plain_model(tmp_path / "repository"))
    server.add("org/adapter", adapter_folder(tmp_path / "adapter"))
    figures: list[tuple[int, int]] = []

    files = store.fetch(_with_adapter(), lambda done, total: figures.append((done, total)))

    base, adapter = store.locate(spec()), files.adapter_folder
    assert base is not None and adapter is not None
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert files.path == base.path
    assert files.revision == f"{base.revision}+{adapter.name}"
    assert files.size_bytes == base.size_bytes + sum(path.stat().st_size for path in adapter.iterdir())
    assert figures[-1] == (files.size_bytes, files.size_bytes)
    assert store.locate(_with_adapter()) == files
    assert store.is_current(_with_adapter(), files)


def test_a_model_without_its_adapter_is_not_whole(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repository"))
    store.fetch(spec(), quiet)

    assert store.locate(spec()) is not None
    assert store.locate(_with_adapter()) is None


def test_a_changed_adapter_is_another_model(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repository"))
    local = adapter_folder(tmp_path / "adapter")
    files = store.fetch(_with_adapter(local), quiet)
    write_json(local / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    later = store.locate(_with_adapter(local))

    assert later is not None and later.revision != files.revision
    assert later.parts[0] == files.parts[0]
    assert not store.is_current(_with_adapter(local), files)


def test_damage_to_an_adapter_is_seen_and_mended(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repository"))
    server.add("org/adapter", adapter_folder(tmp_path / "adapter"))
    files = store.fetch(_with_adapter(), quiet)
    assert files.adapter_folder is not None
    weights = (files.adapter_folder / "adapter_model.safetensors").resolve()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x7f")

    with pytest.raises(BrokenFiles) as caught:
        store.verify(_with_adapter(), files)
    assert store.discard(_with_adapter(), caught.value.file)
    mended = store.fetch(_with_adapter(), quiet)

    assert mended.adapter_folder is not None
    assert (mended.adapter_folder / "adapter_model.safetensors").read_bytes() == whole
    assert mended.revision == files.revision


def test_an_adapter_adds_no_weights(server: LoopbackHub, store: ModelStore, tmp_path: Path) -> None:
    server.add(REPO, plain_model(tmp_path / "repository"))
    server.add("org/adapter", adapter_folder(tmp_path / "adapter"))

    assert store.weight_bytes(_with_adapter(), "cpu") == store.weight_bytes(spec(), "cpu")
