"""Compares the scores of rerankers, one for each kind of head, with float32, and their speed with CrossEncoder's."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ModernBertConfig,
    Qwen3Config,
    XLMRobertaConfig,
)

from benchmarks.gpu.folders import MAX_TOKENS, RERANKER, folder_of
from benchmarks.gpu.parts.speed import PEER_BATCHES, ROUNDS, interleave_calls
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.runner import PartContext
from benchmarks.lib import vocabularies, workloads
from benchmarks.lib.measure import speedup
from benchmarks.lib.models import configure, quiet, randomise
from engines.models.score_head import TOLERANCE

NUM_TEXTS, NUM_ALONE = 24, 4
NUM_DOCUMENTS = {"full": 100, "small": 12}
OURS, PEER = "Embedyard", "CrossEncoder"
_LEAST_S = 5.0
_QUERY = "What is kept in the yard?"

_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 1,
}  # fmt: skip


def _bert() -> tuple[Any, Any, Any]:
    tokenizer = vocabularies.bert()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=160, **_SHAPE)
    return AutoModelForSequenceClassification, config, tokenizer


def _xlm_roberta() -> tuple[Any, Any, Any]:
    tokenizer = vocabularies.xlm_roberta(max_length=160)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=162, type_vocab_size=1, pad_token_id=1, **_SHAPE
    )
    return AutoModelForSequenceClassification, config, tokenizer


def _modernbert() -> tuple[Any, Any, Any]:
    tokenizer = vocabularies.bert(max_length=160)
    config = configure(
        ModernBertConfig, vocab_size=len(tokenizer), max_position_embeddings=512, local_attention=32, pad_token_id=0,
        bos_token_id=2, cls_token_id=2, sep_token_id=3, eos_token_id=3, classifier_pooling="mean", **_SHAPE,
    )  # fmt: skip
    return AutoModelForSequenceClassification, config, tokenizer


def _qwen3(kind: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    config = Qwen3Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, **_SHAPE,
    )  # fmt: skip
    return kind, config, tokenizer


HEADS: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], dict[str, Any]]] = {
    "first token, with the pooler (BERT)": (_bert, {}),
    "first token (XLM-R)": (_xlm_roberta, {}),
    "mean (ModernBERT)": (_modernbert, {}),
    "last token (Qwen3)": (lambda: _qwen3(AutoModelForSequenceClassification, vocabularies.qwen()), {}),
    "yes or no (Qwen3-Reranker)": (
        lambda: _qwen3(AutoModelForCausalLM, vocabularies.chat()), {"template": "qwen3-reranker"},
    ),
}  # fmt: skip
"""What makes the model's class, config and tokenizer, and the registry's fields."""


def run(context: PartContext) -> None:
    """Record each head, then both workloads."""
    rig, reference = Rig(context.device), Rig("cpu")
    with tempfile.TemporaryDirectory() as draft:
        for number, name in enumerate(HEADS):
            if context.left_s < _LEAST_S:
                context.record(head=name, ok=None, raised="no time left in this part")
                continue
            try:
                context.record(head=name, **judge(rig, reference, name, Path(draft) / str(number)))
            except Exception as error:  # noqa: BLE001  # one head that does not load must not hide the others
                context.record(head=name, ok=False, raised=f"{type(error).__name__}: {error}"[:300])
    reference.close()
    rig.close()
    throughput(context)


def judge(rig: Rig, reference: Rig, name: str, folder: Path) -> dict[str, Any]:
    """Return the record of one head: its path, and the largest distance of a score from float32 on the CPU."""
    build, spec = HEADS[name]
    kind, config, tokenizer = build()
    torch.manual_seed(7)
    with quiet():
        model = kind.from_config(config).eval()
        randomise(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    texts = workloads.mixed(NUM_TEXTS, seed=11)
    plain, engine = reference.load(folder, **{**spec, "dtype": "float32"}), rig.load(folder, **spec)
    wanted, found = reference.score(plain, _QUERY, texts), rig.score(engine, _QUERY, texts)
    alone = [rig.score(engine, _QUERY, [text])[0] for text in texts[:NUM_ALONE]]
    worst = max(np.abs(found - wanted).max(), np.abs(np.array(alone) - wanted[:NUM_ALONE]).max())
    off_by = float(worst / np.abs(wanted).max())
    record = {"path": engine.info.path, "notes": list(engine.info.notes), "off_by": off_by}
    plain.close()
    engine.close()
    return {**record, "ok": off_by <= TOLERANCE[_dtype(rig)]}


def throughput(context: PartContext) -> None:
    """Record one query and its documents, of mixed and of equal lengths, interleaved with CrossEncoder."""
    rig = Rig(context.device, tunes=True)
    size = context.settings["size"]
    folder = folder_of(RERANKER[size], context.device)
    engine, peer = rig.load(folder), _peer(rig, folder)
    count = workloads.counter(folder)
    for name in ("documents", "equal"):
        texts = workloads.make(name, NUM_DOCUMENTS[size], count).texts
        runs: dict[str, Callable[[], Any]] = {
            OURS: partial(rig.score, engine, _QUERY, texts),
            PEER: partial(_predict, peer, texts, PEER_BATCHES[size]),
        }
        apart = float(np.abs(runs[OURS]() - runs[PEER]()).max())
        seconds = interleave_calls(runs, ROUNDS[size])
        faster = speedup(seconds[OURS], seconds[PEER])
        context.record(
            model=folder.name, workload=name, texts=len(texts), seconds=seconds, ratio=str(faster), times=faster.value,
            texts_per_s={each: len(texts) / median(samples) for each, samples in seconds.items()},
            path=engine.info.path, apart=apart, ok=apart <= TOLERANCE[_dtype(rig)],
        )  # fmt: skip
    engine.close()
    rig.close()


def _peer(rig: Rig, folder: Path) -> Any:
    with quiet():
        return CrossEncoder(
            str(folder), device=str(rig.device), max_length=MAX_TOKENS, model_kwargs={"dtype": _dtype(rig)},
            activation_fn=torch.nn.Identity(),
        )  # fmt: skip


def _predict(peer: Any, texts: tuple[str, ...], batch_size: int) -> Any:
    return peer.predict([(_QUERY, text) for text in texts], batch_size=batch_size, show_progress_bar=False)


def _dtype(rig: Rig) -> torch.dtype:
    return torch.bfloat16 if rig.is_cuda else torch.float32
