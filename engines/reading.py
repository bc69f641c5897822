"""What a request asks of one model: its texts as ids, and the width and length of its vectors; or a refusal."""

from collections.abc import Mapping

from engines.batch import Output
from engines.errors import DimensionsNotSupported, InvalidValue
from engines.prompts import choose_frame
from engines.records import EmbedCall, ModelInfo
from engines.spec import ModelSpec
from engines.tokenize import IdReading, TextReading, Tokenizer

MAX_FRAME_CHARS = 1 << 24
"""The most characters that prompts may add to a request, which carries them once and has them read with each input."""


def read_call(
    call: EmbedCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]
) -> TextReading | IdReading:
    """The inputs on their way to ids, prompts in front, to be cut to what the model reads.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    truncate = call.truncate or spec.truncate or tokenizer.rules.truncate
    if call.token_ids:
        if call.input_type is not None or call.instruction is not None or call.prompt is not None:
            raise InvalidValue("token ids are taken verbatim: no prompt can be put in front of them", param="input")
        return tokenizer.read_ids(call.token_ids, truncate, must_be_framed=not spec.unframed_token_ids)
    if call.instruction is not None:
        _check_frame(call, len(call.instruction))
    frame = choose_frame(call, prompts, spec.default_prompt, spec.instruction_template)
    _check_frame(call, frame.num_chars)
    return tokenizer.read(call.texts, frame, truncate)


def _check_frame(call: EmbedCall, num_chars: int) -> None:
    total = num_chars * len(call.texts)
    if total > MAX_FRAME_CHARS:
        param = "prompt" if call.prompt is not None else "instruction" if call.instruction is not None else "input_type"
        raise InvalidValue(
            f"{param} puts {num_chars} characters around each of {len(call.texts)} inputs: {total} in all, and a "
            f"request may have {MAX_FRAME_CHARS}; shorten it, or send fewer inputs",
            param=param,
        )


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
