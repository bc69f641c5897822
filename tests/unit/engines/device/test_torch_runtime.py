"""What a thread may use, and what torch takes of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engines.device import torch_runtime as cores


def on_a_thread(work: Callable[[], None]) -> None:
    """Numbers of threads belong to a thread: each test has its own."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def test_a_thread_begins_with_one_core_and_torch_takes_what_it_is_given() -> None:
    def work() -> None:
        cores.prepare()
        assert (cores.usable_threads(), torch.get_num_threads()) == (1, 1)
        cores.set_threads(2)
        assert (cores.usable_threads(), torch.get_num_threads()) == (2, 2)

    on_a_thread(work)


def test_where_nobody_has_said_it_torch_knows() -> None:
    def work() -> None:
        torch.set_num_threads(2)
        assert cores.usable_threads() == 2
        with cores.reserve_for_onnxruntime():
            assert (cores.usable_threads(), torch.get_num_threads()) == (2, 1)
        torch.set_num_threads(1)
        assert cores.usable_threads() == 1

    on_a_thread(work)


def test_cores_are_left_to_others_and_taken_back() -> None:
    def work() -> None:
        cores.set_threads(2)
        with cores.reserve_for_onnxruntime():
            assert (cores.usable_threads(), torch.get_num_threads()) == (2, 1)
            with cores.reserve_for_onnxruntime():
                assert (cores.usable_threads(), torch.get_num_threads()) == (2, 1)
            assert torch.get_num_threads() == 1, "the outer one still leaves them"
        assert (cores.usable_threads(), torch.get_num_threads()) == (2, 2)
        with cores.reserve_for_onnxruntime(False):
            assert torch.get_num_threads() == 2

    on_a_thread(work)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_what_changes_meanwhile_is_known_and_torch_takes_it_afterwards(before: int, after: int) -> None:
    def work() -> None:
        cores.set_threads(before)
        with cores.reserve_for_onnxruntime():
            cores.set_threads(after)
            assert (cores.usable_threads(), torch.get_num_threads()) == (after, 1)
        assert (cores.usable_threads(), torch.get_num_threads()) == (after, after)

    on_a_thread(work)


def test_cores_are_taken_back_after_a_failure() -> None:
    def work() -> None:
        cores.set_threads(2)
        with pytest.raises(ValueError, match="no"), cores.reserve_for_onnxruntime():
            raise ValueError("no")
        assert torch.get_num_threads() == 2

    on_a_thread(work)
