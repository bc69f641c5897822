"""Carries out the trials of `engines/pace.py` on a lane, one a turn, while nobody waits for the model."""

from collections.abc import Callable

import structlog
import torch

from engines.encoder import Encoder
from engines.pace import Pace, Trials, trial_texts
from engines.tokenize import Tokenizer

log = structlog.get_logger(__name__)


class Tuner:
    """Finds out how large the batches of one model should be.

    Args:
        encoder: the model.
        tokenizer: what the model reads.
        trials: which sizes to try.
        own_s: seconds that the present turn has run, without what it gave to others.
        finish: waits until the device has done what it was told to.
        keep: called once, with what was found.

    Attributes:
        is_done: whether nothing is left to be tried.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        trials: Trials,
        *,
        own_s: Callable[[], float],
        finish: Callable[[], None],
        keep: Callable[[Pace], None],
    ) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._trials = trials
        self._own_s = own_s
        self._finish = finish
        self._keep = keep
        self._is_running = False
        self.is_done = False

    @property
    def is_due(self) -> bool:
        """Whether there is something to try, and nobody is trying."""
        return not self._is_running and not self.is_done

    def begin(self) -> None:
        """The next trial is about to run: one at a time."""
        self._is_running = True

    def run(self, use: Callable[[Pace], None]) -> None:
        """One trial, on the lane; the last one has its result used. What goes wrong is no caller's business, and ends
        the trials."""
        tokens = self._trials.next_tokens
        try:
            if tokens is not None:
                self._trials.record(tokens, self._time(tokens))
        except Exception as error:  # noqa: BLE001  # out of memory, or a path that fails: real texts will tell
            log.info("model.trial_failed", tokens=tokens, reason=type(error).__name__)
            self._trials.give_up()
        if self._trials.next_tokens is None:
            self._end(use)
        self._is_running = False

    def _time(self, tokens: int) -> float:
        texts = trial_texts(tokens, self._tokenizer.rules.vocab_size, self._tokenizer.max_tokens)
        begun_s = self._own_s()
        self._encoder(texts)
        self._finish()
        return self._own_s() - begun_s

    def _end(self, use: Callable[[Pace], None]) -> None:
        self.is_done = True
        pace = self._trials.pace()
        if pace is not None:
            log.info("model.pace", batch_tokens=pace.batch_tokens, tokens_per_s=round(pace.tokens_per_s))
            use(pace)
            self._keep(pace)


def finisher(device: torch.device) -> Callable[[], None]:
    """What waits for a device: a CPU has done its work when a call returns.

    For what this thread's stream was given, that is: to wait for the whole device is an error while another thread
    records a graph there.
    """
    return (lambda: None) if device.type == "cpu" else (lambda: torch.cuda.current_stream(device).synchronize())


def device_name(device: torch.device) -> str:
    """What a speed depends on."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
