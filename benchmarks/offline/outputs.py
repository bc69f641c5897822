"""Measures sparse outputs beside `SparseEncoder.encode`, and several outputs of one call beside the dense one alone.

    python -m benchmarks.offline.outputs splade [--layers 6] [--cpu-time]
    python -m benchmarks.offline.outputs together [--layers 24] [--cpu-time]

Models of random weights with MiniLM's vocabulary of 30,522: a SPLADE of width 768, whose decoder's bias makes about one
entry in a hundred weigh something, as a trained one does; and one with bge-m3's files, its width of 1,024 and its 24
layers. Both programs run in this process, in interleaved rounds, with as many cores.
"""

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.folders import minilm_package
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import interleave, speedup
from benchmarks.lib.models import quiet
from benchmarks.lib.report import Report, add_save_option, publish
from engines.affinity import num_usable_cores
from engines.batching.engine import EmbeddingEngine
from engines.spec import Output
from engines.types import Outputs, OutputsCall

_VOCABULARY = 30_522
_ENTRIES = 300
"""Entries of a text that shall weigh something."""

OURS, BASE = "Embedyard", "sentence-transformers"


def build_splade(folder: Path, layers: int) -> None:
    """Writes a SPLADE of random weights."""
    torch.manual_seed(7)
    kind: Any = BertForMaskedLM
    model = kind(BertConfig(vocab_size=_VOCABULARY, num_hidden_layers=layers)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_package()))
    with torch.inference_mode():
        ids = tokenizer(workloads.mixed(4, seed=1), padding=True, truncation=True, max_length=256, return_tensors="pt")
        largest = model(**ids).logits.amax(1).sort(1, descending=True).values
        model.cls.predictions.bias.data -= float(largest[:, _ENTRIES].mean())
    with quiet(), TemporaryDirectory() as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        first = Transformer(draft, transformer_task="fill-mask", max_seq_length=256)
        SparseEncoder(modules=[first, SpladePooling("max")], device="cpu").save(str(folder), create_model_card=False)


def build_m3(folder: Path, layers: int) -> None:
    """Writes a model with bge-m3's files and random weights."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    kind: Any = BertModel
    model = kind(BertConfig(vocab_size=_VOCABULARY, num_hidden_layers=layers, **shape)).eval()
    with quiet(), TemporaryDirectory() as draft:
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(str(minilm_package())).save_pretrained(draft)
        modules = [Transformer(draft, max_seq_length=512), Pooling(1024, "cls"), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    for file, rows in (("sparse_linear.pt", 1), ("colbert_linear.pt", 1024)):
        torch.save({"weight": torch.randn(rows, 1024), "bias": torch.zeros(rows)}, folder / file)


def _outputs(engine: EmbeddingEngine, texts: Sequence[str], *names: Any) -> Outputs:
    found = asyncio.run(engine.run(OutputsCall(model_id="m", texts=tuple(texts), outputs=names)))
    assert isinstance(found, Outputs)
    return found


def _timed(work: Callable[[], object], *, is_cpu_time: bool) -> Callable[[], float]:
    clock = time.process_time if is_cpu_time else time.perf_counter

    def run() -> float:
        begun_s = clock()
        work()
        return clock() - begun_s

    return run


def measure_splade(kit: Kit, folder: Path, texts: list[str], rounds: int, *, is_cpu_time: bool) -> Report:
    """Compares with `SparseEncoder.encode`, first the weights, then the time."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with quiet():
        reference = SparseEncoder(str(folder), device="cpu")
        engine = kit.load(folder)
    torch.set_num_threads(num_usable_cores())
    expected = reference.encode(texts[:8], convert_to_sparse_tensor=False, show_progress_bar=False).numpy()
    found, whole = _outputs(engine, texts[:8], "sparse"), np.zeros((8, _VOCABULARY), np.float32)
    whole[np.repeat(np.arange(8), found.num_terms), found.terms()[0]] = found.terms()[1]
    runs = {
        OURS: _timed(lambda: _outputs(engine, texts, "sparse"), is_cpu_time=is_cpu_time),
        BASE: _timed(lambda: reference.encode(texts, show_progress_bar=False), is_cpu_time=is_cpu_time),
    }
    samples = interleave(runs, rounds)
    rows = [
        (name, f"{len(texts) / median(times):.1f}", str(speedup(samples[OURS], times)))
        for name, times in samples.items()
    ]
    notes = (
        f"largest difference of two weights {np.abs(whole - expected).max():.0e}",
        f"{np.mean(found.num_terms):.0f} entries a text; workspace {engine.workspace_bytes / 2**20:.0f} MiB",
    )
    return _report("splade", watch, ("program", "texts/s", f"{OURS} ×"), rows, samples, notes, is_cpu_time=is_cpu_time)


def measure_together(kit: Kit, folder: Path, texts: list[str], rounds: int, *, is_cpu_time: bool) -> Report:
    """Compares calls for more outputs with the dense one alone."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with quiet():
        engine = kit.load(folder)
    calls: list[tuple[Output | str, ...]] = [("dense",), ("dense", "sparse"), ("dense", "sparse", "multi_vector")]
    runs = {
        " + ".join(names): _timed(lambda names=names: _outputs(engine, texts, *names), is_cpu_time=is_cpu_time)  # type: ignore[misc]  # a default
        for names in calls
    }
    samples = interleave(runs, rounds)
    rows = [(name, f"{median(times):.3f}", str(speedup(samples["dense"], times))) for name, times in samples.items()]
    return _report("together", watch, ("outputs", "seconds", "× dense"), rows, samples, (), is_cpu_time=is_cpu_time)


def _report(  # noqa: PLR0913  # the parts of a report
    name: str,
    watch: Watch,
    header: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    samples: dict[str, list[float]],
    notes: tuple[str, ...],
    *,
    is_cpu_time: bool,
) -> Report:
    return Report(
        name=f"outputs-{name}{'-cpu-time' if is_cpu_time else ''}",
        title=f"Outputs of one call: {name}, float32{', by processor time' if is_cpu_time else ''}",
        machine=watch.machine,
        settings={"rounds": len(next(iter(samples.values())))},
        header=header,
        rows=[*rows],
        samples={"seconds": samples},
        notes=notes,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and saves it."""
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.offline.outputs", description=__doc__)
    parser.add_argument("what", choices=["splade", "together"])
    parser.add_argument("--layers", type=int, help="default: 6 of a SPLADE, 24 of bge-m3")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of time, on a busy machine")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    texts = workloads.mixed(asked.texts, longest_words=90 if asked.what == "splade" else 300)
    with TemporaryDirectory() as place:
        kit, folder = Kit(Path(place)), Path(place) / "model"
        try:
            if asked.what == "splade":
                build_splade(folder, asked.layers or 6)
            else:
                build_m3(folder, asked.layers or 24)
            measure = measure_splade if asked.what == "splade" else measure_together
            publish(measure(kit, folder, texts, asked.rounds, is_cpu_time=asked.cpu_time), asked.results)
        finally:
            kit.close()


if __name__ == "__main__":
    main()
