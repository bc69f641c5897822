"""Computes how many connections the process may hold, from its limit of open files."""

_CONNECTIONS_CAP = 8192
_RESERVED_FILES = 256
"""File descriptors reserved for models, workers and logs: a load that cannot open files fails."""


def connection_limit() -> int:
    """Return the process's limit of open files less the reserved ones, at most as many as can be scanned in 2 ms."""
    try:
        import resource  # not on Windows
    except ImportError:
        return _CONNECTIONS_CAP
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _CONNECTIONS_CAP
        if limit == resource.RLIM_INFINITY
        else min(_CONNECTIONS_CAP, max(limit // 2, limit - _RESERVED_FILES))
    )
