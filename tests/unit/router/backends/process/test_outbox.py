"""Tests of `Outbox`: order of sending, limits, and withdrawn requests."""

import pytest

from engines.rpc.messages import Cancel, Drain, Request, Run
from engines.types import Call, EmbedCall
from router.backends.process.outbox import OWN_CALLS, Outbox


def embed(model_id: str = "a") -> Run[Call]:
    return Run(call=EmbedCall(model_id=model_id, texts=("x",)))


def filled(box: Outbox, *models: str) -> None:
    """Create an outbox with one call per name, numbered from 1."""
    for number, model_id in enumerate(models, start=1):
        box.put(number, embed(model_id))


def send(box: Outbox, size_bytes: int = 1) -> list[int]:
    """Pop all requests that may be sent now; returns their numbers."""
    numbers = []
    while (popped := box.pop()) is not None:
        numbers.append(popped[0])
        box.record_size(popped[0], size_bytes)
    return numbers


def requests(box: Outbox) -> list[Request]:
    """Pop all requests that may be sent now."""
    found = []
    while (popped := box.pop()) is not None:
        found.append(popped[1])
    return found


def test_calls_of_one_model_are_sent_as_they_came() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a", "a", "a")

    assert send(box) == [1, 2, 3]
    assert (box.num_waiting, box.num_sent, box.sent_bytes) == (0, 3, 3)


def test_a_call_that_is_withdrawn_before_it_was_sent_is_forgotten() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a", "a", "b")
    box.withdraw(1)
    box.withdraw(3)

    assert send(box) == [2]
    assert box.num_waiting == 0


def test_a_call_that_is_withdrawn_later_is_cancelled_and_counts_until_it_has_ended() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a")
    send(box, size_bytes=7)
    box.withdraw(1)
    held = box.num_sent, box.sent_bytes
    told = requests(box)
    box.end(1)

    assert held == (1, 7)
    assert told == [Cancel(number=1)]
    assert (box.num_sent, box.sent_bytes) == (0, 0)


def test_a_call_that_is_withdrawn_after_its_end_is_not_cancelled() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a")
    send(box)
    box.end(1)
    box.withdraw(1)

    assert requests(box) == []


def test_a_command_goes_before_calls_is_never_held_back_and_can_be_withdrawn() -> None:
    box = Outbox(max_calls=0, max_bytes=0)
    filled(box, *["a"] * OWN_CALLS)
    send(box)
    box.put(97, embed())
    box.put(98, Drain(grace_s=1.0))
    box.put(99, Drain(grace_s=2.0))
    box.withdraw(98)
    sent = requests(box)
    box.withdraw(99)
    box.end(99)

    assert sent == [Drain(grace_s=2.0)]
    assert requests(box) == [Cancel(number=99)]


@pytest.mark.parametrize(("max_calls", "max_bytes"), [(40, 10**9), (10**9, 40)])
def test_beyond_its_bounds_calls_wait_until_others_have_ended(max_calls: int, max_bytes: int) -> None:
    box = Outbox(max_calls, max_bytes)
    filled(box, *["a"] * 60)
    first = send(box)
    box.end(5)
    box.end(6)

    assert first == list(range(1, 41))
    assert send(box) == [41, 42]
    assert box.num_waiting == 18


def test_a_call_larger_than_all_bounds_is_sent_alone() -> None:
    box = Outbox(max_calls=10, max_bytes=100)
    filled(box, "a", "a")
    first = box.pop()
    box.record_size(1, 10**9)

    assert first is not None
    assert box.pop() is None


def test_models_are_sent_in_turn() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a", "a", "a", "b", "b")

    assert send(box) == [1, 4, 2, 5, 3]


def test_a_cold_model_with_large_requests_does_not_hold_back_a_ready_one() -> None:
    box = Outbox(max_calls=100, max_bytes=100)
    filled(box, *["cold"] * 30)
    send(box, size_bytes=10**7)
    box.put(31, embed("ready"))

    assert send(box) == [31]


def test_nothing_is_left_of_requests_that_have_ended() -> None:
    box = Outbox(max_calls=100)
    filled(box, "a", "b", "a", "c")
    for number in send(box):
        box.end(number)

    assert (box.num_waiting, box.num_sent, box.sent_bytes, requests(box)) == (0, 0, 0, [])
