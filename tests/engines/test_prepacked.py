"""Prepacked products are torch's own, on any thread, and on weights that are held where they were."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu

from engines.prepacked import Block, Projection

HIDDEN, INNER = 24, 40
EPS = (1e-12, 1e-5)


def _parts() -> dict[str, Tensor]:
    torch.manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {
        "wc": (HIDDEN, HIDDEN), "bc": (HIDDEN,), "wu": (INNER, HIDDEN), "bu": (INNER,), "wd": (HIDDEN, INNER),
        "bd": (HIDDEN,), "g1": (HIDDEN,), "e1": (HIDDEN,), "g2": (HIDDEN,), "e2": (HIDDEN,),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _plain(parts: dict[str, Tensor], activate: Any, context: Tensor, x: Tensor) -> Tensor:
    inner = linear(context, parts["wc"], parts["bc"]) + x
    inner = layer_norm(inner, (HIDDEN,), parts["g1"], parts["e1"], EPS[0])
    out = linear(activate(linear(inner, parts["wu"], parts["bu"])), parts["wd"], parts["bd"]) + inner
    return layer_norm(out, (HIDDEN,), parts["g2"], parts["e2"], EPS[1])


@pytest.mark.parametrize("num_rows", [1, 7, 200])
def test_a_projection_is_the_linear_layer(num_rows: int) -> None:
    parts, x = _parts(), torch.randn(num_rows, HIDDEN)

    found = Projection(parts["wu"], parts["bu"])(x)

    assert torch.allclose(found, linear(x, parts["wu"], parts["bu"]), atol=1e-5)


@pytest.mark.parametrize(("operator", "activate"), [("Gelu", gelu), ("Relu", relu)])
@pytest.mark.parametrize("num_rows", [1, 7, 200])
def test_a_block_is_the_rest_of_the_layer(operator: str, activate: Any, num_rows: int) -> None:
    parts, context, x = _parts(), torch.randn(num_rows, HIDDEN), torch.randn(num_rows, HIDDEN)

    found = Block(parts, operator, EPS)(context, x)

    assert torch.allclose(found, _plain(parts, activate, context, x), atol=1e-5)


def test_the_activation_is_the_exact_one() -> None:
    """`tanh`'s approximation, which runtimes like to put in its place, is off by 1e-4."""
    parts = _parts()
    parts["wd"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, INNER - HIDDEN)], dim=1)
    context, x = torch.randn(500, HIDDEN), torch.randn(500, HIDDEN)
    found = Block(parts, "Gelu", EPS)(context, x)

    def off(approximate: str) -> float:
        expected = _plain(parts, lambda rows: gelu(rows, approximate=approximate), context, x)
        return float((found - expected).abs().max())

    assert off("none") < 1e-5 < 1e-4 < off("tanh")


def test_threads_share_a_block() -> None:
    block, rows = Block(_parts(), "Gelu", EPS), [torch.randn(3, HIDDEN) for _ in range(40)]
    alone = [block(row, row) for row in rows]

    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(lambda row: block(row, row), rows))

    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_what_was_given_back_is_not_written_again() -> None:
    projection = Projection(*(_parts()[name] for name in ("wu", "bu")))
    first = projection(torch.ones(2, HIDDEN))
    kept = first.clone()
    projection(torch.zeros(2, HIDDEN))

    assert torch.equal(first, kept)
