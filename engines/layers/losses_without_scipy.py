"""Imports the loss functions of transformers, which every model class imports, without scipy.

Only object detectors use scipy there, in training. It is 390 modules, and 0.28 of the 1.2 s of CPU time that the model
classes take to import.
"""

import importlib
import sys
from typing import Any

from transformers import utils

_LOSSES = "transformers.loss"


def import_losses() -> None:
    """Import them, unless that has happened. scipy is imported when one of them first assigns boxes to labels."""
    shared = vars(utils)
    is_available = shared["is_scipy_available"]
    if f"{_LOSSES}.loss_utils" in sys.modules or not is_available():
        return
    shared["is_scipy_available"] = _is_left_out
    try:
        importlib.import_module(f"{_LOSSES}.loss_utils")
    finally:
        shared["is_scipy_available"] = is_available
    for name, module in list(sys.modules.items()):
        if name.startswith(_LOSSES) and getattr(module, "is_scipy_available", None) is _is_left_out:
            vars(module).update(is_scipy_available=is_available, linear_sum_assignment=_linear_sum_assignment)


def _is_left_out() -> bool:
    return False


def _linear_sum_assignment(*matrix: Any, **options: Any) -> Any:
    from scipy.optimize import linear_sum_assignment  # late: it is what is left out

    return linear_sum_assignment(*matrix, **options)
