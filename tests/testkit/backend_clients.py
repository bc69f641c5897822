"""Sixty-four clients that ask without a pause, and know what is right."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engines.testing.engine import fake_vector
from engines.types import EmbedCall
from router.backends.base import Backend

CLIENTS = 64


class Crowd:
    """How it went for them."""

    def __init__(self, backend: Backend, models: Sequence[str]) -> None:
        self._backend = backend
        self._models = models
        self._is_over = False
        self.answered: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def ask(self, number: int) -> None:
        """One client; what it is told instead of vectors is wrong, too."""
        turn = 0
        while not self._is_over:
            model, text, turn = self._models[(number + turn) % len(self._models)], f"{number} {turn}", turn + 1
            try:
                answer = await self._backend.embed(EmbedCall(model_id=model, texts=(text,), load_timeout_s=60.0))
            except Exception as error:  # noqa: BLE001  # whatever it is, it is not an answer
                self.wrong.append(f"{model}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.01)
                continue
            if not (answer.array()[0] == fake_vector(model, text)).all():
                self.wrong.append(f"{model}: not the vector of {text!r}")
            self.answered[model] += 1

    async def until(self, more: int) -> None:
        """So many more answers for each model."""
        wanted = {model: self.answered[model] + more for model in self._models}
        async with asyncio.timeout(90):
            while any(self.answered[model] < count for model, count in wanted.items()):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.02)

    def leave(self) -> None:
        """They finish what they have begun."""
        self._is_over = True


@asynccontextmanager
async def crowd(backend: Backend, *models: str) -> AsyncIterator[Crowd]:
    """They ask inside the block."""
    made = Crowd(backend, models)
    tasks = [asyncio.create_task(made.ask(number)) for number in range(CLIENTS)]
    try:
        yield made
    finally:
        made.leave()
        await asyncio.gather(*tasks)
