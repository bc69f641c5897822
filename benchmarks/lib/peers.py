"""Installs and starts the programs that we are compared with, each in an environment under `.bench/`.

`python -m benchmarks.lib.peers` makes the environments and the exported models (a few minutes, 5 GB). Programs that
cannot be installed are left out of the tables, with a note. All have the same torch, so that only the program differs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from msgspec import Struct

from benchmarks.lib.folders import BENCH, prepare, resolve
from benchmarks.lib.machine import ROOT
from benchmarks.lib.worker import PEER_SCRIPTS, Worker, WorkerFailed
from engines.spec import Dtype

TORCH = f"torch=={torch.__version__.partition('+')[0]}"

# sentence-transformers 6 wants transformers 5, which optimum-onnx refuses: its ONNX form is measured at the newest 5.x.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "onnx": ("sentence-transformers[onnx]>=5,<6", "transformers<4.58", TORCH),
    "openvino": ("sentence-transformers[openvino]>=6", TORCH),
    "fastapi": ("sentence-transformers>=6", "fastapi", "uvicorn[standard]", "-c", str(ROOT / "constraints.txt")),
    # Built here with this processor's instructions (`BUILD`); a quarter of an hour on two cores.
    "llama": ("llama-cpp-python>=0.3.36", "gguf", "safetensors", "tokenizers"),
    # Readers of weight files (`benchmarks.lifecycle.read`).
    "readers": ("fastsafetensors", "runai-model-streamer", "safetensors", "numpy", TORCH),
    "infinity": ("infinity-emb[torch,optimum,server,logging]==0.0.78", TORCH),
}

BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
"""Variables of an installation, for packages that are compiled here."""

# Comes along, is not used, and its build for CUDA does not load beside torch's for the CPU.
_UNWANTED = ("torchvision",)

FORMS = {"onnx": "onnx", "onnx-plain": "onnx", "openvino": "openvino", "gguf": "llama"}
"""Forms of a model, and the environment that exports each."""


class Peer(Struct, frozen=True, kw_only=True):
    """One program offline: its `kind` in `peers/peer.py`, its environment (None: ours), its form of the model.

    One with a `dtype` is our own engine. One with `only` runs models of that type.
    """

    name: str
    kind: str
    environment: str | None = None
    form: str | None = None
    dtype: Dtype | None = None
    only: str | None = None

    def can_run(self, folder: Path) -> bool:
        """Tell whether the program is compared on this model."""
        return self.only is None or json.loads((folder / "config.json").read_text())["model_type"] == self.only


PEERS = (
    Peer(name="sentence-transformers", kind="sentence-transformers"),
    Peer(name="its ONNX (O3)", kind="sentence-transformers-onnx", environment="onnx", form="onnx"),
    Peer(name="its OpenVINO", kind="sentence-transformers-openvino", environment="openvino", form="openvino"),
    Peer(name="its OpenVINO, default", kind="openvino-default", environment="openvino", form="openvino"),
    Peer(name="ONNX Runtime, sorted", kind="onnxruntime-sorted", environment="onnx", form="onnx"),
    Peer(name="Infinity (torch)", kind="infinity-torch", environment="infinity"),
    Peer(name="Infinity (ONNX)", kind="infinity-onnx", environment="infinity", form="onnx-plain"),
    Peer(name="llama.cpp, F32", kind="llama-cpp-f32", environment="llama", form="gguf", only="qwen3"),
    Peer(name="llama.cpp, Q8_0", kind="llama-cpp-q8-0", environment="llama", form="gguf", only="qwen3"),
    Peer(name="Embedyard, bfloat16", kind="embedyard-bfloat16", dtype="bfloat16"),
    Peer(name="Embedyard, int8", kind="embedyard-int8", dtype="int8"),
)
BASE = PEERS[0]
OURS = "Embedyard"


def interpreter(environment: str | None) -> Path:
    """Return the Python of an environment; None is this one."""
    return Path(sys.executable) if environment is None else BENCH / environment / "bin" / "python"


def is_installed(environment: str | None) -> bool:
    """Tell whether `install` has finished for an environment."""
    return environment is None or (BENCH / environment / ".installed").exists()


def install(environment: str) -> str:
    """Make an environment; return the last lines of pip's error, or an empty string."""
    prepare(BENCH)
    folder = BENCH / environment
    if is_installed(environment):
        return ""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run(
        [*pip, *ENVIRONMENTS[environment]], capture_output=True, text=True, check=False, env=os.environ | BUILD
    )
    if done.returncode:
        return "\n".join(done.stderr.splitlines()[-5:])
    subprocess.run([*pip[:3], "uninstall", "--quiet", "--yes", *_UNWANTED], capture_output=True, check=True)
    (folder / ".installed").write_text("\n".join(ENVIRONMENTS[environment]) + "\n")
    return ""


def model_folder(folder: Path, form: str | None) -> Path:
    """Return the folder of the model in a form, which is exported on first use.

    Raises:
        WorkerFailed: the export failed.
    """
    if form is None:
        return folder
    target = BENCH / "models" / f"{folder.name}-{form}"
    if not target.exists():
        done = subprocess.run(
            [str(interpreter(FORMS[form])), str(PEER_SCRIPTS / "peer.py"), f"export-{form}", str(folder), str(target)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise WorkerFailed(f"the export to {form} failed:\n{done.stderr[-2000:]}")
    return target


def own_worker(folder: Path, *, name: str = OURS, packages: Path = ROOT, dtype: Dtype | None = None) -> Worker:
    """Start our engine from the tree `packages`; it is still loading."""
    options = [] if dtype is None else ["embed", dtype]
    return Worker(name, "own.py", [str(folder), *options], python=interpreter(None), packages=packages)


def peer_worker(peer: Peer, folder: Path) -> Worker:
    """Start a peer; it is still loading.

    Raises:
        WorkerFailed: its environment is missing, or the export of the model failed.
    """
    if peer.dtype is not None:
        return own_worker(folder, name=peer.name, dtype=peer.dtype)
    if not is_installed(peer.environment):
        raise WorkerFailed(f"{peer.name} is not installed: python -m benchmarks.lib.peers")
    model = model_folder(folder, peer.form)
    return Worker(peer.name, "peer.py", [peer.kind, str(model)], python=interpreter(peer.environment))


@contextmanager
def open_workers(folder: Path, peers: Sequence[Peer]) -> Iterator[tuple[list[Worker], list[str]]]:
    """Start our engine and the peers; yield those that started, warm, and a note for each that did not."""
    with ExitStack() as stack:
        workers, notes = [stack.enter_context(own_worker(folder)).wait_until_warm()], []
        for peer in peers:
            if not peer.can_run(folder):
                continue
            try:
                workers.append(stack.enter_context(peer_worker(peer, folder)).wait_until_warm())
            except WorkerFailed as error:
                notes.append(f"left out: {str(error).splitlines()[0]}")
                print(error, file=sys.stderr, flush=True)
        yield workers, notes


def main() -> None:
    """Make all environments and forms, and print what failed."""
    for environment in ENVIRONMENTS:
        print(f"{environment}: {install(environment) or 'ready'}", flush=True)
    for form, environment in FORMS.items():
        folder = resolve("qwen3-0.6b-last" if form == "gguf" else "minilm")
        if is_installed(environment):
            print(f"{folder.name} as {form}: {model_folder(folder, form)}", flush=True)


if __name__ == "__main__":
    main()
