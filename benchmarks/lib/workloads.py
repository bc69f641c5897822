"""Makes texts to measure with: seeded, made from what every Python has installed, and of known length in tokens.

English comes from the language reference that `pydoc` carries (so it differs a little between versions of Python,
which `Workload.fingerprint` shows), Chinese from our own sentences. No model is needed: `count` measures lengths.
"""

import bisect
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data import topics

from msgspec import Struct
from tokenizers import Tokenizer

Count = Callable[[str], int]
"""Tokens of a text, special tokens included."""

_CHINESE = (
    "检索增强生成先把问题变成向量，再到索引里寻找意思相近的段落。",
    "一台服务器可以登记许多模型，但显存里同时只放得下几个。",
    "最久没有被使用的模型先离开，正在服务请求的模型不会被赶走。",
    "向量必须和参考实现一致，无论这一批里还有哪些别的句子。",
    "短句不应该等待长文，也不应该为别人的填充付出计算。",
    "昨天傍晚下了一场大雨，河水涨到了桥边的石阶。",
    "她把旧报纸叠成小船，放进水里，看它慢慢漂远。",
    "价格、日期和编号在检索中常常比形容词更重要，例如2026年11月23日。",
    "数据库管理员说：备份没有恢复过，就等于没有备份。",
    "这家店的面条很便宜，汤却熬了整整一夜。",
    "模型加载需要几秒钟，所以请求会先等着，而不是立刻失败。",
    "长江从西向东流过十一个省级行政区，最后在上海入海。",
)


class Lengths(Struct, frozen=True):
    """Tokens of one kind of text, both bounds inclusive; with a median they are log-normal, else uniform."""

    low: int
    high: int
    median: float | None = None
    sigma: float = 1.0

    def draw(self, rng: random.Random) -> int:
        """Draw one length."""
        if self.median is None:
            return rng.randint(self.low, self.high)
        return min(self.high, max(self.low, round(rng.lognormvariate(math.log(self.median), self.sigma))))


# Mixed: chunks of documents and queries together, half of them shorter than 60 tokens.
LENGTHS = {
    "short": Lengths(8, 16),
    "passages": Lengths(60, 120),
    "mixed": Lengths(5, 510, median=60),
    "long": Lengths(400, 512),
    "chinese": Lengths(5, 120),
    "documents": Lengths(5, 250),
    "equal": Lengths(116, 120),
}
NAMES = tuple(LENGTHS)

QUERIES = "queries"
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
"""Short texts behind one instruction, as Qwen3-Embedding's card asks for."""

_PATIENCE = 200
"""Starting points that are tried before a tokenizer is refused for having no text of a length."""


class Workload(Struct, frozen=True):
    """Texts of one kind, and the tokens of each."""

    name: str
    texts: tuple[str, ...]
    tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens, special ones included and padding excluded."""
        return sum(self.tokens)

    @property
    def fingerprint(self) -> str:
        """Return twelve hex digits that change with any text."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:12]

    def calls(self, num_texts: int) -> list[tuple[str, ...]]:
        """Split the texts into calls of `num_texts`; the last may be smaller."""
        return [self.texts[start : start + num_texts] for start in range(0, len(self.texts), num_texts)]


def make(name: str, num_texts: int, count: Count, seed: int = 7) -> Workload:
    """Make `num_texts` texts of the workload `name`, within the bounds of `LENGTHS` as `count` measures them.

    `queries` are `short` texts behind an instruction.

    Raises:
        ValueError: the tokenizer gives no text of such a length.
    """
    if name == QUERIES:
        short = make("short", num_texts, count, seed)
        asked = tuple(INSTRUCTION + text for text in short.texts)
        return Workload(name, asked, tuple(map(count, asked)))
    rng = random.Random(f"{name}-{seed}")
    words, joiner = (_chinese(), "") if name == "chinese" else (english(), " ")
    lengths = LENGTHS[name]
    made = [_text(lengths.draw(rng), lengths, lambda: _stretch(words, rng), joiner, count) for _ in range(num_texts)]
    return Workload(name, tuple(text for text, _ in made), tuple(tokens for _, tokens in made))


def counter(folder: Path) -> Count:
    """Return a function that counts tokens with a folder's tokenizer, special ones included, without truncation."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)


@cache
def english() -> tuple[str, ...]:
    """Return the words of the language reference, in order, without markup."""
    words = " ".join(topics.topics[name] for name in sorted(topics.topics)).split()
    return tuple(word for word in words if any(letter.isalnum() for letter in word))


def _text(
    target: int, lengths: Lengths, stretches: Callable[[], Iterator[str]], joiner: str, count: Count
) -> tuple[str, int]:
    """Return the longest text of at most `target` tokens from a random starting point, and its number of tokens."""
    for _ in range(_PATIENCE):
        stretch = stretches()
        pieces = [next(stretch) for _ in range(target)]  # a piece is at least one token
        fits = bisect.bisect_right(range(len(pieces) + 1), target, key=lambda n: count(joiner.join(pieces[:n]))) - 1
        text = joiner.join(pieces[: max(fits, 0)])
        tokens = count(text)
        if text and lengths.low <= tokens <= lengths.high:
            return text, tokens
    raise ValueError(f"this tokenizer gave no text of {lengths.low} to {target} tokens in {_PATIENCE} attempts")


def _stretch(words: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield words without end: runs of 8 to 50 words from random starting points."""
    while True:
        start = rng.randrange(len(words))
        yield from words[start : start + rng.randint(8, 50)]


@cache
def _chinese() -> tuple[str, ...]:
    """Return the sentences in random order, 200 of them, each one many times."""
    rng = random.Random(7)
    return tuple("".join(rng.choice(_CHINESE) for _ in range(200)))


# ---- texts of many languages, for comparing vectors ----

SENTENCES = (
    "The yard keeps many engines, and each engine waits for its turn.",
    "A cold model is loaded once, however many people ask for it at the same moment.",
    "Vectors that point the same way mean nearly the same thing.",
    "She read the letter twice, folded it, and put it back into the drawer without a word.",
    "In 1969 two people walked on the moon while 600 million watched them on television.",
    "def embed(texts: list[str]) -> list[float]: return model(texts)[0]",
    "Über den Dächern der Stadt ging langsam die Sonne auf, und niemand sprach ein Wort.",
    "Die Prüfung ist bestanden; größere Modelle brauchen trotzdem mehr Speicher als kleine.",
    "Le musée ouvre à neuf heures, mais la file d'attente commence bien avant l'aube.",
    "El tren hacia el sur sale cada media hora desde el andén número siete.",
    "A manhã estava fria, e o padeiro já tinha vendido todo o pão.",
    "Собака спит у двери, а кошка смотрит в окно на первый снег.",
    "検索エンジンは文書をベクトルに変換して、近いものを探します。",
    "저녁이 되자 시장의 불빛이 하나둘 켜지기 시작했다.",
    "今天天气很好，我们决定沿着河边走到旧城，再坐船回来。",
    "向量数据库把每一段文字变成一串数字，然后寻找最接近的邻居。",
    "القطة تجلس تحت الشجرة وتنتظر صديقها القديم.",
    "नदी के किनारे बच्चे पतंग उड़ा रहे थे।",
    "Η βιβλιοθήκη κλείνει στις οκτώ το βράδυ.",
    "🚀 ship it! 🎉 naïve café — “quoted” … 50 % off, e-mail: yard@example.org",
)

_WORDS = tuple(word for sentence in SENTENCES for word in sentence.split())


def text(words: int, seed: int) -> str:
    """Return a text of `words` words: whole sentences and words drawn from all sentences, in random order."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < words:
        if rng.random() < 0.5:
            drawn += rng.choice(SENTENCES).split()
        else:
            drawn += rng.choices(_WORDS, k=rng.randint(1, 6))
    return " ".join(drawn[:words])


def mixed(count: int, seed: int = 0, longest_words: int = 90) -> list[str]:
    """Return texts of mixed lengths in random order, short ones more often than long ones; no two are the same."""
    rng = random.Random(seed)
    lengths = [1, 2, 3, longest_words, *(int(longest_words ** rng.random()) for _ in range(count - 4))]
    texts = [f"{seed}{index} {text(length, seed * 1000 + index)}" for index, length in enumerate(lengths[:count])]
    rng.shuffle(texts)
    return texts
