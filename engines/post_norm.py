"""Where the families of post-norm encoder layers keep their parts: read off a layer, not off a list of model names."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Names:
    """Where a family keeps the parts of a layer."""

    attention: str
    query: str
    key: str
    value: str
    context: str
    first_norm: str
    up: str
    activation: str
    down: str
    second_norm: str
    gives_tuple: bool = False

    @property
    def parts(self) -> set[str]:
        """Every part that computes something."""
        return {
            self.query, self.key, self.value, self.context, self.first_norm, self.up, self.activation, self.down,
            self.second_norm,
        }  # fmt: skip


BERT = Names(
    attention="attention.self", query="attention.self.query", key="attention.self.key", value="attention.self.value",
    context="attention.output.dense", first_norm="attention.output.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
)  # fmt: skip
MPNET = Names(
    attention="attention.attn", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    context="attention.attn.o", first_norm="attention.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
    gives_tuple=True,
)  # fmt: skip
DISTILBERT = Names(
    attention="attention", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    context="attention.out_lin", first_norm="sa_layer_norm", up="ffn.lin1", activation="ffn.activation",
    down="ffn.lin2", second_norm="output_layer_norm",
)  # fmt: skip


def names_of(layers: Sequence[nn.Module]) -> Names | None:
    """What the parts of these layers are called; None for others: every part must be one that is known."""
    return next((names for names in (BERT, MPNET, DISTILBERT) if all(_is(layer, names) for layer in layers)), None)


def _is(layer: nn.Module, names: Names) -> bool:
    """Whether the layer is made of these parts and no other, as an encoder has them."""
    parts = {name: part for name, part in layer.named_modules() if not list(part.children())}
    working = {name for name, part in parts.items() if not isinstance(part, nn.Dropout)}
    if working != names.parts or getattr(layer, "is_decoder", False):
        return False
    linears = (names.query, names.key, names.value, names.context, names.up, names.down)
    norms = (names.first_norm, names.second_norm)
    return (
        all(type(parts[name]) is nn.Linear and parts[name].bias is not None for name in linears)
        and all(type(parts[name]) is nn.LayerNorm for name in norms)
        and parts[names.query].weight.shape == parts[names.key].weight.shape == parts[names.value].weight.shape
    )
