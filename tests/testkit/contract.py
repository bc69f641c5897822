"""The error codes of the HTTP contract, and request bodies that must be refused."""

from typing import Any

import httpx

from tests.testkit.servers import MAX_BODY_BYTES

INVALID = "invalid_request_error"

CODES = {
    400: {
        "invalid_json", "invalid_value", "empty_input", "too_many_inputs", "context_length_exceeded",
        "dimensions_not_supported", "prompt_not_found", "invalid_token_id", "task_not_supported",
    },
    401: {"invalid_api_key"},
    403: {"insufficient_scope", "model_not_allowed"},
    404: {"model_not_found", "not_found"},
    405: {"method_not_allowed"},
    409: {"model_in_use", "model_pinned", "space_mismatch", "file_in_use", "batch_finished"},
    413: {"body_too_large"},
    429: {"rate_limit_exceeded", "queue_full", "too_many_requests", "quota_exceeded"},
    500: {"internal_error", "non_finite_embedding", "model_too_large"},
    503: {
        "model_loading", "model_load_failed", "shutting_down", "out_of_memory", "device_down", "host_lost",
        "storage_unavailable",
    },
}  # fmt: skip
"""Error codes of the contract by status."""

TYPES = {
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

EMBED = "/v1/embeddings"

BAD_BODIES: list[tuple[str, Any, int, str, str | None]] = [
    ("truncated JSON", b'{"input": "a"', 400, "invalid_json", None),
    ("no JSON at all", b"hello", 400, "invalid_json", None),
    ("an empty body", b"", 400, "invalid_json", None),
    ("bytes that are not UTF-8", b'{"input": "\xff"}', 400, "invalid_json", None),
    ("a lone surrogate", b'{"input": "\\ud800"}', 400, "invalid_json", None),
    ("text after the JSON", b'{"input": "a"} b', 400, "invalid_json", None),
    ("NaN", b'{"input": "a", "keep_alive": NaN}', 400, "invalid_json", None),
    ("a byte order mark", b'\xef\xbb\xbf{"input": "a"}', 400, "invalid_json", None),
    ("unclosed brackets", b'{"extra":' + b"[" * 100_000, 400, "invalid_json", None),
    ("deep nesting", b'{"extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json", None),
    ("an array", [1], 400, "invalid_value", None),
    ("null", b"null", 400, "invalid_value", None),
    ("no input", {"model": "mini"}, 400, "invalid_value", "input"),
    ("null as input", {"input": None}, 400, "invalid_value", "input"),
    ("a number as input", {"input": 5}, 400, "invalid_value", "input"),
    ("an object as input", {"input": {"text": "a"}}, 400, "invalid_value", "input"),
    ("an empty list", {"input": []}, 400, "empty_input", "input"),
    ("an empty text", {"input": ""}, 400, "empty_input", "input"),
    ("an empty text among others", {"input": ["a", ""]}, 400, "empty_input", "input"),
    ("empty token ids", {"input": [[]]}, 400, "empty_input", "input"),
    ("empty token ids among others", {"input": [[1], []]}, 400, "empty_input", "input"),
    ("2,049 texts", {"input": ["a"] * 2049}, 400, "too_many_inputs", "input"),
    ("2,049 lists of ids", {"input": [[1]] * 2049}, 400, "too_many_inputs", "input"),
    ("texts and ids", {"input": ["a", 1]}, 400, "invalid_value", "input"),
    ("ids and lists of ids", {"input": [1, [2]]}, 400, "invalid_value", "input"),
    ("texts and lists of ids", {"input": ["a", [1]]}, 400, "invalid_value", "input"),
    ("lists of texts", {"input": [["a"]]}, 400, "invalid_value", "input"),
    ("fractions as ids", {"input": [1.5]}, 400, "invalid_value", "input"),
    ("a boolean as an id", {"input": [True]}, 400, "invalid_value", "input"),
    ("null among texts", {"input": ["a", None]}, 400, "invalid_value", "input"),
    ("an object among texts", {"input": [{"text": "a"}]}, 400, "invalid_value", "input"),
    ("dimensions as text", {"input": "a", "dimensions": "256"}, 400, "invalid_value", "dimensions"),
    ("zero dimensions", {"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
    ("negative dimensions", {"input": "a", "dimensions": -4}, 400, "invalid_value", "dimensions"),
    ("a fraction as dimensions", {"input": "a", "dimensions": 1.5}, 400, "invalid_value", "dimensions"),
    ("a boolean as dimensions", {"input": "a", "dimensions": True}, 400, "invalid_value", "dimensions"),
    ("an unknown encoding", {"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
    ("a number as encoding", {"input": "a", "encoding_format": 5}, 400, "invalid_value", "encoding_format"),
    ("a number as model", {"input": "a", "model": 5}, 400, "invalid_value", "model"),
    ("an unknown model", {"input": "a", "model": "gpt-4"}, 404, "model_not_found", None),
    ("an empty model", {"input": "a", "model": ""}, 404, "model_not_found", None),
    ("a path as model", {"input": "a", "model": "../../etc/passwd"}, 404, "model_not_found", None),
    ("a number as user", {"input": "a", "user": 5}, 400, "invalid_value", "user"),
    ("a number as input type", {"input": "a", "input_type": 5}, 400, "invalid_value", "input_type"),
    ("a list as instruction", {"input": "a", "instruction": ["x"]}, 400, "invalid_value", "instruction"),
    ("a number as prompt", {"input": "a", "prompt": 5}, 400, "invalid_value", "prompt"),
    ("an unknown truncation", {"input": "a", "truncate": "middle"}, 400, "invalid_value", "truncate"),
    ("a word as a boolean", {"input": "a", "normalize": "yes"}, 400, "invalid_value", "normalize"),
    ("a number as a boolean", {"input": "a", "normalize": 1}, 400, "invalid_value", "normalize"),
    ("an unknown dtype", {"input": "a", "output_dtype": "int4"}, 400, "invalid_value", "output_dtype"),
    ("int8 with one input", {"input": "a", "output_dtype": "int8"}, 400, "invalid_value", "output_dtype"),
    ("an unknown duration", {"input": "a", "keep_alive": "soon"}, 400, "invalid_value", "keep_alive"),
    ("a negative duration", {"input": "a", "keep_alive": -2}, 400, "invalid_value", "keep_alive"),
    ("a boolean as a duration", {"input": "a", "keep_alive": True}, 400, "invalid_value", "keep_alive"),
    ("prompt and input type", {"input": "a", "prompt": "q", "input_type": "query"}, 400, "invalid_value", "prompt"),
    ("prompt and instruction", {"input": "a", "prompt": "q", "instruction": "t"}, 400, "invalid_value", "prompt"),
    ("a body too large", {"input": "a" * MAX_BODY_BYTES}, 413, "body_too_large", None),
]


def assert_envelope(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]

    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == TYPES.get(status, INVALID)
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) > 0
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    for secret in ("Traceback", "/secret", "/work", "site-packages", "object at 0x"):
        assert secret not in response.text
