"""Runs Infinity's client against the server at BASE_URL; prints its results as a JSON line. Has its own environment."""

import json
import os

from infinity_client import AuthenticatedClient  # type: ignore[import-not-found]  # in an environment of its own
from infinity_client.api.default import embeddings, models  # type: ignore[import-not-found]  # as above
from infinity_client.models import OpenAIEmbeddingInputText  # type: ignore[import-not-found]  # as above

with AuthenticatedClient(base_url=os.environ["BASE_URL"], token=os.environ["API_KEY"]) as client:
    texts = ["the first text", "another one"]
    named = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(model="org/other", input_=texts))
    unnamed = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=texts))
    listed = models.sync(client=client)
    narrow = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=texts, dimensions=4))
print(  # noqa: T201 - its answer to the test that runs it
    json.dumps(
        {
            name: [answer.model, answer.usage.total_tokens, [item.embedding for item in answer.data]]
            for name, answer in (("named", named), ("unnamed", unnamed), ("narrow", narrow))
        }
        | {"models": [[model.id, model.owned_by, model.stats["queue_absolute"]] for model in listed.data]}
    )
)
