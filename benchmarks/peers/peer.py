"""Runs other programs as workers, each with the interpreter of its own environment (`benchmarks/lib/peers.py`).

`peer.py KIND FOLDER`, or `peer.py export-FORM FOLDER TARGET`. Every peer runs as its documentation starts it: default
batch size, default threads. Libraries are imported where they are used, by name, because no environment has them all.
"""

import asyncio
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# This is a script, so its own folder is on the path.
lines: Any = importlib.import_module("lines")
llama: Any = importlib.import_module("llama")

Encode = Callable[[list[str]], Any]
"""Texts in, float32 `[n, D]` out."""

PACKAGES = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "infinity-emb", "tokenizers",
            "llama-cpp-python")  # fmt: skip
ONNX_BATCH = 32


def sentence_transformers(folder: str, device: str = "cpu") -> Encode:
    """Load sentence-transformers on torch, in float32."""
    model = _sentence_transformer(folder, device=device)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def sentence_transformers_cuda(folder: str) -> Encode:
    """Load sentence-transformers on the GPU in bfloat16."""
    torch: Any = importlib.import_module("torch")
    model = _sentence_transformer(folder, device="cuda", model_kwargs={"dtype": torch.bfloat16})
    return lambda texts: model.encode(texts, show_progress_bar=False)


def sentence_transformers_onnx(folder: str) -> Encode:
    """Load its ONNX backend, with the graph optimised at O3 (`export_onnx`)."""
    options = {"file_name": "onnx/model_O3.onnx", "provider": "CPUExecutionProvider", "export": False}
    model = _sentence_transformer(folder, device="cpu", backend="onnx", model_kwargs=options)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def sentence_transformers_openvino(folder: str, precision: str | None = "f32") -> Encode:
    """Load its OpenVINO backend in float32; by default OpenVINO computes in bfloat16 where the CPU can."""
    options = {"ov_config": {"INFERENCE_PRECISION_HINT": precision}} if precision else {}
    model = _sentence_transformer(folder, device="cpu", backend="openvino", model_kwargs=options)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def onnxruntime_sorted(folder: str) -> Encode:
    """Load ONNX Runtime without a library around it: the O3 graph, texts sorted by length, batches of 32."""
    np: Any = importlib.import_module("numpy")
    ort: Any = importlib.import_module("onnxruntime")
    tokenizers: Any = importlib.import_module("tokenizers")
    session = ort.InferenceSession(f"{folder}/onnx/model_O3.onnx", providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(512)
    tokenizer.no_padding()

    def batch(rows: Sequence[Any]) -> Any:
        longest = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = row.ids
            mask[at, : len(row.ids)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(None, {name: array for name, array in given.items() if name in wanted})[0]
        weights = mask[..., None].astype(np.float32)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def encode(texts: list[str]) -> Any:
        rows = tokenizer.encode_batch_fast(texts)
        order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
        done = np.concatenate(
            [batch([rows[at] for at in order[i : i + ONNX_BATCH]]) for i in range(0, len(order), ONNX_BATCH)]
        )
        vectors = np.empty_like(done)
        vectors[order] = done
        return vectors

    return encode


def infinity(folder: str, engine: str) -> Encode:
    """Load Infinity's engine without its HTTP server."""
    np: Any = importlib.import_module("numpy")
    package: Any = importlib.import_module("infinity_emb")
    options = {"pooling_method": "mean"} if engine == "optimum" else {}
    os.chdir(folder)  # it finds a local ONNX file only by a path that is relative to the model
    arguments = package.EngineArgs(model_name_or_path=".", engine=engine, device="cpu", **options)
    program = package.AsyncEmbeddingEngine.from_args(arguments)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(program.astart())

    def encode(texts: list[str]) -> Any:
        vectors, _ = loop.run_until_complete(program.embed(sentences=texts))
        return np.stack(vectors)

    return encode


def cross_encoder(folder: str) -> Encode:
    """sentence-transformers' CrossEncoder, sorted by length and 32 pairs at once; texts are a query, then documents."""
    package: Any = importlib.import_module("sentence_transformers")
    model = package.CrossEncoder(folder, device="cpu")
    return lambda texts: model.predict([[texts[0], text] for text in texts[1:]], show_progress_bar=False)[:, None]


def multi_vector(folder: str) -> Encode:
    """sentence-transformers' MultiVectorEncoder and its similarity; texts are a query, then documents."""
    package: Any = importlib.import_module("sentence_transformers")
    model = package.MultiVectorEncoder(folder, device="cpu")

    def score(texts: list[str]) -> Any:
        query, documents = model.encode_query(texts[:1]), model.encode_document(texts[1:])
        return model.similarity(query, documents).T.numpy()

    return score


def infinity_rerank(folder: str) -> Encode:
    """Infinity's own engine for rerankers, without its HTTP server."""
    np: Any = importlib.import_module("numpy")
    package: Any = importlib.import_module("infinity_emb")
    program = package.AsyncEmbeddingEngine.from_args(
        package.EngineArgs(model_name_or_path=folder, engine="torch", device="cpu")
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(program.astart())

    def encode(texts: list[str]) -> Any:
        ranked, _ = loop.run_until_complete(program.rerank(query=texts[0], docs=texts[1:]))
        scores = np.empty((len(texts) - 1, 1), np.float32)
        for found in ranked:
            scores[found.index] = found.relevance_score
        return scores

    return encode


KINDS: dict[str, Callable[[str], Encode]] = {
    "sentence-transformers": sentence_transformers,
    "sentence-transformers-cuda": sentence_transformers_cuda,
    "sentence-transformers-onnx": sentence_transformers_onnx,
    "sentence-transformers-openvino": sentence_transformers_openvino,
    "openvino-default": lambda folder: sentence_transformers_openvino(folder, None),
    "onnxruntime-sorted": onnxruntime_sorted,
    "infinity-torch": lambda folder: infinity(folder, "torch"),
    "llama-cpp-f32": lambda folder: llama.llama_cpp(folder, "F32"),
    "llama-cpp-q8-0": lambda folder: llama.llama_cpp(folder, "Q8_0"),
    "cross-encoder": cross_encoder,
    "multi-vector": multi_vector,
    "infinity-rerank": infinity_rerank,
    "infinity-onnx": lambda folder: infinity(folder, "optimum"),
}


def export_onnx(folder: str, target: str) -> None:
    """Export the folder with an ONNX graph, plain and O3, beside the weights."""
    backend: Any = importlib.import_module("sentence_transformers.backend")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    model = _sentence_transformer(target, device="cpu", backend="onnx", model_kwargs={"export": True})
    model.save_pretrained(target)
    backend.export_optimized_onnx_model(model, "O3", target)


def export_onnx_plain(folder: str, target: str) -> None:
    """Export the folder with only the plain ONNX graph at its root: Infinity takes any graph that it finds there, and
    optimises it itself; one in a subfolder it finds, but cannot open.
    """
    export_onnx(folder, target)
    graphs = Path(target, "onnx")
    (graphs / "model.onnx").rename(Path(target, "model.onnx"))
    shutil.rmtree(graphs)


def export_openvino(folder: str, target: str) -> None:
    """Export the folder in OpenVINO's format, float32."""
    model = _sentence_transformer(folder, device="cpu", backend="openvino", model_kwargs={"export": True})
    model.save_pretrained(target)


EXPORTS: dict[str, Callable[[str, str], None]] = {
    "export-onnx": export_onnx,
    "export-onnx-plain": export_onnx_plain,
    "export-openvino": export_openvino,
    "export-gguf": llama.export_gguf,
}


def answer(encode: Encode, question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question: `time` runs the calls one after the other; `vectors` embeds some texts."""
    if question["op"] == "vectors":
        return {"vectors": encode(question["texts"]).tolist()}
    started, cpu = time.perf_counter(), time.process_time()
    for texts in question["calls"]:
        encode(texts)
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def facts() -> dict[str, Any]:
    """Return versions of packages, and torch's threads where there is torch."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    threads = {"threads": importlib.import_module("torch").get_num_threads()} if "torch" in found else {}
    return {"packages": found, **threads}


def _sentence_transformer(folder: str, **options: Any) -> Any:
    package: Any = importlib.import_module("sentence_transformers")
    return package.SentenceTransformer(folder, **options)


def main() -> None:
    """Export a model, or load one and answer questions."""
    kind, folder, *rest = sys.argv[1:]
    if kind.startswith("export-"):
        (target,) = rest
        draft = Path(f"{target}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        EXPORTS[kind](folder, str(draft))
        draft.rename(target)
        return
    say = lines.open_answers()
    encode = KINDS[kind](folder)
    encode(["a first text", "and another, so that everything is warm"])
    lines.serve(say, facts(), lambda question: answer(encode, question))


if __name__ == "__main__":
    main()
