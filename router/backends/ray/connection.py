"""Connects this process to a Ray cluster."""

import socket

import ray

from engines.errors import InvalidValue
from router.backends.ray.environment import APP, named_address

_CONNECT_TIMEOUT_S = 10.0


def connect(address: str | None) -> None:
    """Connect to the cluster; `None` means the one in `RAY_ADDRESS`, else the one on this machine.

    Raises:
        InvalidValue: no cluster answers.
    """
    if ray.is_initialized():
        return
    address = address or named_address()
    try:
        _check_reachable(address)
        ray.init(address=address or "auto", log_to_driver=False, logging_level="warning", namespace=APP)
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidValue(
            f"no Ray cluster answers at {address or 'this machine'}: start one with `ray start --head`, or set its "
            f"address in RAY_ADDRESS ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _check_reachable(address: str | None) -> None:
    """Raise OSError when nothing listens at the address: Ray itself would retry for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
