"""Exercises of the chapter "T5: every task is text to text".

What is compared with: the package's objectives, masks and attention, lists that are cut and joined,
and models that are built and counted.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_anatomy import masks, objectives
from llm_anatomy.attention import scaled_dot_product_attention
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
from llm_anatomy.models.t5 import T5, T5_SMALL

# --- Shared by several checks --------------------------------------------------------------------

Span = tuple[int, int]


def _pairs(
    left: Mapping[str, Callable[..., Any]], right: Mapping[str, Callable[..., Any]]
) -> list[Mistake]:
    """A mistake for each mixture of right ("") and wrong versions of two parts."""
    return [
        Mistake(
            " ".join(text for text in (one, two) if text),
            lambda *args, one=one, two=two: (left[one](*args), right[two](*args)),
        )
        for one, two in sorted(itertools.product(left, right), key=lambda p: sum(map(bool, p)))
        if one or two
    ]


def _cut(words: Sequence[str], spans: Sequence[Span], fill: Callable[[int, list], list]) -> list:
    """The words, with what `fill` makes of the number and the words of each span in its place."""
    result, at = [], 0
    for i, (start, end) in enumerate(spans):
        result += [*words[at:start], *fill(i, list(words[start:end]))]
        at = end
    return [*result, *words[at:]]


# --- Span corruption -----------------------------------------------------------------------------


def _corrupt_cases() -> list[Case]:
    thanks = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    rows = [
        ("two spans", thanks, [(2, 4), (8, 9)]),
        ("a span at the front and one at the end", thanks[:7], [(0, 2), (4, 7)]),
        ("three spans, two of one word", thanks, [(1, 2), (5, 8), (9, 10)]),
    ]
    return [
        case(label, list(words), list(spans), ["<X>", "<Y>", "<Z>", "<W>"])
        for label, words, spans in rows
    ]


def _corrupted(words: list, spans: list, sentinels: list) -> tuple[list, list]:
    source = _cut(words, spans, lambda i, hidden: [sentinels[i]])
    return source, [*_given(words, spans, sentinels), sentinels[len(spans)]]


def _given(words: list, spans: list, sentinels: list, order: str = "before") -> list:
    target = []
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        parts = [[sentinel], words[start:end]]
        target += itertools.chain(*(parts if order == "before" else parts[::-1]))
    return target


CORRUPT = Exercise(
    name="corrupt",
    title="Corrupt spans by hand",
    level=1,
    minutes=8,
    task="""
Write T5's span corruption. `spans` holds (start, end) of each hidden span, in order, not touching;
`end` itself is not hidden. In the **source** each span is replaced by one sentinel, a new one for
each span. The **target** gives each sentinel and then the words that it replaced, and ends with one
more sentinel. Sentinels are used in the order in which they are given. Leave the end token out.

For "Thank you for inviting me" with the span (2, 4): source "Thank you &lt;X&gt; me", target
"&lt;X&gt; for inviting &lt;Y&gt;".
""",
    stub='''
def corrupt(
    words: list[str], spans: list[tuple[int, int]], sentinels: list[str]
) -> tuple[list[str], list[str]]:
    """The source that the encoder reads, then the target that the decoder writes."""
    raise NotImplementedError
''',
    hints=(
        "Walk through the spans and remember where the last one ended. What stands between two "
        "spans belongs to one of the two lists only.",
        "For each span: the source gets the words since the last end and then the sentinel; the "
        "target gets the sentinel and then the words of the span. After the loop the source gets "
        "the words that are left, and the target the next sentinel.",
    ),
    solution='''
def corrupt(
    words: list[str], spans: list[tuple[int, int]], sentinels: list[str]
) -> tuple[list[str], list[str]]:
    """The source that the encoder reads, then the target that the decoder writes."""
    source, target, at = [], [], 0
    for (start, end), sentinel in zip(spans, sentinels):
        source += [*words[at:start], sentinel]
        target += [sentinel, *words[start:end]]
        at = end
    return source + words[at:], [*target, sentinels[len(spans)]]
''',
    why="Every word is in exactly one of the two lists, so together they hold the text and "
    "nothing is said twice. The last sentinel of the target says that the last span is over.",
    point="The target holds what is hidden and nothing else, which is why it is short.",
    check=same_function(
        _corrupted,
        _corrupt_cases,
        [
            Mistake(
                "Source and target have changed places.",
                lambda w, s, m: _corrupted(w, s, m)[::-1],
            ),
            *_pairs(
                {
                    "": lambda w, s, m: _corrupted(w, s, m)[0],
                    "Source: each hidden word gets a sentinel. A span gets one, however long "
                    "it is.": lambda w, s, m: _cut(w, s, lambda i, hid: [m[i]] * len(hid)),
                    "Source: the sentinels are there, and the hidden words as well, so there is "
                    "nothing to predict.": lambda w, s, m: _cut(w, s, lambda i, hid: [m[i], *hid]),
                    "Source: the hidden words are gone without a trace; nothing marks the "
                    "place.": lambda w, s, m: _cut(w, s, lambda i, hid: []),
                    "Source: all spans get the same sentinel, so the target cannot say which "
                    "one it fills.": lambda w, s, m: _cut(w, s, lambda i, hid: [m[0]]),
                    "Source: the words after the last span are missing.": lambda w, s, m: _cut(
                        w[: s[-1][1]], s, lambda i, hid: [m[i]]
                    ),
                },
                {
                    "": lambda w, s, m: _corrupted(w, s, m)[1],
                    "Target: the sentinel that ends it is missing.": lambda w, s, m: _corrupted(
                        w, s, m
                    )[1][:-1],
                    "Target: it is the whole text. That is BART's; T5 asks for the hidden words "
                    "only.": lambda w, s, m: w,
                    "Target: each sentinel stands behind its words. The decoder must first say "
                    "which span it fills.": lambda w, s, m: (
                        [*_given(w, s, m, "after"), m[len(s)]]
                    ),
                    "Target: the hidden words follow each other without sentinels.": (
                        lambda w, s, m: [x for start, end in s for x in w[start:end]]
                    ),
                },
            ),
            Mistake(
                "The word at `end` is hidden too. `end` is the first word that stays.",
                lambda w, s, m: _corrupted(w, [(a, min(b + 1, len(w))) for a, b in s], m),
            ),
        ],
        names=("the source", "the target"),
    ),
)


# --- Back again ----------------------------------------------------------------------------------


def _restore_cases() -> list[Case]:
    sentinels = ["<X>", "<Y>", "<Z>", "<W>"]
    rows = [
        ("two spans", "a <X> d e <Y> f", "<X> b c <Y> g h <Z>"),
        ("a span at the front", "<X> d e <Y>", "<X> a b c <Y> f <Z>"),
        ("spans told in another order", "a <X> c <Y> e <Z>", "<Y> d d <X> b <Z> f <W>"),
    ]
    return [
        case(label, source.split(), target.split(), list(sentinels))
        for label, source, target in rows
    ]


def _runs(target: list, sentinels: list) -> list[list]:
    """What stands between the sentinels of a target."""
    runs: list[list] = []
    for word in target:
        if word in sentinels:
            runs.append([])
        else:
            runs[-1].append(word)
    return runs


def _by_order(source: list, target: list, sentinels: list) -> list:
    runs = iter(_runs(target, sentinels))
    return [w for word in source for w in (next(runs) if word in sentinels else [word])]


def _told(source: list, target: list, sentinels: list, pick: Callable[[str, list], list]) -> list:
    """The source, with what `pick` makes of a sentinel and its words in the sentinel's place."""
    order = [word for word in target if word in sentinels]
    parts = dict(zip(order, _runs(target, sentinels), strict=True))
    return [w for x in source for w in (pick(x, parts[x]) if x in sentinels else [x])]


RESTORE = Exercise(
    name="restore",
    title="Put the spans back",
    level=2,
    minutes=8,
    task="""
Write the inverse: from the source and the target of span corruption, the whole text. The target
holds each sentinel of the source, followed by its words, and a last sentinel with nothing after it.
A model may fill the spans in another order than that of the source: find them by their sentinels.
""",
    stub='''
def restore(source: list[str], target: list[str], sentinels: list[str]) -> list[str]:
    """The text without any sentinel."""
    raise NotImplementedError
''',
    hints=(
        "Two steps: first learn from the target which words belong to which sentinel, then read "
        "the source once and replace.",
        "Keep a dictionary from sentinel to list. Walking through the target, a sentinel opens a "
        "new list, and every other word is appended to the list that was opened last.",
    ),
    solution='''
def restore(source: list[str], target: list[str], sentinels: list[str]) -> list[str]:
    """The text without any sentinel."""
    words_of, current = {}, []
    for word in target:
        if word in sentinels:
            current = words_of[word] = []
        else:
            current.append(word)
    whole = []
    for word in source:
        whole += words_of[word] if word in sentinels else [word]
    return whole
''',
    why="Because nothing is lost, a test can corrupt any text and ask for it back: the cheapest "
    "proof that corruption is right. The sentinels are names, so their order does not matter.",
    point="Source and target together hold the text: corruption loses nothing.",
    check=same_function(
        lambda s, t, m: _told(s, t, m, lambda x, words: words),
        _restore_cases,
        [
            Mistake(
                "The spans are filled in the order of the target. A sentinel says which span its "
                "words belong to.",
                _by_order,
            ),
            Mistake(
                "The sentinels are still in the text.",
                lambda s, t, m: _told(s, t, m, lambda x, words: [x, *words]),
            ),
            Mistake(
                "Each sentinel is replaced by one word, the first of its span.",
                lambda s, t, m: _told(s, t, m, lambda x, words: words[:1]),
            ),
            Mistake(
                "Each sentinel is replaced by the last word of its span only.",
                lambda s, t, m: _told(s, t, m, lambda x, words: words[-1:]),
            ),
            Mistake(
                "Only the visible words are there: the sentinels were removed, not replaced.",
                lambda s, t, m: [w for w in s if w not in m],
            ),
            Mistake(
                "The hidden words are all at the end. Each span has its place.",
                lambda s, t, m: [w for w in (*s, *t) if w not in m],
            ),
            Mistake(
                "The words of a span stand in reversed order.",
                lambda s, t, m: _told(s, t, m, lambda x, words: words[::-1]),
            ),
        ],
    ),
)


# --- How long ------------------------------------------------------------------------------------


def _lengths_by_counting() -> tuple[int, int, int, int]:
    """From a corruption that is made and counted."""
    generator = torch.Generator().manual_seed(0)
    spans = objectives.random_spans(512, generator)
    sentinels = list(range(1000, 1100))
    source, target = objectives.corrupt_spans(list(range(512)), spans, sentinels, 999)
    return sum(end - start for start, end in spans), len(spans), len(source), len(target)


SPAN_LENGTHS = Exercise(
    name="span_lengths",
    title="How long are source and target?",
    level=2,
    minutes=6,
    task="""
A text of 512 tokens is corrupted as in T5: 15 % of the tokens are hidden, in spans of 3 tokens on
average. Both numbers are rounded to the nearest integer: first the hidden tokens, then the spans,
which are hidden tokens / 3. Source and target each end with one end token, and the target has its
final sentinel before it. Give four integers.
""",
    stub="""
span_lengths = (
    ...,  # hidden tokens
    ...,  # spans
    ...,  # tokens of the source
    ...,  # tokens of the target
)
""",
    hints=(
        "The source loses the hidden tokens and gains a sentinel for each span. What does the "
        "target consist of?",
        "Round 76.8 first, and divide the rounded number by 3. The target: the hidden tokens, a "
        "sentinel for each span, one more sentinel, and the end. Do not forget the source's end.",
    ),
    solution="""
n = 512
hidden = round(0.15 * n)
spans = round(hidden / 3)
span_lengths = (hidden, spans, n - hidden + spans + 1, hidden + spans + 1 + 1)
""",
    why="The decoder reads and writes 105 tokens where the text has 512, and the encoder 462: "
    "span corruption makes training cheaper than predicting the whole text.",
    point="With 15 % hidden in spans of three, the target is about a fifth of the text.",
    check=same_value(
        _lengths_by_counting,
        [
            Mistake(
                "Hidden tokens: 76.8 is rounded down, or not at all. The nearest integer is asked "
                "for.",
                when=lambda got, want: want[0] - 1 <= got[0] < want[0],
            ),
            Mistake(
                "Spans: the number is rounded down, or not at all. The nearest integer is asked "
                "for.",
                when=lambda got, want: got[0] == want[0] and want[1] - 1 <= got[1] < want[1],
            ),
            Mistake(
                "Spans: that is the number of hidden tokens. A span holds three of them on "
                "average.",
                when=lambda got, want: got[1] == want[0],
            ),
            Mistake(
                "Source: the end token is not counted.",
                when=lambda got, want: got[2] == want[2] - 1,
                hint=2,
            ),
            Mistake(
                "Source: the sentinels are not counted. One stands in the place of each span.",
                when=lambda got, want: got[2] == want[2] - want[1],
            ),
            Mistake(
                "Source: the length of the whole text. The hidden tokens are not in it.",
                when=lambda got, want: got[2] in (512, 513, 512 + want[1], 513 + want[1]),
            ),
            Mistake(
                "Target: one token is missing, the final sentinel or the end token.",
                when=lambda got, want: got[2] == want[2] and got[3] == want[3] - 1,
                hint=2,
            ),
            Mistake(
                "Target: final sentinel and end token are both missing.",
                when=lambda got, want: got[2] == want[2] and got[3] == want[3] - 2,
                hint=2,
            ),
            Mistake(
                "Target: the sentinels of the spans are not counted.",
                when=lambda got, want: 0 < want[3] - got[3] - want[1] + 2 <= 2,
            ),
        ],
        names=("hidden tokens", "spans", "tokens of the source", "tokens of the target"),
        rtol=0.0,
    ),
)


# --- T5's attention ------------------------------------------------------------------------------


def _attention_cases() -> list[Case]:
    rows = []
    for B, H, T, S, E, seed in ((2, 3, 4, 4, 5, 0), (1, 2, 3, 6, 4, 10), (3, 2, 2, 5, 9, 20)):
        mask = masks.causal(T, S).expand(B, 1, T, S).clone()
        mask[0, :, :, 0] = False if S > T else mask[0, :, :, 0]
        rows.append(
            case(
                f"B={B}, H={H}, T={T}, S={S}, E={E}",
                normal(B, H, T, E, seed=seed),
                normal(B, H, S, E, seed=seed + 1),
                normal(B, H, S, E, seed=seed + 2),
                2 * normal(1, H, T, S, seed=seed + 3),
                mask,
            )
        )
    return rows


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor,
    *,
    scores: Callable[[Tensor, Tensor], Tensor] = lambda s, b: s + b,
    where: Callable[[Tensor], Tensor] = lambda m: m,
    after: float = 0.0,
) -> Tensor:
    hidden = ~where(mask)
    weights = scores(q @ k.mT, bias).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights + after * bias.masked_fill(hidden, 0.0)) @ v


T5_ATTENTION = Exercise(
    name="t5_attention",
    title="T5's attention",
    level=1,
    minutes=6,
    task=r"""
Write attention as T5 does it, for all heads at once: the scores are the plain dot products, **not**
divided by $\sqrt{E}$, plus a bias for each head and distance. `mask` is `True` where a query may
look. Do it without `scaled_dot_product_attention`.

$$\operatorname{softmax}\bigl(QK^\top + b\bigr)\, V$$
""",
    stub='''
def t5_attention(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H S E"],
    v: Float[Tensor, "B H S E"],
    bias: Float[Tensor, "1 H T S"],
    mask: Bool[Tensor, "B 1 T S"],
) -> Float[Tensor, "B H T E"]:
    """What each head reads."""
    raise NotImplementedError
''',
    hints=(
        "It is the attention of the first chapter with one thing less and one thing more. Where "
        "must the bias stand so that it changes the weights, and the rows still sum to one?",
        "Add the bias to the scores, then set hidden scores to minus infinity, then take the "
        "softmax over the last axis, then multiply by the values.",
    ),
    solution='''
def t5_attention(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H S E"],
    v: Float[Tensor, "B H S E"],
    bias: Float[Tensor, "1 H T S"],
    mask: Bool[Tensor, "B 1 T S"],
) -> Float[Tensor, "B H T E"]:
    """What each head reads."""
    scores = q @ k.transpose(-2, -1) + bias  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v
''',
    why="The bias is in nats, as the scores are: adding ln 2 doubles a weight before the row is "
    "normalised. The missing factor is no loss: T5 starts its queries smaller by the root of E.",
    point="A bias in the scores is all that T5 knows about positions.",
    check=same_function(
        lambda q, k, v, bias, mask: scaled_dot_product_attention(
            q.double(), k.double(), v.double(), mask, bias=bias.double(), scale=1.0
        )[0],
        _attention_cases,
        [
            Mistake(
                "The scores are divided by the root of E. T5 does not do that.",
                lambda *a: _attended(*a, scores=lambda s, b: s / a[0].shape[-1] ** 0.5 + b),
            ),
            Mistake(
                "The scores are divided by the root of E, and the bias too. T5 divides neither.",
                lambda *a: _attended(*a, scores=lambda s, b: (s + b) / a[0].shape[-1] ** 0.5),
            ),
            Mistake("The bias is missing.", lambda *a: _attended(*a, scores=lambda s, b: s)),
            Mistake(
                "The bias is added after the softmax, so the weights no longer sum to one.",
                lambda *a: _attended(*a, scores=lambda s, b: s, after=1.0),
            ),
            Mistake(
                "The scores are multiplied by the bias. It is added.",
                lambda *a: _attended(*a, scores=lambda s, b: s * b),
            ),
            Mistake("The bias is subtracted.", lambda *a: _attended(*a, scores=lambda s, b: s - b)),
            Mistake(
                "The mask is not used.",
                lambda *a: _attended(*a, where=torch.ones_like),
            ),
        ],
    ),
)


# --- Where the scale went ------------------------------------------------------------------------

SCORE_SPREAD = Exercise(
    name="score_spread",
    title="Where did the scale go?",
    level=2,
    minutes=8,
    task=r"""
T5 does not divide its scores by $\sqrt{E}$. Instead its weights start with standard deviation
$(DE)^{-1/2}$ for the queries and $D^{-1/2}$ for the keys. Take $D = 512$, $E = 64$, and a
normalised input: $D$ independent numbers of mean 0 and variance 1. Give four standard deviations at
the start:

* of one number of a query, and of one number of a key;
* of a score, the plain dot product of a query and a key;
* of a score if the query weights also started with $D^{-1/2}$.
""",
    stub="""
score_spread = (
    ...,  # a number of a query
    ...,  # a number of a key
    ...,  # a score
    ...,  # a score, if queries started like keys
)
""",
    hints=(
        "The variance of a sum of independent terms is the sum of their variances; that of a "
        "product of independent terms of mean 0 is the product of theirs. How many terms has a "
        "number of a query, and how many a score?",
        "A number of a query is a sum of D products, each of variance 1/(D E). A score is a sum "
        "of E products. Add variances, and take the root at the very end.",
    ),
    solution="""
D, E = 512, 64
query = math.sqrt(D * 1 / (D * E))
key = math.sqrt(D * 1 / D)
score_spread = (query, key, math.sqrt(E * (query * key) ** 2), math.sqrt(E * (key * key) ** 2))
""",
    why="The factor of the Transformer keeps scores at a standard deviation of 1; T5 gets the same "
    "at the start from smaller queries. Training may change it afterwards, and an optimiser such "
    "as Adam, whose steps do not depend on the size of a weight, sees a difference.",
    point="T5 moved the root of E from the formula into the initialisation.",
    check=same_value(
        lambda: (64**-0.5, 1.0, 1.0, 8.0),
        [
            Mistake(
                "These are variances. The standard deviation is the root.",
                (1 / 64, 1.0, 1.0, 64.0),
            ),
            Mistake(
                "A number of a query: that is the standard deviation of one weight. The number is "
                "a sum of D products.",
                when=lambda got, _: abs(got[0] - (512 * 64) ** -0.5) < 1e-4,
            ),
            Mistake(
                "A number of a query: its weights start smaller than those of the keys, by the "
                "root of E.",
                when=lambda got, _: abs(got[0] - 1) < 1e-3,
            ),
            Mistake(
                "A score: it is a sum of E products, and only one is counted.",
                when=lambda got, _: abs(got[2] - 1 / 8) < 1e-3,
                hint=2,
            ),
            Mistake(
                "A score: standard deviations of the products are added. Variances add.",
                when=lambda got, _: abs(got[2] - 8) < 1e-3,
                hint=2,
            ),
            Mistake(
                "The last score: variances of its products add to E, and the root is missing, or "
                "standard deviations were added.",
                when=lambda got, _: abs(got[3] - 64) < 1e-3,
                hint=2,
            ),
            Mistake(
                "The last score: queries like keys make it larger than T5's. Nothing divides it.",
                when=lambda got, _: abs(got[3] - 1) < 1e-3,
            ),
        ],
        names=("a number of a query", "a number of a key", "a score", "the last score"),
    ),
)


# --- The output ----------------------------------------------------------------------------------


def _logits_cases() -> list[Case]:
    rows = []
    for B, T, D, V, seed, tied in ((2, 3, 4, 7, 0, True), (1, 2, 9, 5, 10, False)):
        output = None if tied else normal(V, D, seed=seed + 2)
        label = f"B={B}, T={T}, D={D}, V={V}, " + ("version 1.0" if tied else "version 1.1")
        rows.append(case(label, normal(B, T, D, seed=seed), normal(V, D, seed=seed + 1), output))
    return rows


def _logits(x: Tensor, table: Tensor, output: Tensor | None, tied: float, own: float) -> Tensor:
    D = x.shape[-1]
    return x @ table.T * D**tied if output is None else x @ output.T * D**own


T5_LOGITS = Exercise(
    name="t5_logits",
    title="Two ways to the logits",
    level=1,
    minutes=5,
    task=r"""
T5 1.0 scores the next token with the embedding table $W$ of shape $(V, D)$; since its entries start
with standard deviation 1, the hidden vector is first multiplied by $D^{-1/2}$. Version 1.1 has an
output matrix of its own, also $(V, D)$, and no factor. `output` is `None` in version 1.0.
""",
    stub='''
def t5_logits(
    x: Float[Tensor, "B T D"],
    table: Float[Tensor, "V D"],
    output: Float[Tensor, "V D"] | None,
) -> Float[Tensor, "B T V"]:
    """The score of each token of the vocabulary."""
    raise NotImplementedError
''',
    hints=(
        "Two cases, and only one of them has a factor. Look at the shapes: which axis is summed?",
        "If there is an output matrix, multiply by its transpose and be done. Otherwise multiply "
        "by the transpose of the table, and by D to the power of minus one half.",
    ),
    solution='''
def t5_logits(
    x: Float[Tensor, "B T D"],
    table: Float[Tensor, "V D"],
    output: Float[Tensor, "V D"] | None,
) -> Float[Tensor, "B T V"]:
    """The score of each token of the vocabulary."""
    if output is not None:
        return x @ output.T
    return x * x.shape[-1] ** -0.5 @ table.T
''',
    why="After the last norm a hidden number is of size 1, so its product with a row of D numbers "
    "of size 1 has size sqrt(D). The factor makes the logits of size 1 again. The Transformer of "
    "2017 has small entries in its table and multiplies the input instead.",
    point="A tied table serves as input and as output, and one of the two needs a factor.",
    check=same_function(
        lambda x, table, output: F.linear(
            *((x / x.shape[-1] ** 0.5, table) if output is None else (x, output))
        ),
        _logits_cases,
        [
            Mistake(
                "The factor of version 1.0 is missing.", lambda *a: _logits(*a, tied=0.0, own=0.0)
            ),
            Mistake(
                "The output of version 1.1 gets the factor too. It is a matrix of its own and "
                "needs none.",
                lambda *a: _logits(*a, tied=-0.5, own=-0.5),
            ),
            Mistake(
                "Version 1.0 is multiplied by the root of D. That is what the Transformer does "
                "with its input; here it is divided.",
                lambda *a: _logits(*a, tied=0.5, own=0.0),
            ),
            Mistake("It is divided by D, not by its root.", lambda *a: _logits(*a, -1.0, 0.0)),
            Mistake(
                "The versions have changed places: the factor is with the matrix of its own.",
                lambda *a: _logits(*a, tied=0.0, own=-0.5),
            ),
            Mistake(
                "The table is always used; version 1.1 scores with its own matrix.",
                lambda x, table, output: _logits(x, table, None, tied=-0.5, own=0.0),
            ),
        ],
    ),
)


# --- What the decoder reads ----------------------------------------------------------------------


def _labels_cases() -> list[Case]:
    rows = [
        ("B=2, T=4, pad_id=0", [[5, 6, 1, -100], [7, 8, 9, 1]], 0),
        ("B=3, T=3, pad_id=4", [[5, 1, -100], [1, -100, -100], [6, 7, 1]], 4),
        ("B=1, T=5, pad_id=2", [[9, 8, 7, 6, 1]], 2),
    ]
    return [case(label, torch.tensor(labels), pad) for label, labels, pad in rows]


def _right_by_loops(labels: Tensor, pad_id: int) -> Tensor:
    rows = [[pad_id, *(pad_id if x == -100 else x for x in row[:-1])] for row in labels.tolist()]
    return torch.tensor(rows)


DECODER_INPUTS = Exercise(
    name="decoder_inputs",
    title="What T5's decoder reads",
    level=1,
    minutes=5,
    task="""
T5 has no start token: the padding token stands in for it. From labels that hold $-100$ where
nothing is to be predicted, make what the decoder reads: the padding token, then all labels but the
last. The embedding has no row $-100$: padding takes its place.
""",
    stub='''
def decoder_inputs(labels: Int[Tensor, "B T"], pad_id: int) -> Int[Tensor, "B T"]:
    """What the decoder reads to predict the labels."""
    raise NotImplementedError
''',
    hints=(
        "The shape stays. In which direction do the labels move, and what falls off?",
        "Put a column of pad_id in front of all columns but the last, then replace -100 by pad_id.",
    ),
    solution='''
def decoder_inputs(labels: Int[Tensor, "B T"], pad_id: int) -> Int[Tensor, "B T"]:
    """What the decoder reads to predict the labels."""
    start = labels.new_full((len(labels), 1), pad_id)
    shifted = torch.cat((start, labels[:, :-1]), dim=1)  # (B, T)
    return shifted.masked_fill(shifted == -100, pad_id)
''',
    why="In transformers the start is `decoder_start_token_id`. A T5Config made by hand has none, "
    "and the model then refuses to shift its labels; the released checkpoints set it to padding.",
    point="T5 begins to write with the padding token.",
    check=same_function(
        _right_by_loops,
        _labels_cases,
        [
            Mistake(
                "-100 is still there. An embedding has no such row.",
                lambda y, pad: F.pad(y, (1, -1), value=pad),
            ),
            Mistake(
                "The labels are shifted to the left. The decoder must read what comes before.",
                lambda y, pad: F.pad(y, (-1, 1), value=pad).masked_fill(
                    F.pad(y, (-1, 1), value=pad) == -100, pad
                ),
            ),
            Mistake(
                "The labels are not shifted: each position reads what it has to say.",
                lambda y, pad: y.masked_fill(y == -100, pad),
            ),
            Mistake(
                "The last label comes round to the front.",
                lambda y, pad: y.roll(1, 1).masked_fill(y.roll(1, 1) == -100, pad),
            ),
            Mistake(
                "Padding is taken to be 0. Its id is given.",
                lambda y, pad: F.pad(y, (1, -1)).masked_fill(F.pad(y, (1, -1)) == -100, 0),
            ),
            Mistake(
                "The start is put in front and the last label is kept, so the inputs are one "
                "longer than the labels.",
                lambda y, pad: F.pad(y.masked_fill(y == -100, pad), (1, 0), value=pad),
            ),
            Mistake(
                "A column of -100 stands in front. T5 starts with padding.",
                lambda y, pad: F.pad(y.masked_fill(y == -100, pad), (1, -1), value=-100),
            ),
        ],
    ),
)


# --- The targets of a prefix decoder -------------------------------------------------------------


def _prefix_cases() -> list[Case]:
    rows = []
    for B, T, prefixes in ((3, 5, [2, 4, 1]), (2, 4, [3, 2]), (1, 3, [3])):
        tokens = torch.arange(1, B * (T + 1) + 1).view(B, T + 1)
        rows.append(case(f"B={B}, T={T}, prefixes {prefixes}", tokens, torch.tensor(prefixes)))
    return rows


def _prefixed(tokens: Tensor, n_prefix: Tensor, more: int = 0, cut: bool = True) -> Tensor:
    """The targets, with so many more ignored than there should be."""
    targets = tokens[:, 1:].clone() if cut else tokens[:, :-1].clone()
    for row, n in zip(targets, n_prefix.tolist(), strict=True):
        row[: max(0, n - 1 + more)] = -100
    return targets


PREFIX_TARGETS = Exercise(
    name="prefix_targets",
    title="What a prefix decoder predicts",
    level=2,
    minutes=7,
    task=r"""
A prefix decoder reads source and target as one sequence of $T + 1$ tokens. It sees all of the
prefix at once, so it is not asked for any token of it. The inputs are the $T$ tokens before the
last. Make the targets $(B, T)$: the next token at each position, and $-100$ where the next token
lies inside the prefix. `n_prefix` is the length of each row's prefix.
""",
    stub='''
def prefix_targets(
    tokens: Int[Tensor, "B T+1"], n_prefix: Int[Tensor, "B"]
) -> Int[Tensor, "B T"]:
    """The next token at each position after the prefix, -100 before."""
    raise NotImplementedError
''',
    hints=(
        "The target at position t is token t + 1. For which t is token t + 1 inside a prefix of n "
        "tokens? Do the last token of the prefix by hand: what does it predict?",
        "Token t + 1 lies inside where t + 1 < n, so n - 1 targets of a row are ignored. The last "
        "token of the prefix predicts the first token after it.",
    ),
    solution='''
def prefix_targets(
    tokens: Int[Tensor, "B T+1"], n_prefix: Int[Tensor, "B"]
) -> Int[Tensor, "B T"]:
    """The next token at each position after the prefix, -100 before."""
    targets = tokens[:, 1:]
    place = torch.arange(1, tokens.shape[1])  # of each target in the text
    return targets.masked_fill(place < n_prefix[:, None], -100)
''',
    why="Inside the prefix each position sees the token that it would have to predict: the loss "
    "would fall to zero and teach copying. A causal decoder gets a loss there as well, which is "
    "the one thing that it has more.",
    point="A prefix decoder learns from the target only; its first loss is at the prefix's end.",
    check=same_function(
        lambda tokens, n: objectives.prefix_lm(tokens, n)[1],
        _prefix_cases,
        [
            Mistake(
                "One target too many is ignored: the last token of the prefix predicts the first "
                "one after it.",
                lambda tokens, n: _prefixed(tokens, n, more=1),
            ),
            Mistake(
                "One target too few is ignored: the last token of the prefix is asked for, and "
                "can be seen.",
                lambda tokens, n: _prefixed(tokens, n, more=-1),
            ),
            Mistake(
                "Nothing is ignored. That is a causal decoder.",
                lambda tokens, n: tokens[:, 1:],
            ),
            Mistake(
                "The tokens are not shifted: each position predicts itself.",
                lambda tokens, n: _prefixed(tokens, n, more=1, cut=False),
            ),
            Mistake(
                "All rows get the prefix of the first one.",
                lambda tokens, n: _prefixed(tokens, n[:1].expand(len(n))),
            ),
            Mistake(
                "It is the prefix that is predicted, and what follows that is ignored.",
                lambda tokens, n: tokens[:, 1:].masked_fill(
                    torch.arange(1, tokens.shape[1]) >= n[:, None], -100
                ),
            ),
        ],
    ),
)


# --- Pairs ---------------------------------------------------------------------------------------


def _by_masks(S: int, T: int) -> tuple[int, int, int]:
    """Counted in the masks themselves."""
    encoder, cross = S * S, torch.ones(T, S).sum()
    first = encoder + int(cross) + int(masks.causal(T).sum())
    prefix = int(masks.prefix(torch.tensor([S]), S + T).sum())
    return first, prefix, int(masks.causal(S + T).sum())


ALLOWED_PAIRS = Exercise(
    name="allowed_pairs",
    title="Who sees how many?",
    level=3,
    minutes=10,
    task=r"""
A source of $S$ tokens and a target of $T$ tokens go through one layer of each: an encoder layer and
a decoder layer of an encoder-decoder; a layer of a prefix decoder that reads source and target as
one sequence, the source as its prefix; a layer of a causal decoder that reads the same sequence.
Count the pairs (query, key) that the masks allow in each of the three, cross-attention included.
""",
    stub='''
def allowed_pairs(S: int, T: int) -> tuple[int, int, int]:
    """Pairs of the encoder-decoder, of the prefix decoder, and of the causal decoder."""
    raise NotImplementedError
''',
    hints=(
        "Draw the square of S + T queries and keys and cut it at S in both directions. Which of "
        "the four blocks is full, which a triangle, which empty, in each of the three? Where does "
        "the encoder-decoder have the same blocks?",
        "A triangle with its diagonal has T (T + 1) / 2 pairs. The encoder is the upper left "
        "block, the decoder's own attention the lower right, cross-attention the lower left.",
    ),
    solution='''
def allowed_pairs(S: int, T: int) -> tuple[int, int, int]:
    """Pairs of the encoder-decoder, of the prefix decoder, and of the causal decoder."""
    encoder, cross, own = S * S, T * S, T * (T + 1) // 2
    both = encoder + cross + own
    return both, both, (S + T) * (S + T + 1) // 2
''',
    why="Encoder-decoder and prefix decoder see exactly the same pairs: the blocks of one mask are "
    "the three attentions of the other. What differs is whose weights do the looking, and that the "
    "decoder of the one has a softmax for the source and another for the target.",
    point="An encoder-decoder and a prefix decoder let the same tokens see the same tokens.",
    check=same_function(
        _by_masks,
        lambda: [case(f"S={S}, T={T}", S, T) for S, T in ((5, 3), (2, 7), (1, 1), (8, 8))],
        [
            Mistake(
                "Encoder-decoder: its cross-attention is missing.",
                lambda S, T: (S * S + T * (T + 1) // 2, *_by_masks(S, T)[1:]),
            ),
            Mistake(
                "Encoder-decoder: the target is counted as a full square. The decoder's own "
                "attention is causal.",
                lambda S, T: (S * S + S * T + T * T, *_by_masks(S, T)[1:]),
            ),
            Mistake(
                "Encoder-decoder: the encoder is counted as a triangle. It looks both ways.",
                lambda S, T: (
                    S * (S + 1) // 2 + S * T + T * (T + 1) // 2,
                    *_by_masks(S, T)[1:],
                ),
            ),
            Mistake(
                "Prefix decoder: everything is counted. The target looks at itself causally, and "
                "the source does not see the target.",
                lambda S, T: (_by_masks(S, T)[0], (S + T) ** 2, _by_masks(S, T)[2]),
            ),
            Mistake(
                "Prefix decoder: the source sees the target. A prefix sees itself only.",
                lambda S, T: (
                    _by_masks(S, T)[0],
                    S * S + 2 * S * T + T * (T + 1) // 2,
                    _by_masks(S, T)[2],
                ),
            ),
            Mistake(
                "Triangles are counted without their diagonal. A query sees itself.",
                lambda S, T: (
                    S * S + S * T + T * (T - 1) // 2,
                    S * S + S * T + T * (T - 1) // 2,
                    (S + T) * (S + T - 1) // 2,
                ),
                hint=2,
            ),
            Mistake(
                "Causal decoder: only the target is counted. It reads the source as well.",
                lambda S, T: (*_by_masks(S, T)[:2], T * (T + 1) // 2),
            ),
        ],
        names=("the encoder-decoder", "the prefix decoder", "the causal decoder"),
        rtol=0.0,
    ),
)


# --- BART's infilling ----------------------------------------------------------------------------


def _infill_cases() -> list[Case]:
    words = list("abcdefg")
    rows = [
        ("spans of two and one", [(1, 3), (5, 6)]),
        ("a span of length 0", [(2, 2), (4, 7)]),
        ("a span at the front and an empty one at the end", [(0, 2), (7, 7)]),
    ]
    return [case(label, list(words), list(spans), "[MASK]") for label, spans in rows]


def _infilled(words: list, spans: list, mask: str) -> list:
    out = list(words)
    for start, end in reversed(spans):
        out[start:end] = [mask]
    return out


INFILL = Exercise(
    name="infill",
    title="BART's text infilling",
    level=2,
    minutes=6,
    task="""
Write BART's text infilling for given spans: each is replaced by **one** mask token, whatever its
length. A span of length 0, such as (3, 3), hides nothing and inserts a mask before word 3. Return
what the encoder reads, and what the decoder has to write.
""",
    stub='''
def infill(
    words: list[str], spans: list[tuple[int, int]], mask: str
) -> tuple[list[str], list[str]]:
    """The damaged text, then the target."""
    raise NotImplementedError
''',
    hints=(
        "What the encoder reads is built as in T5, with one and the same mask everywhere. What "
        "does a decoder write that cannot say which mask it fills?",
        "Between two spans the words stay; each span, also an empty one, gives one mask. BART's "
        "decoder writes the whole text.",
    ),
    solution='''
def infill(
    words: list[str], spans: list[tuple[int, int]], mask: str
) -> tuple[list[str], list[str]]:
    """The damaged text, then the target."""
    damaged, at = [], 0
    for start, end in spans:
        damaged += [*words[at:start], mask]
        at = end
    return damaged + words[at:], list(words)
''',
    why="One mask for a span of unknown length, sometimes of length 0: the model has to find out "
    "how much is missing. All masks are alike, so the target cannot refer to them and is the whole "
    "text.",
    point="BART's decoder writes the whole text, T5's only what is missing.",
    check=same_function(
        lambda words, spans, mask: (_infilled(words, spans, mask), list(words)),
        _infill_cases,
        _pairs(
            {
                "": lambda w, s, m: _infilled(w, s, m),
                "Damaged text: each hidden word gets a mask, as in BERT. A span gets one.": (
                    lambda w, s, m: _cut(w, s, lambda i, hid: [m] * len(hid))
                ),
                "Damaged text: a span of length 0 is skipped. It inserts a mask.": (
                    lambda w, s, m: _cut(w, s, lambda i, hid: [m] * bool(hid))
                ),
                "Damaged text: the spans are deleted without a mask.": (
                    lambda w, s, m: _cut(w, s, lambda i, hid: [])
                ),
                "Damaged text: masks are inserted, and the words of the spans are left in.": (
                    lambda w, s, m: _cut(w, s, lambda i, hid: [m, *hid])
                ),
            },
            {
                "": lambda w, s, m: list(w),
                "Target: only the hidden words. That is T5's way, which needs sentinels to say "
                "where they belong.": lambda w, s, m: [x for a, b in s for x in w[a:b]],
                "Target: it is as damaged as the source.": lambda w, s, m: _infilled(w, s, m),
            },
        ),
        names=("the damaged text", "the target"),
    ),
)


# --- How large -----------------------------------------------------------------------------------

_ATTENTION = 4 * 512 * 512
_FFN = 2 * 512 * 2048
_ENCODER = _ATTENTION + _FFN + 2 * 512
_DECODER = _ENCODER + _ATTENTION + 512
_TABLE = 32_128 * 512


def _small_by_building() -> tuple[int, int, int, int]:
    """From a model that is built, on no device, and counted."""
    with torch.device("meta"):
        model = T5(T5_SMALL)

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    tables = count(model.encoder_bias) + count(model.decoder_bias)
    return count(model.encoder[0]), count(model.decoder[0]), tables, count(model)


SMALL_PARAMETERS = Exercise(
    name="small_parameters",
    title="How large is T5-small?",
    level=2,
    minutes=10,
    task="""
Count the parameters of T5-small, version 1.0: $D = 512$, 8 heads of width 64, $F = 2048$, 6 layers
in the encoder and 6 in the decoder, 32 128 tokens in one table that is also the output. No linear
layer has a bias. A norm has $D$ numbers; each part of a layer has one, and each stack one more at
its end. Each **stack** has one table of 32 buckets for each head.

Give four exact numbers: one encoder layer, one decoder layer, the two tables of buckets together,
the whole model.
""",
    stub="""
small_parameters = (
    ...,  # one encoder layer
    ...,  # one decoder layer
    ...,  # both tables of buckets
    ...,  # the whole model
)
""",
    hints=(
        "Count a layer by its parts: attention has four matrices, the feed-forward layer two, and "
        "each part a norm. What has a decoder layer more?",
        "Encoder layer: 4 D D + 2 D F + 2 D. A decoder layer has one more attention with its "
        "norm. The whole: the token table once, six layers each, the tables of buckets, and two "
        "last norms.",
    ),
    solution="""
D, d_ff, H, V, n_layers, buckets = 512, 2048, 8, 32_128, 6, 32
attention, ffn, norm = 4 * D * D, 2 * D * d_ff, D
encoder_layer = attention + ffn + 2 * norm
decoder_layer = 2 * attention + ffn + 3 * norm
tables = 2 * buckets * H
layers = n_layers * (encoder_layer + decoder_layer)
small_parameters = (encoder_layer, decoder_layer, tables, V * D + layers + tables + 2 * norm)
""",
    why="All that T5-small knows about positions are 512 numbers, because the layers of a stack "
    "share their table: a learned absolute position would have cost 512 numbers for each place. "
    "The token table is 27 % of the model.",
    point="T5-small has 60.5 million parameters, and 512 of them are about positions.",
    check=same_value(
        _small_by_building,
        [
            Mistake(
                "One encoder layer: its norms are counted with a bias. RMS norm has none.",
                when=lambda got, _: got[0] == _ENCODER + 2 * 512,
            ),
            Mistake(
                "One encoder layer: its linear maps are counted with biases. They have none.",
                when=lambda got, _: got[0] == _ENCODER + 4 * 512 + 2048 + 512,
            ),
            Mistake(
                "One encoder layer: its two norms are missing.",
                when=lambda got, _: got[0] == _ENCODER - 2 * 512,
            ),
            Mistake(
                "One encoder layer: the feed-forward layer has two matrices here; the gated one of "
                "version 1.1 has three.",
                when=lambda got, _: got[0] == _ENCODER + 512 * 2048,
            ),
            Mistake(
                "One decoder layer: cross-attention is missing, with its norm.",
                when=lambda got, want: got[0] == want[0] and got[1] == _ENCODER,
            ),
            Mistake(
                "One decoder layer: it has three norms; two are counted.",
                when=lambda got, want: got[0] == want[0] and got[1] == _DECODER - 512,
                hint=2,
            ),
            Mistake(
                "The tables of buckets: each layer is given one. The layers of a stack share it.",
                when=lambda got, _: got[2] == 12 * 32 * 8,
            ),
            Mistake(
                "The tables of buckets: that is one of them. Encoder and decoder have one each.",
                when=lambda got, _: got[2] == 32 * 8,
            ),
            Mistake(
                "The whole model counts the token table twice. It is also the output.",
                when=lambda got, want: got[3] == want[3] + _TABLE,
            ),
            Mistake(
                "The whole model: the last norms of the two stacks are missing.",
                when=lambda got, want: got[3] == want[3] - 2 * 512,
                hint=2,
            ),
        ],
        names=("one encoder layer", "one decoder layer", "both tables", "the whole model"),
        rtol=0.0,
    ),
)


# --- A layer with mistakes -----------------------------------------------------------------------

_SIGNATURE = '''
def fix_t5_layer(
    x: Float[Tensor, "B T D"],
    bias: Float[Tensor, "1 H T T"],
    w_q: Float[Tensor, "D D"],
    w_k: Float[Tensor, "D D"],
    w_v: Float[Tensor, "D D"],
    w_o: Float[Tensor, "D D"],
    w_up: Float[Tensor, "D F"],
    w_down: Float[Tensor, "F D"],
    gain_1: Float[Tensor, "D"],
    gain_2: Float[Tensor, "D"],
    eps: float,
) -> Float[Tensor, "B T D"]:
    """An encoder layer of T5, version 1.0."""
    H = bias.shape[1]

    def heads(y: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T E"]:
        return y.unflatten(-1, (H, -1)).transpose(1, 2)
'''


def _layer_cases() -> list[Case]:
    rows = []
    for B, H, T, E, F_, seed in ((2, 2, 3, 4, 5, 0), (1, 3, 4, 2, 7, 20), (3, 1, 2, 6, 4, 40)):
        D = H * E
        square = [0.6 * normal(D, D, seed=seed + i) for i in range(4)]
        rows.append(
            case(
                f"B={B}, H={H}, T={T}, E={E}, F={F_}",
                normal(B, T, D, seed=seed + 4) + 0.7,
                normal(1, H, T, T, seed=seed + 5),
                *square,
                normal(D, F_, seed=seed + 6),
                normal(F_, D, seed=seed + 7),
                1 + 0.5 * normal(D, seed=seed + 8),
                1 + 0.5 * normal(D, seed=seed + 9),
                1e-2,
            )
        )
    return rows


_BUGS = {
    "mean": "The norm subtracts the mean. T5's norm divides by the root mean square and no more.",
    "scale": "The scores are divided by the root of E.",
    "skip": "The first sum adds to the normalised input. The stream itself must go on.",
    "gelu": "The feed-forward layer uses GELU; that of version 1.0 is a ReLU.",
}


def _layer(
    x: Tensor,
    bias: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gain_1: Tensor,
    gain_2: Tensor,
    eps: float,
    *,
    bugs: Sequence[str] = (),
) -> Tensor:
    """T5's encoder layer, head by head, with any of the mistakes."""

    def norm(y: Tensor, gain: Tensor) -> Tensor:
        y = y - y.mean(-1, keepdim=True) if "mean" in bugs else y
        return gain * y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    H = bias.shape[1]
    E = x.shape[-1] // H
    y, read = norm(x, gain_1), []
    for h in range(H):
        own = slice(h * E, (h + 1) * E)
        scores = y @ w_q[:, own] @ (y @ w_k[:, own]).mT / (E**0.5 if "scale" in bugs else 1.0)
        read.append((scores + bias[0, h]).softmax(-1) @ (y @ w_v[:, own]))
    x = (y if "skip" in bugs else x) + torch.cat(read, dim=-1) @ w_o
    bend = F.gelu if "gelu" in bugs else F.relu
    return x + bend(norm(x, gain_2) @ w_up) @ w_down


FIX_T5_LAYER = Exercise(
    name="fix_t5_layer",
    title="Four mistakes in a T5 layer",
    level=3,
    minutes=12,
    task="""
Somebody ported an encoder layer from another model to T5, version 1.0. It runs and gives the right
shape. It contains **four** mistakes. Find and repair them.
""",
    stub=_SIGNATURE
    + """
    def norm(y: Float[Tensor, "B T D"], gain: Float[Tensor, "D"]) -> Float[Tensor, "B T D"]:
        y = y - y.mean(dim=-1, keepdim=True)
        return gain * y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()

    y = norm(x, gain_1)
    q, k, v = heads(y @ w_q), heads(y @ w_k), heads(y @ w_v)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    mixed = scores.softmax(dim=-1) @ v
    x = y + mixed.transpose(1, 2).flatten(2) @ w_o
    return x + F.gelu(norm(x, gain_2) @ w_up) @ w_down
""",
    hints=(
        "Go through the list of differences between T5 and the Transformer: norm, scores, where "
        "the sum is made, activation. One of the four mistakes is in each.",
        "T5's norm has one step less than layer norm; its scores are plain dot products with a "
        "bias; pre-norm means that the untouched stream is added; version 1.0 cuts off at 0.",
    ),
    solution=_SIGNATURE
    + """
    def norm(y: Float[Tensor, "B T D"], gain: Float[Tensor, "D"]) -> Float[Tensor, "B T D"]:
        return gain * y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt()

    y = norm(x, gain_1)
    q, k, v = heads(y @ w_q), heads(y @ w_k), heads(y @ w_v)
    weights = (q @ k.transpose(-2, -1) + bias).softmax(dim=-1)
    x = x + (weights @ v).transpose(1, 2).flatten(2) @ w_o
    return x + F.relu(norm(x, gain_2) @ w_up) @ w_down
""",
    why="Each of the four gives the right shape, and a model with them would train. It would not "
    "give the outputs of a T5 checkpoint. The mean matters least where vectors have a mean near "
    "0, which is why such a mistake can pass a loose comparison.",
    point="A port is right when it gives the same numbers, not when it runs.",
    check=same_function(
        lambda *args: _layer(*args),
        _layer_cases,
        [
            Mistake(
                " ".join(text for bug, text in _BUGS.items() if bug in left),
                lambda *args, left=left: _layer(*args, bugs=left),
                untouched=len(left) == len(_BUGS),
            )
            for n in range(1, 5)
            for left in itertools.combinations(_BUGS, n)
        ],
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        CORRUPT,
        RESTORE,
        SPAN_LENGTHS,
        T5_ATTENTION,
        SCORE_SPREAD,
        T5_LOGITS,
        DECODER_INPUTS,
        PREFIX_TARGETS,
        ALLOWED_PAIRS,
        INFILL,
        SMALL_PARAMETERS,
        FIX_T5_LAYER,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
