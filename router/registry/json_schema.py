"""JSON Schema of `registry.yaml`, so that editors complete and explain its keys.

`python -m router.registry.json_schema` writes it to `router/registry/registry.schema.json`. What the keys mean is told
here.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from router.registry.file import RegistryFile

SCHEMA_FILE = Path(__file__).with_name("registry.schema.json")

MEANINGS = {
    "version": "Version of this file's format.",
    "models": "The models that may be served.",
    "default_model": "The model of requests that name none: a name or an alias. Left out, `model` is obligatory.",
    "memory": "How much memory models may take.",
    "backend": "Where the models run: local (in the server's own process), process (one worker process a device), ray "
    "(hosts on a Ray cluster). Left out: process where there is more than one GPU, else local. BACKEND in the "
    "environment overrides it.",
    "defaults": "Values for every model that does not say otherwise.",
    "budget": "Part of each device's memory for models: 80% or 20GiB. MEMORY_BUDGET in the environment overrides it.",
    "name": "What clients send as `model`. Slashes are fine, spaces are not.",
    "aliases": "Other names for the same model.",
    "source": "A hub id (BAAI/bge-m3), a local folder (/…, ./…, ../…, ~/…) or package:NAME/SUB/FOLDER.",
    "revision": "Branch, tag or commit of the hub repository. A full commit makes the vectors reproducible.",
    "trust_remote_code": "Run Python code from the repository. Demands a full commit as `revision`.",
    "dtype": "Number format of the weights. auto: bfloat16 on CUDA, float32 elsewhere.",
    "device": "Where the model runs: auto, cpu, cuda or cuda:N.",
    "max_tokens": "Longest input in tokens. Left out: what the model's own files say.",
    "max_batch_tokens": "Most tokens in one forward pass. Left out: what suits the device.",
    "normalize": "Whether vectors have length 1 when a request does not say. Default: true.",
    "truncate": "Which end of a too long input is cut when a request does not say; error refuses it. Default: end.",
    "keep_alive": "Idle time before the model leaves memory: 10m, 1h30m, 90 (seconds), 0 (after each request), "
    "-1 (never by idleness, the default).",
    "pinned": "Once loaded, the model never leaves to make room for others. Default: false.",
    "preload": "Load the model when the server starts, not at the first request. Default: false.",
    "cache": "Memory for vectors that were computed before, so that the same text is not computed again: 256MiB. "
    "Default: 0, none.",
    "cache_shared": "Whether a key is given vectors that were computed for another: faster where keys send the same "
    "texts, but how fast an answer comes then tells whether somebody has asked for a text. Default: false.",
    "replicas": "On how many devices at the most the model may be at once when one is too busy for it. Default: 1.",
    "pooling": "Overrules the model's own pooling. A list is concatenated in its order.",
    "prompts": "Prompt name (query, document, …) → text put in front of the input. Added to the model's own prompts, "
    "and stronger. Use double quotes: every space counts.",
    "default_prompt": "Name of the prompt of requests that name none. Left out: what the model's own files say.",
    "instruction_template": "Query template of an instruct model: {task} is the request's `instruction`, {text} the "
    "input. {text} stands exactly once, {task} at least once.",
    "matryoshka": "Widths that `dimensions` may ask for besides the full one: a list, {min: 32} or {widths: [256]}.",
    "min": "Every width from here to the full one is allowed.",
    "widths": "These widths are allowed besides the full one.",
    "layer_norm": "A layer norm over the full width comes before the cut (nomic-embed-text-v1.5). Default: false.",
    "calibration": "Ranges of the vectors' components, so that output_dtype int8 and uint8 mean the same in every "
    "request, also of one text. `embedyard calibrate` prints them. Left out: each request's own ranges.",
    "lowest": "The smallest value of each component: a list as long as a vector, or one number for all of them.",
    "highest": "The largest value of each component: a list as long as a vector, or one number for all of them.",
    "description": "One line that helps to choose: languages, width, size, context.",
    "license": "SPDX name, or the vendor's.",
    "token_encoding": "Token ids in requests are of this encoding, not the model's own, and are decoded by tiktoken "
    "when that is installed. LangChain's OpenAI client sends cl100k_base.",
    "unframed_token_ids": "Token ids in requests may come without the special tokens that the model's tokenizer puts "
    "around a text ([CLS] … [SEP]). Default: false, they are refused, because they may be another tokenizer's.",
}


def registry_schema() -> dict[str, Any]:
    """The schema, made from the Structs that also check the file."""
    schema: dict[str, Any] = msgspec.json.schema(RegistryFile)
    for definition in schema["$defs"].values():
        for key, value in definition["properties"].items():
            # Since 2019-09 a $ref may have neighbours, so a meaning stands beside it too.
            definition["properties"][key] = {"description": MEANINGS[key], **value}
    schema["$defs"]["MatryoshkaRule"]["oneOf"] = [{"required": ["min"]}, {"required": ["widths"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Embedyard registry",
        **schema,
    }


def schema_text() -> str:
    """The schema as it stands in its file."""
    return json.dumps(registry_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
