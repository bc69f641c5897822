"""Conformance suite: tests that every backend must pass. One class, run by the test module of each backend.

A module provides two fixtures: `backend`, started, with three hosts of `BUDGET_BYTES` each, which its tests share; and
`opened`, which creates another backend for the same or other hosts, for tests that close it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from engines.errors import (
    EngineError,
    HostNotFound,
    LoadFailed,
    ModelLoading,
    ModelNotFound,
    ModelPinned,
    QueueFull,
    ShuttingDown,
    SpaceMismatch,
    TaskNotSupported,
)
from engines.spec import Matryoshka, ModelSpec
from engines.testing.engine import WIDTH, fake_score, fake_vector
from engines.testing.spaces import fake_ingredients, fake_space
from engines.types import Budget, Call, EmbedCall, Event, HostSnapshot, ScoreCall, Scores, TokenizeCall, Tokens
from router.backends.base import Backend
from router.errors import classify
from tests.testkit.backends import BUDGET, BUDGET_BYTES, HOSTS, scripted, until

Opened = Callable[[], AbstractAsyncContextManager[Backend]]


def call(model_id: str, *texts: str, load_timeout_s: float = 20.0) -> EmbedCall:
    return EmbedCall(model_id=model_id, texts=texts or ("x",), load_timeout_s=load_timeout_s)


def specs_of(*specs: ModelSpec) -> dict[str, ModelSpec]:
    return {spec.model_id: spec for spec in specs}


@asynccontextmanager
async def serving(backend: Backend, *specs: ModelSpec, budget: Budget = BUDGET) -> AsyncIterator[None]:
    """Serve only these models inside the block; afterwards none, with nothing in memory."""
    await backend.reload(specs_of(*specs), budget)
    await until(backend, lambda hosts: all(known(host) == len(specs) for host in hosts))
    try:
        yield
    finally:
        await backend.reload({})
        await until(backend, lambda hosts: all(host.used_bytes == 0 and not host.models for host in hosts))


def known(host: HostSnapshot) -> int:
    """Return the models whose files the host has located, so that their sizes count."""
    return sum(status.state != "absent" for status in host.models)


def loads(hosts: tuple[HostSnapshot, ...]) -> Counter[str]:
    """Count the loads of each model, on all hosts together."""
    return Counter({status.model_id: 0 for host in hosts for status in host.models}) + Counter(
        status.model_id for host in hosts for status in host.models for _ in range(status.loads)
    )


def homes(hosts: tuple[HostSnapshot, ...]) -> dict[str, list[str]]:
    """Return the hosts on which each model is ready."""
    found: dict[str, list[str]] = {}
    for host in hosts:
        for status in host.models:
            if status.state == "ready":
                found.setdefault(status.model_id, []).append(host.host_id)
    return found


async def refusal(backend: Backend, wanted: Call) -> Exception:
    with pytest.raises(Exception) as caught:
        await backend.run(wanted)
    return caught.value


class Conformance:
    """Tests that every backend must pass."""

    async def test_vectors_are_right_in_every_form_of_a_request(self, backend: Backend) -> None:
        spec = scripted("a", prompts={"query": "q: "}, matryoshka=Matryoshka(widths=(4,)), max_tokens=6)
        async with serving(backend, spec):
            plain = await backend.run(call("a", "one", "two"))
            cut = await backend.run(EmbedCall(model_id="a", texts=("one",), input_type="query", dimensions=4))
            ids = await backend.run(EmbedCall(model_id="a", token_ids=((1, 2, 3),)))
            long = await backend.run(call("a", "short", "far more words than it reads"))

        assert (plain.array() == [fake_vector("a", "one"), fake_vector("a", "two")]).all()
        assert (cut.array()[0] == fake_vector("a", "q: one", 4)).all()
        assert (ids.array()[0] == fake_vector("a", (1, 2, 3))).all()
        assert (plain.array().shape[1], plain.token_counts, long.truncated) == (WIDTH, (3, 3), (1,))

    async def test_spaces_are_the_same_on_every_backend_and_expectations_are_kept(self, backend: Backend) -> None:
        spec = scripted("a", prompts={"query": "q: "})
        space = fake_space(spec, width=WIDTH, native_width=WIDTH)
        async with serving(backend, spec, scripted("b")):
            plain = await backend.run(structs.replace(call("a", "one"), expect_space=space))
            other = await backend.run(call("b", "one"))
            refused = await refusal(
                backend, EmbedCall(model_id="a", texts=("one",), input_type="query", expect_space=space)
            )
            await until(backend, lambda hosts: len(homes(hosts)) == 2)
            infos = {each.model_id: each.info for host in backend.snapshots() for each in host.models if each.info}

        assert plain.space == space == "s1-689441214b40-70f79b7f843de0da"
        assert other.space not in ("", space)
        assert isinstance(refused, SpaceMismatch)
        assert (refused.param, refused.other_model) == ("expect_space", None)
        assert infos["a"].ingredients == fake_ingredients(spec)

    async def test_a_large_answer_comes_whole(self, backend: Backend) -> None:
        texts = tuple(f"text {index}" for index in range(2048))
        async with serving(backend, scripted("a")):
            answer = await backend.run(call("a", *texts))

        assert (answer.array()[[0, 1000, 2047]] == [fake_vector("a", texts[at]) for at in (0, 1000, 2047)]).all()

    async def test_scores_are_right_and_come_whole(self, backend: Backend) -> None:
        texts = tuple(f"text {index}" for index in range(2048))
        async with serving(backend, scripted("a", task="rerank"), scripted("b", task="classify")):
            many = await backend.run(ScoreCall(model_id="a", queries=("q",), texts=texts))
            raw = await backend.run(ScoreCall(model_id="a", queries=("q", "r"), texts=("x", "y"), activation="none"))
            labels = await backend.run(ScoreCall(model_id="b", texts=("x",)))

        assert isinstance(many, Scores)
        assert isinstance(labels, Scores)
        assert (many.array().shape, many.labels) == ((2048, 1), ("LABEL_0",))
        assert [float(many.array()[at, 0]) for at in (0, 2047)] == [fake_score("a", "q", texts[at]) for at in (0, 2047)]
        assert 1 / (1 + np.exp(-raw.array()[1, 0])) == pytest.approx(fake_score("a", "r", "y"), abs=1e-6)
        assert (labels.array().shape, labels.labels) == ((1, 3), ("negative", "neutral", "positive"))

    async def test_tokens_are_listed_by_models_of_every_task(self, backend: Backend) -> None:
        async with serving(backend, scripted("a"), scripted("b", task="rerank")):
            found = [await backend.run(TokenizeCall(model_id=name, texts=("one two", "x"))) for name in ("a", "b")]

        for tokens in found:
            assert isinstance(tokens, Tokens)
            assert tokens.array()[:4].tolist() == [[101, -1, -1], [3, 0, 3], [3, 4, 7], [102, -1, -1]]
            assert (tokens.token_counts, tokens.specials) == ((4, 3), {101: "[CLS]", 102: "[SEP]"})

    async def test_a_model_refuses_what_it_does_not_compute(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", task="rerank"), scripted("b")):
            vectors = await refusal(backend, call("a"))
            scores = await refusal(backend, ScoreCall(model_id="b", texts=("x",)))
            tasks = {
                status.model_id: status.info.task
                for host in backend.snapshots()
                for status in host.models
                if status.info
            }

        assert (type(vectors), type(scores)) == (TaskNotSupported, TaskNotSupported)
        assert (vars(vectors)["param"], str(vectors)) == ("model", "a can rerank, not embed")
        assert tasks.get("a") in ("rerank", None), "a snapshot of another process may be from before the load"

    async def test_scores_obey_deadlines_cancellation_and_limits(self, backend: Backend) -> None:
        pair = ScoreCall(model_id="a", queries=("q",), texts=("x",))
        async with serving(backend, scripted("a", task="rerank", max_items=4, embed_s=0.1, load_s=0.6)):
            late = await refusal(backend, structs.replace(pair, load_timeout_s=0.1))
            await backend.preload("a")
            waiting = asyncio.create_task(backend.run(structs.replace(pair, texts=("wait",))))
            await until(backend, lambda hosts: sum(s.leases for host in hosts for s in host.models) == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(backend, lambda hosts: sum(s.leases for host in hosts for s in host.models) == 0)
            outcomes = await asyncio.gather(*(backend.run(pair) for _ in range(20)), return_exceptions=True)

        assert isinstance(late, ModelLoading)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert 8 <= len(refused) <= 16, "calls come to a host elsewhere one after the other"
        assert all(isinstance(error, QueueFull) for error in refused)

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            ("ContextLengthExceeded", (400, "context_length_exceeded")),
            ("NonFiniteEmbedding", (500, "non_finite_embedding")),
            ("OutOfMemory", (503, "out_of_memory")),
            ("EngineFailed", (500, "internal_error")),
        ],
    )
    async def test_what_an_engine_raises_is_answered_alike(
        self, backend: Backend, error: str, expected: tuple[int, str]
    ) -> None:
        async with serving(backend, scripted("a", embed_error=error)):
            raised = await refusal(backend, call("a"))

        row = classify(raised)
        assert row is not None
        assert ((row.status, row.code), type(raised).__name__) == (expected, error)

    async def test_a_refusal_keeps_the_field_and_the_numbers_that_it_names(self, backend: Backend) -> None:
        async with serving(backend, scripted("a"), scripted("b", embed_error="NonFiniteEmbedding")):
            prompt = await refusal(backend, EmbedCall(model_id="a", texts=("x",), input_type="nope"))
            ids = await refusal(backend, EmbedCall(model_id="a", token_ids=((99_999,),)))
            not_finite = await refusal(backend, call("b"))

        assert vars(prompt)["param"] == "input_type"
        assert "no prompt 'nope'; this model has none" in str(prompt)
        assert "token id 99999 of input 0" in str(ids)
        assert vars(not_finite)["index"] == 3

    async def test_an_unexpected_error_is_a_crash(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", embed_error="ValueError")):
            raised = await refusal(backend, call("a"))

        row = classify(raised)
        assert row is None or row.code == "internal_error"

    async def test_a_model_on_no_host_is_not_found(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            assert isinstance(await refusal(backend, call("nobody")), ModelNotFound)

    async def test_a_model_that_does_not_load_says_why_and_when_to_ask_again(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", load_error="BrokenFiles")):
            raised = await refusal(backend, call("a"))

        assert isinstance(raised, LoadFailed)
        assert (raised.kind, 0 < raised.retry_after_s <= 10) == ("broken_files", True)

    async def test_a_load_that_fails_is_tried_on_another_host_before_requests_fail(
        self, backend: Backend, tmp_path: Path
    ) -> None:
        spec = scripted("a", load_error="ValueError", once=tmp_path / "failed", bytes=BUDGET_BYTES - 1000)
        async with serving(backend, spec):
            answers = await asyncio.gather(*(backend.run(call("a", f"{index}")) for index in range(3)))
            hosts = await until(backend, lambda hosts: len(homes(hosts)) == 1)

        assert all((answer.array()[0] == fake_vector("a", f"{index}")).all() for index, answer in enumerate(answers))
        assert (tmp_path / "failed").exists()
        assert loads(hosts) == {"a": 1}

    async def test_a_model_too_large_for_every_host_is_refused(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", bytes=BUDGET_BYTES + 1)):
            raised = await refusal(backend, call("a"))
            with pytest.raises(EngineError) as preloading:
                await backend.preload("a")

        assert [classify(error) for error in (raised, preloading.value)] == [classify(raised)] * 2
        assert type(raised).__name__ == "ModelTooLarge"

    async def test_a_model_for_a_device_that_is_not_here_says_so(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            await backend.reload(specs_of(scripted("a"), scripted("b", device="cuda:7")))
            with pytest.raises(LoadFailed, match="requires device 'cuda:7'; this server has cpu"):
                await backend.run(call("b"))

    async def test_simultaneous_requests_load_each_cold_model_once_on_one_host(self, backend: Backend) -> None:
        models = [scripted(f"m{index}", load_s=0.05) for index in range(6)]
        async with serving(backend, *models):
            wanted = [call(spec.model_id, str(index)) for index in range(60) for spec in models]
            answers = await asyncio.gather(*map(backend.run, wanted))
            hosts = await until(backend, lambda hosts: len(homes(hosts)) == 6)

        assert loads(hosts) == {spec.model_id: 1 for spec in models}
        assert all(len(where) == 1 for where in homes(hosts).values())
        assert all(
            (answer.array()[0] == fake_vector(one.model_id, one.texts[0])).all()
            for one, answer in zip(wanted, answers, strict=True)
        )

    async def test_twelve_models_settle_on_three_hosts(self, backend: Backend) -> None:
        models = [scripted(f"m{index}") for index in range(12)]
        async with serving(backend, *models):
            for _ in range(3):
                await asyncio.gather(*(backend.run(call(spec.model_id)) for spec in models))
            hosts = await until(backend, lambda hosts: len(homes(hosts)) == 12)

        assert loads(hosts) == {spec.model_id: 1 for spec in models}
        assert sorted(len(host.residents) for host in hosts) == [4, 4, 4]
        assert all(host.used_bytes + host.workspace_bytes <= host.budget_bytes for host in hosts)

    async def test_a_preload_is_placed_where_it_fits(self, backend: Backend) -> None:
        names = [host.host_id for host in backend.snapshots()]
        async with serving(backend, scripted("large", bytes=3000), scripted("next", bytes=3000)):
            first = await backend.preload("large", host_id=names[1])
            second = await backend.preload("next")

        assert (first.host_id, first.state, second.state) == (names[1], "ready", "ready")
        assert second.host_id != names[1]

    async def test_a_preload_on_a_host_that_is_not_there_is_refused(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            with pytest.raises(HostNotFound, match="host 'nobody' not found; this server has "):
                await backend.preload("a", host_id="nobody")

    async def test_a_preload_that_is_not_waited_for_goes_on(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", load_s=0.1)):
            status = await backend.preload("a", wait=False)
            hosts = await until(backend, lambda hosts: "a" in homes(hosts))

        assert status.state != "ready"
        assert homes(hosts)["a"] == [status.host_id]

    async def test_an_eviction_frees_the_model_on_every_host(self, backend: Backend) -> None:
        names = [host.host_id for host in backend.snapshots()]
        async with serving(backend, scripted("a")):
            for name in names:
                await backend.preload("a", pin=True, host_id=name)
            everywhere = homes(backend.snapshots())["a"]
            with pytest.raises(ModelPinned):
                await backend.evict("a")
            statuses = await backend.evict("a", force=True)

            assert sorted(everywhere) == sorted(names)
            assert sorted((status.host_id, status.state) for status in statuses) == [(n, "cold") for n in sorted(names)]
            assert homes(backend.snapshots()) == {}

    async def test_a_call_that_cannot_wait_for_a_load_fails_and_the_load_goes_on(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", load_s=0.6)):
            raised = await refusal(backend, call("a", load_timeout_s=0.1))
            hosts = await until(backend, lambda hosts: "a" in homes(hosts))

        assert isinstance(raised, ModelLoading)
        assert loads(hosts) == {"a": 1}

    async def test_a_cancelled_call_lets_go_of_its_model(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            await backend.preload("a")
            task = asyncio.create_task(backend.run(call("a", "wait")))
            await until(backend, lambda hosts: sum(s.leases for host in hosts for s in host.models) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(backend, lambda hosts: sum(s.leases for host in hosts for s in host.models) == 0)

    async def test_a_full_queue_refuses_and_does_not_break(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", max_items=4, embed_s=0.1)):
            await backend.preload("a")
            outcomes = await asyncio.gather(*(backend.run(call("a")) for _ in range(20)), return_exceptions=True)
            after = await backend.run(call("a"))

        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert 8 <= len(refused) <= 16, "calls come to a host elsewhere one after the other"
        assert all(isinstance(error, QueueFull) and error.retry_after_s == 0.5 for error in refused)
        assert len(after.token_counts) == 1

    async def test_snapshots_show_every_host_and_what_is_on_it(self, backend: Backend) -> None:
        async with serving(backend, scripted("a"), scripted("b")):
            status = await backend.preload("a")
            hosts = backend.snapshots()

        assert len({host.host_id for host in hosts}) == HOSTS
        assert {host.budget_bytes for host in hosts} == {BUDGET_BYTES}
        home = next(host for host in hosts if host.host_id == status.host_id)
        assert (home.residents, home.used_bytes, home.is_draining) == (("a",), 1000, False)
        assert backend.check() == {}

    async def test_events_arrive_as_they_happen_and_missed_ones_again(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            stream = backend.events()
            before = {event.host_id: event.seq for event in await remembered(backend)}
            status = await backend.preload("a")
            live = await first(stream, 4)
            again = await first(backend.events(before), 4)

        steps = [(event.source, event.target) for event in live]
        assert steps[-3:] == [("waiting_space", "loading"), ("loading", "warming"), ("warming", "ready")]
        assert [event.target for event in again] == [event.target for event in live]
        assert {event.host_id for event in live} == {status.host_id}

    async def test_a_plan_is_that_of_the_best_host(self, backend: Backend) -> None:
        async with serving(backend, scripted("a"), scripted("b", bytes=BUDGET_BYTES + 1)):
            status = await backend.preload("a")
            ready, hopeless = await backend.plan("a"), await backend.plan("b")

        assert (ready.host_id, ready.fits, ready.state) == (status.host_id, True, "ready")
        assert (hopeless.fits, hopeless.need_bytes > BUDGET_BYTES) == (False, True)

    async def test_a_new_registry_reaches_every_host(self, backend: Backend) -> None:
        async with serving(backend, scripted("a"), scripted("old")):
            await backend.run(call("a"))
            await backend.reload(specs_of(scripted("a"), scripted("new", preload=True)))
            hosts = await until(backend, lambda hosts: "new" in homes(hosts))

            assert loads(hosts) == {"a": 1, "new": 1}
            assert all({status.model_id for status in host.models} == {"a", "new"} for host in hosts)
            assert isinstance(await refusal(backend, call("old")), ModelNotFound)

    async def test_a_busy_model_gets_as_many_copies_as_it_may_have(self, backend: Backend) -> None:
        async with serving(backend, scripted("hot", replicas=2, embed_s=0.02), scripted("other", embed_s=0.02)):
            async with asyncio.timeout(15):
                while len(homes(backend.snapshots()).get("hot", [])) < 2:
                    await asyncio.gather(*(backend.run(call(model_id)) for model_id in ("hot", "other") * 8))
            await asyncio.gather(*(backend.run(call("hot")) for _ in range(40)))
            hosts = backend.snapshots()

        assert loads(hosts) == {"hot": 2, "other": 1}

    async def test_a_closing_backend_finishes_running_calls_and_refuses_new_ones(
        self, backend: Backend, opened: Opened
    ) -> None:
        async with opened() as other:
            specs = specs_of(scripted("a", embed_s=0.3))
            await other.reload(specs, BUDGET)
            await other.preload("a")
            begun = [asyncio.create_task(other.run(call("a", str(index)))) for index in range(5)]
            await asyncio.sleep(0.05)
            closing = asyncio.create_task(other.aclose(grace_s=10))
            await asyncio.sleep(0.05)
            with pytest.raises(ShuttingDown):
                await other.run(call("a"))
            answers = await asyncio.gather(*begun)
            await closing

        assert [len(answer.token_counts) for answer in answers] == [1] * 5

    async def test_a_call_not_done_within_the_grace_time_fails(self, backend: Backend, opened: Opened) -> None:
        async with opened() as other:
            await other.reload(specs_of(scripted("a")), BUDGET)
            await other.preload("a")
            begun = asyncio.create_task(other.run(call("a", "wait")))
            await asyncio.sleep(0.1)
            await other.aclose(grace_s=0.2)
            with pytest.raises(ShuttingDown):
                await begun


async def first(stream: AsyncIterator[Event], count: int) -> list[Event]:
    """Read the next state events of the stream."""
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


async def remembered(backend: Backend) -> list[Event]:
    """Read all buffered events."""
    stream = backend.events({host.host_id: 0 for host in backend.snapshots()})
    found: list[Event] = []
    while True:
        try:
            found.append(await asyncio.wait_for(anext(stream), 0.3))
        except (TimeoutError, StopAsyncIteration):
            return found


def by_host(hosts: tuple[HostSnapshot, ...]) -> Mapping[str, HostSnapshot]:
    """Index specs by model id."""
    return {host.host_id: host for host in hosts}
