"""Tests the differences between two registries."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engines.spec import IN_PLACE, Calibration, Matryoshka, ModelSpec
from engines.types import Budget
from router.registry.registry import Changes, Registry, diff

OTHER: dict[str, Any] = {
    "source": "o/other",
    "task": "rerank",
    "template": "qwen3-reranker",
    "revision": "main",
    "adapter": "o/adapter",
    "adapter_revision": "v2",
    "dtype": "float16",
    "smaller_dtypes": ("int8",),
    "min_cosine": 0.5,
    "device": "cpu",
    "max_tokens": 7,
    "pooling": ("mean",),
    "normalize": False,
    "prompts": {"query": "q: "},
    "default_prompt": "query",
    "instruction_template": "{task}{text}",
    "matryoshka": Matryoshka(minimum=32),
    "truncate": "start",
    "keep_alive_s": 5.0,
    "host_keep_alive_s": 5.0,
    "pinned": True,
    "preload": True,
    "warm": True,
    "preload_at": "0 8 * * *",
    "replicas": 2,
    "offload": "allowed",
    "trust_remote_code": True,
    "max_batch_tokens": 64,
    "cache_bytes": 2**20,
    "cache_shared": True,
    "description": "other",
    "license": "other",
    "token_encoding": "cl100k_base",
    "unframed_token_ids": True,
    "calibration": Calibration(lowest=(-1.0,), highest=(1.0,)),
    "sha256": {"model.safetensors": "0" * 64},
}
"""Another value for every field; a test checks that no field is missing."""

SPEC = ModelSpec(model_id="a", source="o/a")


def registry(*specs: ModelSpec, **more: Any) -> Registry:
    return Registry(models={spec.model_id: spec for spec in specs}, **more)


def test_every_field_of_a_spec_is_covered_here() -> None:
    assert OTHER.keys() | {"model_id"} == set(ModelSpec.__struct_fields__)
    assert OTHER.keys() > IN_PLACE


def test_equal_registries_differ_in_nothing() -> None:
    assert diff(registry(SPEC), registry(SPEC)).is_empty


@pytest.mark.parametrize(
    "name",
    [
        "keep_alive_s",
        "host_keep_alive_s",
        "pinned",
        "preload",
        "warm",
        "preload_at",
        "replicas",
        "description",
        "license",
        "token_encoding",
        "calibration",
    ],
)
def test_what_an_engine_never_sees_changes_in_place(name: str) -> None:
    changed = structs.replace(SPEC, **{name: OTHER[name]})

    assert diff(registry(SPEC), registry(changed)) == Changes(updated=("a",))


@pytest.mark.parametrize("name", sorted(OTHER.keys() - IN_PLACE))
def test_what_shapes_vectors_or_memory_needs_a_new_generation(name: str) -> None:
    changed = structs.replace(SPEC, **{name: OTHER[name]}, description="too")

    assert diff(registry(SPEC), registry(changed)) == Changes(replaced=("a",))


def test_aliases_change_in_place() -> None:
    assert diff(registry(SPEC), registry(SPEC, aliases={"x": "a"})) == Changes(updated=("a",))


def test_an_alias_that_moves_changes_both_models() -> None:
    other = ModelSpec(model_id="b", source="o/b")

    changes = diff(registry(SPEC, other, aliases={"x": "a"}), registry(SPEC, other, aliases={"x": "b"}))

    assert changes == Changes(updated=("a", "b"))


def test_the_order_of_models_and_aliases_means_nothing() -> None:
    other = ModelSpec(model_id="b", source="o/b")
    old = registry(SPEC, other, aliases={"x": "a", "y": "a"})

    assert diff(old, registry(other, SPEC, aliases={"y": "a", "x": "a"})).is_empty


def test_models_come_and_go() -> None:
    other = ModelSpec(model_id="b", source="o/b")

    assert diff(registry(SPEC), registry(other)) == Changes(added=("b",), removed=("a",))


def test_a_new_default_and_a_new_budget_are_reported() -> None:
    old = registry(SPEC)

    assert diff(old, registry(SPEC, default_model="a")) == Changes(is_default_changed=True)
    assert diff(old, registry(SPEC, memory_budget=Budget(fraction=0.5))) == Changes(is_budget_changed=True)


SPECS = st.builds(
    ModelSpec,
    model_id=st.sampled_from("abcd"),
    source=st.sampled_from(["o/1", "o/2"]),
    pinned=st.booleans(),
)
REGISTRIES = st.lists(SPECS, max_size=4).map(lambda specs: registry(*specs))


@given(REGISTRIES, REGISTRIES)
def test_every_model_is_in_one_place_and_the_way_back_mirrors_the_way_there(old: Registry, new: Registry) -> None:
    there, back = diff(old, new), diff(new, old)
    listed = [*there.added, *there.removed, *there.updated, *there.replaced]

    assert len(listed) == len(set(listed))
    assert (set(there.added), set(there.removed)) == (set(back.removed), set(back.added))
    assert (set(there.updated), set(there.replaced)) == (set(back.updated), set(back.replaced))
    for model_id in old.models.keys() & new.models.keys():
        assert (model_id in listed) == (old.models[model_id] != new.models[model_id])
