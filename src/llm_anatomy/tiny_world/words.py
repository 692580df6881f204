"""What can be said in the tiny world, in English and a little Chinese, and the ids of the words.

A word is a token: chapters that are not about tokenization split at spaces.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """The words of each class; no word is in two of them."""

    women: tuple[str, ...] = _words("anna bella clara daisy emma fiona grace holly")
    men: tuple[str, ...] = _words("adam boris colin david eric felix george henry")
    at_a_place: tuple[str, ...] = ("found", "bought", "lost", "drew")
    to_a_place: tuple[str, ...] = ("took", "carried", "sent", "brought")
    colors: tuple[str, ...] = _words("red blue green brown white black pink grey")
    objects: tuple[str, ...] = _words("kite book cup lamp hat drum coin map ball cake bike knife")
    places: tuple[str, ...] = _words(
        "park school market garden library station museum beach farm hotel"
    )
    likes: tuple[str, ...] = ("liked", "loved", "enjoyed", "admired")
    hates: tuple[str, ...] = ("hated", "disliked", "despised", "scorned")
    good: tuple[str, ...] = _words(
        "good nice great lovely fine pretty superb charming pleasant splendid perfect cute"
    )
    bad: tuple[str, ...] = _words(
        "bad awful ugly poor nasty terrible dull horrible broken shabby dreadful useless"
    )
    neutral: tuple[str, ...] = ("new", "old", "big", "small", "long", "round")
    water: tuple[str, ...] = ("fished", "swam", "rowed", "dived")
    money: tuple[str, ...] = ("paid", "saved", "borrowed", "invested")
    animals: tuple[str, ...] = _words("dog cat horse goat rabbit duck pig bear")
    states: tuple[str, ...] = ("hungry", "tired", "happy", "quiet", "busy", "wet")


ENGLISH = Lexicon()

# Nouns carry the measure word that a Chinese noun needs after a number.
CHINESE_OBJECTS = {
    "kite": ("只", "风筝"), "book": ("本", "书"), "cup": ("个", "杯子"), "lamp": ("盏", "灯"),
    "hat": ("顶", "帽子"), "drum": ("面", "鼓"), "coin": ("枚", "硬币"), "map": ("张", "地图"),
    "ball": ("个", "球"), "cake": ("块", "蛋糕"), "bike": ("辆", "自行车"), "knife": ("把", "刀"),
}  # fmt: skip
CHINESE = {
    "anna": "安娜", "bella": "贝拉", "clara": "克拉拉", "daisy": "黛西", "emma": "艾玛",
    "fiona": "菲奥娜", "grace": "格蕾丝", "holly": "霍莉", "adam": "亚当", "boris": "鲍里斯",
    "colin": "科林", "david": "大卫", "eric": "埃里克", "felix": "费利克斯", "george": "乔治",
    "henry": "亨利", "found": "找到", "bought": "买", "lost": "丢", "drew": "画", "took": "拿",
    "carried": "搬", "sent": "寄", "brought": "带", "red": "红色", "blue": "蓝色", "green": "绿色",
    "brown": "棕色", "white": "白色", "black": "黑色", "pink": "粉色", "grey": "灰色",
    "park": "公园", "school": "学校", "market": "市场", "garden": "花园", "library": "图书馆",
    "station": "车站", "museum": "博物馆", "beach": "海滩", "farm": "农场", "hotel": "酒店",
    "dog": "狗", "cat": "猫", "horse": "马", "goat": "山羊", "rabbit": "兔子", "duck": "鸭子",
    "pig": "猪", "bear": "熊", "sheep": "绵羊", "fish": "鱼",
}  # fmt: skip
# What sentences are made of besides, in the stories and in the tasks, in English and in Chinese.
GRAMMAR = _words(
    "a the that saw and but while because not it he she was were at in near to left bank . "
    "met all some no animals where who what did had have ? : , -> "
    "translate sentiment summarize question positive negative sheep fish "
    "在 附近 把 到 了 一 的 。"
)


class Vocabulary:
    """Words to ids and back; a closed world has no unknown words.

    Args:
        words: each once; a word's place in the list is its id.

    Raises:
        ValueError: a word appears twice.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) < len(self.words):
            raise ValueError("a word appears twice in the vocabulary")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str]) -> list[int]:
        """The ids of words.

        Raises:
            ValueError: a word is not in the vocabulary.
        """
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(f"not in the vocabulary of {len(self)} words: {unknown[:5]}")
        return [self.ids[word] for word in words]

    def decode(self, ids: Iterable[int] | Int[Tensor, " T"]) -> list[str]:
        """The words of ids.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"ids lie between 0 and {len(self) - 1}, got {wrong[:5]}")
        return [self.words[i] for i in ids]

    def batch(
        self, texts: Sequence[Sequence[str]], length: int | None = None
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """The ids of several texts, padded on the right.

        Args:
            texts: lists of words.
            length: T; that of the longest text unless given.

        Returns:
            The ids, and True where a position is no padding.

        Raises:
            ValueError: there is no text, a text is longer than `length`, or a word is unknown.
        """
        longest = max(map(len, texts), default=0)
        T = longest if length is None else length
        if not texts or longest > T:
            raise ValueError(
                f"expected texts of at most {T} words, got {len(texts)}, up to {longest}"
            )
        ids = torch.full((len(texts), T), self.ids["[PAD]"])  # (B, T)
        for row, words in zip(ids, texts, strict=True):
            row[: len(words)] = torch.tensor(self.encode(words), dtype=torch.long)
        lengths = torch.tensor([len(words) for words in texts])
        return ids, torch.arange(T) < lengths[:, None]


def plural(noun: str) -> str:
    """The plural of an animal."""
    return noun if noun in ("sheep", "fish") else noun + "s"


def vocabulary() -> Vocabulary:
    """Every word of the tiny world, the special tokens first: one vocabulary for all chapters."""
    english = [word for words in astuple(ENGLISH) for word in words]
    chinese = [*CHINESE.values(), *(word for pair in CHINESE_OBJECTS.values() for word in pair)]
    everything = [*SPECIALS, *GRAMMAR, *english, *map(plural, ENGLISH.animals), *chinese]
    return Vocabulary(dict.fromkeys(everything))
