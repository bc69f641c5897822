"""Lists the tokens of texts with their places, for clients that count or split texts as the model will."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.inputs.prompts import select_prompt
from engines.inputs.tokenizer import Tokenizer
from engines.spec import ModelSpec
from engines.types import MAX_LISTED_CHARS, Outputs, TextCall, TokenizeCall, Tokens

Places = NDArray[np.int32]


def list_tokens(call: TokenizeCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]) -> Tokens:
    """Returns the tokens of each text, not truncated. Blocks: 0.1 s for 100,000 characters.

    Raises:
        PromptNotFound: the model has no such prompt.
        InvalidValue: the texts are too long together, or cannot be encoded.
    """
    chosen = TextCall(model_id=call.model_id, texts=call.texts, input_type=call.input_type)
    template = select_prompt(chosen, prompts, spec.default_prompt, spec.instruction_template)
    num_chars = sum(map(len, call.texts)) + template.num_chars * len(call.texts)
    if num_chars > MAX_LISTED_CHARS:
        raise InvalidValue(
            f"input has {num_chars} characters in all, and the tokens of {MAX_LISTED_CHARS} can be listed at once: "
            "send fewer or shorter texts",
            param="input",
        )
    limits, backend = tokenizer.limits, _places_backend(tokenizer)
    prefix, suffix = (limits.prefix, limits.suffix) if call.add_special_tokens else ((), ())
    rows = [_places_of(tokenizer, template.apply(text), prefix, suffix) for text in call.texts]
    return Tokens(
        places=np.concatenate(rows).astype("<i4").tobytes(),
        token_counts=tuple(map(len, rows)),
        specials={special: backend.id_to_token(special) or "" for special in {*prefix, *suffix}},
        before=template.before,
        behind=template.behind,
    )


def name_terms(outputs: Outputs, tokenizer: Tokenizer) -> Outputs:
    """Returns sparse outputs with the names of their entries. Blocks: 0.1 s for the whole of a large vocabulary.

    An entry that the tokenizer lacks, as where the head is padded beyond it, has an empty name.
    """
    backend = _places_backend(tokenizer)
    entries, _ = outputs.terms()
    names = {entry: backend.id_to_token(entry) or "" for entry in np.unique(entries).tolist()}
    return structs.replace(outputs, term_names=names)


def _places_backend(tokenizer: Tokenizer) -> Any:
    """Returns the tokenizer of the library, which has more than the part that the protocol names."""
    return tokenizer.backend


def _places_of(tokenizer: Tokenizer, text: str, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Places:
    tokenizer.encode_bare([text])  # raises our errors, where the library cannot encode the text
    encoding = _places_backend(tokenizer).encode(text, add_special_tokens=False)
    own = [(token_id, *place) for token_id, place in zip(encoding.ids, encoding.offsets, strict=True)]
    around = [[(special, -1, -1) for special in side] for side in (prefix, suffix)]
    return np.array([*around[0], *own, *around[1]], np.int32).reshape(-1, 3)
