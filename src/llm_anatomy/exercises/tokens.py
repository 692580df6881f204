"""Exercises of the chapter "Tokens, embeddings and logits".

What is compared with: all segmentations one by one, autograd, loops over pairs in float64, or
torch's own routines.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_anatomy.exercises._engine import (
    Case,
    Chapter,
    Exercise,
    Mistake,
    case,
    normal,
    same_function,
    same_value,
)

# --- One merge -----------------------------------------------------------------------------------


def _merge(symbols: Sequence[str], pair: tuple[str, str], how: str = "left") -> list[str]:
    """Merge by the sequence of places where a pair may start, with any of several mistakes."""
    found = [
        i
        for i, two in enumerate(itertools.pairwise(symbols))
        if two == pair
        or (how == "either order" and two[::-1] == pair)
        or (how == "by text" and "".join(two) == "".join(pair))
    ]
    if how == "repeated":
        return ["".join(symbols[i : i + 2]) if i in found else s for i, s in enumerate(symbols)]
    starts: list[int] = []
    for i in reversed(found) if how == "right" else found:
        if all(abs(i - other) > 1 for other in starts):
            starts.append(i)
    if how == "first":
        starts = starts[:1]
    return [
        "".join(symbols[i : i + 2]) if i in starts else symbols[i]
        for i in range(len(symbols))
        if i - 1 not in starts
    ]


MERGE_PAIR = Exercise(
    name="merge_pair",
    title="One merge",
    level=1,
    minutes=6,
    task=r"""
One step of byte-pair encoding on one word: put the joined symbol wherever the pair stands, from
left to right. A symbol takes part in one merge at most, so `a a a` with the pair `(a, a)` becomes
`aa a`.
""",
    stub='''
def merge_pair(symbols: tuple[str, ...], pair: tuple[str, str]) -> list[str]:
    """The word's symbols after the merge."""
    raise NotImplementedError
''',
    hints=(
        "Walk through the word with an index. What do you append, and how far do you step, if the "
        "pair stands here, and if it does not?",
        "If this symbol and the next are the pair, append the two joined and step by two; otherwise"
        " append this symbol and step by one. At the last symbol there is no next one.",
    ),
    solution='''
def merge_pair(symbols: tuple[str, ...], pair: tuple[str, str]) -> list[str]:
    """The word's symbols after the merge."""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged
''',
    why="The slice of two symbols equals the pair only if both are there, so the end of the word "
    "needs no case of its own. Stepping by two is what keeps a symbol out of two merges. The pair "
    "is compared symbol by symbol: lo + w and l + ow write the same text and are different pairs.",
    point="Training and encoding are this one step, repeated: only the choice of the pair differs.",
    check=same_function(
        _merge,
        [
            case("n e w e s t, (e, s)", tuple("newest"), ("e", "s")),
            case("a a a b a a, (a, a)", tuple("aaabaa"), ("a", "a")),
            case("lo w l ow, (l, ow)", ("lo", "w", "l", "ow"), ("l", "ow")),
            case("l o w o l o, (l, o)", tuple("lowolo"), ("l", "o")),
            case("b a a a, (a, a)", tuple("baaa"), ("a", "a")),
        ],
        [
            Mistake(
                "Only the first place is merged. The pair may stand in a word several times.",
                lambda *a: _merge(*a, "first"),
            ),
            Mistake(
                "It goes from right to left: where pairs overlap, the left one comes first.",
                lambda *a: _merge(*a, "right"),
            ),
            Mistake(
                "The right part of the pair is still there after the merge: after a merge the "
                "step is two.",
                lambda *a: _merge(*a, "repeated"),
                hint=2,
            ),
            Mistake(
                "Symbols are merged because their text is that of the pair. Compare the two "
                "symbols, one by one.",
                lambda *a: _merge(*a, "by text"),
            ),
            Mistake(
                "The pair is also merged the other way round. A pair has an order.",
                lambda *a: _merge(*a, "either order"),
            ),
            Mistake(
                "Nothing is merged: these are the symbols as they came.",
                lambda symbols, pair: list(symbols),
            ),
        ],
    ),
)


# --- Which pair ----------------------------------------------------------------------------------


def _count_pairs(counts: Mapping[str, int], how: str = "") -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, n in counts.items():
        found = list(itertools.pairwise(word.split()))
        for pair in set(found) if how == "once a word" else found:
            pairs[pair] += 1 if how == "types" else n
    if how == "across":
        text = " ".join(" ".join([word] * n) for word, n in counts.items())
        pairs = Counter(itertools.pairwise(text.split()))
    return pairs


def _best(counts: Mapping[str, int], how: str = "") -> tuple[str, str]:
    pairs = _count_pairs(counts, how)
    if how == "rarest":
        return min(pairs, key=lambda pair: pairs[pair])
    if how == "association":
        symbols: Counter[str] = Counter()
        for word, n in counts.items():
            for symbol in word.split():
                symbols[symbol] += n
        return max(pairs, key=lambda p: pairs[p] / (symbols[p[0]] * symbols[p[1]]))
    return max(pairs, key=lambda pair: pairs[pair])


_WORDS = (
    {"l o w": 5, "l o w e r": 2, "n e w e s t": 6, "w i d e s t": 4, "l e s s": 1},
    {"a b a b a b": 2, "b c": 5, "c d e": 3, "x e d": 1},
    {"t h e": 9, "q u i t": 4, "t h q u": 1, "h e h e h e h e": 1, "o h e n": 2},
    {"r e": 2, "e r": 3, "e r s": 2, "r e d": 1, "r e n": 1, "t e r": 1, "t o": 7},
    {"m n": 6, "n m": 5, "m m": 4, "o p": 8, "p o": 1, "k p": 1},
    {"a b": 5, "c d": 1, "e c d": 1, "c d f": 1},
)

BEST_PAIR = Exercise(
    name="best_pair",
    title="Which pair is merged next?",
    level=1,
    minutes=6,
    task=r"""
A corpus is given as its words, each written as symbols with spaces between them, and how often the
word occurs: `{"l o w": 5, "n e w e s t": 6}`. Return the pair of neighbouring symbols that occurs
most often **in the corpus**. No pair reaches across two words.
""",
    stub='''
def best_pair(counts: dict[str, int]) -> tuple[str, str]:
    """The most frequent pair of neighbours, as (left, right)."""
    raise NotImplementedError
''',
    hints=(
        "A word that occurs six times contributes each of its pairs six times. Where do you keep "
        "the sums?",
        "A dictionary from pair to number: for each word, split it, walk over symbol and next "
        "symbol, and add the word's count, once for every place. Then take the largest.",
    ),
    solution='''
def best_pair(counts: dict[str, int]) -> tuple[str, str]:
    """The most frequent pair of neighbours, as (left, right)."""
    pairs = {}
    for word, count in counts.items():
        symbols = word.split()
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] = pairs.get(pair, 0) + count
    return max(pairs, key=pairs.get)
''',
    why="Counting words first and pairs second is what makes training affordable: a corpus has "
    "far fewer different words than words. The order of a pair matters, and a pair that stands "
    "in a word twice counts twice.",
    point="BPE is greedy: it takes the most frequent pair now, whatever this does later.",
    check=same_function(
        _best,
        [case(f"corpus {i}", words) for i, words in enumerate(_WORDS, start=1)],
        [
            Mistake(
                "Every word counts once. A frequent word must count as often as it occurs.",
                lambda c: _best(c, "types"),
            ),
            Mistake(
                "A pair that stands in a word several times is counted once there.",
                lambda c: _best(c, "once a word"),
            ),
            Mistake(
                "Pairs reach across the end of a word.",
                lambda c: _best(c, "across"),
            ),
            Mistake(
                "The pair is scored by association, count over the product of the parts' counts. "
                "That is another rule; BPE takes the plain count.",
                lambda c: _best(c, "association"),
            ),
            Mistake(
                "This is the rarest pair, not the most frequent one.", lambda c: _best(c, "rarest")
            ),
            Mistake(
                "The right pair, with left and right exchanged.",
                lambda c: _best(c)[::-1],
            ),
        ],
        names=("left", "right"),
    ),
)


# --- Longest match -------------------------------------------------------------------------------


def _cuts(word: str) -> Iterator[list[str]]:
    """All ways to cut a word."""
    for inside in itertools.product((False, True), repeat=len(word) - 1):
        places = [0, *(i for i, cut in enumerate(inside, start=1) if cut), len(word)]
        yield [word[a:b] for a, b in itertools.pairwise(places)]


def _marked(pieces: Sequence[str]) -> list[str]:
    return [*pieces[:1], *("##" + piece for piece in pieces[1:])]


def _by_list(word: str, vocab: frozenset[str]) -> list[str]:
    """Greedy matching, where each step lists all pieces that fit."""
    done: list[str] = []
    rest = word
    while rest:
        known = [
            rest[:n] for n in range(1, len(rest) + 1) if ("##" if done else "") + rest[:n] in vocab
        ]
        if not known:
            return ["[UNK]"]
        done, rest = [*done, known[-1]], rest[len(known[-1]) :]
    return _marked(done)


def _match(word: str, vocab: frozenset[str], how: str) -> list[str]:
    """Greedy matching with any of several mistakes."""
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = "##" if start and "plain" not in how else ""
        lengths = range(1, len(word) - start + 1)
        known = [n for n in lengths if mark + word[start : start + n] in vocab]
        if not known:
            if how == "one by one":
                pieces.append("[UNK]")
                start += 1
                continue
            return [*pieces, "[UNK]"] if how == "rest" else ["[UNK]"]
        n = known[0] if how == "shortest" else known[-1]
        pieces.append(("##" if start and "unmarked" not in how else "") + word[start : start + n])
        start += n
    return pieces


def _fewest(word: str, vocab: frozenset[str]) -> list[str]:
    known = [cut for cut in map(_marked, _cuts(word)) if vocab.issuperset(cut)]
    return min(known, key=len, default=["[UNK]"])


_FIRST = ("un", "able", "a", "b", "l", "e", "u", "n", "ab", "abc", "play", "ing", "ed")
_INSIDE = ("able", "a", "b", "l", "e", "n", "c", "d", "cde", "ing", "in", "g", "i", "ed")
_PIECES = frozenset([*_FIRST, *(f"##{piece}" for piece in _INSIDE)])

LONGEST_MATCH = Exercise(
    name="longest_match",
    title="Longest match first",
    level=2,
    minutes=10,
    task=r"""
WordPiece cuts a word without merges: take the longest piece of the vocabulary that the word begins
with, then the longest for what is left, and so on. A piece that does not start the word is looked
up, and returned, with `##` in front. If somewhere no piece fits, the **whole word** is `["[UNK]"]`.
""",
    stub='''
def longest_match(word: str, vocab: frozenset[str]) -> list[str]:
    """The pieces of a word, as BERT's tokenizer finds them."""
    raise NotImplementedError
''',
    hints=(
        "Two loops: the outer one moves the start of the piece, the inner one tries the ends from "
        "the last character backwards.",
        "For each end, build the candidate, with ## unless it starts the word, and stop at the "
        "first that is in the vocabulary. If the inner loop finds none, the answer is the unknown "
        "token alone, whatever was found before.",
    ),
    solution='''
def longest_match(word: str, vocab: frozenset[str]) -> list[str]:
    """The pieces of a word, as BERT's tokenizer finds them."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces
''',
    why="Greedy matching never goes back: after abc it cannot return to ab, even where ab + ##cde "
    "would cover the word in fewer pieces, and a dead end makes the whole word unknown. It needs "
    "the vocabulary alone, not the order in which it was learned.",
    point="The same vocabulary cut by merges and by longest match may give different pieces.",
    check=same_function(
        _by_list,
        [
            case(f'"{word}"', word, _PIECES)
            for word in ("unable", "playing", "abcde", "abcce", "played", "playxed", "abl", "uning")
        ],
        [
            Mistake(
                "The shortest piece is taken first; it is the longest that counts.",
                lambda *a: _match(*a, "shortest"),
            ),
            Mistake(
                "The pieces inside the word are returned without ##.",
                lambda *a: _match(*a, "unmarked"),
            ),
            Mistake(
                "Pieces inside the word are looked up without ##. The vocabulary keeps the two "
                "kinds apart.",
                lambda *a: _match(*a, "plain"),
            ),
            Mistake(
                "There is no ## anywhere: inside a word a piece is looked up and returned with it.",
                lambda *a: _match(*a, "plain unmarked"),
            ),
            Mistake(
                "The pieces before the dead end are kept. One dead end makes the whole word "
                "unknown.",
                lambda *a: _match(*a, "rest"),
                hint=2,
            ),
            Mistake(
                "A character that fits nothing becomes [UNK] on its own, and the rest is cut on. "
                "One dead end makes the whole word unknown.",
                lambda *a: _match(*a, "one by one"),
                hint=2,
            ),
            Mistake(
                "This is the cut with the fewest pieces. Longest match never goes back to try.",
                _fewest,
            ),
        ],
    ),
)


# --- Bytes ---------------------------------------------------------------------------------------

COUNT_BYTES = Exercise(
    name="count_bytes",
    title="Bytes and a vocabulary",
    level=1,
    minutes=4,
    task=r"""
Predict three numbers. How many tokens does a byte-level BPE **without any merge** make of `杭州`,
and of `café` (written with one character é)? And how large is the vocabulary of a byte-level BPE
with 1000 merges and one special token, if every merge gives a new token?
""",
    stub="""
count_bytes = (
    ...,  # tokens in "杭州" without merges
    ...,  # tokens in "café" without merges
    ...,  # tokens in the vocabulary
)
""",
    hints=(
        "Without merges every byte of the UTF-8 text is a token. How many bytes have a letter of "
        "ASCII, a letter with an accent, and a Chinese character?",
        "One byte for ASCII, two for é, three for each of these Chinese characters. The vocabulary "
        "starts with all values of a byte, and each merge adds one token.",
    ),
    solution="""
count_bytes = (
    len("杭州".encode("utf-8")),
    len("café".encode("utf-8")),
    256 + 1000 + 1,
)
""",
    why="UTF-8 writes code points below 128 in one byte, up to 2047 in two, and up to 65535, where "
    "the common Chinese characters are, in three. A byte has 256 values, so any text can be "
    "written with 256 symbols and nothing is unknown. GPT-2 has 256 + 50 000 + 1 = 50 257.",
    point="A byte-level vocabulary starts at 256 and never meets an unknown character.",
    check=same_value(
        (6, 5, 1257),
        [
            Mistake(
                "Two is the number of characters. A token without merges is a byte.",
                when=lambda got, _: got[0] == 2,
            ),
            Mistake(
                "Two bytes a character is UTF-16. UTF-8 writes these characters in three.",
                when=lambda got, _: got[0] == 4,
            ),
            Mistake(
                "Four bytes a character is UTF-32. UTF-8 is shorter here.",
                when=lambda got, _: got[0] == 8,
            ),
            Mistake(
                "The é counts as one byte. It is not ASCII.",
                when=lambda got, _: got[1] == 4,
            ),
            Mistake(
                "All four letters of café are counted alike. Three of them are ASCII.",
                when=lambda got, _: got[1] in (8, 12, 16),
            ),
            Mistake(
                "Only what training adds is counted. The 256 bytes are tokens too.",
                when=lambda got, _: got[2] in (1000, 1001),
            ),
            Mistake("The special token is missing.", when=lambda got, _: got[2] == 1256),
            Mistake(
                "A byte has 256 values, from 0 to 255.",
                when=lambda got, _: got[2] in (1255, 1128, 1129),
            ),
        ],
        rtol=0.0,
    ),
)


# --- The best segmentation -----------------------------------------------------------------------


def _scored(word: str, scores: Mapping[str, float]) -> list[tuple[float, list[str]]]:
    cuts = [cut for cut in _cuts(word) if all(piece in scores for piece in cut)]
    return [(sum(scores[piece] for piece in cut), cut) for cut in cuts]


def _greedy_score(word: str, scores: Mapping[str, float], start: int = 0) -> float:
    if start == len(word):
        return 0.0
    end = max(e for e in range(start + 1, len(word) + 1) if word[start:e] in scores)
    return scores[word[start:end]] + _greedy_score(word, scores, end)


def _log(**p: float) -> dict[str, float]:
    return {piece: math.log(x) for piece, x in p.items()}


_UNIGRAMS = (
    ("hugs", _log(h=0.05, u=0.1, g=0.1, s=0.2, hu=0.15, hug=0.02, ug=0.2, gs=0.18)),
    ("abab", _log(a=0.3, b=0.25, ab=0.08, ba=0.3, aba=0.01, bab=0.06)),
    ("banana", _log(b=0.1, a=0.2, n=0.1, an=0.22, na=0.2, ana=0.05, ban=0.12, nana=0.001)),
    ("lowest", _log(l=0.1, o=0.1, w=0.1, e=0.2, s=0.1, t=0.1, low=0.05, est=0.03, es=0.2, lo=0.02)),
)

BEST_SCORE = Exercise(
    name="best_score",
    title="The best of all segmentations",
    level=3,
    minutes=15,
    task=r"""
A Unigram tokenizer gives every piece a log-probability. The score of a segmentation is the sum over
its pieces. A word of $n$ characters has $2^{n-1}$ segmentations; find the **highest score** without
listing them. Every single character is a piece.
""",
    stub='''
def best_score(word: str, scores: dict[str, float]) -> float:
    """The highest summed log-probability of any segmentation of the word."""
    raise NotImplementedError
''',
    hints=(
        "Let best[e] be the highest score of the first e characters. The last piece of the best "
        "segmentation starts somewhere. What is left in front of it?",
        "best[0] is 0. For each end, try every start before it whose piece has a score: the "
        "candidate is best[start] plus that score. Keep the largest.",
    ),
    solution='''
def best_score(word: str, scores: dict[str, float]) -> float:
    """The highest summed log-probability of any segmentation of the word."""
    best = [0.0]
    for end in range(1, len(word) + 1):
        candidates = [
            best[start] + scores[word[start:end]]
            for start in range(end)
            if word[start:end] in scores
        ]
        best.append(max(candidates))
    return best[-1]
''',
    why="Whatever the last piece is, the part before it must itself be cut in the best way: so one "
    "number for each prefix is enough, and the work grows with the square of the length instead of "
    "doubling with every character. This is the Viterbi algorithm. With a sum of exponentials in "
    "place of the maximum it gives the likelihood, which training needs.",
    point="Unigram looks at all segmentations at the cost of a table with one entry per prefix.",
    check=same_function(
        lambda word, scores: max(score for score, _ in _scored(word, scores)),
        [case(f'"{word}"', word, scores) for word, scores in _UNIGRAMS],
        [
            Mistake(
                "This takes the longest piece first. A longer piece may be improbable.",
                _greedy_score,
            ),
            Mistake(
                "This is the log of the sum over all segmentations, the likelihood of the word. "
                "The best one alone is asked for.",
                lambda word, scores: math.log(sum(math.exp(s) for s, _ in _scored(word, scores))),
            ),
            Mistake(
                "This is the segmentation with the fewest pieces, not with the highest score.",
                lambda word, scores: max(
                    (-len(cut), score) for score, cut in _scored(word, scores)
                )[1],
            ),
            Mistake(
                "The word is cut into single characters.",
                lambda word, scores: sum(scores[c] for c in word),
            ),
            Mistake(
                "This is a probability. The score is its logarithm.",
                lambda word, scores: math.exp(max(score for score, _ in _scored(word, scores))),
            ),
            Mistake(
                "This is the lowest score of all segmentations: the sign or the comparison is "
                "turned round.",
                lambda word, scores: min(score for score, _ in _scored(word, scores)),
            ),
            Mistake(
                "The score is divided by the number of pieces. It is their sum.",
                lambda word, scores: max(score / len(cut) for score, cut in _scored(word, scores)),
            ),
        ],
        rtol=1e-6,
    ),
)


# --- The table's gradient ------------------------------------------------------------------------


def _table_gradient(ids: Tensor, top: Tensor, vocab_size: int) -> Tensor:
    table = torch.zeros(vocab_size, top.shape[1], dtype=torch.float64, requires_grad=True)
    F.embedding(ids, table).backward(top.double())
    return table.grad.float()


def _repeats(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.bincount(ids, minlength=vocab_size)[:, None]


def _one_of_repeated(ids: Tensor, top: Tensor, vocab_size: int, *, last: bool) -> Tensor:
    gradient = torch.zeros(vocab_size, top.shape[1])
    for t in range(len(ids)) if last else reversed(range(len(ids))):
        gradient[ids[t]] = top[t]
    return gradient


EMBEDDING_GRADIENT = Exercise(
    name="embedding_gradient",
    title="Which rows does a batch train?",
    level=2,
    minutes=8,
    task=r"""
A text of $T$ tokens reads its rows from a table of shape $(V, D)$: output $t$ is row `ids[t]`. The
loss has the gradient `top` with respect to these outputs. Return its gradient with respect to the
**table**, without `autograd` or `backward`.
""",
    stub='''
def embedding_gradient(
    ids: Int[Tensor, "T"], top: Float[Tensor, "T D"], vocab_size: int
) -> Float[Tensor, "V D"]:
    """Gradient of the loss with respect to the table."""
    raise NotImplementedError
''',
    hints=(
        "Reading a row is multiplying by a one-hot vector. What is the gradient of x W with "
        "respect to W? And what if a token stands in the text twice?",
        "The gradient is the transposed one-hot matrix times `top`: each row sums what arrives at "
        "the places of its token. Rows of absent tokens stay zero.",
    ),
    solution='''
def embedding_gradient(
    ids: Int[Tensor, "T"], top: Float[Tensor, "T D"], vocab_size: int
) -> Float[Tensor, "V D"]:
    """Gradient of the loss with respect to the table."""
    one_hot = F.one_hot(ids, vocab_size).to(top.dtype)  # (T, V)
    return one_hot.T @ top
''',
    why="The outputs are one_hot @ table, so the gradient of the table is one_hot transposed times "
    "the gradient of the outputs. Writing gradient[ids] = top, or even +=, keeps one of the "
    "repeated tokens only: torch does not add up repeated indices there. index_add does.",
    point="A token that is not in the batch gets no gradient, and a token that is there twice gets "
    "the sum.",
    check=same_function(
        _table_gradient,
        lambda: [
            case(f"T={len(ids)}, V={V}, D={D}", torch.tensor(ids), normal(len(ids), D, seed=s), V)
            for ids, V, D, s in (
                ([1, 4, 1, 2], 6, 3, 610),
                ([0, 2, 2, 2, 5, 0, 7], 9, 4, 620),
                ([3, 1, 0], 5, 2, 630),
            )
        ],
        [
            Mistake(
                "Of a token that stands in the text several times only the last place counts. An "
                "assignment, and += as well, keeps one of them.",
                lambda *a: _one_of_repeated(*a, last=True),
            ),
            Mistake(
                "Of a token that stands in the text several times only the first place counts.",
                lambda *a: _one_of_repeated(*a, last=False),
            ),
            Mistake(
                "The places of a repeated token are averaged. Gradients add up.",
                lambda ids, top, V: _table_gradient(ids, top, V) / _repeats(ids, V).clamp(min=1),
            ),
            Mistake(
                "It is divided by the number of tokens. `top` already is the gradient of the loss.",
                lambda ids, top, V: _table_gradient(ids, top, V) / len(ids),
            ),
            Mistake(
                "The sum over all places goes to every row. A row gets what arrives at its own.",
                lambda ids, top, V: top.sum(0).expand(V, -1),
            ),
            Mistake(
                "The gradients stand in the order of the places. Row i belongs to token i.",
                lambda ids, top, V: F.pad(top, (0, 0, 0, V - len(ids))),
            ),
        ],
    ),
)


# --- Skip-gram -----------------------------------------------------------------------------------


def _skip_gram(word: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy: the context is labelled 1, the negatives 0."""
    logits = torch.cat([context[None], negatives]).double() @ word.double()
    labels = torch.zeros_like(logits)
    labels[0] = 1
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum").float()


SKIP_GRAM_LOSS = Exercise(
    name="skip_gram_loss",
    title="One pair against its negatives",
    level=2,
    minutes=8,
    task=r"""
Skip-gram with negative sampling asks of every pair: was it seen together, or was the context drawn
at random? The probability of "seen" is $\sigma(w \cdot c)$. Return the negative log-likelihood, in
nats, of one word $w$ with one context that **was** seen and $K$ contexts that were **drawn**:
the sum over all $1 + K$ answers.
""",
    stub='''
def skip_gram_loss(
    word: Float[Tensor, "D"], context: Float[Tensor, "D"], negatives: Float[Tensor, "K D"]
) -> Float[Tensor, ""]:
    """Loss of one seen pair and its K drawn ones."""
    raise NotImplementedError
''',
    hints=(
        "The seen pair should be answered yes, the others no. If yes has the probability of a "
        "sigmoid, what is the probability of no?",
        "One minus the sigmoid of x is the sigmoid of minus x. Take F.logsigmoid of the product "
        "for the seen pair, and of minus the product for each drawn one; add up; change the sign.",
    ),
    solution='''
def skip_gram_loss(
    word: Float[Tensor, "D"], context: Float[Tensor, "D"], negatives: Float[Tensor, "K D"]
) -> Float[Tensor, ""]:
    """Loss of one seen pair and its K drawn ones."""
    yes = F.logsigmoid(context @ word)
    no = F.logsigmoid(-(negatives @ word))  # (K,)
    return -(yes + no.sum())
''',
    why="A softmax over the vocabulary would need all V products for each pair; 1 + K yes-or-no "
    "questions need 1 + K. logsigmoid is stable where log of sigmoid would be log of zero. The "
    "negatives are summed, not averaged: K is part of the objective and shifts its optimum.",
    point="Each pair costs 1 + K products, whatever the size of the vocabulary.",
    check=same_function(
        _skip_gram,
        lambda: [
            case(
                f"D={D}, K={K}", normal(D, seed=s), normal(D, seed=s + 1), normal(K, D, seed=s + 2)
            )
            for D, K, s in ((3, 2, 640), (5, 7, 650), (4, 3, 660))
        ],
        [
            Mistake(
                "The drawn contexts are answered yes as well: their sign is missing.",
                lambda w, c, n: -(F.logsigmoid(c @ w) + F.logsigmoid(n @ w).sum()),
            ),
            Mistake(
                "The drawn contexts are averaged. The loss is the sum over all answers.",
                lambda w, c, n: -(F.logsigmoid(c @ w) + F.logsigmoid(-(n @ w)).mean()),
            ),
            Mistake(
                "This is the log-likelihood. A loss is its negative.",
                lambda w, c, n: F.logsigmoid(c @ w) + F.logsigmoid(-(n @ w)).sum(),
            ),
            Mistake(
                "This is a softmax over the context and the negatives. Here each pair is a "
                "yes-or-no question of its own.",
                lambda w, c, n: -F.log_softmax(torch.cat([c[None], n]) @ w, dim=0)[0],
            ),
            Mistake(
                "The drawn contexts are missing: without them every product may grow for ever.",
                lambda w, c, n: -F.logsigmoid(c @ w),
            ),
            Mistake(
                "Yes and no are exchanged: the seen pair is answered no.",
                lambda w, c, n: -(F.logsigmoid(-(c @ w)) + F.logsigmoid(n @ w).sum()),
            ),
            Mistake(
                "Probabilities are added instead of their logarithms.",
                lambda w, c, n: -((c @ w).sigmoid() + (-(n @ w)).sigmoid().sum()),
            ),
            Mistake(
                "The average over the 1 + K answers is taken. The sum is asked for.",
                lambda w, c, n: _skip_gram(w, c, n) / (1 + len(n)),
            ),
        ],
    ),
)


def _pmi(counts: Tensor, k: int, *, base: str = "pmi") -> Tensor:
    rows, columns = counts.sum(1, keepdim=True), counts.sum(0, keepdim=True)
    log = {
        "pmi": (counts * counts.sum() / (rows * columns)).log(),
        "unscaled": (counts / (rows * columns)).log(),
        "conditional": (counts / rows).log(),
        "joint": (counts / counts.sum()).log(),
        "counts": counts.log(),
    }[base]
    return log - math.log(k)


def _best_products_by_search(counts: Tensor, k: int) -> Tensor:
    """Newton's method on the objective of each cell, which is convex in the product."""
    p = counts.double() / counts.sum()
    q = k * torch.outer(p.sum(1), p.sum(0))
    x = torch.zeros_like(p)
    for _ in range(100):
        s = x.sigmoid()
        x = x - ((p + q) * s - p) / ((p + q) * s * (1 - s))
    return x.float()


BEST_PRODUCTS = Exercise(
    name="best_products",
    title="What skip-gram converges to",
    level=3,
    minutes=15,
    task=r"""
`counts[i, j]` says how often word $i$ was seen with context $j$. With $K$ negatives for each seen
pair, drawn in proportion to how often a context occurs, the expected loss is

$$\begin{aligned} -\sum_{ij} \big[\, & p_{ij} \log \sigma(x_{ij}) \\
& + K\, p_i\, p_j \log \sigma(-x_{ij}) \,\big] , \end{aligned}$$

where $p_{ij}$ is the share of the pair among all pairs, $p_i$ and $p_j$ are the shares of its word
and of its context, and $x_{ij} = w_i \cdot c_j$. With enough dimensions every $x_{ij}$ is free.
Derive the best $x$ from the counts, all of which are positive.
""",
    stub='''
def best_products(counts: Float[Tensor, "V S"], k: int) -> Float[Tensor, "V S"]:
    """The products w · c at the minimum of the expected loss."""
    raise NotImplementedError
''',
    hints=(
        "Every x has its own two terms. Set the derivative to zero; the derivative of the log of "
        "a sigmoid is the sigmoid of the negative.",
        "The condition is: sigmoid(x) is p_ij divided by p_ij plus K p_i p_j. So e to the x is the "
        "ratio of the two. Write the shares with the sums of rows and columns and the total.",
    ),
    solution='''
def best_products(counts: Float[Tensor, "V S"], k: int) -> Float[Tensor, "V S"]:
    """The products w · c at the minimum of the expected loss."""
    total = counts.sum()
    words = counts.sum(dim=1, keepdim=True)  # (V, 1)
    contexts = counts.sum(dim=0, keepdim=True)  # (1, S)
    return torch.log(counts * total / (words * contexts)) - math.log(k)
''',
    why="Setting p σ(-x) = K p_i p_j σ(x) gives e^x = p / (K p_i p_j): the pointwise mutual "
    "information less log K (Levy and Goldberg, 2014). So word2vec and a table of counts answer "
    "the same question; few dimensions make it a low-rank approximation of that table.",
    point="Skip-gram with negative sampling factorises the table of pointwise mutual information.",
    check=same_function(
        _best_products_by_search,
        lambda: [
            case(f"V={V}, S={S}, K={k}", torch.floor(40 * normal(V, S, seed=s).abs()) + 2, k)
            for V, S, k, s in ((3, 4, 2, 670), (5, 3, 5, 680), (4, 6, 3, 690))
        ],
        [
            Mistake(
                "The number of negatives is missing: it shifts every product.",
                lambda c, k: _pmi(c, 1),
            ),
            Mistake(
                "log K has the wrong sign: more negatives push the products down.",
                lambda c, k: _pmi(c, k) + 2 * math.log(k),
            ),
            Mistake(
                "The total number of pairs is missing: p_i and p_j are shares, not counts.",
                lambda c, k: _pmi(c, k, base="unscaled"),
                hint=2,
            ),
            Mistake(
                "It is compared with the word's frequency alone. Frequent contexts are drawn as "
                "negatives more often.",
                lambda c, k: _pmi(c, k, base="conditional"),
            ),
            Mistake(
                "This is the log of the pair's share, without what chance would give.",
                lambda c, k: _pmi(c, k, base="joint"),
            ),
            Mistake(
                "This is the log of the raw counts. It is the ratio to chance that counts.",
                lambda c, k: _pmi(c, k, base="counts"),
            ),
            Mistake(
                "The logarithm is missing: this is e to the x.",
                lambda c, k: _pmi(c, k).exp(),
                hint=2,
            ),
            Mistake(
                "This is sigmoid(x), the probability of “seen”. Solve for x.",
                lambda c, k: _pmi(c, k).sigmoid(),
                hint=2,
            ),
            Mistake(
                "These are bits. The sigmoid has e in it, so the logarithm is natural.",
                lambda c, k: _pmi(c, k) / math.log(2),
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


# --- Analogies -----------------------------------------------------------------------------------


def _analogy(
    vectors: Tensor,
    a: int,
    b: int,
    c: int,
    *,
    first: bool = True,
    cosine: bool = True,
    signs: tuple[int, int, int] = (-1, 1, 1),
    exclude: str = "abc",
    distance: bool = False,
) -> int:
    """Search word by word, with any of several mistakes."""
    rows = F.normalize(vectors, dim=1) if first else vectors
    query = sum(sign * rows[i] for sign, i in zip(signs, (a, b, c), strict=True))
    named = {"a": a, "b": b, "c": c}
    best, found = -math.inf, -1
    for i, row in enumerate(rows):
        if i in [named[letter] for letter in exclude]:
            continue
        score = -(row - query).norm() if distance else row @ query
        if cosine:
            score = score / row.norm()
        if score > best:
            best, found = float(score), i
    return found


def _analogy_cases() -> list[Case]:
    """Random tables; in one b lies near a, so that c is near the query, in one c lies near a."""
    a, b, c = 4, 17, 30
    cases = []
    for seed, V, D, near in (
        (700, 40, 3, None),
        (710, 60, 4, b),
        (720, 50, 3, c),
        (730, 80, 5, None),
        (740, 45, 4, None),
    ):
        vectors = normal(V, D, seed=seed)
        if near is not None:
            vectors[near] = vectors[a] + 0.1 * normal(D, seed=seed + 2)
        scale = torch.exp(normal(V, 1, seed=seed + 1))
        cases.append(case(f"V={V}, D={D}", scale * vectors, a, b, c))
    return cases


ANALOGY = Exercise(
    name="analogy",
    title="a is to b as c is to …",
    level=2,
    minutes=10,
    task=r"""
Solve *a is to b as c is to ?* with a table of word vectors. Scale every vector to length 1, form
$b - a + c$, and return the index of the word whose vector has the largest **cosine** with it, the
three words of the question excluded.
""",
    stub='''
def analogy(vectors: Float[Tensor, "V D"], a: int, b: int, c: int) -> int:
    """Index of the word that completes the analogy."""
    raise NotImplementedError
''',
    hints=(
        "After scaling, the cosine with one fixed query is the dot product up to a factor. How do "
        "you keep three words from winning?",
        "F.normalize over the features; the query from three rows; one matrix product for all "
        "similarities; set the entries of a, b and c to minus infinity; argmax; make it an int.",
    ),
    solution='''
def analogy(vectors: Float[Tensor, "V D"], a: int, b: int, c: int) -> int:
    """Index of the word that completes the analogy."""
    unit = F.normalize(vectors, dim=1)
    similarity = unit @ (unit[b] - unit[a] + unit[c])  # (V,)
    similarity[[a, b, c]] = -math.inf
    return int(similarity.argmax())
''',
    why="Without the exclusion the answer is very often c itself, or b: the step b - a is short "
    "beside the distance between words, so the query has not gone far. Published accuracies rest "
    "on the exclusion, which is worth knowing before one reads much into an analogy.",
    point="An analogy is a nearest neighbour of a sum of three vectors, with three words barred.",
    check=same_function(
        _analogy,
        _analogy_cases,
        [
            Mistake(
                "The words of the question may win. Exclude all three.",
                lambda *x: _analogy(*x, exclude=""),
            ),
            Mistake(
                "Only c is excluded. b, and also a, may still win.",
                lambda *x: _analogy(*x, exclude="c"),
            ),
            Mistake(
                "The step goes from b to a. It should lead from a to b, starting at c.",
                lambda *x: _analogy(*x, signs=(1, -1, 1)),
            ),
            Mistake(
                "It adds a and subtracts c. The question is a to b as c to ?",
                lambda *x: _analogy(*x, signs=(1, 1, -1)),
            ),
            Mistake(
                "Nothing is scaled and dot products are compared: long vectors win.",
                lambda *x: _analogy(*x, first=False, cosine=False),
            ),
            Mistake(
                "The vectors are scaled for the comparison only. Scale them before the sum.",
                lambda *x: _analogy(*x, first=False),
            ),
            Mistake(
                "Distances between unscaled vectors are compared, not cosines.",
                lambda *x: _analogy(*x, first=False, cosine=False, distance=True),
            ),
        ],
    ),
)


# --- Logits --------------------------------------------------------------------------------------

LOG_ODDS = Exercise(
    name="log_odds",
    title="From probability to logit and back",
    level=1,
    minutes=5,
    task=r"""
Three numbers, with at least four digits. The logit (log-odds, in nats) of the probability 0.8; the
probability whose logit is $-\ln 3$; and the probability that a softmax gives to the **first** of
two tokens with the logits 2 and 0.
""",
    stub="""
log_odds = (
    ...,  # logit of 0.8
    ...,  # probability with the logit -ln 3
    ...,  # softmax of (2, 0), first entry
)
""",
    hints=(
        "Odds are p to 1 - p. The way back from log-odds to a probability has a name, and the "
        "softmax of two logits depends on one number only.",
        "ln(p / (1 - p)); its inverse is the sigmoid, odds over one plus odds; the softmax of two "
        "logits is the sigmoid of their difference.",
    ),
    solution="""
log_odds = (
    math.log(0.8 / 0.2),
    1 / (1 + math.exp(math.log(3))),
    1 / (1 + math.exp(-2)),
)
""",
    why="Odds of 4 to 1 have the logarithm 1.386. The logit -ln 3 means odds of 1 to 3, which is a "
    "quarter. Dividing both exponentials of the softmax by that of the first logit leaves "
    "1 / (1 + e^(0 - 2)): only the difference matters.",
    point="For two classes softmax is the sigmoid of the difference of the logits.",
    check=same_value(
        (math.log(4), 0.25, 1 / (1 + math.exp(-2))),
        [
            Mistake(
                "These are the odds. The logit is their logarithm.",
                when=lambda got, _: math.isclose(got[0], 4, rel_tol=1e-3),
            ),
            Mistake(
                "This is the log of the probability, not of the odds.",
                when=lambda got, _: math.isclose(got[0], math.log(0.8), rel_tol=1e-2),
            ),
            Mistake(
                "The logit is asked for in nats: the logarithm is natural.",
                when=lambda got, _: any(
                    math.isclose(got[0], x, rel_tol=1e-2) for x in (2, math.log10(4))
                ),
            ),
            Mistake(
                "e to the logit is the odds. The probability is odds over one plus odds.",
                when=lambda got, _: math.isclose(got[1], 1 / 3, rel_tol=1e-2),
            ),
            Mistake(
                "The sign of the second logit is lost: a negative logit is below one half.",
                when=lambda got, _: math.isclose(got[1], 0.75, rel_tol=1e-3),
            ),
            Mistake(
                "The last one is the probability of the second token.",
                when=lambda got, _: math.isclose(got[2], 1 / (1 + math.exp(2)), rel_tol=1e-2),
            ),
            Mistake(
                "The last one divides by the sum without exponentials first.",
                when=lambda got, _: math.isclose(got[2], 1.0, rel_tol=1e-3),
            ),
            Mistake(
                "The last one is an exponential that was not divided by the sum.",
                when=lambda got, _: math.isclose(got[2], math.exp(2), rel_tol=1e-2),
            ),
        ],
        rtol=1e-3,
    ),
)


# --- Perplexity ----------------------------------------------------------------------------------

_BUGS = {
    "axis": "the softmax still runs over the positions, not over the vocabulary",
    "padding": "padding still counts",
    "order": "the exponential is still taken before the mean",
}


def _perplexity(
    logits: Tensor, targets: Tensor, real: Tensor, bugs: tuple[str, ...] = ()
) -> Tensor:
    logp = logits.log_softmax(dim=1 if "axis" in bugs else -1)
    nll = -logp.gather(-1, targets[..., None])[..., 0]
    nll = nll.flatten() if "padding" in bugs else nll[real]
    return nll.exp().mean() if "order" in bugs else nll.mean().exp()


def _perplexity_by_loop(logits: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    total, n = 0.0, 0
    for b, t in real.nonzero().tolist():
        row = logits[b, t].double()
        total += float(torch.logsumexp(row, 0) - row[targets[b, t]])
        n += 1
    return torch.tensor(math.exp(total / n))


def _perplexity_cases() -> list[Case]:
    cases = []
    for lengths, T, V, seed in (((5, 2), 5, 7, 750), ((1, 6, 3), 6, 4, 760), ((4, 3), 7, 9, 770)):
        B = len(lengths)
        targets = normal(B, T, seed=seed + 1).abs().mul(1000).long() % V
        real = torch.arange(T) < torch.tensor(lengths)[:, None]
        cases.append(case(f"B={B}, T={T}, V={V}", 2 * normal(B, T, V, seed=seed), targets, real))
    return cases


def _capital(causes: list[str]) -> str:
    text = " and ".join([", ".join(causes[:-1]), causes[-1]] if len(causes) > 1 else causes)
    return f"{text[0].upper()}{text[1:]}."


_BUGGY = '''
def fix_perplexity(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Perplexity per real token."""
    logp = logits.log_softmax(dim=1)
    nll = -logp.gather(-1, targets[..., None]).squeeze(-1)  # (B, T)
    return nll.exp().mean()
'''

FIX_PERPLEXITY = Exercise(
    name="fix_perplexity",
    title="Three mistakes in a perplexity",
    level=3,
    minutes=12,
    task=r"""
This function should return the perplexity of a batch: $e$ to the mean negative log-probability of
the targets, over all **real** tokens of the batch together. `real` is `False` at padding. It runs,
and returns a number above 1. It contains **three** mistakes. Find and repair them.
""",
    stub=_BUGGY,
    hints=(
        "Ask three questions: which axis must sum to one, which positions are counted, and is the "
        "mean taken of the right thing?",
        "The vocabulary is the last axis. Select the entries of real tokens with the boolean mask. "
        "Take the mean of the logarithms first, and one exponential at the end.",
    ),
    solution='''
def fix_perplexity(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Perplexity per real token."""
    logp = logits.log_softmax(dim=-1)
    nll = -logp.gather(-1, targets[..., None]).squeeze(-1)  # (B, T)
    return nll[real].mean().exp()
''',
    why="The vocabulary is the last axis; over positions the numbers would sum to one as well, "
    "which is why nothing complains. Padding has easy or absurd targets and moves the mean either "
    "way. The mean of exponentials is never below the exponential of the mean (Jensen), so that "
    "version looks worse than the model is, and one impossible token decides it alone.",
    point="Perplexity is the exponential of a mean: over real tokens, of the whole batch.",
    check=same_function(
        _perplexity_by_loop,
        _perplexity_cases,
        [
            Mistake(
                _capital([_BUGS[bug] for bug in bugs]),
                lambda *a, bugs=bugs: _perplexity(*a, bugs),
                untouched=len(bugs) == 3,
            )
            for n in (1, 2, 3)
            for bugs in itertools.combinations(_BUGS, n)
        ]
        + [
            Mistake(
                "The rows' perplexities are averaged. All tokens of the batch count alike.",
                lambda x, y, real: torch.stack(
                    [
                        _perplexity(a[None], b[None], c[None])
                        for a, b, c in zip(x, y, real, strict=True)
                    ]
                ).mean(),
            ),
            Mistake(
                "The sum over real tokens is divided by all positions, padding included.",
                lambda x, y, real: _perplexity(x, y, real).log().mul(real.double().mean()).exp(),
            ),
            Mistake(
                "This is the mean loss. The exponential is missing.",
                lambda *a: _perplexity(*a).log(),
            ),
        ],
    ),
)


# --- Bits per byte -------------------------------------------------------------------------------


def _bits(
    loss: float,
    n_tokens: int,
    text: str,
    *,
    per: Callable[[str], int] = lambda text: len(text.encode()),
    unit: float = math.log(2),
    total: bool = True,
) -> float:
    return loss * (n_tokens if total else 1) / unit / per(text)


BITS_PER_BYTE = Exercise(
    name="bits_per_byte",
    title="A number that two tokenizers can share",
    level=2,
    minutes=6,
    task=r"""
A model's mean loss on a text is `loss` nats per token, over `n_tokens` tokens. Return the loss in
**bits per byte** of the text in UTF-8, which does not depend on the tokenizer.
""",
    stub='''
def bits_per_byte(loss: float, n_tokens: int, text: str) -> float:
    """The loss in bits per byte of the text."""
    raise NotImplementedError
''',
    hints=(
        "How many nats does the model lose on the whole text? Only then ask what to divide by.",
        "Total nats are the mean times the number of tokens. A bit is ln 2 nats. The bytes are the "
        "length of text.encode().",
    ),
    solution='''
def bits_per_byte(loss: float, n_tokens: int, text: str) -> float:
    """The loss in bits per byte of the text."""
    bits = loss * n_tokens / math.log(2)
    return bits / len(text.encode("utf-8"))
''',
    why="The total is what the model says about the text: the negative log of one probability. The "
    "number of tokens belongs to the tokenizer, the number of bytes to the text. So a comparison "
    "of two models with different tokenizers has to divide by something that both share.",
    point="Divide the whole loss by the length of the text, not by the number of your own tokens.",
    check=same_function(
        _bits,
        [
            case("an English text", 2.31, 7, "the lowest newest"),
            case("a Chinese text", 3.4, 5, "杭州是个好地方"),
            case("an accent", 1.7, 3, "a café"),
        ],
        [
            Mistake(
                "It is divided by characters. A character may have several bytes.",
                lambda *a: _bits(*a, per=len),
            ),
            Mistake("These are nats. A bit is ln 2 nats.", lambda *a: _bits(*a, unit=1.0)),
            Mistake(
                "It is multiplied by ln 2. A nat is more than a bit, so the number must grow.",
                lambda *a: _bits(*a, unit=1 / math.log(2)),
            ),
            Mistake(
                "The number of tokens is missing: the loss given is a mean.",
                lambda *a: _bits(*a, total=False),
            ),
            Mistake(
                "These are bits per token: the bytes do not come in.",
                lambda loss, n, text: loss / math.log(2),
            ),
            Mistake(
                "It is divided by the number of words. Bytes are asked for.",
                lambda *a: _bits(*a, per=lambda text: len(text.split())),
            ),
            Mistake(
                "These are the bits of the whole text.",
                lambda *a: _bits(*a, per=lambda text: 1),
            ),
        ],
        rtol=1e-6,
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        MERGE_PAIR,
        BEST_PAIR,
        COUNT_BYTES,
        LONGEST_MATCH,
        BEST_SCORE,
        EMBEDDING_GRADIENT,
        SKIP_GRAM_LOSS,
        BEST_PRODUCTS,
        ANALOGY,
        LOG_ODDS,
        FIX_PERPLEXITY,
        BITS_PER_BYTE,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
