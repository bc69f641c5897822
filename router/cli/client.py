"""Questions of the command line to a running server. A client library would take longer to import than the answer."""

import json
import urllib.error
import urllib.request
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from router.config.setting_values import is_loopback

Answer = TypeVar("Answer")

_PATIENCE_S = 30.0


class RemoteError(Exception):
    """The server did not answer as it should; the message says what to do.

    `status` is the answer's, None when there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def get(url: str, path: str, kind: type[Answer], key: str | None = None, *, body: object = None) -> Answer:
    """The JSON behind `path` of the server at `url`, as `kind`; with a `body`, what the server answers to that.

    Raises:
        RemoteError: no server, no leave, or an answer that is not Embedyard's.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    content = None if body is None else msgspec.json.encode(body)
    try:
        request = urllib.request.Request(url.rstrip("/") + path, content, headers)
        with _opener(url).open(request, timeout=_PATIENCE_S) as answer:
            return msgspec.json.decode(answer.read(), type=kind)
    except urllib.error.HTTPError as error:
        raise RemoteError(_refusal(url, error), error.code) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise RemoteError(f"no server answers at {url} ({reason}): start one, or correct --url") from None
    except msgspec.DecodeError:
        raise RemoteError(f"what answers at {url} is not Embedyard: correct --url") from None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """A proxy of the environment is not asked for this machine's own server."""
    host = urlsplit(url).hostname or ""
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if is_loopback(host) else [])


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    try:
        message: Any = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {error.code}: is it Embedyard?"
    if error.code in (401, 403):
        return f"{message} (set ADMIN_API_KEY or API_KEY as the server has it)"
    return str(message)
