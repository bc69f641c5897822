"""Which errors say that memory was missing, and which that the device has failed for good."""

import pytest
import torch

from engines.errors import BrokenFiles, device_loss, is_device_error, is_out_of_memory


def accelerator_error(message: str, code: int | None = None) -> Exception:
    """As torch raises it: its C++ sets `error_code` on the exception."""
    error = torch.AcceleratorError(message)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]  # set by torch's C++
    return error


LOST = [
    (accelerator_error("CUDA error: device-side assert triggered\nCUDA kernel", 710), "device-side assert"),
    (accelerator_error("CUDA error: an illegal memory access was encountered", 700), "illegal memory access"),
    (accelerator_error("CUDA error: unspecified launch failure"), "unspecified launch failure"),
    (accelerator_error("CUDA error: Invalid access of peer GPU memory over nvlink", 226), "CUDA error 226"),
    (accelerator_error("CUDA error: unknown error", 999), "CUDA error 999"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "uncorrectable ecc error"),
    (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), "device-side assert"),
]  # fmt: skip

USABLE = [
    accelerator_error("CUDA error: out of memory", 2),
    accelerator_error("CUDA error: operation failed due to a previous error during capture", 901),
    accelerator_error("CUDA error: operation not permitted when stream is capturing", 900),
    accelerator_error("CUDA error: no kernel image is available for execution on the device", 209),
    accelerator_error("CUDA error: invalid argument", 1),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    RuntimeError("the size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("device-side assert triggered in CUDA is only the text of a request"),
    BrokenFiles("CUDA error: device-side assert triggered"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize(("error", "loss"), LOST, ids=[str(error) for error, _ in LOST])
def test_a_context_that_is_gone_is_told_from_other_errors(error: Exception, loss: str) -> None:
    assert device_loss(error) == loss
    assert is_device_error(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", USABLE, ids=str)
def test_an_error_that_leaves_the_device_usable_is_no_loss(error: Exception) -> None:
    assert device_loss(error) == ""
    assert is_device_error(error) == is_out_of_memory(error)
