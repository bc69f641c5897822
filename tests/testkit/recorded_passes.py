"""Makes models that load on a CPU run as on a GPU, with recorded passes."""

import pytest
import torch

from engines.layers import attention
from engines.loading import builders
from engines.models import cuda_graphs, weight_forms
from engines.models.prepacked import PrepackedWeights
from tests.testkit.encoders import FakeGraphCapturer, varlen


def record_passes(monkeypatch: pytest.MonkeyPatch, num_sizes: int) -> FakeGraphCapturer:
    """Returns what records the passes of the first sizes."""
    recorder = FakeGraphCapturer()
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "_VARLEN", {("cpu", torch.float32)})
    monkeypatch.setattr(builders, "capturer_for", lambda device: recorder)
    monkeypatch.setattr(cuda_graphs, "SIZES", cuda_graphs.SIZES[:num_sizes])
    monkeypatch.setattr(PrepackedWeights, "size_bytes", lambda *_: 0)  # second copies of weights are for CPUs
    monkeypatch.setattr(weight_forms, "onednn_is_faster", lambda: False)  # and so are packed ones
    return recorder
