"""`ModelSpec`: everything the registry says about one model. A leaf: it knows neither files nor devices."""

from typing import Literal

from msgspec import Struct, structs

Truncate = Literal["end", "start", "error"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PoolingMode = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""Pooling modes as sentence-transformers names them; several are concatenated in the order given."""

NEVER_IDLE = -1.0
"""`keep_alive_s` of a model that never leaves by idleness."""


class Matryoshka(Struct, frozen=True, kw_only=True):
    """Which widths a model's vectors may be cut to.

    Either `widths` (a list) or `minimum` (every width from there to the native one).
    `layer_norm`: a layer norm over the full width comes before the cut (nomic-embed-text-v1.5's model card).
    """

    widths: tuple[int, ...] = ()
    minimum: int | None = None
    layer_norm: bool = False

    def allows(self, width: int, native: int) -> bool:
        """Whether a vector of `native` components may be cut to `width`."""
        if self.minimum is not None:
            return self.minimum <= width <= native
        return width == native or width in self.widths

    def describe(self, native: int) -> str:
        """The allowed widths in words, for messages and `/v1/models`."""
        if self.minimum is not None:
            return f"any of {self.minimum} to {native}"
        return ", ".join(map(str, sorted({*self.widths, native})))


class Calibration(Struct, frozen=True, kw_only=True):
    """The range of each component of a model's vectors, over texts like those to come: what int8 codes divide evenly.

    One number a component of the full width, or one number in all that stands for each of them at any width.
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    def covers(self, width: int) -> bool:
        """Whether it says what vectors of `width` components need."""
        return {len(self.lowest), len(self.highest)} <= {1, width}


class ModelSpec(Struct, frozen=True, kw_only=True):
    """One model of the registry, defaults applied. `None` means: what the model's own files say.

    `replicas`: on how many hosts at the most a busy model may be at the same time.

    `source` is a hub id, a local folder (absolute, or starting with `./` or `../` or `~`),
    or `package:NAME/SUB/FOLDER` for files inside an installed Python package.
    """

    model_id: str
    source: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    max_tokens: int | None = None
    pooling: tuple[PoolingMode, ...] | None = None
    normalize: bool = True
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    instruction_template: str | None = None
    matryoshka: Matryoshka | None = None
    truncate: Truncate | None = None
    keep_alive_s: float = NEVER_IDLE
    pinned: bool = False
    preload: bool = False
    replicas: int = 1
    trust_remote_code: bool = False
    max_batch_tokens: int | None = None
    description: str = ""
    license: str = ""
    token_encoding: Literal["cl100k_base"] | None = None
    unframed_token_ids: bool = False
    cache_bytes: int = 0
    cache_shared: bool = False
    calibration: Calibration | None = None


IN_PLACE = frozenset(
    {"keep_alive_s", "pinned", "preload", "replicas", "description", "license", "token_encoding", "calibration"}
)
"""The fields of a `ModelSpec` that a running engine never sees. Every other one shapes its vectors or its memory
(`max_batch_tokens` too: the workspace was measured for it), so a change of it needs a new generation."""


def is_same_engine(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether an engine built for `old` serves `new`: they differ in the pool's wishes and in words only."""
    return old == structs.replace(new, **{name: getattr(old, name) for name in IN_PLACE})
