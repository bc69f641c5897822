"""The ways to call flash attention: torch's operator, and the public function in the forms of each release.

Signatures are those of torch 2.10.0 to 2.13.0; the fakes compute on a CPU what the kernel would.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines.layers import attention, varlen
from engines.layers.attention import packed_attention
from engines.layers.packing import PackedLayout
from engines.layers.varlen import VarlenKernel, Window, choose_kernel, direct_kernel, gives_the_same, public_kernel
from tests.testkit.encoders import varlen as on_a_cpu

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
LENGTHS = [1, 2, 2, 7, 12]


class Calls:
    """Fakes of the kernel, which count their calls."""

    def __init__(self) -> None:
        self.num = 0

    def _run(  # noqa: PLR0913  # see `Run`
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float | None, window: Window
    ) -> Tensor:
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "flash_api.cpp refuses it"
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        self.num += 1
        return on_a_cpu(
            q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def of_2_10(  # noqa: PLR0913  # the signature is torch's
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: object = None,
    ) -> Tensor:  # fmt: skip
        return self._run(query, key, value, cu_seq_q, max_q, None, (-1, 0) if is_causal else (-1, -1))

    def of_2_11(  # noqa: PLR0913  # the signature is torch's
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, return_aux: object = None, scale: float | None = None, window_size: Window = (-1, -1),
    ) -> Tensor:  # fmt: skip
        return self._run(query, key, value, cu_seq_q, max_q, scale, window_size)

    def of_2_12(  # noqa: PLR0913  # the signature is torch's
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
        max_k: int, *, return_aux: object = None, scale: float | None = None, window_size: Window = (-1, -1),
        enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:  # fmt: skip
        if not enable_gqa and query.size(1) != key.size(1):
            raise ValueError("Expect query and key/value to have the same number of heads")
        return self._run(query, key, value, cu_seq_q, max_q, scale, window_size)

    def operator(self, *names: str) -> Any:
        """As `torch.ops.aten._flash_attention_forward.default`, with these arguments."""

        def run(*given: Any, scale: float | None, window_size_left: int, window_size_right: int) -> tuple[Tensor, ...]:
            q, k, v, offsets, offsets_k, longest, longest_k, dropout, is_causal, debug = given
            assert offsets is offsets_k and longest == longest_k and (dropout, debug) == (0.0, False)
            window = (window_size_left, window_size_right)
            assert is_causal == (window == (-1, 0)), "as varlen_attn calls it"
            return self._run(q, k, v, offsets, longest, scale, window), Tensor(), Tensor(), Tensor(), Tensor()

        run._schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in names])  # type: ignore[attr-defined]  # a fake
        return run


ARGUMENTS = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    "scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes",
)  # fmt: skip


def states(width: int, heads: int, seed: int) -> Tensor:
    return torch.randn(1, heads, sum(LENGTHS), width, generator=torch.Generator().manual_seed(seed))


def run_row(width: int = 8, kv_heads: int = 4, **options: Any) -> Tensor:
    q, k, v = states(width, 4, 0), states(width, kv_heads, 1), states(width, kv_heads, 2)
    return packed_attention(nn.Module(), q, k, v, None, packed_layout=PackedLayout(LENGTHS, CPU), **options)[0]


def row_by(monkeypatch: pytest.MonkeyPatch, kernel: VarlenKernel | None, **options: Any) -> Tensor:
    """Returns the attention of a row on a device whose kernel is this one."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_VARLEN", {("cpu", torch.float32)})
        patch.setattr(attention, "choose_kernel", lambda *_: kernel)
        return run_row(**options)


FORMS: dict[str, tuple[Callable[[Calls], VarlenKernel | None], bool, bool]] = {
    "2.10": (lambda calls: public_kernel(calls.of_2_10), False, False),
    "2.11": (lambda calls: public_kernel(calls.of_2_11), True, True),
    "2.12": (lambda calls: public_kernel(calls.of_2_12), True, True),
    "operator": (lambda calls: direct_kernel(calls.operator(*ARGUMENTS)), True, True),
}
"""How the kernel is called, and whether that takes a scale and a window."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scaling", [None, 8**-0.5, 0.7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_release_gives_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, form: str, causal: bool, window: int | None, scaling: float | None, kv_heads: int
) -> None:
    make, has_scale, has_window = FORMS[form]
    options: dict[str, Any] = {
        "is_causal": causal, "sliding_window": window, "scaling": scaling, "kv_heads": kv_heads
    }  # fmt: skip
    calls = Calls()

    got = row_by(monkeypatch, make(calls), **options)

    torch.testing.assert_close(got, run_row(**options), rtol=0, atol=1e-6)
    assert calls.num == ((window is None or has_window) and (scaling != 0.7 or has_scale))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("width", "is_taken"), [(4, True), (12, True), (20, True), (256, True), (264, False), (512, False)]
)
def test_heads_are_padded_to_what_the_kernel_takes_and_wider_ones_run_by_length(
    monkeypatch: pytest.MonkeyPatch, form: str, width: int, is_taken: bool
) -> None:
    make, has_scale, _ = FORMS[form]
    calls = Calls()

    got = row_by(monkeypatch, make(calls), width=width, is_causal=True)

    torch.testing.assert_close(got, run_row(width=width, is_causal=True), rtol=0, atol=1e-5)
    assert got.shape == (1, sum(LENGTHS), 4, width)
    assert calls.num == (is_taken and (has_scale or width % 8 == 0))


def test_the_operator_of_this_torch_is_called_with_what_it_takes() -> None:
    kernel = direct_kernel(torch.ops.aten._flash_attention_forward.default)
    assert kernel is not None
    q, k, v = (torch.empty(12, heads, 16, dtype=torch.float16, device="meta") for heads in (4, 2, 2))
    offsets = torch.empty(3, dtype=torch.int32, device="meta")

    out = kernel.run(q, k, v, offsets, 7, 0.5, (3, 0))

    assert (out.shape, out.dtype) == ((12, 4, 16), torch.float16)


@pytest.mark.parametrize(
    "names",
    [ARGUMENTS[:10], ARGUMENTS[:11], (*ARGUMENTS[:6], "new", *ARGUMENTS[6:])],
    ids=["no scale", "no window", "other"],
)
def test_an_operator_that_has_changed_is_not_called(names: tuple[str, ...]) -> None:
    assert direct_kernel(Calls().operator(*names)) is None


def test_a_public_function_that_is_unknown_is_not_called() -> None:
    def unknown(query: Tensor, key: Tensor, value: Tensor, sequences: object) -> Tensor:
        return query

    assert public_kernel(unknown) is None


# Which one is used.


def wrong(kernel: VarlenKernel | None) -> VarlenKernel:
    assert kernel is not None
    run = kernel.run
    return VarlenKernel(lambda *given: run(*given) * 1.001)


def failing(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


def test_kernels_are_compared_bit_by_bit() -> None:
    calls = Calls()
    one, other = public_kernel(calls.of_2_11), direct_kernel(calls.operator(*ARGUMENTS))
    old = public_kernel(calls.of_2_10)
    assert one is not None and other is not None and old is not None

    assert gives_the_same(one, other, CPU)
    assert calls.num == 2 * 2 * 4, "two scales, four windows"
    assert gives_the_same(other, old, CPU)
    assert not gives_the_same(wrong(one), other, CPU)
    assert not gives_the_same(VarlenKernel(failing), other, CPU)


@pytest.mark.parametrize(
    ("capability", "is_same", "has_public", "chosen"),
    [
        ((7, 5), True, True, None),
        ((8, 0), True, True, "operator"),
        ((9, 0), True, False, "operator"),
        ((9, 0), False, True, "public"),
        (None, False, True, "operator"),
    ],
    ids=["before Ampere", "Ampere", "torch 2.9", "the operator differs", "simulated"],
)
def test_the_operator_is_used_where_it_gives_what_the_public_function_gives(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    is_same: bool,
    has_public: bool,
    chosen: str | None,
) -> None:
    monkeypatch.setattr(varlen, "compute_capability", lambda device: capability)
    monkeypatch.setattr(varlen, "gives_the_same", lambda *_: is_same)
    public = Calls().of_2_12 if has_public else None

    kernel = choose_kernel.__wrapped__(public, GPU)

    assert (kernel and kernel.run.__qualname__.split("_kernel")[0].replace("direct", "operator")) == chosen


def test_a_cpu_has_no_kernel() -> None:
    assert choose_kernel(None, CPU) is None
