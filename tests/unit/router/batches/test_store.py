"""Tests the rows of files and batches: owners, quotas, pages, leases of several servers."""

from collections import Counter

import pytest
from msgspec import structs

from router.batches.leases import LEASE_S, LeaseLost
from router.batches.records import Page, Room, Segment
from router.errors import BatchFinished, FileInUse, ObjectNotFound, QuotaExceeded
from tests.testkit.batches import BATCH, INPUT_ID, OWNER, QUOTA, BatchWorld, file_record, with_id

NOBODY = Counter[str]()


def test_a_file_is_seen_by_its_owner_only(world: BatchWorld) -> None:
    world.store.add_file(file_record())

    assert world.store.file(OWNER, INPUT_ID) == file_record()
    with pytest.raises(ObjectNotFound):
        world.store.file("key:other", INPUT_ID)
    with pytest.raises(ObjectNotFound):
        world.store.delete_file("key:other", INPUT_ID)
    assert world.store.files("key:other", Page(limit=10)) == ([], False)
    with pytest.raises(ObjectNotFound):
        world.store.add_batch(structs.replace(BATCH, owner="key:other"))


def test_a_batch_is_seen_and_cancelled_by_its_owner_only(world: BatchWorld) -> None:
    world.add(b"{}")

    with pytest.raises(ObjectNotFound):
        world.store.batch("key:other", BATCH.id)
    with pytest.raises(ObjectNotFound):
        world.store.cancel("key:other", BATCH.id)
    assert world.store.batches("key:other", Page(limit=10)) == ([], False)
    assert world.batch().status == "validating"


def test_quotas_are_of_each_owner(world: BatchWorld) -> None:
    for number in range(QUOTA.max_files):
        world.store.add_file(file_record(f"file-{number:032x}"))

    with pytest.raises(QuotaExceeded, match="100 files"):
        world.store.check_room(OWNER)
    with pytest.raises(QuotaExceeded):
        world.store.add_file(file_record("file-" + "f" * 32))
    assert world.store.check_room("key:other") == Room(QUOTA.max_bytes, "MAX_BYTES_PER_KEY")


def test_stored_bytes_are_limited(world: BatchWorld) -> None:
    world.store.add_file(file_record(bytes=QUOTA.max_bytes - 5))

    assert world.store.check_room(OWNER) == Room(5, "MAX_BYTES_PER_KEY")
    with pytest.raises(QuotaExceeded, match="may store 5 more"):
        world.store.add_file(file_record("file-" + "f" * 32, bytes=6))
    world.store.add_file(file_record("file-" + "f" * 32, bytes=5))
    with pytest.raises(QuotaExceeded, match="MAX_BYTES_PER_KEY"):
        world.store.check_room(OWNER)


def test_all_keys_together_may_store_so_many_bytes(world: BatchWorld) -> None:
    for number in range(2):
        world.store.add_file(file_record(f"file-{number:032x}", owner=f"key:{number}", bytes=QUOTA.max_bytes - 20))
    assert world.store.check_room("key:new") == Room(40, "MAX_STORED_BYTES")
    world.add(b"0123456789")
    batch = world.leases.claim(NOBODY)
    assert batch is not None
    world.leases.advance(batch, Segment(epoch=1, output_bytes=20, error_bytes=5))

    assert world.store.stored_bytes() == QUOTA.max_stored - 5
    with pytest.raises(QuotaExceeded, match="may store 5 more \\(MAX_STORED_BYTES\\)"):
        world.store.add_file(file_record("file-" + "f" * 32, owner="key:new", bytes=6))
    world.leases.advance(batch, Segment(epoch=1, output_bytes=20, error_bytes=10))
    with pytest.raises(QuotaExceeded, match=r"Storage full.*MAX_STORED_BYTES"):
        world.store.check_room("key:new")
    with pytest.raises(QuotaExceeded, match="Storage full"):
        world.store.add_batch(with_id(BATCH, 7, input_file_id=INPUT_ID))


def test_unfinished_batches_are_limited(world: BatchWorld) -> None:
    for number in range(QUOTA.max_unfinished):
        world.add(b"{}", with_id(BATCH, number))

    with pytest.raises(QuotaExceeded, match="3 unfinished batches"):
        world.store.add_batch(structs.replace(BATCH, input_file_id=f"file-{0:032x}"))


def test_pages_follow_each_other_without_a_gap(world: BatchWorld) -> None:
    ids = [f"file-{number:032x}" for number in range(7)]
    for number, file_id in enumerate(ids):
        world.store.add_file(file_record(file_id, created_at=float(number // 2)))  # some at the same moment

    for is_ascending, expected in ((True, ids), (False, ids[::-1])):
        found: list[str] = []
        has_more = True
        while has_more:
            page = Page(limit=3, after=found[-1] if found else None, is_ascending=is_ascending)
            records, has_more = world.store.files(OWNER, page)
            found += [record.id for record in records]
        assert found == expected
    assert world.store.files(OWNER, Page(limit=10), "batch_output") == ([], False)
    with pytest.raises(ObjectNotFound):
        world.store.files(OWNER, Page(limit=3, after="file-" + "e" * 32))


def test_a_file_that_a_batch_reads_is_not_deleted(world: BatchWorld) -> None:
    world.add(b"{}")

    with pytest.raises(FileInUse, match=BATCH.id):
        world.store.delete_file(OWNER, INPUT_ID)
    world.now_s = 10.0**10
    assert world.store.drop_expired() == []

    batch = world.leases.claim(NOBODY)
    assert batch is not None
    world.leases.finish(batch, "cancelled", {}, [])
    assert world.store.drop_expired() == [INPUT_ID]


def test_a_batch_that_has_ended_cannot_be_cancelled(world: BatchWorld) -> None:
    world.add(b"{}")
    batch = world.leases.claim(NOBODY)
    assert batch is not None
    world.leases.begin(batch, 1)
    world.leases.begin_finalizing(batch)

    with pytest.raises(BatchFinished, match="finalizing"):
        world.store.cancel(OWNER, BATCH.id)
    world.leases.finish(batch, "completed", {}, [])
    with pytest.raises(BatchFinished, match="completed"):
        world.store.cancel(OWNER, BATCH.id)


def test_one_server_has_a_batch_until_its_lease_ends(world: BatchWorld) -> None:
    world.add(b"{}")
    first, second = world.leases_of("first"), world.leases_of("second")
    batch = first.claim(NOBODY)
    assert batch is not None and batch.holder == "first" and batch.epoch == 1
    assert second.claim(NOBODY) is None

    world.now_s += LEASE_S - 1
    first.renew(batch)
    world.now_s += LEASE_S - 1
    assert second.claim(NOBODY) is None

    world.now_s += 1
    taken = second.claim(NOBODY)
    assert taken is not None and taken.holder == "second" and taken.epoch == 2
    for write in (
        lambda: first.renew(batch),
        lambda: first.read(batch),
        lambda: first.begin(batch, 1),
        lambda: first.begin_finalizing(batch),
        lambda: first.advance(batch, Segment(epoch=1, output_bytes=9, error_bytes=9)),
        lambda: first.finish(batch, "completed", {"output_file_id": file_record("file-" + "f" * 32)}, []),
    ):
        with pytest.raises(LeaseLost):
            write()
    first.release(batch)
    assert world.batch() == taken
    assert [segment.output_bytes for segment in second.segments(BATCH.id)] == [0, 0]


def test_a_released_batch_is_free_at_once_or_after_a_while(world: BatchWorld) -> None:
    world.add(b"{}")
    first, second = world.leases_of("first"), world.leases_of("second")
    batch = first.claim(NOBODY)
    assert batch is not None
    first.release(batch, retry_in_s=5.0)
    assert second.claim(NOBODY) is None
    world.now_s += 5.0
    batch = second.claim(NOBODY)
    assert batch is not None
    second.release(batch)
    assert first.claim(NOBODY) is not None


def test_the_owner_with_the_fewest_running_batches_comes_first(world: BatchWorld) -> None:
    for number, owner in enumerate(("key:a", "key:a", "key:b")):
        world.add(b"{}", with_id(BATCH, number, owner=owner, created_at=float(number)))

    running = Counter[str]()
    order = []
    while (batch := world.leases.claim(running)) is not None:
        running[batch.owner] += 1
        order.append(batch.owner)

    assert order == ["key:a", "key:b", "key:a"]


def test_batches_that_ended_long_ago_are_forgotten(world: BatchWorld) -> None:
    world.add(b"{}", with_id(BATCH, 1))
    world.add(b"{}", with_id(BATCH, 2))
    batch = world.leases.claim(NOBODY)
    assert batch is not None
    world.leases.finish(batch, "failed", {}, [])

    world.store.drop_old_batches(before=1.0)

    assert world.store.count_by_status() == {"validating": 1}
    assert world.leases.segments(batch.id) == []
