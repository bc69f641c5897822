"""A prepacked encoder gives the values of torch's layers, on any number of threads, without copying the tables."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention

from engines.layers.packing import PackedLayout
from engines.models.onnx_graph import Shape
from engines.models.prepacked import PrepackedEncoder, is_suitable, layers_at_once, row_inputs

HEADS, WIDTH, INNER = 3, 8, 40
HIDDEN = HEADS * WIDTH
EPS = (1e-6, 1e-12, 1e-5)
NUM_WORDS, NUM_POSITIONS = 30, 130

Parts = dict[str, Tensor]


def _parts(seed: int = 5) -> Parts:
    torch.manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "wq": (3 * HIDDEN, HIDDEN), "bq": (3 * HIDDEN,), "wc": (HIDDEN, HIDDEN), "bc": (HIDDEN,),
        "wu": (INNER, HIDDEN), "bu": (INNER,), "wd": (HIDDEN, INNER), "bd": (HIDDEN,),
        "g1": (HIDDEN,), "e1": (HIDDEN,), "g2": (HIDDEN,), "e2": (HIDDEN,),
    }  # fmt: skip
    return {name: torch.randn(shape) / 3 for name, shape in shapes.items()}


def _shape(activation: str = "Gelu") -> Shape:
    return Shape(HEADS, WIDTH, activation, EPS)


def _layout(*lengths: int) -> PackedLayout:
    return PackedLayout(list(lengths), torch.device("cpu"))


def _tables() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(NUM_WORDS, HIDDEN), torch.randn(NUM_POSITIONS, HIDDEN)


def _encoder(
    layers: list[Parts], activation: str = "Gelu", num_threads: int = 1, kind: Tensor | None = None
) -> PrepackedEncoder:
    weights = {f"{name}{index}": weight for index, parts in enumerate(layers) for name, weight in parts.items()}
    before = {"g0": torch.ones(HIDDEN), "e0": torch.zeros(HIDDEN)} | ({} if kind is None else {"kind": kind})
    return PrepackedEncoder(_tables(), before | weights, _shape(activation), len(layers), num_threads)


def _run(encoder: PrepackedEncoder, layout: PackedLayout, ids: Tensor | None = None) -> Tensor:
    row = row_inputs(_ids(layout) if ids is None else ids, layout.positions, layout)
    return torch.from_numpy(encoder(row, None, range(99)))


def _ids(layout: PackedLayout) -> Tensor:
    return torch.arange(layout.num_tokens) % NUM_WORDS


def _embedded(layout: PackedLayout, kind: Tensor | None = None) -> Tensor:
    words, places = _tables()
    total = words[_ids(layout)] + places[layout.positions] + (0.0 if kind is None else kind)
    return layer_norm(total, (HIDDEN,), eps=EPS[0])


def _plain(parts: Parts, activate: Callable[[Tensor], Tensor], x: Tensor, layout: PackedLayout) -> Tensor:
    """Computes a layer by the paper's formula, one text after the other."""
    found = []
    for text in torch.split(linear(x, parts["wq"], parts["bq"]), layout.lengths):
        query, key, value = text.view(-1, 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        found.append(scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1))
    inner = linear(torch.cat(found), parts["wc"], parts["bc"]) + x
    inner = layer_norm(inner, (HIDDEN,), parts["g1"], parts["e1"], EPS[1])
    out = linear(activate(linear(inner, parts["wu"], parts["bu"])), parts["wd"], parts["bd"]) + inner
    return layer_norm(out, (HIDDEN,), parts["g2"], parts["e2"], EPS[2])


@pytest.mark.parametrize(("operator", "activate"), [("Gelu", gelu), ("Relu", relu)])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("lengths", [(1,), (7,), (1, 2, 7), (7, 2, 1), (40, 40), (100, 120)])
def test_a_layer_gives_the_values_of_torch(
    operator: str, activate: Callable[[Tensor], Tensor], num_threads: int, lengths: tuple[int, ...]
) -> None:
    parts, layout = _parts(), _layout(*lengths)

    found = _run(_encoder([parts], operator, num_threads), layout)

    assert torch.allclose(found, _plain(parts, activate, _embedded(layout), layout), atol=1e-5)


def test_the_token_type_is_added_to_each_embedding() -> None:
    parts, layout, kind = _parts(), _layout(2, 5), torch.randn(HIDDEN)

    found = _run(_encoder([parts], kind=kind), layout)

    assert torch.allclose(found, _plain(parts, gelu, _embedded(layout, kind), layout), atol=1e-5)


@pytest.mark.parametrize("calls", [[3], [1, 1, 1], [2, 1], [1, 2]])
def test_layers_run_in_order_however_many_a_call_runs(calls: list[int]) -> None:
    layers, layout = [_parts(seed) for seed in range(3)], _layout(2, 5)
    expected, encoder = _embedded(layout), _encoder(layers)
    for parts in layers:
        expected = _plain(parts, gelu, expected, layout)

    found, first = None, 0
    for number in calls:
        found = encoder(row_inputs(_ids(layout), layout.positions, layout), found, range(first, first + number))
        first += number

    assert found is not None
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_the_activation_is_the_exact_one() -> None:
    """The `tanh` approximation, which runtimes often use instead, is off by 1e-4."""
    parts = _parts()
    parts["wd"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, INNER - HIDDEN)], dim=1)
    layout = _layout(100, 100)
    found = _run(_encoder([parts]), layout)

    def off(approximate: str) -> float:
        expected = _plain(parts, lambda rows: gelu(rows, approximate=approximate), _embedded(layout), layout)
        return float((found - expected).abs().max())

    assert off("none") < 1e-5 < 1e-4 < off("tanh")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_share_an_encoder(num_threads: int) -> None:
    encoder, layout = _encoder([_parts()], num_threads=num_threads), _layout(3)
    rows = [torch.randint(NUM_WORDS, (3,)) for _ in range(40)]
    alone = [_run(encoder, layout, row) for row in rows]

    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(lambda row: _run(encoder, layout, row), rows))

    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_returned_values_are_not_overwritten() -> None:
    encoder, layout = _encoder([_parts()]), _layout(2)
    first = _run(encoder, layout, torch.tensor([1, 2]))
    kept = first.clone()
    _run(encoder, layout, torch.tensor([3, 4]))

    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("lengths", "is_suitable_row"),
    [
        ((256,), True),
        ((257,), False),
        ((256,) * 10, True),
        ((10, 30), True),
        ((9, 30), False),
    ],
    ids=["a long text", "too long a text", "many tokens", "some padding", "too much padding"],
)
def test_short_texts_of_similar_length_are_suitable(lengths: tuple[int, ...], is_suitable_row: bool) -> None:
    assert is_suitable(_layout(*lengths)) is is_suitable_row


@pytest.mark.parametrize(("num_tokens", "num_layers"), [(12, 42), (128, 4), (129, 3), (256, 2), (400, 1), (1024, 1)])
def test_the_more_tokens_the_fewer_layers_a_call_runs(num_tokens: int, num_layers: int) -> None:
    """A pass can be preempted only between two calls."""
    assert layers_at_once(_layout(num_tokens)) == num_layers
