"""Runs LangChain's rerankers and Infinity's client against BASE_URL. Has its own environment. Prints a line of JSON."""

import json
import os
from typing import Any

from infinity_client import Client  # type: ignore[import-not-found]  # in an environment of its own
from infinity_client.api.default import classify, rerank  # type: ignore[import-not-found]  # as above
from infinity_client.models import ClassifyInput, RerankInput  # type: ignore[import-not-found]  # as above
from langchain_cohere import CohereRerank  # type: ignore[import-not-found]  # as above
from langchain_community.document_compressors import (  # type: ignore[import-not-found]  # as above
    infinity_rerank,
    jina_rerank,
)
from langchain_core.documents import Document

URL, KEY = os.environ["BASE_URL"], os.environ["API_KEY"]
ASKED = json.loads(os.environ["ASKED"])
QUERY, DOCUMENTS, TOP_N = ASKED["query"], ASKED["documents"], ASKED["top_n"]

infinity = Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"})
jina_rerank.JINA_API_URL = f"{URL}/v1/rerank"  # its only address


def compressed(ranker: Any) -> list[tuple[str, float]]:
    documents = [Document(page_content=text) for text in DOCUMENTS]
    found = ranker.compress_documents(documents, QUERY)
    return [(document.page_content, document.metadata["relevance_score"]) for document in found]


def infinity_ranking(**fields: Any) -> dict[str, Any]:
    answer = rerank.sync(client=infinity, body=RerankInput(query=QUERY, documents=DOCUMENTS, **fields))
    return {
        "ranking": [(result.index, result.relevance_score) for result in answer.results],
        "documents": [result.document or None for result in answer.results],
        "tokens": answer.usage.total_tokens,
    }


labels = classify.sync(client=infinity, body=ClassifyInput(input_=DOCUMENTS, model="labeler"))
print(  # noqa: T201 - its answer to the test that runs it
    json.dumps(
        {
            "cohere": compressed(CohereRerank(cohere_api_key=KEY, base_url=URL, model="ranker", top_n=TOP_N)),
            "jina": compressed(jina_rerank.JinaRerank(jina_api_key=KEY, model="ranker", top_n=TOP_N)),
            "infinity": compressed(infinity_rerank.InfinityRerank(client=infinity, model="ranker", top_n=TOP_N)),
            "infinity_client": infinity_ranking(return_documents=True, top_n=TOP_N),
            "infinity_raw": infinity_ranking(raw_scores=True),
            "infinity_labels": [[(item.label, item.score) for item in of_text] for of_text in labels.data],
        }
    )
)
