"""Trains small tokenizers, each with the model, the normaliser and the post-processor of its family."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.lib.workloads import SENTENCES

_VOCAB_SIZE = 900
_TRAINING = tuple(sentence for sentence in SENTENCES for _ in range(3))
_ANSWERS = ("yes", "no") * 200
"""What a causal reranker answers, each a token."""
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Built = TypeVar("Built", PreTrainedTokenizerFast, Tokenizer)
Args = ParamSpec("Args")


def _built_once(build: Callable[Args, Built]) -> Callable[Args, Built]:
    """Trains a tokenizer once, and returns a copy (1 to 3 ms) at each call: a tokenizer keeps the truncation and the
    padding that it was last called with, and cut the texts of another test."""
    trained: Any = cache(build)

    @wraps(build)
    def copy(*args: Args.args, **kwargs: Args.kwargs) -> Built:
        found: Built = deepcopy(trained(*args, **kwargs))
        return found

    return copy


def _surround(
    tokenizer: Tokenizer, before: Sequence[str] = (), behind: Sequence[str] = (), pair: str | None = None
) -> Any:
    around = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *behind])]
    options = {} if pair is None else {"pair": pair}
    return processors.TemplateProcessing(single=[*before, "$A", *behind], special_tokens=around, **options)


def _wrap(tokenizer: Tokenizer, **names: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]  # upstream


def _wordpiece(specials: list[str], unknown: str, lowercase: bool) -> Tokenizer:
    """Builds a WordPiece model from whole words and the most frequent beginnings and continuations of words.

    The library's own trainer would choose other pieces in every run.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    sentences = [normalizer.normalize_str(sentence) for sentence in SENTENCES]
    words = [word for sentence in sentences for word, _ in pre_tokenizer.pre_tokenize_str(sentence)]
    counts = Counter(
        f"##{word[start:end]}" if start else word[start:end]
        for word in words
        for start in range(len(word))
        for end in range(start + 1, len(word) + 1)
        if end - start <= 4 or start == 0
    )
    letters = sorted(piece for piece in counts if len(piece.removeprefix("##")) == 1)
    longer = sorted(set(counts) - set(letters), key=lambda piece: (-counts[piece] * len(piece), piece))
    pieces = [*specials, *letters, *longer[: _VOCAB_SIZE - len(letters) - len(specials)]]
    model = models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in specials])
    return tokenizer


@_built_once
def bert(*, lowercase: bool = True, with_specials: bool = True, max_length: int = 512) -> PreTrainedTokenizerFast:
    """BERT, DistilBERT, ELECTRA, ModernBERT …: `[CLS] … [SEP]`."""
    tokenizer = _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[UNK]", lowercase)
    if with_specials:
        tokenizer.post_processor = _surround(tokenizer, ["[CLS]"], ["[SEP]"], "[CLS] $A [SEP] $B:1 [SEP]:1")
    return _wrap(
        tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_max_length=max_length,
    )  # fmt: skip


@_built_once
def mpnet(max_length: int = 512) -> PreTrainedTokenizerFast:
    """MPNet: BERT's pieces with RoBERTa's special tokens; `<pad>` is 1."""
    tokenizer = _wordpiece(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "[UNK]", True)
    tokenizer.post_processor = _surround(tokenizer, ["<s>"], ["</s>"], "<s> $A </s> </s> $B </s>")
    return _wrap(
        tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="[UNK]", mask_token="<mask>", model_max_length=max_length,
    )  # fmt: skip


@_built_once
def roberta(max_length: int = 512) -> PreTrainedTokenizerFast:
    """RoBERTa: byte-level BPE, `<s> … </s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _wrap(
        tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=max_length,
    )  # fmt: skip


@_built_once
def xlm_roberta(max_length: int = 512) -> PreTrainedTokenizerFast:
    """XLM-R, CamemBERT: unigram after replacing white space by `▁`, `<s> … </s>`."""
    tokenizer = _unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = _surround(tokenizer, ["<s>"], ["</s>"], "<s> $A </s> </s> $B </s>")
    return _wrap(
        tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=max_length,
    )  # fmt: skip


@_built_once
def t5(*, with_specials: bool = True, max_length: int = 512) -> PreTrainedTokenizerFast:
    """T5: unigram, only an end token."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"])
    if with_specials:
        tokenizer.post_processor = _surround(tokenizer, behind=["</s>"])
    return _wrap(tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=max_length)


@_built_once
def qwen(*, with_specials: bool = True, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Qwen: byte-level BPE after its own regex, `… <|endoftext|>`; without it, as a chat model's tokenizer."""
    tokenizer = _qwen_model(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    level = processors.ByteLevel(trim_offsets=False)
    if with_specials:
        tokenizer.post_processor = processors.Sequence([level, _surround(tokenizer, behind=["<|endoftext|>"])])
    else:
        tokenizer.post_processor = level
    return _wrap(tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=max_length)


def _qwen_model(specials: list[str], more: Sequence[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer, specials, more)
    return tokenizer


@_built_once
def chat(*, max_length: int = 512) -> PreTrainedTokenizerFast:
    """A Qwen for conversations: no special tokens around a text, and single tokens for the answers of a reranker."""
    tokenizer = _qwen_model(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], _ANSWERS)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _wrap(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=max_length)


@_built_once
def llama(*, with_end: bool = True, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Llama and Mistral: BPE of the whole text with byte fallback, `<s> …` and, for embedders, `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Pieces are learnt word by word, as SentencePiece does, and applied without pre-tokenisation.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_TRAINING, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = _surround(tokenizer, ["<s>"], ["</s>"] if with_end else [])
    return _wrap(
        tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=max_length
    )


@_built_once
def gemma(max_length: int = 512, *, with_end: bool = True) -> PreTrainedTokenizerFast:
    """Gemma: BPE after replacing spaces by `▁`, `<bos> …` and, for embedders, `<eos>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_TRAINING if with_end else (*_TRAINING, *("Yes",) * 200), trainer)
    # As in the original: the normaliser leaves no spaces to split at, so a text is one piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.post_processor = _surround(tokenizer, ["<bos>"], ["<eos>"] if with_end else [])
    return _wrap(
        tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=max_length,
    )  # fmt: skip


@_built_once
def bare() -> Tokenizer:
    """WordPiece without special tokens around a text, as static embeddings use."""
    return _wordpiece(["[PAD]", "[UNK]"], "[UNK]", True)


def _train_bytes(tokenizer: Tokenizer, specials: list[str], more: Sequence[str] = ()) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*_TRAINING, *more], trainer)


def _unigram(specials: list[str]) -> Tokenizer:
    """Builds a unigram model from the most frequent parts of words, scored by frequency.

    The library's own trainer would give other scores in every run.
    """
    counts = Counter(
        word[start:end]
        for sentence in SENTENCES
        for word in (f"▁{word}" for word in unicodedata.normalize("NFKC", sentence).split())
        for start in range(len(word))
        for end in range(start + 1, min(start + 7, len(word)) + 1)
    )
    letters = sorted(piece for piece in counts if len(piece) == 1)
    longer = sorted((p for p in counts if len(p) > 1 and counts[p] > 1), key=lambda p: (-counts[p] * len(p), p))
    pieces = [*letters, *longer[: _VOCAB_SIZE - len(letters) - len(specials)]]
    total = sum(counts[piece] for piece in pieces)
    scored = [(piece, math.log(counts[piece] / total)) for piece in pieces]
    model = models.Unigram([*((special, 0.0) for special in specials), *scored], specials.index("<unk>"), False)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in specials])
    return tokenizer
