"""Texts for tests: many languages and scripts, any length, always the same for the same seed."""

import random

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
    """A text of that many words, drawn from all sentences; every other one follows a sentence for a while."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < words:
        if rng.random() < 0.5:
            drawn += rng.choice(SENTENCES).split()
        else:
            drawn += rng.choices(_WORDS, k=rng.randint(1, 6))
    return " ".join(drawn[:words])


def mixed(count: int, seed: int = 0, longest_words: int = 90) -> list[str]:
    """Texts of mixed lengths, short ones more often than long ones, in no order; no two alike."""
    rng = random.Random(seed)
    lengths = [1, 2, 3, longest_words, *(int(longest_words ** rng.random()) for _ in range(count - 4))]
    texts = [f"{seed}{index} {text(length, seed * 1000 + index)}" for index, length in enumerate(lengths[:count])]
    rng.shuffle(texts)
    return texts
