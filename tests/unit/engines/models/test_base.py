"""An encoder with one path needs few methods of its own, is checked as any other, and is not changed once built."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.errors import SelfCheckFailed
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.models.base import EncoderConfig, ForwardPaths, LoadedEncoder, PathForm, SinglePath, SinglePathEncoder
from engines.models.self_check import SelfCheck
from engines.models.verification import Canaries
from tests.testkit.encoders import Letters


class MeanOfIds(SinglePathEncoder):
    """Vectors `[mean, length]`; a second text in a batch moves them by `leak`."""

    def __init__(self, leak: float = 0.0) -> None:
        self.dimensions = 2
        self._leak = leak

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        rows = [[ids.mean(), len(ids) + self._leak * (len(texts) - 1)] for ids in texts]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def tensors(self) -> list[Tensor]:
        return []

    def token_bytes(self) -> int:
        return 8


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))


def run(check: SelfCheck, paths: ForwardPaths, tokenizer: Tokenizer) -> tuple[str, ...]:
    return check.run(paths, tokenizer, "float32", "key", 0.0)


def test_an_encoder_with_one_path_defines_three_methods_and_is_whole(tokenizer: Tokenizer) -> None:
    encoder: LoadedEncoder = MeanOfIds()
    check = SelfCheck(Canaries(None))

    notes = run(check, encoder.paths, tokenizer)
    check.check_again(encoder.paths)

    assert notes == ()
    assert (encoder.path, encoder.attention, encoder.fallback, encoder.extra_bytes()) == ("packed", "packed", "", 0)


def test_its_check_finds_vectors_that_depend_on_the_batch(tokenizer: Tokenizer) -> None:
    with pytest.raises(SelfCheckFailed, match="the packed path is"):
        run(SelfCheck(Canaries(None)), MeanOfIds(leak=0.5).paths, tokenizer)


def test_a_model_that_was_not_checked_at_load_has_nothing_to_be_compared_with() -> None:
    for recheck in (SelfCheck(Canaries(None)).check_again, EncoderConfig().recheck):
        with pytest.raises(NotImplementedError, match="not checked at load"):
            recheck(MeanOfIds().paths)


def test_a_model_whose_vectors_have_changed_since_the_check_is_found(tokenizer: Tokenizer) -> None:
    check = SelfCheck(Canaries(None))
    run(check, MeanOfIds().paths, tokenizer)

    with pytest.raises(SelfCheckFailed, match="from what the check at load found"):
        check.check_again(MeanOfIds(leak=0.5).paths)


class _Counting(SinglePath):
    """Passes a preemption point in each form."""

    def __init__(self, encoder: MeanOfIds, config: EncoderConfig) -> None:
        super().__init__(encoder)
        self._config = config

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        for form in super().forms(texts):
            self._config.preemption_point()
            yield form


def test_on_a_gpu_only_the_check_at_load_is_preempted(tokenizer: Tokenizer) -> None:
    passed: list[str] = []
    check = SelfCheck(Canaries(None))
    config = EncoderConfig(preemption_point=check.while_running(lambda: passed.append("point")))
    config.preemption_point()
    assert passed == []

    run(check, _Counting(MeanOfIds(), config), tokenizer)
    assert passed == ["point"] * 2
    config.preemption_point()

    assert passed == ["point"] * 2


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(AttributeError):
        EncoderConfig().num_threads = 2  # type: ignore[misc]  # what the test is about
