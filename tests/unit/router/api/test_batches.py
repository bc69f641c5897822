"""Tests files and batches over a real socket: answers as the endpoints', hostile bodies, foreign ids, quotas."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Request
from structlog.testing import capture_logs

from engines.errors import QueueFull
from router.api.batch_lines import body_of
from router.api.encoding import EncodedAnswer
from router.api.outputs_encoding import StreamedAnswer
from router.batches.upload import Upload
from router.config.settings import Settings
from tests.testkit.batches import line, parsed
from tests.testkit.servers import Limited, Served, bearer, limited, serve, write_keys

FILES, BATCHES = "/v1/files", "/v1/batches"
MAX_FILE_BYTES = 200_000
ENDED = ("completed", "failed", "expired", "cancelled")
BOUNDARY = "frontier"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("data")
    yield from serve(Settings(data_dir=folder, max_file_bytes=MAX_FILE_BYTES, max_body_bytes=20_000))


def upload(client: httpx.Client, text: str | bytes, name: str = "in.jsonl", **fields: str) -> httpx.Response:
    return client.post(FILES, files={"file": (name, text)}, data={"purpose": "batch"} | fields)


def run(client: httpx.Client, rows: Sequence[str], endpoint: str = "/v1/embeddings", **more: Any) -> dict[str, Any]:
    """Upload the rows, run them as a batch, and return it when it has ended."""
    file_id = upload(client, "\n".join(rows)).json()["id"]
    made = client.post(BATCHES, json={"input_file_id": file_id, "endpoint": endpoint} | more)
    assert made.status_code == 200, made.text
    return wait(client, made.json()["id"])


def wait(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    while True:  # the suite's timeout is the limit
        batch: dict[str, Any] = client.get(f"{BATCHES}/{batch_id}").json()
        if batch["status"] in ENDED:
            return batch
        time.sleep(0.01)


def content(client: httpx.Client, file_id: str) -> list[dict[str, Any]]:
    return parsed(client.get(f"{FILES}/{file_id}/content").content)


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_a_line_is_answered_as_its_endpoint_answers(served: Served) -> None:
    bodies = [{"model": "mini", "input": ["a", "b"]}, {"input": "c", "encoding_format": "base64"}]
    rows = [line(f"{number}", body=body) for number, body in enumerate(bodies)]

    batch = run(served.client, rows, metadata={"job": "docs"})

    assert (batch["status"], batch["metadata"], batch["endpoint"]) == ("completed", {"job": "docs"}, "/v1/embeddings")
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    found = [row["response"]["body"] for row in content(served.client, batch["output_file_id"])]
    assert found == [served.client.post("/v1/embeddings", json=body).json() for body in bodies]


def test_what_was_cut_is_said_as_the_endpoint_says_it(served: Served) -> None:
    served.backend.truncated = (0, 1)
    try:
        batch = run(served.client, [line("a", body={"model": "mini", "input": ["a", "b"]})])
        expected = served.client.post("/v1/embeddings", json={"model": "mini", "input": ["a", "b"]}).headers
    finally:
        served.backend.truncated = ()

    (row,) = content(served.client, batch["output_file_id"])
    assert row["response"]["headers"]["x-embed-truncated"] == expected["x-embed-truncated"] == "0-1"


async def test_an_answer_that_is_encoded_as_it_is_sent_is_kept_whole() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"data":'
        yield b"[]}"

    async def receive() -> Any:
        await asyncio.Future()

    request = Request[Any, Any, Any]({"type": "http", "headers": []}, receive=receive)  # type: ignore[arg-type]  # no more is read

    assert await body_of(StreamedAnswer(chunks(), {}), request) == b'{"data":[]}'
    assert await body_of(EncodedAnswer(b"{}", {}), request) == b"{}"


def test_documents_are_ranked_as_the_endpoint_ranks_them(served: Served) -> None:
    body = {"model": "mini", "query": "q", "documents": ["a", "b"]}

    batch = run(served.client, [line("r", url="/v1/rerank", body=body)], "/v1/rerank")

    (row,) = content(served.client, batch["output_file_id"])
    expected = served.client.post("/v1/rerank", json=body).json()
    assert row["response"]["body"] == expected | {"id": row["id"]}


def test_errors_of_lines_are_those_of_the_endpoint(served: Served) -> None:
    bodies: list[Any] = [
        {"input": []}, {"input": "a", "model": "nothing"}, [1], "text", {"input": 5}, {"input": "a", "dimensions": 0}
    ]  # fmt: skip

    batch = run(served.client, [line(f"{number}", body=body) for number, body in enumerate(bodies)])

    found = [row["response"] for row in content(served.client, batch["error_file_id"])]
    for answer, body in zip(found, bodies, strict=True):
        expected = served.client.post("/v1/embeddings", json=body)
        assert (answer["status_code"], answer["body"]) == (expected.status_code, expected.json())


def test_a_line_waits_while_the_queue_is_full(served: Served) -> None:
    served.backend.failures["mini"] = QueueFull("full", retry_after_s=0.01)
    file_id = upload(served.client, line("a")).json()["id"]
    made = served.client.post(BATCHES, json={"input_file_id": file_id, "endpoint": "/v1/embeddings"}).json()
    while not served.backend.calls:
        time.sleep(0.005)
    served.backend.failures.clear()

    assert wait(served.client, made["id"])["request_counts"]["completed"] == 1


def test_a_file_is_kept_as_it_was_sent(served: Served) -> None:
    text = bytes(range(256)) * 100

    made = upload(served.client, text, "../../etc/pass\x07wd\u202e.jsonl")

    assert made.status_code == 200
    found = made.json()
    assert (found["object"], found["bytes"], found["purpose"]) == ("file", len(text), "batch")
    assert "/" not in found["filename"] and found["filename"].isprintable()
    assert served.client.get(f"{FILES}/{found['id']}").json() == found
    answer = served.client.get(f"{FILES}/{found['id']}/content")
    assert (answer.content, answer.headers["content-length"]) == (text, str(len(text)))
    assert served.client.head(f"{FILES}/{found['id']}/content").headers["content-length"] == str(len(text))
    assert served.client.delete(f"{FILES}/{found['id']}").json() == {
        "id": found["id"], "object": "file", "deleted": True
    }  # fmt: skip
    assert code_of(served.client.get(f"{FILES}/{found['id']}/content")) == (404, "not_found")


def form(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    """Return a multipart body; each part has its `Content-Disposition` options and its bytes."""
    made = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {options}\r\n\r\n".encode() + data + b"\r\n"
        for options, data in parts
    )
    return made + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


PURPOSE, FILE = ('name="purpose"', b"batch"), ('name="file"; filename="a.jsonl"', b"{}")
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.mark.parametrize(
    ("content_type", "body", "param"),
    [
        ("application/json", b"{}", None),
        ("", b"", None),
        ("multipart/form-data", form(PURPOSE, FILE), None),
        ("multipart/form-data; boundary=" + "b" * 5000, form(PURPOSE, FILE), None),
        (MULTIPART, b"", None),
        (MULTIPART, b"nonsense" * 1000, None),
        (MULTIPART, form(PURPOSE, FILE, end=False), None),
        (MULTIPART, form(PURPOSE), "file"),
        (MULTIPART, form(FILE), "purpose"),
        (MULTIPART, form(('name="purpose"', b"fine-tune"), FILE), "purpose"),
        (MULTIPART, form(FILE, ('name="purpose"', b"\xff\x00")), "purpose"),
        (MULTIPART, form(PURPOSE, FILE, FILE), "file"),
        (MULTIPART, form(('name="purpose"', b"b" * 5000), FILE), "purpose"),
        (MULTIPART, form(*[PURPOSE] * 50, FILE), None),
        (MULTIPART, form(PURPOSE, ("filename=x", b"1"), FILE), ""),
        (MULTIPART, form(PURPOSE, FILE, ('name="expires_after[seconds]"', b"-1")), "expires_after[seconds]"),
        (MULTIPART, form(PURPOSE, FILE, ('name="expires_after[seconds]"', b"9" * 500)), "expires_after[seconds]"),
        (MULTIPART, f"--{BOUNDARY}\r\n".encode() + b"X: y\r\n" * 100_000, None),
        (MULTIPART, f"--{BOUNDARY}\r\nContent-Disposition: {'x' * 100_000}".encode(), None),
    ],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(
    served: Served, content_type: str, body: bytes, param: str | None
) -> None:
    before = served.client.get(FILES).json()

    answer = served.client.post(FILES, content=body, headers={"content-type": content_type})

    if param == "":  # a part without a name is no mistake
        assert answer.status_code == 200
        return
    assert code_of(answer) == (400, "invalid_value")
    assert answer.json()["error"]["param"] == param
    assert served.client.get(FILES).json() == before


def test_a_file_that_is_too_large_is_refused_as_it_arrives(served: Served) -> None:
    answer = upload(served.client, b"x" * (MAX_FILE_BYTES + 1))

    assert code_of(answer) == (413, "body_too_large")
    assert f"{MAX_FILE_BYTES} bytes (MAX_FILE_BYTES)" in answer.json()["error"]["message"]
    assert upload(served.client, b"x" * MAX_FILE_BYTES).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "nothing", "file-" + "0" * 32, "file-../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "%00", "file-" + "A" * 32,
        "batch_" + "0" * 32, "file-%F0%9F%92%A9", "file-' OR 1=1 --", "x" * 1000,
    ],
)  # fmt: skip
def test_an_id_that_is_not_ones_own_is_not_found(served: Served, given: str) -> None:
    for method, path in (
        ("GET", f"{FILES}/{given}"), ("GET", f"{FILES}/{given}/content"), ("DELETE", f"{FILES}/{given}"),
        ("GET", f"{BATCHES}/{given}"), ("POST", f"{BATCHES}/{given}/cancel"),
    ):  # fmt: skip
        assert code_of(served.client.request(method, path)) == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, 400, "endpoint"),
        ({"endpoint": "/admin/models"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"completion_window": "24h\n"}, 400, "completion_window"),
        ({"input_file_id": "file-" + "0" * 32}, 404, None),
        ({"input_file_id": "../in"}, 404, None),
        ({"input_file_id": 5}, 400, "input_file_id"),
        ({"metadata": {f"{number}": "" for number in range(17)}}, 400, "metadata"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata"),
        ({"metadata": {"k": 1}}, 400, "metadata"),
    ],
)
def test_a_wrong_batch_is_refused(served: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    file_id = upload(served.client, line("a")).json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"} | change

    answer = served.client.post(BATCHES, json=body)

    assert answer.status_code == status, answer.text
    assert (answer.json()["error"]["param"] or "").partition(".")[0] == (param or "")


def test_results_are_no_input(served: Served) -> None:
    batch = run(served.client, [line("a")])

    answer = served.client.post(BATCHES, json={"input_file_id": batch["output_file_id"], "endpoint": "/v1/embeddings"})

    assert code_of(answer) == (404, "not_found")
    assert "batch_output" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=99999", "limit=x", "order=up", "purpose=x"])
def test_a_wrong_page_is_refused(served: Served, query: str) -> None:
    assert code_of(served.client.get(f"{FILES}?{query}")) == (400, "invalid_value")


def test_the_metrics_count_batches_and_lines(served: Served) -> None:
    run(served.client, [line("a"), "{"])
    time.sleep(2.5)  # the counts by status are read that often

    text = served.client.get("/metrics").text

    assert 'embedyard_batch_lines_total{outcome="failed"}' in text
    assert 'embedyard_batches{status="completed"}' in text


def test_without_a_data_folder_the_routes_say_what_to_set(tmp_path: Path) -> None:
    for server in serve(Settings(state_dir=tmp_path)):
        for answer in (server.client.get(FILES), upload(server.client, "{}"), server.client.get(f"{BATCHES}/x")):
            assert code_of(answer) == (404, "not_found")
            assert "DATA_DIR" in answer.json()["error"]["message"]


@contextmanager
def keyed(tmp_path: Path, **settings: Any) -> Iterator[Limited]:
    keys = {"web": {"models": ["mini"]}, "bulk": {"scopes": ["batch"]}, "ops": {"scopes": ["admin"]}}
    path = write_keys(tmp_path / "keys.yaml", keys)
    with limited(Settings(keys_file=path, data_dir=tmp_path / "data", **settings)) as server:
        yield server


def test_a_key_sees_its_own_files_and_batches_and_uses_its_own_models(tmp_path: Path) -> None:
    with keyed(tmp_path) as server:
        web = httpx.Client(base_url=server.url, headers=bearer("web"))
        bulk = httpx.Client(base_url=server.url, headers=bearer("bulk"))
        ops = httpx.Client(base_url=server.url, headers=bearer("ops"))
        with web, bulk, ops:
            batch = run(web, [line("a"), line("b", body={"model": "BAAI/bge-m3", "input": "x"})])
            (refused,) = content(web, batch["error_file_id"])
            assert refused["response"]["body"]["error"]["code"] == "model_not_allowed"
            for path in (
                f"{FILES}/{batch['output_file_id']}", f"{FILES}/{batch['output_file_id']}/content",
                f"{FILES}/{batch['input_file_id']}", f"{BATCHES}/{batch['id']}",
            ):  # fmt: skip
                assert code_of(bulk.get(path)) == (404, "not_found")
            assert bulk.get(FILES).json()["data"] == [] == bulk.get(BATCHES).json()["data"]
            body = {"input_file_id": batch["input_file_id"], "endpoint": "/v1/embeddings"}
            assert code_of(bulk.post(BATCHES, json=body)) == (404, "not_found")
            assert code_of(ops.get(FILES)) == (403, "insufficient_scope")
            assert server.client.get(FILES).status_code == 401

            assert run(bulk, [line("a")])["request_counts"]["completed"] == 1
            assert code_of(bulk.post("/v1/embeddings", json={"input": "a"})) == (403, "insufficient_scope")


def test_a_key_may_store_so_many_files_and_bytes(tmp_path: Path) -> None:
    with keyed(tmp_path, max_files_per_key=2, max_bytes_per_key=100) as server:
        with httpx.Client(base_url=server.url, headers=bearer("web")) as web:
            answer = upload(web, b"x" * 101)
            assert code_of(answer) == (413, "body_too_large")
            assert "MAX_BYTES_PER_KEY" in answer.json()["error"]["message"]
            assert [upload(web, b"x").status_code for _ in range(2)] == [200, 200]
            answer = upload(web, b"x")
            assert code_of(answer) == (429, "quota_exceeded")
            assert answer.headers["x-should-retry"] == "false"
        with httpx.Client(base_url=server.url, headers=bearer("bulk")) as bulk:
            assert upload(bulk, b"x").status_code == 200


def test_all_keys_may_store_so_many_bytes_and_uploads_count_while_they_run(tmp_path: Path) -> None:
    with keyed(tmp_path, max_stored_bytes=3 * 2**20) as server:
        web, bulk = (httpx.Client(base_url=server.url, headers=bearer(name)) for name in ("web", "bulk"))
        with web, bulk:
            answers = []

            def body() -> Iterator[bytes]:
                whole = form(PURPOSE, FILE)
                head, tail = whole.split(b"{}")
                yield head + b"x" * 2 * 2**20
                while not any(path.stat().st_size > 2**19 for path in (tmp_path / "data" / "uploads").iterdir()):
                    time.sleep(0.01)
                answers.append(upload(bulk, b"x" * 5 * 2**19))  # while the other has at least 1 of the 3 MiB
                yield tail

            first = web.post(FILES, content=body(), headers={"content-type": MULTIPART})
            assert first.status_code == 200
            assert [code_of(answer) for answer in answers] == [(429, "quota_exceeded")]
            assert "MAX_STORED_BYTES" in answers[0].json()["error"]["message"]
            assert code_of(upload(bulk, b"x" * (2**20 + 1))) in ((413, "body_too_large"), (429, "quota_exceeded"))
            assert upload(bulk, b"x" * (2**20 - 2048)).status_code == 200
            answer = upload(bulk, b"x" * 4096)
            assert code_of(answer) == (429, "quota_exceeded")
            assert "Storage full" in answer.json()["error"]["message"]


def test_truncated_lines_are_logged_once_for_the_batch(served: Served) -> None:
    served.backend.truncated = (0, 1)
    try:
        with capture_logs() as logged:
            run(served.client, [line(f"{number}", body={"input": ["a", "b"]}) for number in range(3)])
            while not any(row["event"] == "inputs.truncated" for row in logged):
                time.sleep(0.01)
    finally:
        served.backend.truncated = ()

    (row,) = [row for row in logged if row["event"] == "inputs.truncated"]
    assert (row["lines"], row["truncated"]) == (3, 6)


def test_how_long_batches_take_is_a_metric(served: Served) -> None:
    run(served.client, [line("a")])

    text = served.client.get("/metrics").text
    assert 'embedyard_batch_job_seconds_count{status="completed"}' in text


def test_a_client_that_leaves_leaves_no_file(served: Served, tmp_path: Path) -> None:
    before = served.client.get(FILES).json()

    def body() -> Iterator[bytes]:
        yield form(PURPOSE, FILE, end=False)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        served.client.post(FILES, content=body(), headers={"content-type": MULTIPART})

    assert served.client.get(FILES).json() == before


def test_unfinished_batches_go_on_after_a_restart(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    for server in serve(settings):
        server.backend.failures["mini"] = QueueFull("full", retry_after_s=0.01)
        file_id = upload(server.client, "\n".join(map(line, "abc"))).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings"}
        made = server.client.post(BATCHES, json=body).json()
        while not server.backend.calls:
            time.sleep(0.005)
    for server in serve(settings):
        batch = wait(server.client, made["id"])
        assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        rows = content(server.client, batch["output_file_id"])
        assert [row["custom_id"] for row in rows] == ["a", "b", "c"]


def test_an_upload_is_written_as_it_arrives(served: Served) -> None:
    sizes: list[int] = []
    original = Upload.write

    def write(self: Upload, chunk: bytes) -> None:
        sizes.append(len(chunk))
        original(self, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Upload, "write", write)
        with httpx.Client(base_url=served.url) as client:
            client.post(FILES, files={"file": ("a", b"x" * (8 * 2**20))}, data={"purpose": "batch"})

    assert sizes and max(sizes) < 2 * 2**20
