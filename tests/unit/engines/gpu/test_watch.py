"""The fake GPU catches what it is for: each mistake is planted in a model's layer, and found there."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from benchmarks.lib.engine_kit import Kit
from engines.layers.packing import PackedLayout, to_device
from engines.models.adapters import layers_of
from engines.models.base import ForwardPath, ForwardPathFailed
from engines.models.transformer import TransformerEncoder
from tests.testkit.fake_gpu import GPU, Finding, twin
from tests.testkit.fake_gpu_families import encoder_of, texts_for, unintended
from tests.testkit.fake_gpu_kit import FakeGpuKit

Plant = Callable[[Tensor], object]


@pytest.fixture(scope="module")
def encoder(fake: FakeGpuKit, kit: Kit) -> TransformerEncoder:
    """BERT, whose first layer mistakes are planted in."""
    encoder = encoder_of(fake.load(kit.recipe_folder("bert-cls")))
    assert isinstance(encoder, TransformerEncoder)
    return encoder


@pytest.fixture(params=["fused", "packed", "padded"])
def path(request: pytest.FixtureRequest, fake: FakeGpuKit, encoder: TransformerEncoder) -> Iterator[ForwardPath]:
    path: ForwardPath = request.param
    fake.call(lambda: encoder.switch_to(path))
    fake.gpu.take()
    yield path
    fake.gpu.take()


def found_with(fake: FakeGpuKit, encoder: TransformerEncoder, plant: Plant) -> list[Finding]:
    """Runs a pass whose first layer does `plant` with its hidden states; returns what the suite would complain of."""
    hook = layers_of(encoder._model)[0].register_forward_hook(lambda _, __, out: _use(plant, out))
    try:
        fake.passes(lambda: encoder(texts_for(encoder)))
    except ForwardPathFailed:
        encoder.passes._is_fallback_due = encoder.passes.is_active = False
    finally:
        hook.remove()
    return unintended(fake.gpu.take(), encoder.attention)


def _use(plant: Plant, out: Tensor) -> None:
    plant(out)


def test_a_pass_without_a_mistake_has_no_findings(fake: FakeGpuKit, encoder: TransformerEncoder, path: str) -> None:
    assert found_with(fake, encoder, lambda hidden: hidden * 2) == []


READING: dict[str, Plant] = {
    "cpu": lambda hidden: hidden.cpu(),
    "item": lambda hidden: hidden.sum().item(),
    "a condition": lambda hidden: bool(hidden.sum() > 0),
    "tolist": lambda hidden: hidden[0, 0].tolist(),
    "nonzero": lambda hidden: hidden.nonzero(),
    "a mask as an index": lambda hidden: hidden[hidden > 0],
    "a mask that is written through": lambda hidden: hidden.clone().__setitem__(hidden > 0, 0),
    "unique": lambda hidden: torch.unique(hidden),
    "equal": lambda hidden: hidden.equal(hidden),
    "a list as an index": lambda hidden: hidden[:, [0]],
    "numbers of the host": lambda hidden: torch.tensor([1, 2], device=hidden.device),
    "a copy that is not pinned": lambda hidden: torch.zeros(3).to(hidden.device, non_blocking=True),
    "a copy that is waited for": lambda hidden: torch.zeros(3).pin_memory().to(hidden.device),
}


@pytest.mark.parametrize("what", READING)
def test_what_the_host_waits_for_is_found(fake: FakeGpuKit, encoder: TransformerEncoder, path: str, what: str) -> None:
    found = found_with(fake, encoder, READING[what])

    assert {finding.kind for finding in found} == {"sync"}
    assert all(finding.place.startswith("tests/unit/engines/gpu/test_watch.py:") for finding in found)


def test_a_mask_on_the_wrong_device_is_found(fake: FakeGpuKit, encoder: TransformerEncoder, path: str) -> None:
    found = found_with(fake, encoder, lambda hidden: hidden.masked_fill(torch.zeros(hidden.shape).bool(), 0))

    assert [finding.kind for finding in found] == ["device"]


def test_float32_in_a_layer_is_found(fake: FakeGpuKit, encoder: TransformerEncoder, path: str) -> None:
    found = found_with(fake, encoder, lambda hidden: nn.functional.gelu(hidden.float()).to(hidden.dtype))

    assert {(finding.kind, finding.operation) for finding in found} == {
        ("float32", "aten._to_copy.default"), ("float32", "aten.gelu.default")
    }  # fmt: skip


def test_a_weight_in_float32_is_found(fake: FakeGpuKit, encoder: TransformerEncoder, path: str) -> None:
    weight = fake.call(lambda: torch.zeros(64, device=GPU))

    assert [finding.kind for finding in found_with(fake, encoder, lambda hidden: hidden + weight)] == ["float32"]


def test_what_is_intended_on_padded_paths_is_a_finding_on_packed_ones() -> None:
    mask = Finding("sync", "transformers/masking_utils.py:_ignore_bidirectional_mask_sdpa", "aten.is_nonzero.default")

    assert unintended([mask], "padded") == []
    assert unintended([mask, mask], "packed") == [mask]


def test_a_graph_that_would_wait_is_not_captured(fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransformerEncoder._row

    def copying(self: TransformerEncoder, row: Tensor, layout: PackedLayout) -> Tensor:
        return right(self, row.cpu().to(row.device), layout)

    monkeypatch.setattr(TransformerEncoder, "_row", copying)
    info = fake.load(kit.recipe_folder("bert-cls")).info

    assert (info.path, info.notes) == ("fused", ("fused: RuntimeError in the forward pass",))


def test_the_kernel_for_rows_refuses_heads_of_other_widths(fake: FakeGpuKit) -> None:
    """It takes multiples of 8, up to 256."""
    q = fake.call(lambda: torch.zeros(4, 2, 12, dtype=torch.bfloat16, device=GPU))
    offsets = fake.call(lambda: torch.tensor([0, 4], dtype=torch.int32, device=GPU))

    with pytest.raises(RuntimeError, match="heads are 12 wide"):
        fake.call(lambda: varlen_attn(q, q, q, offsets, offsets, 4, 4))


def test_a_pinned_copy_is_not_waited_for_and_keeps_its_values(fake: FakeGpuKit) -> None:
    fake.gpu.take()
    numbers = np.arange(6)

    made = fake.call(lambda: to_device(numbers, GPU) + 1)

    assert fake.gpu.take() == []
    assert (made.device, twin(made).tolist()) == (GPU, list(range(1, 7)))
