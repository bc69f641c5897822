"""Generates the JSON Schema of `registry.yaml`, with which editors complete and explain its keys.

`python -m router.registry.json_schema` writes it to `router/registry/registry.schema.json`. The keys are documented
here.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from router.registry.file import RegistryFile

SCHEMA_FILE = Path(__file__).with_name("registry.schema.json")

MEANINGS = {
    "version": "Version of the file format.",
    "models": "The models to serve.",
    "default_model": "Name or alias of the model for requests without `model`. Default: none, so `model` is required.",
    "memory": "The memory that models may use, and which of them leaves it first.",
    "eviction": "Which model leaves memory first. lru: the least recently used one. cost: the one whose absence is "
    "expected to cost least, by the requests that it gets, the seconds that it takes to load and its bytes. Default: "
    "lru. A change needs a restart.",
    "backend": "Where the models run: local (in the server process), process (one worker process per device) or ray "
    "(hosts on a Ray cluster). Default: process with several GPUs, else local. Overridden by the environment variable "
    "BACKEND.",
    "defaults": "Default values for all models.",
    "budget": "Share of each device's memory for models: 80% or 20GiB. Overridden by the environment variable "
    "MEMORY_BUDGET.",
    "host_budget": "Main memory for models that left their device (parked), of the whole machine: 30%, 64GiB or 0 for "
    "none. They come back by copies alone. Default: with GPUs half of the main memory that is free at start beyond "
    "4 GiB, else 0. Overridden by the environment variable HOST_MEMORY_BUDGET.",
    "name": "The name that clients send as `model`. May contain slashes, but no spaces.",
    "aliases": "Other names for the same model.",
    "source": "A hub id (BAAI/bge-m3), a local folder (/…, ./…, ../…, ~/…) or package:NAME/SUB/FOLDER.",
    "revision": "Branch, tag or commit of the hub repository. A full commit makes vectors reproducible.",
    "adapter": "A PEFT adapter (LoRA) of the model, as `source`: merged into the weights at load. One that "
    "sentence-transformers saved brings modules, prompts and tokenizer with it.",
    "adapter_revision": "Branch, tag or commit of the adapter's hub repository.",
    "task": "What the model computes: embed (vectors), rerank (a score for a query and a document) or classify (a "
    "score for each label). If given, requests for another task are refused without a load. Default: from the files.",
    "template": "How a causal language model that answers yes or no reads a query and a document, where its own files "
    "do not say: the published template of the family. Default: from the files, or from the name of the repository.",
    "trust_remote_code": "Run Python code from the repository. Requires a full commit as `revision`. Default: false.",
    "dtype": "Data type of the weights. auto: bfloat16 on CUDA (before Ampere float16, or float32 where that "
    "overflows), float32 elsewhere. int8: a quarter of float32's memory. int4: CPUs "
    "with AVX512-BF16 or AMX, a fifth. "
    "`embedyard precision` measures what a reduced one costs and gains. A list, as [float32, int8]: a load takes the "
    "first that fits into free memory, and evicts for the smallest only.",
    "min_cosine": "The least cosine to float32 that a reduced dtype may reach on the calibration texts; below it the "
    "model is not served. 0 compares nothing. Default: 0.999 for bfloat16 and float16, 0.99 for int8, 0.95 for int4.",
    "device": "Where the model runs: auto, cpu, cuda or cuda:N.",
    "max_tokens": "Maximum input length in tokens. Default: from the model's own files.",
    "max_batch_tokens": "Maximum tokens in one forward pass. Default: chosen for the device.",
    "normalize": "Whether vectors are normalized to length 1, unless a request sets `normalize`. Default: true.",
    "truncate": "The end at which too long inputs are truncated, unless a request sets `truncate`; error refuses "
    "them. Default: end.",
    "keep_alive": "Idle time before the model is unloaded: 10m, 1h30m, 90 (seconds), 0 (after each request) or -1 "
    "(never, the default).",
    "host_keep_alive": "Idle time before the model, once parked in main memory, leaves that too; as keep_alive. "
    "Default: -1.",
    "pinned": "Never evict the model for others once it is loaded. Default: false.",
    "preload": "Load the model at start, not at the first request. Default: false.",
    "warm": "Load the model at start, before those of preload, which may park it in main memory. Default: false.",
    "preload_at": "Load the model at these times, in cron's words and the server's local time: 0 8 * * 1-5 is eight "
    "o'clock on workdays. Default: at none.",
    "cache": "Size of the cache of vectors, so that repeated texts are not computed again: 256MiB. Default: 0 (no "
    "cache).",
    "cache_shared": "Whether keys share the cache. Faster if they send the same texts, but the response time then "
    "reveals whether another key has sent a text. Default: false.",
    "replicas": "Maximum number of devices that load the model at once, when one is too busy for it. Default: 1.",
    "offload": "allowed: where no device can hold the model alone, its layers are split over the devices of the host, "
    "and the last ones kept in main memory (memory.host_budget). Default: never.",
    "pooling": "Overrides the model's own pooling. The results of a list are concatenated in its order.",
    "prompts": "Prompt name (query, document, …) → text that is prepended to inputs. Added to the model's own "
    "prompts, and overrides them. Use double quotes: every space counts.",
    "default_prompt": "Name of the prompt for requests without `input_type`. Default: from the model's own files.",
    "instruction_template": "Query template of an instruct model: {task} is the request's `instruction`, {text} the "
    "input. {text} must occur exactly once, {task} at least once.",
    "matryoshka": "Widths that `dimensions` may request besides the full one: a list, {min: 32} or {widths: [256]}.",
    "min": "All widths from this one to the full one are allowed.",
    "widths": "These widths are allowed besides the full one.",
    "layer_norm": "Apply a layer norm over the full width before truncation (nomic-embed-text-v1.5). Default: false.",
    "calibration": "Ranges of the components, so that output_dtype int8 and uint8 mean the same in all requests, even "
    "with one text. `embedyard calibrate` prints them. Default: the ranges of each request.",
    "lowest": "Smallest value of each component: a list as long as a vector, or one number for all components.",
    "highest": "Largest value of each component: a list as long as a vector, or one number for all components.",
    "sha256": "File of the model → its sha256 in hexadecimal digits. A file with another one is refused at load. "
    "`adapter/FILE` is a file of the adapter.",
    "description": "One line for choosing a model: languages, width, size, context length.",
    "license": "SPDX identifier, or the vendor's name of the license.",
    "token_encoding": "The encoding of token ids in requests, if not the model's own; tiktoken, if installed, decodes "
    "them. LangChain's OpenAI client sends cl100k_base.",
    "unframed_token_ids": "Accept token ids without the special tokens that the model's tokenizer adds ([CLS] … "
    "[SEP]). Default: false, because such ids may come from another tokenizer.",
}


def registry_schema() -> dict[str, Any]:
    """Build the schema from the Structs that also check the file."""
    schema: dict[str, Any] = msgspec.json.schema(RegistryFile)
    for definition in schema["$defs"].values():
        for key, value in definition["properties"].items():
            # Since draft 2019-09 a $ref may have siblings, so a description can be beside it.
            definition["properties"][key] = {"description": MEANINGS[key], **value}
    schema["$defs"]["MatryoshkaRule"]["oneOf"] = [{"required": ["min"]}, {"required": ["widths"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Embedyard registry",
        **schema,
    }


def schema_text() -> str:
    """Return the text of the schema file."""
    return json.dumps(registry_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
