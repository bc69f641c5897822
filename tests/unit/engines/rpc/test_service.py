"""`HostService`: which generations of the registry it applies."""

from engines.rpc.messages import CommandResult, Generation, Reload, Reply
from engines.rpc.service import HostService
from engines.testing.fakes import fake_host, fake_specs


def served(reply: Reply) -> list[str]:
    """Returns the model ids in the reply's snapshot."""
    assert isinstance(reply, CommandResult)
    return [status.model_id for status in reply.snapshot.models]


async def test_a_host_takes_what_is_of_a_higher_generation_and_says_which_it_serves() -> None:
    service = HostService(fake_host("a"), Generation(0, "a"))
    await service.host.start()
    newer = await service.answer(Reload(specs=fake_specs("b"), generation=Generation(2, "b")))
    late = await service.answer(Reload(specs=fake_specs("c"), generation=Generation(1, "c")))
    rolled_back = await service.answer(Reload(specs=fake_specs("a"), generation=Generation(3, "a")))
    shown = service.poll().generation

    assert [served(reply) for reply in (newer, late, rolled_back)] == [["b"], ["b"], ["a"]]
    assert shown == Generation(3, "a")
