"""What an engine is made of (`engines/batching/engine.py`), and its bounds."""

from msgspec import Struct

from engines.batching.autotune import BatchSizeTuner
from engines.batching.batch import BatchLimits
from engines.batching.outputs import OutputFacts
from engines.batching.rest_of_check import RestOfCheck
from engines.batching.scores import Scoring
from engines.batching.spaces import ModelSpaces
from engines.inputs.tokenizer import Tokenizer
from engines.models.base import Encoder
from engines.models.parking import ParkableEncoder
from engines.spec import ModelSpec
from engines.types import ModelInfo


class EngineLimits(Struct, frozen=True, kw_only=True):
    """Bounds of an engine.

    Args:
        max_queue_items: texts that may wait.
        max_queue_requests: requests that may wait; None is any number.
        even_batches: a call that is alone gives the same bits each time, whichever threads and cores are idle.
        target_dim: width when a request names none and the model allows it.
    """

    batch: BatchLimits
    max_queue_items: int = 8192
    max_queue_requests: int | None = None
    batch_timeout_s: float = 0.0
    even_batches: bool = False
    target_dim: int | None = None


class Parts(Struct, frozen=True):
    """What the loader made of a model folder.

    `tuner` finds the size of batches; None where that is known. `scoring`: of a model that scores; None for vectors.
    `facts`: what it gives beside dense vectors. `spaces`: names the spaces of vectors; None where they have no names.
    `parkable`: moves its weights to main memory; None where nothing can. `rest_of_check`: what an earlier load has
    checked; None for a model that every load checks as a whole.
    """

    encoder: Encoder
    tokenizer: Tokenizer
    spec: ModelSpec
    info: ModelInfo
    tuner: BatchSizeTuner | None = None
    scoring: Scoring | None = None
    facts: OutputFacts = OutputFacts()
    spaces: ModelSpaces | None = None
    parkable: ParkableEncoder | None = None
    rest_of_check: RestOfCheck | None = None
