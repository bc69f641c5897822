"""Serves a CrossEncoder of sentence-transformers with FastAPI, as is common.

`fastapi_rerank.py FOLDER PORT`, in the environment `fastapi`.
A plain function as the route, so that FastAPI runs it on its threads; default batch size; nothing else is tuned.
"""

import importlib
import sys
from typing import Any

fastapi: Any = importlib.import_module("fastapi")
sentence_transformers: Any = importlib.import_module("sentence_transformers")
uvicorn: Any = importlib.import_module("uvicorn")


def create_app(folder: str) -> Any:
    """Load the model and return the app."""
    app = fastapi.FastAPI()
    model = sentence_transformers.CrossEncoder(folder, device="cpu")

    def rerank(body: dict[str, Any]) -> dict[str, Any]:
        pairs = [(body["query"], document) for document in body["documents"]]
        scores = model.predict(pairs, show_progress_bar=False).tolist()
        ranked = sorted(enumerate(scores), key=lambda one: -one[1])
        results = [{"index": index, "relevance_score": score} for index, score in ranked]
        return {"results": results, "model": body.get("model", "")}

    app.post("/v1/rerank")(rerank)
    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
