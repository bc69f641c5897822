"""Serves sentence-transformers with FastAPI, as is common.

`fastapi_app.py FOLDER PORT`, in the environment `fastapi`.
A plain function as the route, so that FastAPI runs it on its threads; default batch size; nothing else is tuned.
"""

import base64
import importlib
import sys
from typing import Any

fastapi: Any = importlib.import_module("fastapi")
sentence_transformers: Any = importlib.import_module("sentence_transformers")
uvicorn: Any = importlib.import_module("uvicorn")


def create_app(folder: str) -> Any:
    """Load the model and return the app."""
    app = fastapi.FastAPI()
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")

    def embed(body: dict[str, Any]) -> dict[str, Any]:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        vectors = model.encode(texts, show_progress_bar=False)
        is_base64 = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(len(row) for row in model.tokenizer(texts, truncation=True)["input_ids"])
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.get("model", ""), "usage": usage}

    app.post("/v1/embeddings")(embed)
    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
