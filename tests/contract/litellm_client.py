"""Runs LiteLLM against the server at BASE_URL and prints its results as one JSON line. Has its own environment."""

import json
import os

import litellm  # type: ignore[import-not-found]  # it lives in an environment of its own

ASKED = {"api_base": f"{os.environ['BASE_URL']}/v1", "api_key": os.environ["API_KEY"], "max_retries": 0}

plain = litellm.embedding(model="openai/mini", input=["the first text", "another one"], **ASKED)
narrow = litellm.embedding(model="openai/text-embedding-3-small", input=["a b"], dimensions=4, **ASKED)
try:
    litellm.embedding(model="openai/nothing", input=["a"], **ASKED)
except litellm.NotFoundError as error:
    refusal = error.status_code
print(  # noqa: T201 - its answer to the test that runs it
    json.dumps(
        {
            "vectors": [item["embedding"] for item in plain.data],
            "narrow": narrow.data[0]["embedding"],
            "tokens": plain.usage.prompt_tokens,
            "refusal": refusal,
        }
    )
)
