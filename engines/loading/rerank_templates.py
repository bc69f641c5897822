"""The templates of causal rerankers whose folders do not state one, as their authors publish them.

Sources: the model cards of Qwen3-Reranker and bge-reranker-v2-gemma, and mixedbread's `mxbai_rerank_v2.py`. The parts
of a template are tokenised one by one where the authors do so; the document alone is cut.
"""

from msgspec import Struct

from engines.errors import UnsupportedModel
from engines.spec import ModelSpec, RerankTemplate


class TemplateText(Struct, frozen=True, kw_only=True):
    """One template: prefix, query, middle, document, suffix.

    Args:
        model_type: of the transformer that it was made for.
        source: the beginning of the names of its repositories.
        starts_with_bos: whether the first token is the tokenizer's own first one.
        prefix, middle, suffix: texts that are tokenised each by itself.
        query: what stands before and behind the query.
        instructed: what stands before and behind an instruction that is put in front of the query instead; None if the
            model takes none.
        default_instruction: the instruction of requests without one; None for none.
        text: what stands before the document.
        true, false: the tokens whose logits make the score.
        max_tokens: what the authors read at the most.
    """

    model_type: str
    source: str
    starts_with_bos: bool = False
    prefix: tuple[str, ...] = ()
    query: tuple[str, str] = ("", "")
    instructed: tuple[str, str] | None = None
    default_instruction: str | None = None
    middle: tuple[str, ...] = ()
    text: str = ""
    suffix: tuple[str, ...] = ()
    true: str = "yes"
    false: str | None = "no"
    max_tokens: int = 8192


TEMPLATES: dict[RerankTemplate, TemplateText] = {
    "qwen3-reranker": TemplateText(
        model_type="qwen3",
        source="qwen3-reranker",
        prefix=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        ),
        query=("<Query>: ", "\n"),
        instructed=("<Instruct>: ", "\n<Query>: "),
        default_instruction="Given a web search query, retrieve relevant passages that answer the query",
        text="<Document>: ",
        suffix=("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",),
    ),
    "mxbai-rerank-v2": TemplateText(
        model_type="qwen2",
        source="mxbai-rerank-",
        prefix=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n",
        ),
        query=("query: ", ""),
        instructed=("instruction: ", "\nquery: "),
        middle=("\n",),
        text="document: ",
        suffix=(
            "\n",
            "You are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
            "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        true="1",
        false="0",
    ),
    "bge-reranker-v2-gemma": TemplateText(
        model_type="gemma",
        source="bge-reranker-v2-gemma",
        starts_with_bos=True,
        query=("A: ", ""),
        middle=("\n",),
        text="B: ",
        suffix=(
            "\n",
            "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
            "providing a prediction of either 'Yes' or 'No'.",
        ),
        true="Yes",
        false=None,
        max_tokens=1024,
    ),
}


def template_of(spec: ModelSpec, model_type: str) -> TemplateText:
    """Returns the template of a causal reranker: the registry's, else by the name of its repository.

    Raises:
        UnsupportedModel: neither says which, or it was made for other models.
    """
    name = spec.template or _name_of(spec.source)
    if name is None:
        raise UnsupportedModel(
            "the files do not say how this language model reads a query and a document, and with another template its "
            f"scores mean nothing: set `template` in the registry ({', '.join(TEMPLATES)}), or serve the folder that "
            "sentence-transformers' CrossEncoder saves"
        )
    template = TEMPLATES[name]
    if template.model_type != model_type:
        raise UnsupportedModel(
            f"the template {name} is that of a {template.model_type}, but config.json describes a {model_type}; "
            "correct `template` in the registry"
        )
    return template


def is_known_reranker(source: str) -> bool:
    """Whether a source is the repository of a causal reranker, by its name."""
    return _name_of(source) is not None


def _name_of(source: str) -> RerankTemplate | None:
    repository = source.rstrip("/").rsplit("/", 1)[-1].lower()
    for name, template in TEMPLATES.items():
        if repository.startswith(template.source) and (name != "mxbai-rerank-v2" or repository.endswith("-v2")):
            return name
    return None
