"""The cores that a thread may use, and those that torch uses of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engines.device import torch_runtime


def on_a_thread(work: Callable[[], None]) -> None:
    """Runs a test on a thread of its own, as torch keeps its number of threads for each thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def test_a_thread_begins_with_one_core_and_torch_uses_the_number_that_is_set() -> None:
    def work() -> None:
        torch_runtime.prepare()
        assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (1, 1)
        torch_runtime.set_threads(2)
        assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (2, 2)

    on_a_thread(work)


def test_where_no_number_was_set_torch_decides() -> None:
    def work() -> None:
        torch.set_num_threads(2)
        assert torch_runtime.usable_threads() == 2
        with torch_runtime.reserve_for_onnxruntime():
            assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (2, 1)
        torch.set_num_threads(1)
        assert torch_runtime.usable_threads() == 1

    on_a_thread(work)


def test_cores_are_reserved_for_onnxruntime_and_given_back() -> None:
    def work() -> None:
        torch_runtime.set_threads(2)
        with torch_runtime.reserve_for_onnxruntime():
            assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (2, 1)
            with torch_runtime.reserve_for_onnxruntime():
                assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (2, 1)
            assert torch.get_num_threads() == 1, "the outer one still reserves them"
        assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (2, 2)
        with torch_runtime.reserve_for_onnxruntime(False):
            assert torch.get_num_threads() == 2

    on_a_thread(work)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_number_that_is_set_meanwhile_is_known_and_torch_uses_it_afterwards(before: int, after: int) -> None:
    def work() -> None:
        torch_runtime.set_threads(before)
        with torch_runtime.reserve_for_onnxruntime():
            torch_runtime.set_threads(after)
            assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (after, 1)
        assert (torch_runtime.usable_threads(), torch.get_num_threads()) == (after, after)

    on_a_thread(work)


def test_cores_are_given_back_after_a_failure() -> None:
    def work() -> None:
        torch_runtime.set_threads(2)
        with pytest.raises(ValueError, match="no"), torch_runtime.reserve_for_onnxruntime():
            raise ValueError("no")
        assert torch.get_num_threads() == 2

    on_a_thread(work)
