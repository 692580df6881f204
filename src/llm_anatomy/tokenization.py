"""Three ways to cut text into subwords: BPE, WordPiece and Unigram, and how each is learned.

Each is equal to its model in the `tokenizers` library, which is what one uses outside of a course:
`to_tokenizers` gives the same tokenizer in its form, and that form is the file format here.

A tokenizer cuts a text into words, a word into pieces, and gives each piece its id. Special tokens
have a place in the vocabulary, but nothing looks for them in a text: to insert one, use its id, as
in `tokenizer.ids["[CLS]"]`.
"""

import json
import math
import operator
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "▁"  # U+2581, SentencePiece's visible space

# --- From text to words ---------------------------------------------------------------------------


def space_words(text: str) -> list[str]:
    """Cut before each space and keep it, as "▁": "a bc" becomes "▁a", "▁bc".

    Kudo and Richardson, 2018 (arXiv:1808.06226). A text that does not start with a space gets one,
    so that a word is the same at the start of a text and inside it.
    """
    text = text.replace(" ", SPACE)
    return re.findall(f"{SPACE}[^{SPACE}]*", text if text[:1] in ("", SPACE) else SPACE + text)


def bert_words(text: str) -> list[str]:
    """Cut at white space, and put each punctuation mark and each Chinese character on its own.

    Devlin et al., 2019 (arXiv:1810.04805), and the code of its cased and multilingual models.
    """
    alone = (f" {c} " if _is_punctuation(c) or _is_chinese(c) else c for c in text)
    return "".join(" " if _is_space(c) else c for c in "".join(alone)).split(" ")


def byte_words(text: str) -> list[str]:
    """Cut as GPT-2 does, then write each byte of a word's UTF-8 as one visible character.

    Radford et al., 2019. A word is a run of letters, of digits, or of other signs, with the space
    before it, if there is one; or an English ending such as 's.
    """
    shadow = "".join(map(_kind, text))  # the same length in ASCII, so that a simple pattern serves
    return [
        "".join(BYTE_TO_CHAR[b] for b in text[m.start() : m.end()].encode())
        for m in _GPT2_WORD.finditer(shadow)
    ]


_GPT2_WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)


def _kind(c: str) -> str:
    """An ASCII character of the same kind: letter, digit, white space or other."""
    if c == "'" or c == " " or "a" <= c <= "z":
        return c
    if _is_space(c):
        return "\t"
    return {"L": "A", "N": "0"}.get(unicodedata.category(c)[0], "!")


def _is_space(c: str) -> bool:
    return c.isspace() and not "\x1c" <= c <= "\x1f"  # Unicode's white space, not Python's


def _is_punctuation(c: str) -> bool:
    return c in "$+<=>^`|~" or unicodedata.category(c)[0] == "P"


_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def _is_chinese(c: str) -> bool:
    return any(first <= ord(c) <= last for first, last in _CHINESE)


def _visible_bytes() -> dict[int, str]:
    """GPT-2's table: a printable byte is itself, the others take the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    table.update({b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*printable}))})
    return table


BYTE_TO_CHAR = _visible_bytes()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}

# --- What all tokenizers share --------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back. A subclass says how words are cut out, cut up and put together again.

    Args:
        vocab: the tokens; the place of a token in the list is its id.

    Raises:
        ValueError: a token appears twice.
    """

    kind: str  # the name of the model in the library's files

    def __init__(self, vocab: Sequence[str]) -> None:
        self.vocab = list(vocab)
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        if len(self.ids) < len(self.vocab):
            twice = [token for token, n in Counter(self.vocab).items() if n > 1]
            raise ValueError(f"each token may appear once, but these repeat: {twice[:5]}")

    def __len__(self) -> int:
        return len(self.vocab)

    @staticmethod
    def words(text: str) -> list[str]:
        """The words of a text: no token reaches across two of them."""
        raise NotImplementedError

    def pieces(self, word: str) -> list[str]:
        """Cut one word into tokens of the vocabulary."""
        raise NotImplementedError

    @staticmethod
    def join(tokens: Sequence[str]) -> str:
        """The text of some tokens."""
        raise NotImplementedError

    def tokens(self, text: str) -> list[str]:
        """Cut a text into tokens of the vocabulary."""
        return [piece for word in self.words(text) if word for piece in self.pieces(word)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens."""
        return [self.ids[token] for token in self.tokens(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [operator.index(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"token ids lie between 0 and {len(self) - 1}, got {wrong[:5]}")
        return self.join([self.vocab[i] for i in ids])

    @classmethod
    def _count(cls, texts: Iterable[str]) -> Counter[str]:
        """How often each word occurs."""
        if isinstance(texts, str):
            raise ValueError("expected several texts, such as a list of strings; got one string")
        counts = Counter(word for text in texts for word in cls.words(text) if word)
        if not counts:
            raise ValueError("there is no word in the corpus, so there is nothing to learn from")
        return counts

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        """The same tokenizer in the form of the `tokenizers` library."""
        raise NotImplementedError

    @classmethod
    def _from_model(cls, model: Mapping[str, Any]) -> "Tokenizer":
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the JSON file of the `tokenizers` library."""
        self.to_tokenizers().save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read the JSON file of the `tokenizers` library, if it describes just this tokenizer.

        Raises:
            ValueError: the file describes another kind of tokenizer, or one with other options.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:  # through the library, which also reads the forms that older versions wrote
            theirs = json.loads(tokenizers.Tokenizer.from_str(text).to_str())
        except Exception as error:
            raise ValueError(f"{path} is no file of the tokenizers library: {error}") from error
        if theirs["model"]["type"] != cls.kind:
            raise ValueError(f"{path} holds a {theirs['model']['type']} model, no {cls.kind}")
        ours = cls._from_model(theirs["model"])
        again = json.loads(ours.to_tokenizers().to_str())
        for part in ("normalizer", "pre_tokenizer", "decoder", "model"):
            old, new = theirs[part] or {}, again[part] or {}
            wrong = [k for k in {**old, **new} if (old.get(k) or None) != (new.get(k) or None)]
            if wrong:
                raise ValueError(f"the {part} in {path} is not that of {cls.__name__}: {wrong}")
        return ours


# --- Byte-pair encoding ---------------------------------------------------------------------------

Score = Callable[[int, int, int], int | float]
Pair = tuple[str, str]


def frequency(pair: int, left: int, right: int) -> int:
    """Score of a merge in BPE: how often the pair occurs."""
    return pair


def association(pair: int, left: int, right: int) -> float:
    """Score of a merge that asks how much oftener the pair occurs than its parts would by chance.

    Its logarithm is, up to a constant, what each occurrence of the pair gains in log-likelihood
    under a unigram model that gets the pair as a unit, all other probabilities left as they are.
    """
    return pair / (left * right)


def learn_merges(
    words: Mapping[tuple[str, ...], int],
    vocab: list[str],
    vocab_size: int,
    score: Score = frequency,
    join: Callable[[str, str], str] = operator.add,
) -> list[Pair]:
    """Merge the best pair of neighbours everywhere, again and again, and say which pairs it were.

    Sennrich et al., 2016 (arXiv:1508.07909), algorithm 1. Of pairs with the same score the one with
    the smaller left id is merged, then the one with the smaller right id.

    Args:
        words: the words, as symbols, and how often each occurs.
        vocab: every symbol in the words; it grows by one token a merge, in place.
        vocab_size: when to stop; earlier, where no pair is left.
        score: of a pair, from the number of times that it, its left and its right part occur.
        join: makes the new token of the two parts.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    cut, weight = [list(word) for word in words], list(words.values())
    pairs: Counter[Pair] = Counter()
    symbols: Counter[str] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)

    def count(i: int, sign: int) -> None:
        for symbol in cut[i]:
            symbols[symbol] += sign * weight[i]
        for pair in pairwise(cut[i]):
            pairs[pair] += sign * weight[i]
            where[pair].add(i)
            if not pairs[pair]:
                del pairs[pair]

    def rank(pair: Pair) -> tuple[int | float, int, int]:
        left, right = pair
        return -score(pairs[pair], symbols[left], symbols[right]), ids[left], ids[right]

    for i in range(len(cut)):
        count(i, +1)
    merges = []
    while len(vocab) < vocab_size and pairs:
        best = min(pairs, key=rank)
        token = join(*best)
        if token not in ids:
            ids[token] = len(vocab)
            vocab.append(token)
        merges.append(best)
        for i in where.pop(best):
            count(i, -1)
            cut[i] = merge(cut[i], best, token)
            count(i, +1)
    return merges


def merge(symbols: Sequence[str], pair: Pair, token: str) -> list[str]:
    """Put `token` wherever the pair stands, from left to right."""
    merged, i = [], 0
    while i < len(symbols):
        found = tuple(symbols[i : i + 2]) == pair
        merged.append(token if found else symbols[i])
        i += 2 if found else 1
    return merged


def _start(specials: Sequence[str], alphabet: Iterable[str], vocab_size: int) -> list[str]:
    """The vocabulary before anything is learned: special tokens, then single characters."""
    vocab = [*specials, *sorted(set(alphabet) - set(specials))]
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size ({vocab_size}) has no room for the {len(specials)} special tokens and the "
            f"{len(vocab) - len(specials)} characters of the alphabet"
        )
    return vocab


class BPE(Tokenizer):
    """Byte-pair encoding: apply the learned merges in the order in which they were learned.

    Sennrich et al., 2016 (arXiv:1508.07909), on words that carry their space. A character that the
    training never saw becomes `unk`.

    Raises:
        ValueError: the unknown token, a part of a merge or its result is not in the vocabulary.
    """

    kind = "BPE"

    def __init__(
        self, vocab: Sequence[str], merges: Sequence[Pair], unk: str | None = "<unk>"
    ) -> None:
        super().__init__(vocab)
        self.merges = [(left, right) for left, right in merges]
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.unk = unk
        needed = {unk} - {None} | {t for a, b in self.merges for t in (a, b, a + b)}
        if missing := sorted(needed - self.ids.keys()):
            raise ValueError(f"the vocabulary lacks {missing[:5]}")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ("<unk>",)
    ) -> "BPE":
        """Learn merges until the vocabulary is full or every word is one token.

        Raises:
            ValueError: there is no word, or the vocabulary is smaller than the alphabet.
        """
        counts = cls._count(texts)
        vocab = _start(specials, cls._alphabet(counts), vocab_size)
        merges = learn_merges({tuple(word): n for word, n in counts.items()}, vocab, vocab_size)
        return cls(vocab, merges)

    @staticmethod
    def _alphabet(words: Iterable[str]) -> set[str]:
        return set().union(*words)

    words = staticmethod(space_words)

    def pieces(self, word: str) -> list[str]:
        parts = [c if c in self.ids else self.unk for c in word]
        while True:
            ranks = [self.rank.get(pair, math.inf) for pair in pairwise(parts)]
            first = min(ranks, default=math.inf)
            if first == math.inf:
                return parts
            i = ranks.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    @staticmethod
    def join(tokens: Sequence[str]) -> str:
        return _join_spaces(tokens)

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        theirs = tokenizers.Tokenizer(models.BPE(self.ids, self.merges, unk_token=self.unk))
        theirs.pre_tokenizer = pre_tokenizers.Metaspace()
        theirs.decoder = decoders.Metaspace()
        return theirs

    @classmethod
    def _from_model(cls, model: Mapping[str, Any]) -> "BPE":
        vocab = sorted(model["vocab"], key=model["vocab"].get)
        return cls(vocab, [tuple(pair) for pair in model["merges"]], model["unk_token"] or None)


def _join_spaces(tokens: Sequence[str]) -> str:
    """Put tokens together and turn "▁" into spaces, except those of the first token."""
    first, rest = tokens[:1], tokens[1:]
    return "".join([t.replace(SPACE, "") for t in first] + [t.replace(SPACE, " ") for t in rest])


class ByteLevelBPE(BPE):
    """BPE on bytes instead of characters: 256 symbols write any text, so nothing is unknown.

    Radford et al., 2019 (GPT-2). A Chinese character has three bytes and becomes up to three
    tokens, or one where the training saw it often.
    """

    def __init__(self, vocab: Sequence[str], merges: Sequence[Pair], unk: None = None) -> None:
        super().__init__(vocab, merges, unk)
        if missing := sorted(CHAR_TO_BYTE.keys() - self.ids.keys()):
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes: {missing[:5]}")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()
    ) -> "ByteLevelBPE":
        """As `BPE.train`; the alphabet is the 256 bytes, whatever the texts are."""
        return super().train(texts, vocab_size, specials)

    @staticmethod
    def _alphabet(words: Iterable[str]) -> set[str]:
        return set(CHAR_TO_BYTE)

    words = staticmethod(byte_words)

    @staticmethod
    def join(tokens: Sequence[str]) -> str:
        """The text of some tokens; bytes that are no UTF-8, half a character say, become U+FFFD."""
        raw = b"".join(
            bytes(CHAR_TO_BYTE[c] for c in token)
            if CHAR_TO_BYTE.keys() >= {*token}
            else token.encode()
            for token in tokens
        )
        return raw.decode(errors="replace")

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        theirs = tokenizers.Tokenizer(models.BPE(self.ids, self.merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        return theirs


# --- WordPiece ------------------------------------------------------------------------------------


class WordPiece(Tokenizer):
    """Take the longest token that fits, again and again; a piece inside a word starts with "##".

    Schuster and Nakajima, 2012; BERT's tokenizer (Devlin et al., 2019, arXiv:1810.04805). There are
    no merges: encoding needs the vocabulary alone. If a word cannot be cut to its end, or has more
    than `max_length` characters, the whole word is `unk`.

    Raises:
        ValueError: the unknown token is not in the vocabulary.
    """

    kind = "WordPiece"

    def __init__(self, vocab: Sequence[str], unk: str = "[UNK]", max_length: int = 100) -> None:
        super().__init__(vocab)
        self.unk = unk
        self.max_length = max_length
        if unk not in self.ids:
            raise ValueError(f"the vocabulary lacks the unknown token {unk!r}")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        specials: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        score: Score = frequency,
    ) -> "WordPiece":
        """Learn a vocabulary by merging, and forget the merges.

        The code that made BERT's vocabulary was not released. The paper of 2012 merges for the
        likelihood of a language model, the `tokenizers` library by frequency, as BPE does; so does
        this, unless another score is given, such as `association`.

        Raises:
            ValueError: there is no word, or the vocabulary is smaller than the alphabet.
        """
        counts = cls._count(texts)
        words = {(word[0], *(f"##{c}" for c in word[1:])): n for word, n in counts.items()}
        firsts = set().union(*counts)  # each character may start a word
        _start(specials, firsts.union(*words), vocab_size)
        vocab = _start(specials, firsts, vocab_size)
        vocab += sorted(set().union(*words) - set(vocab))
        learn_merges(words, vocab, vocab_size, score, lambda a, b: a + b.removeprefix("##"))
        return cls(vocab)

    words = staticmethod(bert_words)

    def pieces(self, word: str) -> list[str]:
        if len(word) > self.max_length:
            return [self.unk]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None:
                return [self.unk]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    @staticmethod
    def join(tokens: Sequence[str]) -> str:
        """Words with one space between them: what stood between them in the text is lost."""
        rest = (t.removeprefix("##") if t.startswith("##") else " " + t for t in tokens[1:])
        return "".join([*tokens[:1], *rest])

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        model = models.WordPiece(
            self.ids, unk_token=self.unk, max_input_chars_per_word=self.max_length
        )
        theirs = tokenizers.Tokenizer(model)
        theirs.normalizer = normalizers.BertNormalizer(
            clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )
        theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        theirs.decoder = decoders.WordPiece(cleanup=False)
        return theirs

    @classmethod
    def _from_model(cls, model: Mapping[str, Any]) -> "WordPiece":
        vocab = sorted(model["vocab"], key=model["vocab"].get)
        return cls(vocab, model["unk_token"], model["max_input_chars_per_word"])


# --- Unigram --------------------------------------------------------------------------------------

Scores = dict[str, float]


class Unigram(Tokenizer):
    """Cut a word where the product of its pieces' probabilities is largest.

    Kudo, 2018 (arXiv:1804.10959); T5's and XLNet's tokenizer. A run of characters that no piece
    covers is `unk`, at a score of 10 nats below the smallest for each of them. As in the library
    a special token is a piece like others: a text that spells it gets it.

    Args:
        vocab: the tokens.
        scores: log-probability of each, in nats. Special tokens have 0 by custom.
        unk: the token for unknown characters.

    Raises:
        ValueError: the numbers of tokens and scores differ, or the unknown token is missing.
    """

    kind = "Unigram"

    def __init__(self, vocab: Sequence[str], scores: Sequence[float], unk: str = "<unk>") -> None:
        super().__init__(vocab)
        if len(scores) != len(self):
            raise ValueError(f"there are {len(self)} tokens, but {len(scores)} scores")
        if unk not in self.ids:
            raise ValueError(f"the vocabulary lacks the unknown token {unk!r}")
        self.scores = [float(score) for score in scores]
        self.unk = unk
        self._score_of = dict(zip(self.vocab, self.scores, strict=True))
        self._unk_score = min(self.scores) - 10
        self._longest = max(map(len, self.vocab))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        specials: Sequence[str] = ("<unk>",),
        *,
        n_seeds: int | None = None,
        max_length: int = 16,
        n_em: int = 2,
        keep: float = 0.75,
    ) -> "Unigram":
        """Start with too many pieces; fit their probabilities and drop the least useful, in turn.

        Kudo, 2018, section 3.2. A single character is never dropped.

        Args:
            texts: the corpus.
            vocab_size: tokens in the end, or fewer where the corpus has not so many pieces.
            specials: tokens at the head of the vocabulary, of score 0.
            n_seeds: pieces to start with; eight times the vocabulary unless given.
            max_length: of a piece, in characters.
            n_em: rounds of EM before each pruning.
            keep: share of the pieces that a pruning leaves.

        Raises:
            ValueError: there is no word, the vocabulary is smaller than the alphabet, or `keep` is
                no share.
        """
        if not 0 < keep < 1:
            raise ValueError(f"a pruning keeps a share between 0 and 1, got {keep}")
        counts = cls._count(texts)
        _start(specials, set().union(*counts), vocab_size)
        target = vocab_size - len(specials)
        scores = seed_pieces(counts, n_seeds or 8 * vocab_size, max_length)
        while True:
            for _ in range(n_em):
                scores, _ = em_step(counts, scores)
            if len(scores) <= target:
                break
            scores = prune(counts, scores, max(target, int(keep * len(scores))))
        # A character that no word needs on its own would be all but impossible in a new word: it
        # counts as half a use in as many as there are characters.
        floor = math.log(0.5 / sum(n * len(word) for word, n in counts.items()))
        ranked = sorted(scores, key=lambda piece: (-scores[piece], piece))
        values = [max(scores[piece], floor) for piece in ranked]
        return cls([*specials, *ranked], [0.0] * len(specials) + values)

    words = staticmethod(space_words)

    def pieces(self, word: str) -> list[str]:
        cuts = viterbi(word, self._score_of, self._longest, self._unk_score)
        known = [piece if piece in self.ids else self.unk for piece in cuts]
        return [
            p
            for p, before in zip(known, [None, *known], strict=False)
            if not p == before == self.unk
        ]

    @staticmethod
    def join(tokens: Sequence[str]) -> str:
        return _join_spaces(tokens)

    def to_tokenizers(self) -> tokenizers.Tokenizer:
        pairs = list(zip(self.vocab, self.scores, strict=True))
        theirs = tokenizers.Tokenizer(models.Unigram(pairs, unk_id=self.ids[self.unk]))
        theirs.pre_tokenizer = pre_tokenizers.Metaspace()
        theirs.decoder = decoders.Metaspace()
        return theirs

    @classmethod
    def _from_model(cls, model: Mapping[str, Any]) -> "Unigram":
        vocab, scores = zip(*model["vocab"], strict=True)
        return cls(vocab, scores, vocab[model["unk_id"]])


def viterbi(word: str, scores: Scores, longest: int, unk_score: float | None = None) -> list[str]:
    """The best segmentation of a word; of equally good ones, that with the longest last piece.

    Args:
        word: the characters to be cut.
        scores: log-probability of each piece, in nats.
        longest: characters in the longest piece.
        unk_score: of a single character that is no piece; None if there is no such character.

    Returns:
        The pieces, from left to right; empty if the word cannot be cut.
    """
    best = [0.0] + [-math.inf] * len(word)  # best[end]: the score of the best cut of word[:end]
    came_from = [0] * (len(word) + 1)
    for start in range(len(word)):
        for end in range(start + 1, min(start + longest, len(word)) + 1):
            score = scores.get(word[start:end], unk_score if end == start + 1 else None)
            if score is not None and best[start] + score > best[end]:
                best[end] = best[start] + score
                came_from[end] = start
    if best[-1] == -math.inf:
        return []
    pieces, end = [], len(word)
    while end:
        pieces.append(word[came_from[end] : end])
        end = came_from[end]
    return pieces[::-1]


def seed_pieces(counts: Mapping[str, int], n_seeds: int, max_length: int = 16) -> Scores:
    """The characters, and the substrings that cover most of the corpus, as log-probabilities.

    A longer substring must occur at least twice; it covers its number of occurrences times its
    length. Characters come first: they are all kept.
    """
    found: Counter[str] = Counter()
    for word, n in counts.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + max_length, len(word)) + 1):
                found[word[start:end]] += n
    covers = {s: n * len(s) for s, n in found.items() if n > 1 or len(s) == 1}
    ranked = sorted(covers, key=lambda s: (len(s) > 1, -covers[s], s))
    chosen = ranked[: max(n_seeds, sum(len(s) == 1 for s in ranked))]
    total = sum(covers[s] for s in chosen)
    return {s: math.log(covers[s] / total) for s in chosen}


def em_step(counts: Mapping[str, int], scores: Scores) -> tuple[Scores, float]:
    """Better log-probabilities of the pieces, and the log-likelihood of the words under the old.

    E: how often is each piece expected to be used, over all segmentations of all words? M: its new
    probability is its share of these uses. The log-likelihood, in nats, never falls from one step
    to the next (Dempster et al., 1977).

    Raises:
        ValueError: a word cannot be cut into these pieces.
    """
    longest = max(map(len, scores))
    expected = dict.fromkeys(scores, 0.0)
    log_likelihood = 0.0
    for word, n in counts.items():
        edges = [
            (start, end, scores[word[start:end]])
            for start in range(len(word))
            for end in range(start + 1, min(start + longest, len(word)) + 1)
            if word[start:end] in scores
        ]
        forward = _log_sums(edges, len(word))  # of all cuts of word[:i]
        turned = [(len(word) - end, len(word) - start, score) for start, end, score in edges]
        backward = _log_sums(sorted(turned), len(word))[::-1]  # of all cuts of word[i:]
        if forward[-1] == -math.inf:
            raise ValueError(f"the word {word!r} cannot be cut into the given pieces")
        for start, end, score in edges:
            share = math.exp(forward[start] + score + backward[end] - forward[-1])
            expected[word[start:end]] += n * share
        log_likelihood += n * forward[-1]
    total = sum(expected.values())
    tiny = 1e-300  # in place of zero, which has no logarithm
    return {s: math.log(max(e / total, tiny)) for s, e in expected.items()}, log_likelihood


def _log_sums(edges: Sequence[tuple[int, int, float]], n: int) -> list[float]:
    """For each place up to n, the log of the summed probability of all paths from 0 to it.

    Args:
        edges: (from, to, log-probability), sorted, from < to.
        n: the last place.
    """
    arriving: list[list[float]] = [[0.0]] + [[] for _ in range(n)]
    sums = []
    edge = 0
    for place in range(n + 1):
        top = max(arriving[place], default=-math.inf)
        if top > -math.inf:
            top += math.log(sum(math.exp(score - top) for score in arriving[place]))
        sums.append(top)
        while edge < len(edges) and edges[edge][0] == place:
            _, end, score = edges[edge]
            arriving[end].append(top + score)
            edge += 1
    return sums


def prune(counts: Mapping[str, int], scores: Scores, size: int) -> Scores:
    """Keep the `size` pieces whose loss would cost the best segmentations most, and all characters.

    The cost of a piece is the number of times that it is used, times what its own best segmentation
    into other pieces scores less. The scores that stay are as before: a round of EM adjusts them.
    """
    longest = max(map(len, scores))
    used: Counter[str] = Counter()
    for word, n in counts.items():
        for piece in viterbi(word, scores, longest):
            used[piece] += n

    def cost(piece: str) -> float:
        if len(piece) == 1:
            return math.inf
        others = viterbi(piece, scores, len(piece) - 1)
        return used[piece] * (scores[piece] - sum(scores[other] for other in others))

    ranked = sorted(scores, key=lambda piece: (-cost(piece), -scores[piece], piece))
    return {piece: scores[piece] for piece in ranked[:size]}
