"""Which Embedyard this is. A leaf."""

from importlib.metadata import PackageNotFoundError, version


def embedyard_version() -> str:
    """Of the installed distribution."""
    try:
        return version("embedyard")
    except PackageNotFoundError:
        return "from a checkout"
