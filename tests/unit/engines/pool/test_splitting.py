"""Tests what `cut` leaves out: fills that cannot succeed; and that more room never loses a split."""

from random import Random

from engines.pool import splitting
from engines.pool.slot import MemoryNeed, Split
from engines.pool.splitting import cut

Rooms = list[tuple[int, int]]


def random_case(seed: int) -> tuple[MemoryNeed, Rooms, Rooms]:
    """Returns a need, and the rooms of one to four devices, of some of which less than nothing is left."""
    random = Random(seed)
    parts = tuple(random.randint(1, 40) for _ in range(random.randint(1, 20)))
    pools = range(random.randint(1, 4))
    rooms = [(pool, random.randint(-20, 120)) for pool in pools]
    host_rooms = [(pool, random.randint(-20, 150)) for pool in pools] if random.random() < 0.7 else []
    return MemoryNeed(workspace_bytes=5, parts=parts), rooms, host_rooms


def tried_one_by_one(need: MemoryNeed, rooms: Rooms, host_rooms: Rooms) -> Split | None:
    parts, counts = need.parts or (), range(1, len(rooms) + 1)
    fills = [splitting._fill(need, parts, rooms[:count], ()) for count in counts]
    fills += [splitting._fill(need, parts, rooms[:count], host_rooms) for count in reversed(counts) if host_rooms]
    return next((split for split in fills if split is not None), None)


def test_a_cut_is_the_first_of_all_fills_that_succeeds() -> None:
    cases = [random_case(seed) for seed in range(3000)]
    found = [cut(*case) for case in cases]

    assert found == [tried_one_by_one(*case) for case in cases]
    assert 300 < sum(split is None for split in found) < 2700
    assert sum(split is not None and split.num_host_parts > 0 for split in found) > 100


def test_what_fits_fits_with_more_room_too() -> None:
    """So a claim that can be served beside other processes is not compared with the budgets."""
    for seed in range(3000):
        need, rooms, host_rooms = random_case(seed)
        more = [(pool, room + Random(seed + pool).randint(0, 60)) for pool, room in rooms]

        assert cut(need, rooms, host_rooms) is None or cut(need, more, host_rooms) is not None, seed
