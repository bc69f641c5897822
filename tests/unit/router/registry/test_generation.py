"""Tests that the registry that was read last is the newest, and is sent to every host until the host serves it."""

from engines.rpc.messages import Generation
from engines.spec import ModelSpec
from engines.types import Budget
from router.registry.generation import DesiredRegistry, first_generation

OLD = {"a": ModelSpec(model_id="a", source="org/a", prompts={"query": "q: ", "passage": "p: "})}
NEW = {"a": ModelSpec(model_id="a", source="org/b")}
BUDGET = Budget(fraction=0.5)


def settled(specs: dict[str, ModelSpec], *shown: Generation) -> DesiredRegistry:
    """Return the desired registry of a router that has seen these generations."""
    desired = DesiredRegistry(specs)
    for generation in shown:
        desired.observe(generation)
    desired.settle(shown)
    return desired


def test_the_same_content_is_the_same_generation_and_another_one_is_not() -> None:
    turned = {"a": ModelSpec(model_id="a", source="org/a", prompts={"passage": "p: ", "query": "q: "})}

    assert first_generation(OLD) == first_generation(turned) != first_generation(NEW)


def test_every_reload_is_newer_than_all_that_was_seen_also_one_that_rolls_back() -> None:
    desired = settled(OLD, first_generation(OLD))
    first = desired.generation
    desired.change(NEW, None)
    second = desired.generation
    desired.observe(Generation(7, "of another router"))
    desired.change(OLD, None)
    third = desired.generation

    assert first < second < third
    assert (third.counter, third.digest) == (8, first.digest)
    assert desired.message.specs == OLD


def test_a_reload_without_changes_is_sent_again() -> None:
    desired = settled(OLD, Generation(3, first_generation(OLD).digest))
    desired.change(OLD, None)

    assert desired.is_outdated(Generation(3, first_generation(OLD).digest))


def test_a_router_that_starts_with_the_registry_of_the_hosts_updates_only_those_behind() -> None:
    served, born = Generation(5, first_generation(OLD).digest), first_generation(NEW)
    desired = settled(OLD, born, served)

    assert desired.generation == served
    assert (desired.is_outdated(born), desired.is_outdated(served)) == (True, False)


def test_a_router_that_starts_with_another_registry_sends_it() -> None:
    served = Generation(5, first_generation(OLD).digest)
    desired = settled(NEW, served)

    assert desired.generation == Generation(6, first_generation(NEW).digest)
    assert desired.is_outdated(served)


def test_no_host_is_outdated_before_the_first_hosts_reported() -> None:
    desired = settled(NEW)
    early = desired.is_outdated(Generation(0, ""))
    desired.settle([Generation(2, first_generation(OLD).digest)])

    assert not early
    assert desired.generation.counter == 3


def test_another_routers_newer_registry_stays_until_the_next_reload() -> None:
    desired = settled(OLD, first_generation(OLD))
    theirs = Generation(4, first_generation(NEW).digest)
    desired.observe(theirs)
    left_alone = not desired.is_outdated(theirs)
    desired.change(OLD, None)

    assert left_alone
    assert desired.is_outdated(theirs)


def test_two_routers_that_read_the_same_agree_on_one_generation() -> None:
    desired = settled(OLD, first_generation(OLD))
    theirs = Generation(4, first_generation(OLD).digest)
    desired.observe(theirs)

    assert desired.generation == theirs


def test_two_reloads_of_the_same_count_end_alike_on_every_host() -> None:
    one, other = settled(OLD, first_generation(OLD)), settled(OLD, first_generation(OLD))
    one.change(NEW, None)
    other.change({}, None)
    higher = max(one.generation, other.generation)

    assert [desired.is_outdated(higher) for desired in (one, other)] == [False, False]
    assert one.is_outdated(other.generation) != other.is_outdated(one.generation)


def test_a_budget_holds_until_there_is_another_one() -> None:
    desired = DesiredRegistry(OLD)
    desired.change(NEW, BUDGET, "auto")
    desired.change(OLD, None)

    assert (desired.message.budget, desired.message.host_budget) == (BUDGET, "auto")
