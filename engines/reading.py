"""What a request asks of one model: its texts as ids, and the width and length of its vectors; or a refusal."""

from collections.abc import Mapping

from engines.batch import Output
from engines.errors import DimensionsNotSupported, InvalidValue
from engines.prompts import choose_frame
from engines.records import EmbedCall, ModelInfo
from engines.spec import ModelSpec
from engines.tokenize import Encoded, Tokenizer


def encode_call(call: EmbedCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]) -> Encoded:
    """The inputs as ids, prompts in front, cut to what the model reads.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    truncate = call.truncate or spec.truncate or tokenizer.rules.truncate
    if call.token_ids:
        if call.input_type is not None or call.instruction is not None or call.prompt is not None:
            raise InvalidValue("token ids are taken verbatim: no prompt can be put in front of them", param="input")
        return tokenizer.take_ids(call.token_ids, truncate)
    frame = choose_frame(call, prompts, spec.default_prompt, spec.instruction_template)
    try:
        return tokenizer.encode(call.texts, frame, truncate)
    except UnicodeEncodeError as error:
        raise InvalidValue("input holds a lone surrogate, which is no text in any encoding", param="input") from error


def output_of(call: EmbedCall, info: ModelInfo, *, normalize: bool, target_dim: int | None) -> Output:
    """Width and length of the vectors; `normalize` and `target_dim` where the call says nothing.

    Raises:
        DimensionsNotSupported: naming the widths that the model gives.
    """
    native, allowed = info.dimensions, info.matryoshka
    width = call.dimensions
    if width is None:
        width = target_dim if target_dim is not None and target_dim <= native else native
        width = width if allowed.allows(width, native) else native
    elif not allowed.allows(width, native):
        raise DimensionsNotSupported(
            f"dimensions is {width}, but {call.model_id} gives {allowed.describe(native)}", param="dimensions"
        )
    return Output(width, normalize if call.normalize is None else call.normalize, allowed.layer_norm)
