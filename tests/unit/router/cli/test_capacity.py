"""The capacity line at start: whether pinned and preloaded models fit, and which models take turns."""

import pytest

from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus
from router.cli.capacity import plan_capacity
from router.registry.registry import Registry

GIB = 2**30


def host(name: str, budget_gib: float, **needs: tuple[float, float] | None) -> HostSnapshot:
    """A device and its models: (weights, workspace) in GiB, None for unknown."""
    models = tuple(
        ModelStatus(
            model_id=model_id, state="cold", host_id=name, device=name, source="s",
            need_bytes=int(need[0] * GIB) if need else 0, need_workspace_bytes=int(need[1] * GIB) if need else 0,
        )
        for model_id, need in needs.items()
    )  # fmt: skip
    budget = int(budget_gib * GIB)
    return HostSnapshot(
        host_id=name, device=name, total_bytes=2 * budget, budget_bytes=budget, used_bytes=0, workspace_bytes=0,
        free_bytes=budget, residents=(), models=models,
    )  # fmt: skip


def registry(*model_ids: str, pinned: str = "", preload: str = "") -> Registry:
    return Registry(
        models={
            model_id: ModelSpec(model_id=model_id, source="s", pinned=model_id in pinned, preload=model_id in preload)
            for model_id in model_ids
        }
    )


def test_all_fit() -> None:
    here = host("cpu", 10, a=(2, 1), b=(3, 0.5), c=None)

    capacity = plan_capacity(registry("a", "b", "c", pinned="a"), [here])

    assert (capacity.misfits, capacity.alternating, capacity.num_known) == ((), (), 2)
    assert str(capacity) == "6.0 of 10.0 GiB for the 2 models whose sizes are known, all at once"
    assert str(plan_capacity(registry("a"), [here])) == "3.0 of 10.0 GiB for the one model whose size is known"


def test_models_that_do_not_fit_together_take_turns() -> None:
    here = host("cpu", 10, a=(4, 1), b=(3, 1), c=(3, 1), d=(3, 1))

    one = plan_capacity(registry("a", "b", "c", preload="a"), [here])
    two = plan_capacity(registry("a", "b", "c", "d", preload="a"), [here])

    assert (one.alternating, two.alternating) == (("c",), ("c", "d"))
    wanted = "; pinned and preloaded ones take 5.0"
    assert str(one) == f"11.0 of 10.0 GiB for the 3 models whose sizes are known, so c takes turns with others{wanted}"
    assert str(two) == f"14.0 of 10.0 GiB for the 4 models whose sizes are known, so c and d take turns{wanted}"


def test_pinned_models_that_do_not_fit_are_named_with_the_cure() -> None:
    here = host("cpu", 5, a=(4, 1), b=(3, 1))

    capacity = plan_capacity(registry("a", "b", pinned="ab"), [here])

    assert capacity.misfits == ("b",)
    assert str(capacity) == (
        "pinned and preloaded models do not fit: 8.0 of 5.0 GiB; no room for b. Raise MEMORY_BUDGET, or pin and "
        "preload fewer"
    )


def test_workspaces_of_one_device_do_not_add_up() -> None:
    here = host("cpu", 10, a=(4, 2), b=(4, 2))

    assert plan_capacity(registry("a", "b", pinned="ab"), [here]).misfits == ()


def test_a_large_workspace_that_comes_last_still_counts() -> None:
    here = host("cpu", 10, a=(5, 0), b=(4, 2))

    assert plan_capacity(registry("a", "b", pinned="ab"), [here]).misfits == ("b",)


def test_models_spread_over_the_devices_that_take_them() -> None:
    first, second = host("cuda:0", 5, a=(4, 1), b=(4, 1)), host("cuda:1", 5, a=(4, 1), b=(4, 1), c=(4, 1))

    spread = plan_capacity(registry("a", "b", pinned="ab"), [first, second])
    too_many = plan_capacity(registry("a", "b", "c", pinned="abc"), [first, second])

    assert spread.misfits == ()
    assert len(too_many.misfits) == 1


def test_the_wanted_have_the_first_choice() -> None:
    here = host("cpu", 5, big=(4, 0), small=(2, 0))

    assert plan_capacity(registry("big", "small", pinned="small"), [here]).alternating == ("big",)


@pytest.mark.parametrize("hosts", [[], [host("cpu", 5)], [host("cpu", 5, a=None)]])
def test_nothing_is_said_of_what_is_not_known(hosts: list[HostSnapshot]) -> None:
    assert plan_capacity(registry("a", pinned="a"), hosts).num_known == 0


def test_many_names_are_cut_short() -> None:
    models = dict.fromkeys("abcdefg", (1.0, 0.0))

    capacity = plan_capacity(registry(*models), [host("cpu", 1, **models)])

    assert str(capacity).endswith("so b, c, d and 3 more take turns")
