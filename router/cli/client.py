"""HTTP client of the command line for a running server. An HTTP library would take longer to import than a request."""

import json
import urllib.error
import urllib.request
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from router.config.setting_values import is_loopback

Answer = TypeVar("Answer")

_TIMEOUT_S = 30.0


class RemoteError(Exception):
    """A request to the server failed; the message has the remedy.

    `status`: HTTP status of the response, None without one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def get(
    url: str,
    path: str,
    response_type: type[Answer],
    key: str | None = None,
    *,
    body: object = None,
    timeout_s: float = _TIMEOUT_S,
) -> Answer:
    """Request `path` from the server at `url` and decode its JSON as `response_type`; a POST when there is a `body`.

    Raises:
        RemoteError: no server, no answer in time, no permission, or not an Embedyard response.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    content = None if body is None else msgspec.json.encode(body)
    try:
        request = urllib.request.Request(url.rstrip("/") + path, content, headers)
        with _opener(url).open(request, timeout=timeout_s) as response:
            return msgspec.json.decode(response.read(), type=response_type)
    except urllib.error.HTTPError as error:
        raise RemoteError(_error_message(url, error), error.code) from None
    except TimeoutError:  # it has accepted the connection: failing to connect is a URLError
        raise RemoteError(f"the server at {url} has not answered within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise RemoteError(f"no server answers at {url} ({reason}); start one, or correct --url") from None
    except msgspec.DecodeError:
        raise RemoteError(f"the server at {url} is not Embedyard; correct --url") from None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Create an opener that uses no proxy for this machine's own server."""
    host = urlsplit(url).hostname or ""
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if is_loopback(host) else [])


def _error_message(url: str, error: urllib.error.HTTPError) -> str:
    try:
        message: Any = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {error.code}; is it Embedyard?"
    if error.code in (401, 403):
        return f"{message} (set ADMIN_API_KEY or API_KEY to the server's key)"
    return str(message)
