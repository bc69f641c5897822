"""Computes scores from the hidden states of a packed row, with the model's own head on one row for each text.

A head of transformers reads one vector of a text: its first token's, its last token's, or the mean of all. Which one,
`select_rows` finds out by comparison with the model's own forward pass. The head then runs as the code of its class,
with a backbone that returns the vectors it is given, as if each text had one token. So there are no names of heads
here, and of a language model's vocabulary only the tokens that are asked for are computed.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from engines.errors import UnsupportedModel
from engines.inputs.token_ids import ID_MASK, TYPE_SHIFT, Ids
from engines.layers.packing import PackedLayout, TokenChoice
from engines.layers.pooling import pool

RowChoice = Literal["cls", "mean", "lasttoken"]
"""The vector of a text that a head reads."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far scores may be from those of the model's own forward pass, where that runs its head in the same dtype."""


class LogitTokens(NamedTuple):
    """The tokens of a language model whose logits make the score: `true`, minus `false` where there is one."""

    true: int
    false: int | None = None

    @property
    def ids(self) -> list[int]:
        """Returns the tokens in the order of the logits."""
        return [self.true] if self.false is None else [self.true, self.false]


class GivenStates(nn.Module):
    """Stands in for the backbone of a model: returns the vectors `inputs_embeds` `[n, 1, H]` as its hidden states."""

    def __init__(self, pooler: nn.Module | None, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.pooler, self._activation = pooler, activation

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Returns the vectors, and what the backbone's own pooler makes of them."""
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=inputs_embeds,
            pooler_output=self._pooled(inputs_embeds),
        )

    def _pooled(self, hidden: Tensor) -> Tensor | None:
        if self.pooler is None:
            return None
        if self._activation is None:
            pooled: Tensor = self.pooler(hidden)
            return pooled
        return self._activation(self.pooler(hidden[:, 0]))  # ALBERT's is a plain linear layer


class ScoreHead:
    """Computes the logits of a packed row's texts (`engines.models.head.Head`), in float32.

    Args:
        model: transformers' model with a head. Its backbone is taken out.
        backbone: the attribute of the model that holds its backbone.
        tokens: the tokens of a language model; None for a classifier.

    Attributes:
        rows: the vectors that the head reads.
        dimensions: the number of scores of a text.
        weights: the head's own.
    """

    def __init__(self, model: Any, backbone: str, tokens: LogitTokens | None = None) -> None:
        base = getattr(model, backbone)
        pooler = getattr(base, "pooler", None)
        activation = getattr(base, "pooler_activation", None)
        if tokens is not None:
            _keep_logits(model, tokens.ids)
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, backbone: GivenStates(pooler, activation)}
        self.weights: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        for weight in self.weights:
            weight.data = weight.data.float() if weight.is_floating_point() else weight.data
        self._model.config = _with_padding(model.config)
        self._tokens = tokens
        self.rows: RowChoice = "lasttoken" if tokens is not None else "cls"
        self.dimensions = 1 if tokens is not None else int(model.config.num_labels)

    @property
    def reads(self) -> TokenChoice:
        """See `Head`."""
        choices: dict[RowChoice, TokenChoice] = {"cls": "first", "lasttoken": "last"}
        return choices.get(self.rows, "all")

    def __call__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Turns packed hidden states `[T, H]` into logits, float32 `[n, dimensions]`."""
        return self._logits(_rows(hidden, layout, self.rows))

    def _logits(self, rows: Tensor) -> Tensor:
        found: Tensor = self._model(
            inputs_embeds=rows[:, None], attention_mask=torch.ones(len(rows), 1, dtype=torch.int64, device=rows.device)
        ).logits
        if self._tokens is None:
            return found
        logits = found[:, -1]
        return logits if logits.shape[-1] == 1 else logits[:, :1] - logits[:, 1:]


def _rows(hidden: Tensor, layout: PackedLayout, choice: RowChoice) -> Tensor:
    """Returns one vector of each text, float32 `[n, H]`."""
    if choice == "mean":
        return pool(hidden, layout, ("mean",))
    return hidden[layout.starts if choice == "cls" else layout.ends - 1].float()


def _keep_logits(model: Any, ids: list[int]) -> None:
    """Replaces the output embeddings of a language model, `[vocabulary, H]`, by those of a few tokens."""
    whole = model.get_output_embeddings()
    few = nn.Linear(whole.in_features, len(ids), bias=whole.bias is not None, device=whole.weight.device)
    few.weight.data = whole.weight.data[ids].float()
    if whole.bias is not None:
        few.bias.data = whole.bias.data[ids].float()
    model.set_output_embeddings(few)


def _check_logits(model: Any, ids: list[int]) -> None:
    """Checks that a language model has logits for some tokens.

    Raises:
        UnsupportedModel: it has none.
    """
    whole = model.get_output_embeddings()
    if not isinstance(whole, nn.Linear) or max(ids) >= whole.out_features or min(ids) < 0:
        raise UnsupportedModel(
            f"the score is read from the tokens {ids}, but the model has no logits for them; fetch the model again"
        )


def _with_padding(config: Any) -> Any:
    """Returns a config with a padding token, without which heads refuse more than one text; all rows are texts here."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    return config


class Probe(NamedTuple):
    """A text and the logits that the model's own forward pass gives for it, float32 `[dimensions]`.

    `ids` have types in their upper bits where the model reads them.
    """

    ids: Ids
    logits: Tensor


@torch.inference_mode()
def plain_logits(model: Any, texts: Sequence[Ids], tokens: LogitTokens | None, *, has_types: bool) -> list[Probe]:
    """Runs the model's own forward pass on each text alone, before anything of it is changed.

    Raises:
        UnsupportedModel: it has no logits for the tokens.
    """
    if tokens is not None:
        _check_logits(model, tokens.ids)
    probes = []
    for ids in texts:
        row = torch.from_numpy(ids)[None].to(model.device)
        options: dict[str, Any] = {"token_type_ids": row >> TYPE_SHIFT} if has_types else {}
        if tokens is not None:
            options["logits_to_keep"] = 1
        row = row & ID_MASK
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), **options).logits.float()[0]
        if tokens is not None:
            logits = logits[-1, tokens.ids]
            logits = logits[:1] if tokens.false is None else logits[:1] - logits[1:]
        probes.append(Probe(ids, logits))
    return probes


@torch.inference_mode()
def select_rows(
    head: ScoreHead, backbone: Any, probes: Sequence[Probe], dropped_id: int | None, *, has_types: bool
) -> RowChoice:
    """Selects the vectors with which the head gives the logits of the model's own forward pass, and sets them.

    Args:
        dropped_id: the token that a head which reads the last token skips at the end.

    Raises:
        UnsupportedModel: no vector gives them.
    """
    choices: tuple[RowChoice, ...] = ("lasttoken",) if head.rows == "lasttoken" else ("cls", "lasttoken", "mean")
    far = {choice: _distance(head, backbone, probes, choice, dropped_id, has_types) for choice in choices}
    best = min(far, key=lambda choice: far[choice])
    allowed = TOLERANCE[backbone.dtype]
    if not far[best] <= allowed:
        raise UnsupportedModel(
            f"the head of this {backbone.config.model_type} does not read one vector of a text: with the nearest one "
            f"({best}) its scores are {far[best]:.1e} from its own forward pass, more than {allowed:.0e}; use "
            "another model"
        )
    head.rows = best
    return best


def _distance(  # one comparison, used by the function above only
    head: ScoreHead,
    backbone: Any,
    probes: Sequence[Probe],
    choice: RowChoice,
    dropped_id: int | None,
    has_types: bool,
) -> float:
    worst = 0.0
    for probe in probes:
        row = torch.from_numpy(probe.ids)[None].to(backbone.device)
        if choice == "lasttoken" and dropped_id is not None:
            row = row[:, : _end_without(row[0], dropped_id)]
        options: dict[str, Any] = {"token_type_ids": row >> TYPE_SHIFT} if has_types else {}
        row = row & ID_MASK
        hidden = backbone(input_ids=row, attention_mask=torch.ones_like(row), **options).last_hidden_state[0]
        layout = PackedLayout([len(hidden)], hidden.device)
        found = head._logits(_rows(hidden, layout, choice))[0]
        worst = max(worst, relative_error(found, probe.logits))
    return worst


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference of two logits, relative to those of more than 1."""
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max())


def _end_without(row: Tensor, dropped_id: int) -> int:
    kept = (row != dropped_id).nonzero()
    return int(kept[-1]) + 1 if len(kept) else 1
