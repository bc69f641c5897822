"""Builds `ScoreCall`s from the requests of rerank, score, classify and predict routes. Pure.

Everything that needs no model is checked here, so that an invalid request never loads one. The calls have no model yet:
`router/api/scoring.py` adds it.
"""

from collections.abc import Sequence

from msgspec import UNSET

from engines.errors import InvalidValue
from engines.spec import Truncate
from engines.types import ScoreCall
from router.api.decoding import keep_alive_s
from router.errors import EmptyInput, TooManyInputs
from router.schemas.inference import MAX_INPUTS
from router.schemas.scoring import (
    ClassifyRequest,
    DocumentText,
    EitherRerankRequest,
    PredictRequest,
    RerankOptions,
    RerankRequest,
    ScoreRequest,
    TextPair,
)


def rerank_call(data: RerankRequest) -> ScoreCall:
    """Build the call for a request with `documents`.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    return _rerank_call(data, data.documents, data.truncate)


def either_rerank_call(data: EitherRerankRequest) -> ScoreCall:
    """Build the call for a request with `documents`, or with `texts` (TEI).

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    if data.documents is not None and data.texts is not None:
        raise InvalidValue("texts: send documents or texts (text-embeddings-inference), not both", param="texts")
    if data.documents is not None:
        return _rerank_call(data, data.documents, data.truncate)
    if data.texts is None:
        raise InvalidValue("documents is required (or texts, as text-embeddings-inference names it)", param="documents")
    if isinstance(data.truncate, str):
        raise InvalidValue("truncate: Expected `bool` with texts; send documents instead, or true", param="truncate")
    return ScoreCall(
        model_id="",
        texts=checked(data.texts, "texts"),
        queries=checked(data.query, "query"),
        truncate=tei_truncate(data.truncate, data.truncation_direction),
        activation="none" if data.raw_scores else "probabilities",
        keep_alive_s=keep_alive_s(data.keep_alive),
        is_flex=data.service_tier == "flex",
    )


def _rerank_call(
    data: RerankOptions, documents: Sequence[str | DocumentText], truncate: Truncate | bool | None
) -> ScoreCall:
    if data.rank_fields not in (None, [], ["text"]):
        raise InvalidValue('rank_fields must be ["text"]: documents are ranked by their text', param="rank_fields")
    texts = [document if isinstance(document, str) else document.text for document in documents]
    return ScoreCall(
        model_id="",
        texts=checked(texts, "documents"),
        queries=checked(data.query, "query"),
        instruction=data.instruction,
        truncate=tei_truncate(truncate, None) if isinstance(truncate, bool) else truncate,
        max_text_tokens=data.max_tokens_per_doc or None,
        activation="none" if data.raw_scores else "default",
        keep_alive_s=keep_alive_s(data.keep_alive),
        is_flex=data.service_tier == "flex",
    )


def score_call(data: ScoreRequest) -> ScoreCall:
    """Build the call for one text with each of many, or for two lists item by item.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    queries, texts = checked(data.text_1, "text_1"), checked(data.text_2, "text_2")
    if len(queries) not in (1, len(texts)):
        raise InvalidValue(
            f"text_1 has {len(queries)} texts and text_2 has {len(texts)}: send one in text_1, or as many as in text_2",
            param="text_1",
        )
    return ScoreCall(
        model_id="",
        texts=texts,
        queries=queries,
        instruction=data.instruction,
        truncate=data.truncate,
        activation="none" if data.use_activation is False else "default",
        keep_alive_s=keep_alive_s(data.keep_alive),
    )


def classify_call(data: ClassifyRequest) -> ScoreCall:
    """Build the call for the labels of texts.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    is_raw = data.use_activation is False or data.raw_scores is True
    return ScoreCall(
        model_id="",
        texts=checked(data.input, "input"),
        truncate=data.truncate,
        activation="none" if is_raw else "probabilities",
        keep_alive_s=keep_alive_s(data.keep_alive),
    )


def predict_call(data: PredictRequest) -> tuple[ScoreCall, bool]:
    """Build the call for TEI's `inputs`, and tell whether they are a list, which is answered by a list.

    `inputs` has three forms: a text; `[text]` or the pair `[text, text]`; a list of such lists.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    inputs, is_batch = _predict_inputs(data)
    lengths = set(map(len, inputs))
    if len(lengths) > 1:
        raise InvalidValue("inputs mixes texts and pairs: send one kind per request", param="inputs")
    call = ScoreCall(
        model_id="",
        texts=tuple(item[-1] for item in inputs),
        queries=tuple(item[0] for item in inputs) if lengths == {2} else (),
        truncate=tei_truncate(data.truncate, data.truncation_direction),
        activation="none" if data.raw_scores else "probabilities",
    )
    return call, is_batch


def _predict_inputs(data: PredictRequest) -> tuple[list[tuple[str, ...]], bool]:
    """Return the texts and pairs of `inputs`, and whether it is a list of them."""
    if isinstance(data.inputs, str):
        return [checked(data.inputs, "inputs")], False
    check_count(len(data.inputs), "inputs")
    texts = [item for item in data.inputs if isinstance(item, str)]
    lists = [item for item in data.inputs if isinstance(item, TextPair)]
    if texts and lists:
        raise InvalidValue("inputs mixes texts and lists of texts: send one kind per request", param="inputs")
    if len(texts) > 2:
        raise InvalidValue(
            f"inputs has {len(texts)} texts, and a list of two is a pair: send many as [[text], [text], ...]",
            param="inputs",
        )
    if texts:
        return [checked(texts, "inputs")], False
    items: list[tuple[str, ...]] = [
        (item.first,) if item.second is UNSET else (item.first, item.second) for item in lists
    ]
    empty = next((index for index, item in enumerate(items) if not all(item)), None)
    if empty is not None:
        raise EmptyInput(f"inputs[{empty}] has an empty text", param="inputs")
    return items, True


def checked(given: str | Sequence[str], field: str) -> tuple[str, ...]:
    """Return the texts of a field.

    Raises:
        EmptyInput: there is none, or one is empty.
        TooManyInputs.
    """
    if isinstance(given, str):
        if not given:
            raise EmptyInput(f"{field} is empty", param=field)
        return (given,)
    check_count(len(given), field)
    if not all(given):
        raise EmptyInput(f"{field}[{given.index('')}] is empty", param=field)
    return tuple(given)


def check_count(count: int, field: str) -> None:
    """Refuse a list that is empty or too long."""
    if not count:
        raise EmptyInput(f"{field} is empty: send at least one", param=field)
    if count > MAX_INPUTS:
        raise TooManyInputs(
            f"{field} has {count} items (maximum {MAX_INPUTS} per request); split the request", param=field
        )


def tei_truncate(truncate: bool | None, direction: str | None) -> Truncate | None:
    """Translate truncation. Three cases: 1. off: an error. 2. on, or with a direction: that end. 3. not given: None."""
    if truncate is False:
        return "error"  # (1)
    if direction is not None:
        return "start" if direction.lower() == "left" else "end"  # (2)
    return "end" if truncate else None  # (2), (3)
