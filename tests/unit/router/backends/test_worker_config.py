"""How a process of one host starts it."""

import gc

import pytest
from msgspec import structs

from engines.errors import LoadFailed
from engines.host import Host
from engines.spec import ModelSpec
from engines.testing.fakes import FakeLoader, fake_host
from engines.types import EmbedCall
from router.backends.process.fleet import ProcessFleet
from router.backends.remote import RemoteBackend
from router.backends.worker_config import CrashNote, WorkerConfig, start_host
from tests.testkit.backends import worker_configs

COUNTED = ModelSpec(model_id="m", source="fake/m")


def open_counting_host(worker: WorkerConfig, _: CrashNote) -> Host:
    """Open a host whose loads fail, and say how many objects are frozen."""

    def say(_: str) -> None:
        raise LoadFailed(f"{gc.get_freeze_count()} objects")

    return fake_host(COUNTED, loader=FakeLoader(pause=say), host_id=worker.host_id)


async def test_what_exists_when_a_host_has_started_is_left_out_of_later_collections() -> None:
    before, kept = gc.get_freeze_count(), [[0]]
    host = fake_host(COUNTED)
    await start_host(host)
    after, is_left = gc.get_freeze_count(), any(each is kept[0] for each in gc.get_objects())
    await host.aclose(grace_s=0.0)

    assert (after > before, is_left) == (True, False)


async def test_a_worker_process_leaves_out_what_it_has_imported() -> None:
    config = structs.replace(worker_configs()[0], specs={"m": COUNTED}, open=open_counting_host)
    backend = RemoteBackend(ProcessFleet([config], 1, grace_s=5.0), {"m": COUNTED})
    await backend.start()
    try:
        with pytest.raises(LoadFailed, match=r"\d{5,} objects"):
            await backend.run(EmbedCall(model_id="m", texts=("a",)))
    finally:
        await backend.aclose(grace_s=0.0)
