"""Names the spaces of one loaded model's vectors, once its files are hashed; refuses requests that expect others."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import structlog
from msgspec import Struct, structs

from engines.batching.output import OutputSpec
from engines.device.scheduler import post
from engines.errors import ModelLoading, ShuttingDown, SpaceMismatch
from engines.inputs.prompts import select_prompt
from engines.space import Ingredients, Listed, VectorForm, space_of
from engines.space_memory import Asked, RememberedModel, SpaceMemory
from engines.spec import ModelSpec
from engines.types import ModelInfo, TextCall

log = structlog.get_logger(__name__)

FIRST_ANSWER_S = 1.0
"""How long a model that is ready otherwise waits for its hashes, so that its first answers have a space too."""


class SpaceSource(Struct, frozen=True):
    """Reads a model's ingredients: `read` is called on a thread of its own and stops where its argument says so."""

    read: Callable[[Callable[[], bool]], Ingredients]
    memory: SpaceMemory


Lengths = Callable[[TextCall], tuple[int, int]]
"""Returns the tokens that are read of an input of a call, and those that are of one on its side of a search."""


class ModelSpaces:
    """Knows the spaces of one model.

    Hashing begins with `begin`, so that it runs beside the load. Until it ends, answers have no space, and requests
    that expect one wait.

    Args:
        source: reads the ingredients.
        spec: the model, with its default prompt.
    """

    def __init__(self, source: SpaceSource, spec: ModelSpec) -> None:
        self._source = source
        self._spec = spec
        self._info: ModelInfo | None = None
        self._is_closed = False
        self._described = threading.Event()
        self._found: Future[RememberedModel] = Future()
        self._complete: Callable[[Ingredients], Ingredients] = lambda ingredients: ingredients
        self._lengths: Lengths | None = None

    def begin(self) -> None:
        """Starts hashing on a thread."""
        threading.Thread(target=self._read, name=f"space-{self._spec.model_id}", daemon=True).start()

    def describe(
        self,
        spec: ModelSpec,
        info: ModelInfo,
        complete: Callable[[Ingredients], Ingredients],
        lengths: Lengths | None = None,
    ) -> None:
        """Gives what is known once the model is built; `complete` adds what only a built model shows. `lengths`: of a
        model that reads queries or documents to lengths of their own."""
        self._spec, self._info, self._complete, self._lengths = spec, info, complete, lengths
        self._described.set()

    def close(self) -> None:
        """Ends hashing; requests that wait are failed."""
        self._is_closed = True
        self._described.set()

    @property
    def ingredients(self) -> Ingredients | None:
        """Returns the ingredients; None while they are unknown."""
        if not self._found.done() or self._found.exception() is not None:
            return None
        return self._found.result().ingredients

    async def settled_within(self, seconds: float) -> None:
        """Waits until hashing has ended, at most so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended(), seconds)

    def name(self, call: TextCall, output: OutputSpec) -> str:
        """Returns the space of a call's vectors; empty while it is unknown, and for an output without one."""
        ingredients = self.ingredients
        form = self._form(call, output) if ingredients is not None else None
        return "" if form is None or ingredients is None else space_of(ingredients, form)

    async def check(self, call: TextCall, output: OutputSpec) -> str:
        """Waits for the hashes; returns the space of a call if it is the one that the call expects.

        Raises:
            SpaceMismatch: it is not, and the message says what differs; or its space cannot be known.
            ModelLoading: hashing takes longer than the call waits for a load.
        """
        try:
            await asyncio.wait_for(self._ended(), call.load_timeout_s)
        except TimeoutError:
            message = f"the files of {call.model_id} are still being hashed; retry"
            raise ModelLoading(message, retry_after_s=5.0) from None
        return await asyncio.to_thread(self._check, call, output)

    def _check(self, call: TextCall, output: OutputSpec) -> str:
        model, expected = self._result(call.model_id), call.expect_space
        form = self._form(call, output)
        if form is None:
            raise SpaceMismatch(f"expect_space is {expected}, but this kind of output of {call.model_id} has no space")
        found = space_of(model.ingredients, form)
        if expected is not None and found != expected:
            why = self._source.memory.explain(Asked(expected=expected, model=model, form=form))
            raise SpaceMismatch(
                f"expect_space is {expected}, but this request gives {found}: {why.words}. Send the requests that made "
                "the index, or build it anew",
                other_model=why.other_model,
            )
        return found

    async def _ended(self) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._found.add_done_callback(lambda _: post(loop, ended.set))
        await ended.wait()

    def _result(self, model_id: str) -> RememberedModel:
        try:
            return self._found.result()
        except ShuttingDown:
            raise
        except Exception:  # noqa: BLE001  # the thread has logged it
            raise SpaceMismatch(
                f"the space of {model_id} is unknown, because its files could not be hashed: load the model again, or "
                "omit expect_space"
            ) from None

    def _form(self, call: TextCall, output: OutputSpec) -> VectorForm | None:
        form = output.space_form()
        if form is None or self._info is None:
            return None
        if call.token_ids:
            before = behind = ""
        else:
            frame = select_prompt(call, self._info.prompts, self._spec.default_prompt, self._spec.instruction_template)
            before, behind = frame.before, frame.behind
        longest = self._info.max_tokens
        reads, usual = (longest, longest) if self._lengths is None else self._lengths(call)
        limit = min(call.max_tokens or reads, reads)
        return structs.replace(
            form,
            native_width=self._info.dimensions,
            before=before,
            behind=behind,
            cut=call.truncate if call.truncate in ("start", "end") else None,
            max_tokens=None if limit == usual else limit,
        )

    # ---- on the thread ----

    def _read(self) -> None:
        try:
            ingredients = self._source.read(lambda: not self._is_closed)
            self._described.wait()
            if self._is_closed or self._info is None:
                raise ShuttingDown("the model left while its files were hashed; send the request again")
            self._found.set_result(self._remember(self._complete(ingredients), self._info))
        except Exception as error:  # noqa: BLE001  # whoever waits gets it
            if not self._is_closed:
                log.warning("model.space_unknown", model=self._spec.model_id, error=str(error) or type(error).__name__)
            self._found.set_exception(error)

    def _remember(self, ingredients: Ingredients, info: ModelInfo) -> RememberedModel:
        listed = Listed(width=info.dimensions, prompts=info.prompts, matryoshka=info.matryoshka)
        return self._source.memory.remember(self._spec.model_id, ingredients, listed)
