"""Whose registry holds: what was read last, whatever the age of its file; and every host is told until it serves it."""

from engines.rpc.messages import Generation
from engines.spec import ModelSpec
from engines.types import Budget
from router.registry.generation import DesiredRegistry, first_generation

OLD = {"a": ModelSpec(model_id="a", source="org/a", prompts={"query": "q: ", "passage": "p: "})}
NEW = {"a": ModelSpec(model_id="a", source="org/b")}
BUDGET = Budget(fraction=0.5)


def settled(specs: dict[str, ModelSpec], *shown: Generation) -> DesiredRegistry:
    """A router that has started, and heard these hosts."""
    desired = DesiredRegistry(specs)
    for generation in shown:
        desired.hear(generation)
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
    desired.hear(Generation(7, "of another router"))
    desired.change(OLD, None)
    third = desired.generation

    assert first < second < third
    assert (third.counter, third.digest) == (8, first.digest)
    assert desired.message.specs == OLD


def test_a_reload_that_changes_nothing_is_told_again() -> None:
    desired = settled(OLD, Generation(3, first_generation(OLD).digest))
    desired.change(OLD, None)

    assert desired.is_lacking(Generation(3, first_generation(OLD).digest))


def test_a_router_that_starts_with_what_hosts_serve_tells_only_those_that_are_behind() -> None:
    served, born = Generation(5, first_generation(OLD).digest), first_generation(NEW)
    desired = settled(OLD, born, served)

    assert desired.generation == served
    assert (desired.is_lacking(born), desired.is_lacking(served)) == (True, False)


def test_a_router_that_starts_with_another_registry_brings_it() -> None:
    served = Generation(5, first_generation(OLD).digest)
    desired = settled(NEW, served)

    assert desired.generation == Generation(6, first_generation(NEW).digest)
    assert desired.is_lacking(served)


def test_before_any_host_was_heard_nobody_is_told_and_the_first_ones_decide() -> None:
    desired = settled(NEW)
    early = desired.is_lacking(Generation(0, ""))
    desired.settle([Generation(2, first_generation(OLD).digest)])

    assert not early
    assert desired.generation.counter == 3


def test_what_another_router_has_read_later_is_left_alone_and_beaten_by_the_next_reload() -> None:
    desired = settled(OLD, first_generation(OLD))
    theirs = Generation(4, first_generation(NEW).digest)
    desired.hear(theirs)
    left_alone = not desired.is_lacking(theirs)
    desired.change(OLD, None)

    assert left_alone
    assert desired.is_lacking(theirs)


def test_two_routers_that_read_the_same_agree_on_one_generation() -> None:
    desired = settled(OLD, first_generation(OLD))
    theirs = Generation(4, first_generation(OLD).digest)
    desired.hear(theirs)

    assert desired.generation == theirs


def test_two_reloads_of_the_same_count_end_alike_on_every_host() -> None:
    one, other = settled(OLD, first_generation(OLD)), settled(OLD, first_generation(OLD))
    one.change(NEW, None)
    other.change({}, None)
    higher = max(one.generation, other.generation)

    assert [desired.is_lacking(higher) for desired in (one, other)] == [False, False]
    assert one.is_lacking(other.generation) != other.is_lacking(one.generation)


def test_a_budget_holds_until_there_is_another_one() -> None:
    desired = DesiredRegistry(OLD)
    desired.change(NEW, BUDGET)
    desired.change(OLD, None)

    assert desired.message.budget == BUDGET
