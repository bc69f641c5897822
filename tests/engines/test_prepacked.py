"""Prepacked layers are torch's own, on any number of threads, and on weights that are held where they were."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention

from engines.layout import Layout
from engines.prepacked import PrepackedLayers, Shape, layers_at_once, suits

HEADS, WIDTH, INNER = 3, 8, 40
HIDDEN = HEADS * WIDTH
EPS = (1e-12, 1e-5)

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


def _layout(*lengths: int) -> Layout:
    return Layout(list(lengths), torch.device("cpu"))


def _plain(parts: Parts, activate: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """The layer as the paper has it, one text after the other."""
    found = []
    for text in torch.split(linear(x, parts["wq"], parts["bq"]), layout.lengths):
        query, key, value = text.view(-1, 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        found.append(scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1))
    inner = linear(torch.cat(found), parts["wc"], parts["bc"]) + x
    inner = layer_norm(inner, (HIDDEN,), parts["g1"], parts["e1"], EPS[0])
    out = linear(activate(linear(inner, parts["wu"], parts["bu"])), parts["wd"], parts["bd"]) + inner
    return layer_norm(out, (HIDDEN,), parts["g2"], parts["e2"], EPS[1])


@pytest.mark.parametrize(("operator", "activate"), [("Gelu", gelu), ("Relu", relu)])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("lengths", [(1,), (7,), (1, 2, 7), (7, 2, 1), (40, 40), (100, 120)])
def test_a_layer_is_what_torch_makes_of_it(
    operator: str, activate: Callable[[Tensor], Tensor], num_threads: int, lengths: tuple[int, ...]
) -> None:
    parts, layout, x = _parts(), _layout(*lengths), torch.randn(sum(lengths), HIDDEN)

    found = PrepackedLayers([parts], _shape(operator), num_threads)(x, layout, 0, 0)

    assert torch.allclose(found, _plain(parts, activate, x, layout), atol=1e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 2), (0, 0), (1, 1), (2, 2), (0, 1), (1, 2)])
def test_any_layers_run_one_after_the_other_and_no_others(first: int, last: int) -> None:
    layers, layout, x = [_parts(seed) for seed in range(3)], _layout(2, 5), torch.randn(7, HIDDEN)
    expected = x
    for parts in layers[first : last + 1]:
        expected = _plain(parts, gelu, expected, layout)

    found = PrepackedLayers(layers, _shape(), 1)(x, layout, first, last)

    assert torch.allclose(found, expected, atol=1e-5)


def test_the_activation_is_the_exact_one() -> None:
    """`tanh`'s approximation, which runtimes like to put in its place, is off by 1e-4."""
    parts = _parts()
    parts["wd"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, INNER - HIDDEN)], dim=1)
    layout, x = _layout(100, 100), torch.randn(200, HIDDEN)
    found = PrepackedLayers([parts], _shape(), 1)(x, layout, 0, 0)

    def off(approximate: str) -> float:
        expected = _plain(parts, lambda rows: gelu(rows, approximate=approximate), x, layout)
        return float((found - expected).abs().max())

    assert off("none") < 1e-5 < 1e-4 < off("tanh")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_share_layers(num_threads: int) -> None:
    layers, layout = PrepackedLayers([_parts()], _shape(), num_threads), _layout(3)
    rows = [torch.randn(3, HIDDEN) for _ in range(40)]
    alone = [layers(row, layout, 0, 0) for row in rows]

    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(lambda row: layers(row, layout, 0, 0), rows))

    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_what_was_given_back_is_not_written_again() -> None:
    layers = PrepackedLayers([_parts()], _shape(), 1)
    first = layers(torch.ones(2, HIDDEN), _layout(2), 0, 0)
    kept = first.clone()
    layers(torch.zeros(2, HIDDEN), _layout(2), 0, 0)

    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("lengths", "is_suited"),
    [
        ((192,), True),
        ((193,), False),
        ((192,) * 10, True),
        ((10, 30), True),
        ((9, 30), False),
    ],
    ids=["a long text", "too long a text", "many tokens", "some padding", "too much padding"],
)
def test_short_texts_of_like_length_are_suited(lengths: tuple[int, ...], is_suited: bool) -> None:
    assert suits(_layout(*lengths)) is is_suited


@pytest.mark.parametrize(("num_tokens", "num_layers"), [(12, 42), (128, 4), (129, 3), (256, 2), (400, 1), (1024, 1)])
def test_the_more_tokens_the_fewer_layers_are_one_call(num_tokens: int, num_layers: int) -> None:
    """Between two calls others are let pass."""
    assert layers_at_once(_layout(num_tokens)) == num_layers
