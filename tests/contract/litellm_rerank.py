"""Runs LiteLLM's rerank against BASE_URL for each kind of server that it knows. Has its own environment."""

import json
import os
from typing import Any

import litellm  # type: ignore[import-not-found]  # it lives in an environment of its own

URL = os.environ["BASE_URL"]
ASKED = json.loads(os.environ["ASKED"]) | {"api_key": os.environ["API_KEY"]}
BASES = {
    "cohere": URL,
    "jina_ai": URL,
    "infinity": f"{URL}/infinity",
    "hosted_vllm": URL,
    "hosted_vllm/v1": f"{URL}/v1",
    "huggingface": URL,
}


def ranked(provider: str, base: str, **fields: Any) -> dict[str, Any]:
    answer = litellm.rerank(model=f"{provider.partition('/')[0]}/ranker", api_base=base, **ASKED, **fields)
    return {
        "ranking": [(result["index"], result["relevance_score"]) for result in answer.results],
        "texts": [result.get("document", {}).get("text") for result in answer.results],
        "meta": answer.meta,
    }


found = {provider: ranked(provider, base) for provider, base in BASES.items()}
found["infinity without documents"] = ranked("infinity", URL, return_documents=False)
try:
    litellm.rerank(model="cohere/nothing", api_base=URL, **ASKED)
except litellm.NotFoundError as error:
    found["refusal"] = error.status_code
print(json.dumps(found))  # noqa: T201 - its answer to the test that runs it
