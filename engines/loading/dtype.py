"""Chooses the number format of weights by the device and the family of the model. Pure: it reads no device."""

from engines.spec import Dtype

_NO_FLOAT16 = ("qwen3", "t5", "mt5", "umt5")
"""Families whose activations overflow float16 (according to their model cards; NaN observed with Qwen3-Embedding-8B),
and every Gemma."""

_AMPERE = (8, 0)
"""From this compute capability on, GPUs compute bfloat16; before it, torch emulates it, slower than float32."""

_VOLTA = (7, 0)
"""From this compute capability on, GPUs have tensor cores for float16; some before it compute it 64 times slower."""

Capability = tuple[int, int]


def overflows_float16(model_type: str) -> bool:
    """Tells whether the activations of a family overflow float16; `model_type` as its config names it."""
    return model_type.startswith(_NO_FLOAT16) or "gemma" in model_type


def automatic_dtype(model_type: str, device_kind: str, capability: Capability | None) -> Dtype:
    """Returns what `dtype: auto` means. Four cases:

    1. on a CPU, float32;  2. on a GPU from Ampere on, or of unknown capability, bfloat16;  3. before Ampere, float16 on
    tensor cores, unless the family overflows in it;  4. else float32.
    """
    if device_kind != "cuda":
        return "float32"  # (1)
    if capability is None or capability >= _AMPERE:
        return "bfloat16"  # (2)
    return "float16" if capability >= _VOLTA and not overflows_float16(model_type) else "float32"  # (3), (4)


def dtype_notes(requested: Dtype, used: str, capability: Capability | None) -> tuple[str, ...]:
    """Returns what operators should know about the dtype in use on this device; nothing where it is the usual one.

    Args:
        requested: as the registry has it.
        used: of the weights.
        capability: of the GPU; None for a CPU.
    """
    if capability is None or capability >= _AMPERE:
        return ()
    gpu = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    if requested == "auto":
        why = "" if used == "float16" or capability < _VOLTA else ", and its activations overflow float16"
        return (f"{used}: {gpu} has neither bfloat16 nor flash attention{why}",)
    return (f"{used}: as the registry has it, but {gpu} emulates it slowly",) if used == "bfloat16" else ()
