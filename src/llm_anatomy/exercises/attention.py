"""Exercises of the chapters "Attention" and "Positions".

What is compared with: torch's own functions in float64, or loops that spell the definition out.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_anatomy.exercises._engine import (
    Case,
    Chapter,
    Exercise,
    Mistake,
    case,
    normal,
    one_of,
    same_function,
    same_value,
    unrepaired,
)

# --- Shared by several checks --------------------------------------------------------------------


def _near(got: float | int, value: float | int) -> bool:
    return math.isclose(float(got), value, rel_tol=1e-3, abs_tol=1e-3)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def _last_rows(T: int, S: int) -> Tensor:
    """Loop form of a causal mask whose queries are the last T of S positions."""
    return torch.tensor([[j <= S - T + i for j in range(S)] for i in range(T)])


# --- The variance of a dot product ---------------------------------------------------------------

VARIANCE = Exercise(
    name="variance_of_scores",
    title="How large is a dot product?",
    level=1,
    minutes=4,
    task=r"""
A query $q$ and a key $k$ have 64 entries each. All 128 numbers are drawn independently with mean 0
and variance 1. What are the **variance** and the **standard deviation** of the score $q \cdot k$?

Predict both before you measure anything.
""",
    stub="""
variance_of_scores = (
    ...,  # the variance of q · k
    ...,  # its standard deviation
)
""",
    hints=(
        "The score is a sum of 64 products. What are the mean and the variance of one of them? "
        "And what happens to variances when independent terms are added?",
        "The product of two independent numbers of mean 0 and variance 1 has mean 0 and variance 1 "
        "itself. Variances of independent terms add up; standard deviations do not.",
    ),
    solution="""
d_head = 64
variance_of_scores = (d_head * 1.0, math.sqrt(d_head))
""",
    why="Each product q_i k_i has mean 0 and variance E[q_i²] E[k_i²] = 1. The 64 products are "
    "independent, so their variances add to 64, and the standard deviation is the square root, 8. "
    "It is this 8 that the factor 1/sqrt(d_head) takes out again.",
    point="Scores spread like the square root of the width: dividing by sqrt(d_head) brings their "
    "standard deviation back to 1, whatever the width.",
    check=same_value(
        (64.0, 8.0),
        [
            Mistake(
                "Those two are the other way round: the standard deviation is the square root of "
                "the variance.",
                when=lambda got, _: _near(got[0], 8) and _near(got[1], 64),
            ),
            Mistake(
                "The variance does not stay at 1: that is the variance of one product, and 64 "
                "independent products are added.",
                when=lambda got, _: _near(got[0], 1),
            ),
            Mistake(
                "64² would be the variance if all 64 products were the same number. They are "
                "independent: their variances add, their standard deviations do not.",
                when=lambda got, _: _near(got[0], 64**2),
                hint=2,
            ),
            Mistake(
                "The variance counts each of the 64 products once. Their factors q_i and k_i do "
                "not count twice: the variance of a product of two such numbers is 1 · 1, not 1 + "
                "1.",
                when=lambda got, _: _near(got[0], 128),
                hint=2,
            ),
            Mistake(
                "The variance is right. The standard deviation is its square root.",
                when=lambda got, _: _near(got[0], 64) and not _near(got[1], 8),
            ),
        ],
        names=("variance", "standard deviation"),
    ),
)


# --- Scores --------------------------------------------------------------------------------------


def _scores_cases() -> list[Case]:
    return [
        case("B=2, H=3, T=4, S=5, E=6", normal(2, 3, 4, 6), normal(2, 3, 5, 6, seed=1)),
        case("B=1, H=2, T=7, S=3, E=16", normal(1, 2, 7, 16, seed=2), normal(1, 2, 3, 16, seed=3)),
        case("B=3, H=1, T=1, S=8, E=2", normal(3, 1, 1, 2, seed=4), normal(3, 1, 8, 2, seed=5)),
    ]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhte,bhse->bhts", q.double(), k.double()) / math.sqrt(q.shape[-1])


SCALED_SCORES = Exercise(
    name="scaled_scores",
    title="Scaled scores",
    level=1,
    minutes=5,
    task=r"""
Write the scores of scaled dot-product attention. Entry $(t, s)$ of each head is
$q_t \cdot k_s / \sqrt{E}$, where $E$ is the width of one head. There are $T$ queries and $S$ keys,
and the two numbers need not be equal.
""",
    stub='''
def scaled_scores(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B H S E"]
) -> Float[Tensor, "B H T S"]:
    """How well each of the T queries matches each of the S keys."""
    raise NotImplementedError
''',
    hints=(
        "All T · S dot products of a head are one matrix product. Which of the two matrices has to "
        "be turned over, and which axis is summed away?",
        "`@` multiplies the last two axes and leaves B and H alone. Transpose only the last two "
        "axes of the keys (`.mT`), and divide by the square root of the axis that disappears.",
    ),
    solution='''
def scaled_scores(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B H S E"]
) -> Float[Tensor, "B H T S"]:
    """How well each of the T queries matches each of the S keys."""
    return q @ k.mT / math.sqrt(q.shape[-1])
''',
    why="`k.mT` swaps the last two axes only, so each head of each sequence gets its own (T, E) by "
    "(E, S) product. The divisor is the square root of the width that was summed over: of one "
    "head, not of the model.",
    point="One matrix product holds all T · S comparisons, and 1/sqrt(E) keeps their spread at 1, "
    "where the softmax still has a gradient.",
    check=same_function(
        _scores,
        _scores_cases,
        [
            Mistake("The scores are not scaled: divide by sqrt(E).", lambda q, k: q @ k.mT),
            Mistake(
                "They are divided by E, not by its square root. The spread of q · k grows like "
                "sqrt(E), so dividing by E makes it shrink with the width.",
                lambda q, k: q @ k.mT / q.shape[-1],
            ),
            Mistake(
                "They are multiplied by sqrt(E) instead of divided.",
                lambda q, k: q @ k.mT * math.sqrt(q.shape[-1]),
            ),
            Mistake(
                "They are divided by the square root of the number of keys. Only the width E of a "
                "head enters the spread of a dot product.",
                lambda q, k: q @ k.mT / math.sqrt(k.shape[-2]),
            ),
            Mistake(
                "They are divided by the square root of the number of queries. Only the width E of "
                "a head enters the spread of a dot product.",
                lambda q, k: q @ k.mT / math.sqrt(q.shape[-2]),
            ),
            Mistake(
                "They are divided by the square root of the whole model's width H · E. Each dot "
                "product sums over the E features of one head.",
                lambda q, k: q @ k.mT / math.sqrt(q.shape[1] * q.shape[-1]),
                hint=2,
            ),
            Mistake(
                "Queries and keys have changed places: rows belong to queries, columns to keys.",
                lambda q, k: k @ q.mT / math.sqrt(q.shape[-1]),
            ),
            Mistake(
                "`.T` turns all four axes of the keys round. Only the last two change places.",
                lambda q, k: q @ k.permute(3, 2, 1, 0),
                hint=2,
            ),
            Mistake(
                "The keys are not transposed: a row of queries must meet a row of keys, so their "
                "last two axes have to be swapped first.",
                lambda q, k: q @ k,
                hint=2,
            ),
        ],
    ),
)


# --- Softmax -------------------------------------------------------------------------------------


def _softmax_cases() -> list[Case]:
    level = torch.tensor([0.0, -900.0, 900.0, 9000.0]).view(4, 1)
    return [
        case("ordinary scores of shape (2, 3, 5)", 3 * normal(2, 3, 5)),
        case("a single row of 7", normal(7, seed=1)),
        case("rows near 0, -900, 900 and 9000", level + normal(2, 4, 3, seed=2)),
        case("scores 1000 apart", 1000 * normal(3, 6, seed=3)),
    ]


def _by_hand(scores: Tensor, shift: Tensor | float, dim: int = -1, keepdim: bool = True) -> Tensor:
    weights = torch.exp(scores - shift)
    return weights / weights.sum(dim, keepdim=keepdim)


SOFTMAX_ROWS = Exercise(
    name="softmax_rows",
    title="A softmax that does not overflow",
    level=1,
    minutes=8,
    task=r"""
Write the softmax over the last axis by hand, without `softmax` or `logsumexp`:
$w_s = e^{a_s} / \sum_j e^{a_j}$. In float32 $e^{89}$ is already infinite, yet your function must
give the right weights for scores in the thousands. Each row has its own size: one may lie near
$-900$ and the next near $9000$.
""",
    stub='''
def softmax_rows(scores: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Weights that are positive and sum to 1 over the last axis."""
    raise NotImplementedError
''',
    hints=(
        "What happens to the weights of a row when you add the same number to all its scores? "
        "Choose the number that makes every exponent harmless.",
        "Take each row's own maximum off it first: then no exponent is above 0, and one of them is "
        "0, so the sum is at least 1. `keepdim=True` keeps the axis, so that rows line up.",
    ),
    solution='''
def softmax_rows(scores: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Weights that are positive and sum to 1 over the last axis."""
    exponent = scores - scores.amax(dim=-1, keepdim=True)
    weights = exponent.exp()
    return weights / weights.sum(dim=-1, keepdim=True)
''',
    why="A constant added to a row multiplies its numerators and its sum alike, so it cancels. "
    "With the row's maximum taken off, the largest term is exp(0) = 1: nothing overflows, and the "
    "sum cannot be 0. The maximum of the whole tensor will not do, because a row far below it "
    "would vanish and end as 0/0.",
    point="The softmax sees differences of scores only, so each row may be moved to where the "
    "arithmetic is safe.",
    check=same_function(
        lambda scores: _softmax(scores.double()),
        _softmax_cases,
        [
            Mistake(
                "exp overflows: inf / inf is nan. The scores need to be moved down first.",
                lambda scores: _by_hand(scores, 0.0),
            ),
            Mistake(
                "The maximum of the whole tensor is taken off. A row that lies far below it "
                "vanishes, and its weights become 0/0. Each row needs its own maximum.",
                lambda scores: _by_hand(scores, scores.max()),
                hint=2,
            ),
            Mistake(
                "The mean is taken off, not the maximum: the largest score can still be far above "
                "it, and its exp overflows.",
                lambda scores: _by_hand(scores, scores.mean(-1, keepdim=True)),
                hint=2,
            ),
            Mistake(
                "The softmax runs over the wrong axis: the weights of a row do not sum to 1. Use "
                "the last axis.",
                lambda scores: torch.softmax(scores, dim=max(-2, -scores.ndim)),
            ),
            Mistake(
                "The softmax runs over the first axis: sum over the last one, dim=-1.",
                lambda scores: torch.softmax(scores, dim=0),
            ),
            Mistake(
                "All entries together sum to 1. Each row should, on its own.",
                lambda scores: torch.softmax(scores.flatten(), 0).view(scores.shape),
            ),
            Mistake(
                "These are the logarithms of the weights.",
                lambda scores: torch.log_softmax(scores, dim=-1),
            ),
            Mistake(
                "The weights are not divided by their sum.",
                lambda scores: torch.exp(scores - scores.amax(-1, keepdim=True)),
            ),
            Mistake(
                "The sum or the maximum of each row has lost its axis, so that it lines up with "
                "the columns. Keep the axis.",
                lambda scores: _by_hand(scores, scores.amax(-1, keepdim=True), keepdim=False),
                hint=2,
            ),
        ],
        rtol=2e-3,  # float32 has no more digits for scores in the thousands
        atol=1e-5,
    ),
)


# --- Entropy -------------------------------------------------------------------------------------

ENTROPY_LIMITS = Exercise(
    name="entropy_limits",
    title="From everywhere to one place",
    level=1,
    minutes=4,
    task=r"""
A query looks at 16 keys with weights $w = \mathrm{softmax}(c \cdot a)$, where the 16 scores $a$ all
differ. The entropy $-\sum_s w_s \ln w_s$, in **nats**, says how widely it looks. What does the
entropy tend to when $c \to 0$, and when $c \to \infty$?
""",
    stub="""
entropy_limits = (
    ...,  # as c goes to 0
    ...,  # as c goes to infinity
)
""",
    hints=(
        "What do the weights themselves become in the two limits? The entropy follows from them.",
        "At c = 0 all scores are equal, so each of the 16 weights is the same. For large c the "
        "largest score takes all the weight. Nats are natural logarithms.",
    ),
    solution="""
entropy_limits = (math.log(16), 0.0)
""",
    why="At c = 0 every weight is 1/16, and the entropy is ln 16 = 2.77 nats, the most that 16 "
    "keys allow. As c grows, the softmax tends to a hard choice of the largest score; a certain "
    "choice has entropy 0, since 1 · ln 1 = 0 and w ln w goes to 0 with w.",
    point="The factor before the softmax is an inverse temperature: it moves attention between an "
    "average over all keys and a choice of one.",
    check=same_value(
        (math.log(16), 0.0),
        [
            Mistake(
                "The two limits have changed places: a small factor makes all scores alike.",
                when=lambda got, _: _near(got[0], 0) and _near(got[1], math.log(16)),
            ),
            Mistake(
                "4 is the entropy in bits (the logarithm to base 2). In nats it is the natural "
                "logarithm.",
                when=lambda got, _: _near(got[0], 4),
            ),
            Mistake(
                "That is a logarithm to base 10. In nats it is the natural logarithm.",
                when=lambda got, _: _near(got[0], math.log10(16)),
            ),
            Mistake(
                "1/16 is the weight of each key. The entropy is the mean of -ln of the weights.",
                when=lambda got, _: _near(got[0], 1 / 16),
            ),
            Mistake(
                "16 is how many keys the query looks at; the entropy is its logarithm.",
                when=lambda got, _: _near(got[0], 16),
                hint=2,
            ),
            Mistake(
                "The first limit is right. In the second, one weight is 1 and the others are 0: "
                "what is 1 · ln 1?",
                when=lambda got, _: _near(got[0], math.log(16)),
                hint=2,
            ),
        ],
        names=("c to 0", "c to infinity"),
        atol=1e-3,
    ),
)


def _weights(B: int, H: int, T: int, S: int, seed: int, spread: float = 2.0) -> Tensor:
    return _softmax(spread * normal(B, H, T, S, seed=seed))


def _effective_cases() -> list[Case]:
    hard = F.one_hot(torch.tensor([[[4, 0, 2]]]), 5).float()
    return [
        case("B=2, H=3, T=4, S=5", _weights(2, 3, 4, 5, 0)),
        case("weights that are all 0 but one", hard),
        case("sharp weights, B=1, H=2, T=6, S=3", _weights(1, 2, 6, 3, 1, 200.0)),
        case("equal weights, B=1, H=1, T=2, S=7", torch.full((1, 1, 2, 7), 1 / 7)),
    ]


def _entropy(weights: Tensor) -> Tensor:
    return torch.special.entr(weights.double()).sum(-1)


EFFECTIVE_KEYS = Exercise(
    name="effective_keys",
    title="How many keys does a query look at?",
    level=2,
    minutes=8,
    task=r"""
The exponential of the entropy, $\exp\!\left(-\sum_s w_s \ln w_s\right)$, is the *effective number*
of keys that a query looks at: 1 if all weight is on one key, $S$ if the weights are equal. Compute
it for every query. Some weights are exactly 0, and $0 \ln 0$ counts as 0.
""",
    stub='''
def effective_keys(weights: Float[Tensor, "B H T S"]) -> Float[Tensor, "B H T"]:
    """The effective number of keys that each query looks at, between 1 and S."""
    raise NotImplementedError
''',
    hints=(
        "Three steps: the term of each key, the sum over keys, the exponential. What does your "
        "first step give where a weight is exactly 0?",
        "torch gives `0 * log(0) = nan`. There are functions that know the limit, such as "
        "`torch.xlogy(w, w)`; or replace the zeros before the logarithm.",
    ),
    solution='''
def effective_keys(weights: Float[Tensor, "B H T S"]) -> Float[Tensor, "B H T"]:
    """The effective number of keys that each query looks at, between 1 and S."""
    entropy = -torch.xlogy(weights, weights).sum(dim=-1)
    return entropy.exp()
''',
    why="`torch.xlogy(w, w)` is w ln w with the limit 0 at w = 0, where the plain product would be "
    "0 times minus infinity, hence nan. The sum runs over the keys, so there is one number for "
    "each query.",
    point="Entropy in nats is the logarithm of a count; its exponential is a number of keys, which "
    "is easier to read.",
    check=same_function(
        lambda weights: _entropy(weights).exp(),
        _effective_cases,
        [
            Mistake(
                "0 · ln 0 came out as nan: a weight that is exactly 0 has to count as 0.",
                lambda weights: (-(weights * weights.log()).sum(-1)).exp(),
            ),
            Mistake("This is the entropy; its exponential is asked for.", _entropy),
            Mistake(
                "The sign is missing: this is 1 over the effective number.",
                lambda weights: (-_entropy(weights)).exp(),
            ),
            Mistake(
                "2 to the power of an entropy in nats mixes two units: either log2 and 2**, or the "
                "natural logarithm and exp.",
                lambda weights: 2 ** _entropy(weights),
            ),
            Mistake(
                "An entropy in bits goes with 2**, not with exp: the units are mixed.",
                lambda weights: (_entropy(weights) / math.log(2)).exp(),
            ),
            Mistake(
                "The sum runs over the queries. The weights of one query lie along the last axis.",
                lambda weights: torch.special.entr(weights).sum(-2).exp(),
            ),
            Mistake(
                "This is the mean over the keys. The entropy is a sum: the weights already "
                "average.",
                lambda weights: torch.special.entr(weights).mean(-1).exp(),
            ),
            Mistake(
                "This counts the weights above 0; nearly all of them are, if only by a little.",
                lambda weights: (weights > 0).sum(-1).float(),
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


# --- Masks ---------------------------------------------------------------------------------------


def _causal(n_queries: int, n_keys: int) -> Tensor:
    return _last_rows(n_queries, n_keys)[None, None]


def _triangle(n_queries: int, n_keys: int, diagonal: int) -> Tensor:
    return torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool).tril(diagonal)


CAUSAL_MASK = Exercise(
    name="causal_mask",
    title="The causal mask",
    level=1,
    minutes=5,
    task=r"""
Make the mask that keeps a query from looking ahead: boolean, `True` where it **may** look, of shape
$(1, 1, T, S)$ so that it broadcasts over batch and heads. The $T$ queries are the **last** $T$ of
the $S$ positions, as when earlier keys wait in a cache; a query sees itself and everything before
it.
""",
    stub='''
def causal_mask(n_queries: int, n_keys: int) -> Bool[Tensor, "1 1 T S"]:
    """True where query t, at position S - T + t, may look at the key at position s."""
    raise NotImplementedError
''',
    hints=(
        "Draw the case of 2 queries and 5 keys. Where does the first query stand among the 5 "
        "positions? A triangle of ones is close; check on which diagonal it ends.",
        "`torch.tril` with its argument `diagonal` keeps the entries on and below a diagonal. The "
        "diagonal has to move right by as many positions as come before the first query.",
    ),
    solution='''
def causal_mask(n_queries: int, n_keys: int) -> Bool[Tensor, "1 1 T S"]:
    """True where query t, at position S - T + t, may look at the key at position s."""
    query = torch.arange(n_keys - n_queries, n_keys)
    key = torch.arange(n_keys)
    return (key <= query[:, None])[None, None]
''',
    why="Positions are compared, not indices: query t stands at position S - T + t. Written like "
    "this, the rule can be read aloud, and the cached case needs no second rule. "
    "`torch.ones(T, S, dtype=torch.bool).tril(S - T)` is the same mask.",
    point="A causal mask compares positions. With T = S it is a triangle; with one query and a "
    "cache it is a row of True.",
    check=same_function(
        _causal,
        [
            case("T=5, S=5", 5, 5),
            case("T=2, S=5", 2, 5),
            case("T=1, S=4", 1, 4),
            case("T=3, S=7", 3, 7),
        ],
        [
            Mistake(
                "A query cannot see itself: the diagonal is missing. With this mask the first "
                "query sees nothing at all.",
                lambda T, S: _triangle(T, S, S - T - 1),
            ),
            Mistake(
                "A query can see the token after it: the diagonal lies one too far to the right. "
                "In training the model would read off the very token that it has to predict.",
                lambda T, S: _triangle(T, S, S - T + 1),
            ),
            Mistake(
                "The queries are placed at the start of the keys. They are the last T positions, "
                "so the first query already has S - T keys before it.",
                lambda T, S: _triangle(T, S, 0),
                hint=2,
            ),
            Mistake(
                "The mask is the other way round: True means that a query may look.",
                lambda T, S: ~_triangle(T, S, S - T),
            ),
            Mistake(
                "The mask is the other way round, with True for what is hidden, and the queries "
                "are placed at the start of the keys.",
                lambda T, S: ~_triangle(T, S, 0),
            ),
            Mistake(
                "A query sees what comes after it, not what came before: this is the upper "
                "triangle.",
                lambda T, S: torch.ones(1, 1, T, S, dtype=torch.bool).triu(S - T),
            ),
            Mistake(
                "Keys and queries have changed places: rows belong to queries, columns to keys.",
                lambda T, S: _triangle(T, S, S - T).mT.contiguous(),
            ),
            Mistake(
                "There are as many columns as queries: n_keys is not used. Each query has one "
                "column for every key, the cached ones included.",
                lambda T, S: _triangle(T, T, 0),
            ),
            Mistake(
                "The two leading axes of size 1, for batch and heads, are missing.",
                lambda T, S: _triangle(T, S, S - T)[0, 0],
            ),
            Mistake(
                "This is an additive mask, 0 and -inf, to be added to the scores. A boolean one is "
                "asked for: True where a query may look.",
                lambda T, S: torch.zeros(1, 1, T, S).masked_fill(
                    ~_triangle(T, S, S - T), -math.inf
                ),
            ),
        ],
    ),
)


def _padding(lengths: Tensor, n_keys: int) -> Tensor:
    rows = [[s < length for s in range(n_keys)] for length in lengths.tolist()]
    return torch.tensor(rows)[:, None, None, :]


def _columns(n_keys: int) -> Tensor:
    return torch.arange(n_keys)


PADDING_MASK = Exercise(
    name="padding_mask",
    title="The padding mask",
    level=1,
    minutes=5,
    task=r"""
Sequences of different lengths are padded **on the right** to a common length $S$. From the lengths,
make the mask that hides the padding: boolean, `True` where the key is a real token, of shape
$(B, 1, 1, S)$ so that it holds for every head and every query.
""",
    stub='''
def padding_mask(lengths: Int[Tensor, "B"], n_keys: int) -> Bool[Tensor, "B 1 1 S"]:
    """True at the real tokens of each sequence, False at its padding."""
    raise NotImplementedError
''',
    hints=(
        "Positions count from 0. In a sequence of length 3, which positions hold real tokens? And "
        "on which of the four axes do the keys lie?",
        "Compare `torch.arange(n_keys)` with the lengths, laid out so that broadcasting gives (B, "
        "S); then index with None to put two axes of size 1 between.",
    ),
    solution='''
def padding_mask(lengths: Int[Tensor, "B"], n_keys: int) -> Bool[Tensor, "B 1 1 S"]:
    """True at the real tokens of each sequence, False at its padding."""
    position = torch.arange(n_keys, device=lengths.device)
    keep = position < lengths[:, None]  # (B, S)
    return keep[:, None, None, :]
''',
    why="Padding is hidden as a key: nobody may look at it. The axis of the queries has size 1, so "
    "the same keys are hidden from all of them. A padded query may still look around; its output "
    "is never used.",
    point="A padding mask lies on the axis of the keys: it hides tokens from being looked at, not "
    "from looking.",
    check=same_function(
        _padding,
        lambda: [
            case("lengths [3, 5, 1], S=5", torch.tensor([3, 5, 1]), 5),
            case("lengths [2, 4], S=7", torch.tensor([2, 4]), 7),
            case("lengths [6], S=6", torch.tensor([6]), 6),
        ],
        [
            Mistake(
                "The mask is the other way round: True means a real token.",
                lambda n, S: (_columns(S) >= n[:, None])[:, None, None],
            ),
            Mistake(
                "One token of padding stays visible: positions count from 0, so the last real "
                "token of a sequence of length 3 is at position 2.",
                lambda n, S: (_columns(S) <= n[:, None])[:, None, None],
            ),
            Mistake(
                "The last real token is hidden: positions count from 0, so a sequence of length 3 "
                "has its tokens at 0, 1 and 2.",
                lambda n, S: (_columns(S) < n[:, None] - 1)[:, None, None],
            ),
            Mistake(
                "The padding is hidden on the left. Here it stands on the right, after the tokens.",
                lambda n, S: (_columns(S) >= S - n[:, None])[:, None, None],
            ),
            Mistake(
                "The mask lies on the axis of the queries: it keeps padding from looking, and "
                "still lets everyone look at padding. The keys are the last axis.",
                lambda n, S: (_columns(S) < n[:, None])[:, None, :, None],
            ),
            Mistake(
                "The shape is (B, S). Put axes of size 1 for heads and queries between the two, or "
                "it will not broadcast against (B, H, T, S).",
                lambda n, S: _columns(S) < n[:, None],
                hint=2,
            ),
            Mistake(
                "One axis is missing: (B, 1, S) lines B up with the heads of (B, H, T, S).",
                lambda n, S: (_columns(S) < n[:, None])[:, None],
                hint=2,
            ),
        ],
    ),
)


def _prefix(n_prefix: Tensor, n_positions: int) -> Tensor:
    T = n_positions
    rows = [[[s <= t or s < n for s in range(T)] for t in range(T)] for n in n_prefix.tolist()]
    return torch.tensor(rows)[:, None]


def _halves(n_prefix: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Causal (1, 1, T, T); inside the prefix as a key (B, 1, 1, T) and as a query (B, 1, T, 1)."""
    inside = torch.arange(T) < n_prefix[:, None]
    return _triangle(T, T, 0), inside[:, None, None, :], inside[:, None, :, None]


PREFIX_MASK = Exercise(
    name="prefix_mask",
    title="The mask of a prefix language model",
    level=2,
    minutes=8,
    task=r"""
A prefix language model reads its prompt both ways and writes its answer from left to right. The
first $n$ positions (the prefix, of another length in each sequence) may be seen by **everyone**;
all other positions follow the causal rule. Make the mask, `True` where a query may look.
""",
    stub='''
def prefix_mask(n_prefix: Int[Tensor, "B"], n_positions: int) -> Bool[Tensor, "B 1 T T"]:
    """Both ways within the first n_prefix positions of each sequence, causal after them."""
    raise NotImplementedError
''',
    hints=(
        "Say in words when query t may look at key s. There are two reasons, and either is enough.",
        "Combine a causal mask with 'the key lies in the prefix'. The second depends on s only, so "
        "it has shape (B, 1, 1, T). Is the combination `&` or `|`?",
    ),
    solution='''
def prefix_mask(n_prefix: Int[Tensor, "B"], n_positions: int) -> Bool[Tensor, "B 1 T T"]:
    """Both ways within the first n_prefix positions of each sequence, causal after them."""
    position = torch.arange(n_positions, device=n_prefix.device)
    causal = position <= position[:, None]  # (T, T)
    in_prefix = position < n_prefix[:, None]  # (B, T)
    return causal | in_prefix[:, None, None, :]
''',
    why="Query t may look at key s if s is not after t, or if s belongs to the prefix. Two "
    "permissions are joined by `|`; the padding mask, a prohibition, was joined by `&`. A prefix "
    "of length 0 gives the causal mask, one of full length no mask at all.",
    point="One number turns a decoder into an encoder: the causal mask is the prefix mask with an "
    "empty prefix, the full mask the one with nothing but prefix.",
    check=same_function(
        _prefix,
        lambda: [
            case("n_prefix [2, 4, 0], T=5", torch.tensor([2, 4, 0]), 5),
            case("n_prefix [3, 7], T=7", torch.tensor([3, 7]), 7),
        ],
        [
            Mistake(
                "The two reasons are joined by `&`, so a query must be after the key and the key "
                "in the prefix: the answer cannot see itself. Either reason is enough.",
                lambda n, T: _halves(n, T)[0] & _halves(n, T)[1],
            ),
            Mistake(
                "The queries of the prefix see everything, the answer too. It is the keys of the "
                "prefix that everyone may see.",
                lambda n, T: _halves(n, T)[0] | _halves(n, T)[2],
            ),
            Mistake(
                "Nobody sees anything outside the prefix: the causal rule is missing.",
                lambda n, T: _halves(n, T)[1].expand(-1, 1, T, T),
            ),
            Mistake(
                "Only the prefix looks, and only at itself: the answer sees nothing.",
                lambda n, T: _halves(n, T)[1] & _halves(n, T)[2],
            ),
            Mistake(
                "The prefix is causal too: within it, everyone may look both ways.",
                lambda n, T: _halves(n, T)[0].expand(len(n), 1, T, T),
            ),
            Mistake(
                "The prefix is one position too long: positions count from 0.",
                lambda n, T: _halves(n, T)[0] | _halves(n + 1, T)[1],
            ),
            Mistake(
                "The prefix is one position too short: positions count from 0.",
                lambda n, T: _halves(n, T)[0] | _halves(n - 1, T)[1],
            ),
            Mistake(
                "The axis of size 1 for the heads is missing.",
                lambda n, T: (_halves(n, T)[0] | _halves(n, T)[1])[:, 0],
                hint=2,
            ),
        ],
    ),
)


def _masked_cases() -> list[Case]:
    holes = torch.tensor(
        [[True, False, True, True, False], [False] * 5, [False, True] + [True] * 3]
    )
    some = normal(2, 1, 4, 7, seed=3) > -0.3
    some[0, 0, 2] = False
    return [
        case("a causal mask, B=2, H=3, T=4, S=4", 2 * normal(2, 3, 4, 4), _causal(4, 4)),
        case(
            "a second row that sees nothing, B=2, H=2, T=3, S=5", normal(2, 2, 3, 5, seed=1), holes
        ),
        case("B=2, H=3, T=4, S=7", 3 * normal(2, 3, 4, 7, seed=2) - 1, some),
    ]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    scores, mask = scores.double(), mask.expand_as(scores)
    weights = torch.zeros_like(scores)
    for index in itertools.product(*(range(n) for n in scores.shape[:-1])):
        seen = mask[index]
        if seen.any():
            weights[index][seen] = _softmax(scores[index][seen])
    return weights


MASKED_SOFTMAX = Exercise(
    name="masked_softmax",
    title="A masked softmax",
    level=2,
    minutes=10,
    task=r"""
Turn scores into weights under a mask (`True` = may look). Hidden keys get weight **exactly 0**; the
visible ones share the weight as if the hidden ones were not there. A query that may look at nothing
gets a row of zeros. Do not change the scores in place.
""",
    stub='''
def masked_softmax(
    scores: Float[Tensor, "B H T S"], mask: Bool[Tensor, "#B #H #T #S"]
) -> Float[Tensor, "B H T S"]:
    """Weights over the visible keys; a row that sees nothing is all zeros."""
    raise NotImplementedError
''',
    hints=(
        "What must a score be for its exponential to be 0? Then look at a row in which every score "
        "is that: what does the softmax divide by?",
        "Fill the hidden scores with minus infinity and take the softmax. A row without any "
        "visible key is now nan, and every entry of it is hidden: one more fill repairs it.",
    ),
    solution='''
def masked_softmax(
    scores: Float[Tensor, "B H T S"], mask: Bool[Tensor, "#B #H #T #S"]
) -> Float[Tensor, "B H T S"]:
    """Weights over the visible keys; a row that sees nothing is all zeros."""
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0)
''',
    why="exp(-inf) is exactly 0, so hidden keys take no weight, neither above nor below the "
    "fraction line. A row of nothing but -inf becomes 0/0 = nan; setting the hidden entries to 0 "
    "afterwards repairs it and changes no other row. A score of 0 would not hide: exp(0) = 1.",
    point="Hiding a key means a score of minus infinity, not of 0; and what becomes of a row that "
    "sees nothing has to be decided, or it is nan.",
    check=same_function(
        _masked,
        _masked_cases,
        [
            Mistake(
                "The row that sees nothing is nan: its softmax is 0/0. It should be zeros.",
                lambda a, m: _softmax(a.masked_fill(~m, -math.inf)),
            ),
            Mistake(
                "The hidden scores are set to 0, and exp(0) = 1: a hidden key still takes part.",
                lambda a, m: _softmax(a * m),
            ),
            Mistake(
                "The hidden weights are set to 0 after the softmax, so the visible ones no longer "
                "sum to 1: they had already given a share away.",
                lambda a, m: _softmax(a) * m,
            ),
            Mistake(
                "A large negative number is not minus infinity: in the row that sees nothing all "
                "scores are equal, and each hidden key gets the weight 1/S.",
                lambda a, m: _softmax(a.masked_fill(~m, -1e9)),
                hint=2,
            ),
            Mistake(
                "A large negative number is added instead of minus infinity: in the row that sees "
                "nothing it cancels, and the hidden keys share the weight.",
                when=lambda got, want: bool(
                    ((want.sum(-1) == 0) == ((got - want).abs().amax(-1) > 1e-3)).all()
                ),
                hint=2,
            ),
            Mistake(
                "The mask is the other way round: True means that a query may look.",
                lambda a, m: _softmax(a.masked_fill(m, -math.inf)).masked_fill(m, 0.0),
            ),
            Mistake(
                "The mask is the other way round (True means that a query may look), and a row "
                "that sees nothing is nan.",
                lambda a, m: _softmax(a.masked_fill(m, -math.inf)),
            ),
            Mistake(
                "The softmax runs over the queries. Each query's weights lie along the last axis.",
                lambda a, m: torch.softmax(a.masked_fill(~m, -math.inf), -2).masked_fill(~m, 0.0),
            ),
            Mistake("The mask is not used.", lambda a, m: _softmax(a)),
        ],
    ),
)


# --- Attention -----------------------------------------------------------------------------------


def _attend_cases() -> list[Case]:
    def row(B: int, H: int, T: int, S: int, E: int, M: int, mask: Tensor, seed: int) -> Case:
        return case(
            f"B={B}, H={H}, T={T}, S={S}, E={E}, values of width {M}",
            normal(B, H, T, E, seed=seed),
            normal(B, H, S, E, seed=seed + 1),
            normal(B, H, S, M, seed=seed + 2),
            mask,
        )

    return [
        row(2, 3, 4, 5, 6, 7, _padding(torch.tensor([5, 2]), 5), 10),
        row(1, 2, 3, 8, 4, 5, _causal(3, 8), 20),
        row(3, 1, 6, 6, 2, 3, _causal(6, 6), 30),
    ]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    over: int = -1,
) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~mask, -math.inf), over)
    return weights @ v, weights


def _attend_oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    identity = torch.eye(k.shape[-2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output, F.scaled_dot_product_attention(q, k, identity, attn_mask=mask)


ATTEND = Exercise(
    name="attend",
    title="Scaled dot-product attention, whole",
    level=2,
    minutes=8,
    task=r"""
Put scores, mask and softmax together: $\mathrm{softmax}(q k^\top / \sqrt{E})\, v$, with hidden
keys at weight 0. Return the output **and** the weights. Every query sees at least one key here.
The values have a width of their own.
""",
    stub='''
def attend(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H S E"],
    v: Float[Tensor, "B H S M"],
    mask: Bool[Tensor, "#B #H #T #S"],
) -> tuple[Float[Tensor, "B H T M"], Float[Tensor, "B H T S"]]:
    """Average the values, weighted by how well each key matches the query."""
    raise NotImplementedError
''',
    hints=(
        "Follow the shapes: (T, E) and (S, E) make (T, S); (T, S) and (S, M) make (T, M). Where "
        "between the two products does the mask act?",
        "Scores, divided by sqrt(E); hidden ones to minus infinity; softmax over the keys, which "
        "are the last axis; then the matrix product of weights and values. Return both.",
    ),
    solution='''
def attend(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H S E"],
    v: Float[Tensor, "B H S M"],
    mask: Bool[Tensor, "#B #H #T #S"],
) -> tuple[Float[Tensor, "B H T M"], Float[Tensor, "B H T S"]]:
    """Average the values, weighted by how well each key matches the query."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights @ v, weights
''',
    why="Each output row is an average of the values, with weights that sum to 1 over the visible "
    "keys. Nothing is learned inside: the learned parts are the maps that made q, k and v.",
    point="Attention is an average of values; queries and keys do nothing but choose the weights.",
    check=same_function(
        _attend_oracle,
        _attend_cases,
        [
            Mistake(
                "The scores are not divided by sqrt(E).",
                lambda q, k, v, m: _attend(q, k, v, m, scale=1.0),
            ),
            Mistake(
                "The scores are divided by E, not by its square root.",
                lambda q, k, v, m: _attend(q, k, v, m, scale=1 / q.shape[-1]),
            ),
            Mistake(
                "The scores are divided by the square root of the values' width. It is the width "
                "of queries and keys, which is summed over, that sets the scale.",
                lambda q, k, v, m: _attend(q, k, v, m, scale=v.shape[-1] ** -0.5),
            ),
            Mistake(
                "The softmax runs over the queries, so that the weights of a query do not sum to "
                "1.",
                lambda q, k, v, m: _attend(q, k, v, m, over=-2),
            ),
            Mistake(
                "The mask is not used.",
                lambda q, k, v, m: _attend(q, k, v, torch.ones_like(m)),
            ),
            Mistake(
                "The mask is the other way round: True means that a query may look.",
                lambda q, k, v, m: _attend(q, k, v, ~m),
            ),
            Mistake(
                "The hidden weights are set to 0 after the softmax, so the rows no longer sum to "
                "1.",
                lambda q, k, v, m: (
                    (_attend(q, k, v, torch.ones_like(m))[1] * m) @ v,
                    _attend(q, k, v, torch.ones_like(m))[1] * m,
                ),
                hint=2,
            ),
            Mistake(
                "Weights and output have changed places: the output comes first.",
                lambda q, k, v, m: _attend(q, k, v, m)[::-1],
            ),
            Mistake(
                "Only the output comes back. Return the weights as well.",
                lambda q, k, v, m: _attend(q, k, v, m)[0],
            ),
            Mistake(
                "These are averages of the keys. The weights belong to the values.",
                lambda q, k, v, m: (_attend(q, k, k, m)[0], _attend(q, k, v, m)[1]),
            ),
        ],
        names=("output", "weights"),
    ),
)


def _split(x: Tensor, n_heads: int) -> Tensor:
    E = x.shape[-1] // n_heads
    return torch.stack([x[..., h * E : (h + 1) * E] for h in range(n_heads)], dim=1)


SPLIT_HEADS = Exercise(
    name="split_heads",
    title="Split into heads",
    level=1,
    minutes=6,
    task=r"""
A projection gives $(B, T, D)$. Head $h$ owns the features $hE$ to $(h+1)E - 1$ of **every**
position, where $E = D/H$. Bring the heads forward: $(B, H, T, E)$.
""",
    stub='''
def split_heads(x: Float[Tensor, "B T D"], n_heads: int) -> Float[Tensor, "B H T E"]:
    """Give each head its slice of the features of every position."""
    raise NotImplementedError
''',
    hints=(
        "A reshape never moves a number in memory; it only cuts the row of numbers differently. "
        "Which axis of (B, T, D) has to be cut in two, and which axes then have to change places?",
        "Cut D into (H, E) where it stands, which gives (B, T, H, E). Then swap the axes of "
        "positions and heads, by `transpose` or `permute`, not by another reshape.",
    ),
    solution='''
def split_heads(x: Float[Tensor, "B T D"], n_heads: int) -> Float[Tensor, "B H T E"]:
    """Give each head its slice of the features of every position."""
    B, T, D = x.shape
    return x.view(B, T, n_heads, D // n_heads).transpose(1, 2)
''',
    why="`view(B, T, H, E)` cuts each row of features in H pieces, and `transpose` moves the axis. "
    "`view(B, H, T, E)` has the right shape too, but cuts the whole sequence instead: its head 0 "
    "holds all the features of the first T/H positions. einops says it in one line: "
    '`rearrange(x, "B T (H E) -> B H T E", H=n_heads)`.',
    point="A reshape regroups, a transpose moves. The wrong one gives the right shape, trains, and "
    "mixes positions: only values can tell.",
    check=same_function(
        _split,
        lambda: [
            case("B=2, T=5, D=12, H=3", normal(2, 5, 12), 3),
            case("B=3, T=4, D=8, H=2", normal(3, 4, 8, seed=1), 2),
            case("B=1, T=7, D=6, H=6", normal(1, 7, 6, seed=2), 6),
        ],
        [
            Mistake(
                "A reshape straight to (B, H, T, E) regroups the numbers: each head now holds "
                "whole positions instead of a slice of every position. Cut D, then swap two axes.",
                lambda x, H: x.reshape(x.shape[0], H, x.shape[1], -1),
            ),
            Mistake(
                "The axes of positions and heads still have to change places: this is (B, T, H, "
                "E).",
                lambda x, H: x.reshape(*x.shape[:2], H, -1),
            ),
            Mistake(
                "The features are dealt out like cards: head h got every H-th feature. It owns a "
                "block of E neighbours: cut D into (H, E), in this order.",
                lambda x, H: x.reshape(*x.shape[:2], -1, H).permute(0, 3, 1, 2),
                hint=2,
            ),
            Mistake(
                "Positions and features of a head have changed places: this is (B, H, E, T).",
                lambda x, H: _split(x, H).mT,
            ),
            Mistake(
                "Heads and features of a head have changed places: this is (B, E, T, H).",
                lambda x, H: _split(x, H).permute(0, 3, 2, 1),
            ),
            Mistake(
                "Batch and heads have changed places: this is (H, B, T, E).",
                lambda x, H: _split(x, H).transpose(0, 1),
            ),
        ],
    ),
)


def _merge(x: Tensor) -> Tensor:
    return torch.cat([x[:, h] for h in range(x.shape[1])], dim=-1)


MERGE_HEADS = Exercise(
    name="merge_heads",
    title="Merge the heads",
    level=1,
    minutes=5,
    task=r"""
The way back: from $(B, H, T, E)$ to $(B, T, H \cdot E)$. At each position the outputs of the heads
stand side by side, head 0 first.
""",
    stub='''
def merge_heads(x: Float[Tensor, "B H T E"]) -> Float[Tensor, "B T D"]:
    """Put the heads' outputs side by side at each position."""
    raise NotImplementedError
''',
    hints=(
        "It undoes the split, so the two steps come in the opposite order.",
        "First swap the axes of heads and positions, which gives (B, T, H, E); then the last two "
        "axes lie next to each other and can be joined by `flatten` or `reshape`.",
    ),
    solution='''
def merge_heads(x: Float[Tensor, "B H T E"]) -> Float[Tensor, "B T D"]:
    """Put the heads' outputs side by side at each position."""
    return x.transpose(1, 2).flatten(2)
''',
    why="Only neighbouring axes can be joined, so H has to move next to E first. After a transpose "
    "the numbers no longer lie in order, so `view` would refuse; `flatten` and `reshape` copy "
    "where they must.",
    point="Undo steps in reverse order: transpose first, then join. Joining first gives the right "
    "shape and the wrong numbers.",
    check=same_function(
        _merge,
        lambda: [
            case("B=2, H=3, T=5, E=4", normal(2, 3, 5, 4)),
            case("B=3, H=2, T=4, E=7", normal(3, 2, 4, 7, seed=1)),
            case("B=1, H=5, T=2, E=3", normal(1, 5, 2, 3, seed=2)),
        ],
        [
            Mistake(
                "The axes are joined before they change places: the numbers of one position come "
                "from several positions.",
                lambda x: x.reshape(x.shape[0], x.shape[2], -1),
            ),
            Mistake(
                "`view` cannot join axes that a transpose has pulled apart in memory: use "
                "`reshape` or `flatten`, which copy where they must.",
                lambda x: x.transpose(1, 2).view(x.shape[0], x.shape[2], -1),
                hint=2,
            ),
            Mistake(
                "The features of the heads are interleaved: the heads should stand side by side, "
                "all of head 0 first.",
                lambda x: x.permute(0, 2, 3, 1).flatten(2),
            ),
            Mistake(
                "The heads are joined along the positions: this is (B, H · T, E).",
                lambda x: x.flatten(1, 2),
            ),
            Mistake(
                "The heads are added up. They keep their own features, side by side; mixing them "
                "is the output projection's work.",
                lambda x: x.sum(1),
            ),
            Mistake(
                "The heads are averaged. They keep their own features, side by side; mixing them "
                "is the output projection's work.",
                lambda x: x.mean(1),
            ),
        ],
    ),
)


def _projections(D: int, E: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(D, E, seed=seed + i) / math.sqrt(D) for i in range(3))


def _cross_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, S={S}, D={D}, E={E}",
            normal(B, T, D, seed=seed),
            normal(B, S, D, seed=seed + 1),
            *_projections(D, E, seed + 2),
        )
        for B, T, S, D, E, seed in ((2, 4, 5, 8, 6, 40), (3, 7, 2, 6, 4, 50), (1, 1, 6, 4, 3, 60))
    ]


def _one_head(
    from_q: Tensor,
    from_k: Tensor,
    from_v: Tensor,
    w: tuple[Tensor, ...],
    scale: float | None = None,
) -> Tensor:
    q, k, v = from_q @ w[0], from_k @ w[1], from_v @ w[2]
    return _softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)) @ v


def _cross_oracle(x: Tensor, memory: Tensor, *w: Tensor) -> Tensor:
    x, memory, w_q, w_k, w_v = (t.double() for t in (x, memory, *w))
    return F.scaled_dot_product_attention(x @ w_q, memory @ w_k, memory @ w_v)


CROSS_ATTENTION = Exercise(
    name="cross_attention",
    title="Cross-attention",
    level=2,
    minutes=8,
    task=r"""
In a translation model the decoder's states `x` look at the encoder's output `memory`. Write one
head of this cross-attention, with no mask. Each weight matrix is $(D, E)$ and stands on the right:
$x W$. Decide which of the three projections reads what.
""",
    stub='''
def cross_attention(
    x: Float[Tensor, "B T D"],
    memory: Float[Tensor, "B S D"],
    w_q: Float[Tensor, "D E"],
    w_k: Float[Tensor, "D E"],
    w_v: Float[Tensor, "D E"],
) -> Float[Tensor, "B T E"]:
    """Let each position of x gather what it needs from the memory."""
    raise NotImplementedError
''',
    hints=(
        "Who asks, and who is asked? The output has one row for each position that asks.",
        "Queries come from x. Keys and values belong together, one pair for each position that can "
        "be looked at: both come from the memory.",
    ),
    solution='''
def cross_attention(
    x: Float[Tensor, "B T D"],
    memory: Float[Tensor, "B S D"],
    w_q: Float[Tensor, "D E"],
    w_k: Float[Tensor, "D E"],
    w_v: Float[Tensor, "D E"],
) -> Float[Tensor, "B T E"]:
    """Let each position of x gather what it needs from the memory."""
    q, k, v = x @ w_q, memory @ w_k, memory @ w_v
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, T, S)
    return weights @ v
''',
    why="The output has T rows, one for each query, so the queries come from x. A key says what "
    "its value offers, so both are made from the same position of the memory. Self-attention is "
    "the case memory = x.",
    point="Queries come from the side that asks, keys and values from the side that is asked; the "
    "shape (T, S) of the weights says which is which.",
    check=same_function(
        _cross_oracle,
        _cross_cases,
        [
            Mistake(
                "The sides are swapped: the queries come from the memory, so there is one output "
                "for each position of the memory. It is x that asks.",
                lambda x, m, *w: _one_head(m, x, x, w),
            ),
            Mistake(
                "This is self-attention: x looks at itself, and the memory is not used.",
                lambda x, m, *w: _one_head(x, x, x, w),
            ),
            Mistake(
                "The values come from x, the keys from the memory. A weight that belongs to a "
                "position of the memory must be applied to the value of that position.",
                lambda x, m, *w: _one_head(x, m, x, w),
                hint=2,
            ),
            Mistake(
                "The keys come from x, the values from the memory. Each value needs the key of its "
                "own position.",
                lambda x, m, *w: _one_head(x, x, m, w),
                hint=2,
            ),
            Mistake(
                "This is the memory's self-attention: x is not used.",
                lambda x, m, *w: _one_head(m, m, m, w),
            ),
            Mistake(
                "The scores are not divided by sqrt(E).",
                lambda x, m, *w: _one_head(x, m, m, w, 1.0),
            ),
            Mistake(
                "The scores are divided by sqrt(D), the width of the model. The dot product sums "
                "over the E features of the head.",
                lambda x, m, *w: _one_head(x, m, m, w, x.shape[-1] ** -0.5),
            ),
            Mistake(
                "w_q and w_k have changed places.",
                lambda x, m, w_q, w_k, w_v: _one_head(x, m, m, (w_k, w_q, w_v)),
            ),
        ],
    ),
)


# --- Find the mistakes ---------------------------------------------------------------------------


def _broken(*bugs: str) -> Callable[..., Tensor]:
    """Multi-head attention with any of the four mistakes of the exercise."""

    def attention(
        x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int
    ) -> Tensor:
        B, T, D = x.shape
        E = D // n_heads
        heads = [x @ w for w in (w_q, w_k, w_v)]
        if "split" in bugs:
            q, k, v = (h.view(B, n_heads, T, E) for h in heads)
        else:
            q, k, v = (_split(h, n_heads) for h in heads)
        scores = q @ k.mT / math.sqrt(D if "scale" in bugs else E)
        y = torch.softmax(scores, dim=-2 if "axis" in bugs else -1) @ v
        return (y.reshape(B, T, D) if "merge" in bugs else _merge(y)) @ w_o

    return attention


_BUGS = {
    "split": "`view` alone splits the heads by positions instead of by features",
    "scale": "the scores are divided by the square root of the whole width, not of a head's",
    "axis": "the softmax runs over the queries instead of the keys",
    "merge": "the heads are joined without moving their axis next to the features first",
}


def _mha_oracle(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int
) -> Tensor:
    layer = nn.MultiheadAttention(
        x.shape[-1], n_heads, bias=False, batch_first=True, device="cpu", dtype=torch.float64
    )
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat((w_q.T, w_k.T, w_v.T)))
        layer.out_proj.weight.copy_(w_o.T)
        return layer(*[x.double()] * 3, need_weights=False)[0]


def _mha_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, D={D}, H={H}",
            normal(B, T, D, seed=seed),
            *(normal(D, D, seed=seed + i) / math.sqrt(D) for i in range(1, 5)),
            H,
        )
        for B, T, D, H, seed in ((2, 5, 12, 3, 70), (3, 4, 8, 2, 80), (1, 6, 10, 5, 90))
    ]


FIX_MULTI_HEAD = Exercise(
    name="fix_multi_head",
    title="Four mistakes in multi-head attention",
    level=3,
    minutes=15,
    task=r"""
This self-attention runs, gives the right shape, and a model built on it would even learn something.
It contains **four** mistakes. Find and repair them. Each weight matrix is $(D, D)$ and stands on
the right; there is no mask.
""",
    stub='''
def fix_multi_head(
    x: Float[Tensor, "B T D"],
    w_q: Float[Tensor, "D D"],
    w_k: Float[Tensor, "D D"],
    w_v: Float[Tensor, "D D"],
    w_o: Float[Tensor, "D D"],
    n_heads: int,
) -> Float[Tensor, "B T D"]:
    """Multi-head self-attention without bias terms."""
    B, T, D = x.shape
    E = D // n_heads
    q, k, v = ((x @ w).view(B, n_heads, T, E) for w in (w_q, w_k, w_v))
    scores = q @ k.mT / math.sqrt(D)
    weights = scores.softmax(dim=-2)
    y = weights @ v
    return y.reshape(B, T, D) @ w_o
''',
    hints=(
        "Go line by line and write the shape beside each. Shapes alone will not find any of the "
        "four: ask of each axis what it means, and of each row of weights what it sums to.",
        "Two mistakes are about moving the axis of the heads (one on the way in, one on the way "
        "out), one about which axis the softmax normalises, one about the width under the square "
        "root.",
    ),
    solution='''
def fix_multi_head(
    x: Float[Tensor, "B T D"],
    w_q: Float[Tensor, "D D"],
    w_k: Float[Tensor, "D D"],
    w_v: Float[Tensor, "D D"],
    w_o: Float[Tensor, "D D"],
    n_heads: int,
) -> Float[Tensor, "B T D"]:
    """Multi-head self-attention without bias terms."""
    B, T, D = x.shape
    E = D // n_heads
    q, k, v = ((x @ w).view(B, T, n_heads, E).transpose(1, 2) for w in (w_q, w_k, w_v))
    scores = q @ k.mT / math.sqrt(E)
    weights = scores.softmax(dim=-1)
    y = weights @ v
    return y.transpose(1, 2).reshape(B, T, D) @ w_o
''',
    why="The heads are cut from the features and then moved; they are moved back before they are "
    "joined; the softmax runs over the keys, the last axis; and a dot product over E features "
    "needs sqrt(E). None of the four changes a shape, which is why a comparison of values with an "
    "independent implementation is the only test that finds them.",
    point="Code with the right shapes can be wrong four times over: compare values with something "
    "written by somebody else.",
    check=same_function(_mha_oracle, _mha_cases, unrepaired(_BUGS, _broken)),
)


# --- Grouped queries, caches, sizes --------------------------------------------------------------


REPEAT_KV = Exercise(
    name="repeat_kv",
    title="Share keys among query heads",
    level=2,
    minutes=6,
    task=r"""
In grouped-query attention $H$ query heads share $G$ key heads: the first $H/G$ query heads use key
head 0, the next $H/G$ use key head 1, and so on. Repeat the key heads so that every query head
finds its own: from $(B, G, S, E)$ to $(B, H, S, E)$.
""",
    stub='''
def repeat_kv(k: Float[Tensor, "B G S E"], n_heads: int) -> Float[Tensor, "B H S E"]:
    """Give each of the H query heads the key head that it shares."""
    raise NotImplementedError
''',
    hints=(
        "With H = 6 and G = 2, write down which key head each of the six query heads uses. Is it "
        "0 1 0 1 0 1 or 0 0 0 1 1 1?",
        "Each key head is repeated H/G times in a row before the next one comes. torch has one "
        "method that repeats the whole sequence and another that repeats each element.",
    ),
    solution='''
def repeat_kv(k: Float[Tensor, "B G S E"], n_heads: int) -> Float[Tensor, "B H S E"]:
    """Give each of the H query heads the key head that it shares."""
    return k.repeat_interleave(n_heads // k.shape[1], dim=1)
''',
    why="`repeat_interleave` repeats each head in place, 0 0 0 1 1 1. `repeat` would tile the "
    "whole set, 0 1 0 1 0 1: the same shape, and a checkpoint loaded into it would pair every "
    "query with the wrong keys.",
    point="Heads that share keys are neighbours. One group gives multi-query attention, as many "
    "groups as heads gives ordinary multi-head attention.",
    check=same_function(
        lambda k, H: torch.stack([k[:, h * k.shape[1] // H] for h in range(H)], 1),
        lambda: [
            case("B=2, G=2, H=6, S=5, E=3", normal(2, 2, 5, 3), 6),
            case("B=1, G=3, H=12, S=4, E=2", normal(1, 3, 4, 2, seed=1), 12),
            case("B=3, G=1, H=4, S=2, E=5", normal(3, 1, 2, 5, seed=2), 4),
            case("B=2, G=4, H=4, S=3, E=6", normal(2, 4, 3, 6, seed=3), 4),
        ],
        [
            Mistake(
                "The heads are tiled, 0 1 0 1: query heads that share a key head are neighbours, "
                "so the order is 0 0 1 1.",
                lambda k, H: k.repeat(1, H // k.shape[1], 1, 1),
            ),
            Mistake(
                "Each head is repeated H times. There are G of them already: H/G times is enough.",
                lambda k, H: k.repeat_interleave(H, 1),
            ),
            Mistake(
                "The heads are tiled H times. There are G of them already, and neighbours share.",
                lambda k, H: k.repeat(1, H, 1, 1),
            ),
            Mistake(
                "The positions are repeated instead of the heads: the axis of the heads is 1.",
                lambda k, H: k.repeat_interleave(H // k.shape[1], 2),
            ),
            Mistake(
                "All query heads get the first key head.",
                lambda k, H: k[:, :1].expand(-1, H, -1, -1),
            ),
            Mistake(
                "All query heads get the average of the key heads. Averaging is how an existing "
                "model is turned into a grouped one; here each head keeps its own group.",
                lambda k, H: k.mean(1, keepdim=True).expand(-1, H, -1, -1),
            ),
            Mistake(
                "The key heads are not repeated.",
                lambda k, H: k.clone(),
            ),
        ],
    ),
)


def _cached_cases() -> list[Case]:
    rows = []
    for B, H, T, P, E, seed in ((2, 3, 1, 4, 6, 100), (2, 2, 3, 5, 4, 110), (1, 2, 4, 0, 5, 120)):
        q, k, v = (normal(B, H, T, E, seed=seed + i) for i in range(3))
        past = [normal(B, H, P, E, seed=seed + i) for i in (3, 4)]
        rows.append(case(f"T={T} new, {P} cached, B={B}, H={H}, E={E}", q, k, v, *past))
    return rows


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    *,
    shift: int | None = None,
    order: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    k = torch.cat((past_k, k)[::order], dim=2)
    v = torch.cat((past_v, v)[::order], dim=2)
    T, S = q.shape[2], k.shape[2]
    return _attend(q, k, v, _triangle(T, S, S - T if shift is None else shift))[0], k, v


def _cached_strict(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *, unseen: float
) -> tuple[Tensor, Tensor, Tensor]:
    """No query sees itself; the output is `unseen` where it sees nothing at all."""
    output, *both = _cached(q, k, v, past_k, past_v, shift=past_k.shape[2] - 1)
    return (output.nan_to_num(unseen), *both)


def _cached_oracle(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, past_k, past_v = (t.double() for t in (q, k, v, past_k, past_v))
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    P = past_k.shape[2]
    rows = [
        F.scaled_dot_product_attention(q[:, :, [t]], k[:, :, : P + t + 1], v[:, :, : P + t + 1])
        for t in range(q.shape[2])
    ]
    return torch.cat(rows, 2), k, v


CACHED_STEP = Exercise(
    name="cached_step",
    title="A step with a cache",
    level=3,
    minutes=12,
    task=r"""
When a model writes, the keys and values of earlier positions wait in a cache. Given the queries,
keys and values of $T$ **new** positions and a cache of $P$ earlier ones, return the output of the
new positions and the cache as it is afterwards. Attention is causal; $P$ may be 0, and $T$ may be
more than 1 (a prompt that comes in pieces).
""",
    stub='''
def cached_step(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H T E"],
    v: Float[Tensor, "B H T E"],
    past_k: Float[Tensor, "B H P E"],
    past_v: Float[Tensor, "B H P E"],
) -> tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
    """The output at the new positions, then all keys and all values, S = P + T of each."""
    raise NotImplementedError
''',
    hints=(
        "The new positions come after the cached ones. A new query sees the whole cache, and of "
        "the new positions those up to its own.",
        "Join old and new keys along the axis of positions, then the values. The mask is (T, P + "
        "T): the queries are the last T positions, so its diagonal moves right by P. You have "
        "written this mask in `causal_mask`.",
    ),
    solution='''
def cached_step(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H T E"],
    v: Float[Tensor, "B H T E"],
    past_k: Float[Tensor, "B H P E"],
    past_v: Float[Tensor, "B H P E"],
) -> tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
    """The output at the new positions, then all keys and all values, S = P + T of each."""
    k = torch.cat((past_k, k), dim=2)
    v = torch.cat((past_v, v), dim=2)
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, v
''',
    why="The cache changes what is computed again, not what is computed: the output is the last T "
    "rows of causal attention over all P + T positions. With T = 1 the mask is all True, which is "
    "why a forgotten mask goes unnoticed until a prompt arrives in two pieces. torch's own "
    "`is_causal=True` puts the triangle at the upper left, which is wrong as soon as P > 0.",
    point="A cache saves work and changes nothing: the new rows are those of causal attention over "
    "everything, so the mask ends at the lower right.",
    check=same_function(
        _cached_oracle,
        _cached_cases,
        [
            Mistake(
                "There is no mask among the new positions: a new query sees those after it. With "
                "T = 1 this does no harm, with a piece of a prompt it does.",
                lambda *a: _cached(*a, shift=10**6),
            ),
            Mistake(
                "The mask starts at the upper left: the first new query sees only the first key of "
                "the cache. The queries are the last T positions.",
                lambda *a: _cached(*a, shift=0),
                hint=2,
            ),
            Mistake(
                "The mask is one place too strict: a new query does not see its own position. Its "
                "diagonal moves right by P, not by P - 1.",
                lambda *a: _cached_strict(*a, unseen=0.0),
                hint=2,
            ),
            Mistake(
                "A new query does not see its own position: the diagonal of the mask moves right "
                "by P, not by P - 1. Without a cache its first row sees nothing, hence the nan.",
                lambda *a: _cached_strict(*a, unseen=math.nan),
                hint=2,
            ),
            Mistake(
                "The mask is one place too wide: a new query sees the position after its own.",
                lambda q, k, v, pk, pv: _cached(q, k, v, pk, pv, shift=pk.shape[2] + 1),
                hint=2,
            ),
            Mistake(
                "The mask consists of the numbers 0 and 1, and torch adds a mask of numbers to the "
                "scores: nothing is hidden. Make it boolean.",
                lambda q, k, v, pk, pv: (
                    F.scaled_dot_product_attention(
                        q,
                        torch.cat((pk, k), 2),
                        torch.cat((pv, v), 2),
                        attn_mask=_causal(q.shape[2], q.shape[2] + pk.shape[2]).to(q.dtype),
                    ),
                    torch.cat((pk, k), 2),
                    torch.cat((pv, v), 2),
                ),
            ),
            Mistake(
                "New keys are put before the cached ones. Positions stay in order: the cache "
                "first.",
                lambda *a: _cached(*a, order=-1),
            ),
            Mistake(
                "New keys are put before the cached ones (the cache should come first), and there "
                "is no mask among the new positions.",
                lambda *a: _cached(*a, order=-1, shift=10**6),
            ),
            Mistake(
                "The new positions look at themselves only: the cached keys and values are not "
                "used.",
                lambda q, k, v, pk, pv: (
                    _cached(q, k, v, pk[:, :, :0], pv[:, :, :0])[0],
                    torch.cat((pk, k), 2),
                    torch.cat((pv, v), 2),
                ),
            ),
            Mistake(
                "The cache that comes back holds the new positions only, so the next step would "
                "have forgotten everything before. Return all of them.",
                lambda q, k, v, pk, pv: (_cached(q, k, v, pk, pv)[0], k, v),
            ),
            Mistake(
                "The cache comes back as it was, without the new positions.",
                lambda q, k, v, pk, pv: (_cached(q, k, v, pk, pv)[0], pk, pv),
            ),
            Mistake(
                "Keys and values have changed places in what comes back.",
                lambda *a: tuple(_cached(*a)[i] for i in (0, 2, 1)),
            ),
        ],
        names=("output", "all keys", "all values"),
    ),
)


def _n_parameters(d_model: int, n_heads: int, n_kv_heads: int, bias: bool) -> int:
    wide, narrow = d_model, d_model // n_heads * n_kv_heads
    layers = [
        nn.Linear(d_model, out, bias=bias, device="meta") for out in (wide, narrow, narrow, wide)
    ]
    return sum(p.numel() for layer in layers for p in layer.parameters())


COUNT_PARAMETERS = Exercise(
    name="count_parameters",
    title="Count the parameters",
    level=1,
    minutes=6,
    task=r"""
Count the parameters of an attention layer with four projections: queries, keys, values and output.
There are $H$ query heads and $G$ key/value heads, each of width $E = D/H$. With `bias`, each
projection has one number more for each of its outputs.
""",
    stub='''
def count_parameters(d_model: int, n_heads: int, n_kv_heads: int, bias: bool) -> int:
    """How many numbers an attention layer learns."""
    raise NotImplementedError
''',
    hints=(
        "Write the four weight matrices with their shapes. Which of them know about G? Does H "
        "alone change anything?",
        "Queries and output are D by D. Keys and values are D by G · E. A bias is as long as the "
        "projection is wide, which is not the same for all four.",
    ),
    solution='''
def count_parameters(d_model: int, n_heads: int, n_kv_heads: int, bias: bool) -> int:
    """How many numbers an attention layer learns."""
    d_kv = d_model // n_heads * n_kv_heads
    weights = 2 * d_model * d_model + 2 * d_model * d_kv
    biases = 2 * d_model + 2 * d_kv if bias else 0
    return weights + biases
''',
    why="With G = H all four matrices are D by D, and the layer has 4D² weights: more heads cut "
    "the same width in thinner slices and cost nothing. Fewer key/value heads make two of the "
    "matrices narrower, and, which matters more, the cache.",
    point="The number of heads does not change the number of parameters; the number of key/value "
    "heads does.",
    check=same_function(
        _n_parameters,
        [
            case("D=512, H=8, G=8, with bias", 512, 8, 8, True),
            case("D=768, H=12, G=4, with bias", 768, 12, 4, True),
            case("D=4096, H=32, G=8, no bias", 4096, 32, 8, False),
            case("D=96, H=6, G=1, with bias", 96, 6, 1, True),
        ],
        [
            Mistake(
                "All four projections are counted as D by D. Those of keys and values have only "
                "G · E outputs.",
                lambda D, H, G, bias: 4 * D * D + 4 * D * bias,
            ),
            Mistake(
                "The output projection is missing: D by D, after the heads are merged.",
                lambda D, H, G, bias: _n_parameters(D, H, G, bias) - D * D - D * bias,
            ),
            Mistake(
                "The weights are right; the bias terms are missing where `bias` is true.",
                lambda D, H, G, bias: _n_parameters(D, H, G, False),
            ),
            Mistake(
                "The weights are right. The bias terms of keys and values are only G · E long.",
                lambda D, H, G, bias: _n_parameters(D, H, G, False) + 4 * D * bias,
                hint=2,
            ),
            Mistake(
                "The bias terms are counted even where `bias` is false.",
                lambda D, H, G, bias: _n_parameters(D, H, G, True),
            ),
            Mistake(
                "It is multiplied by the number of heads. The heads share out the width D; each "
                "has only E = D/H of it.",
                lambda D, H, G, bias: H * _n_parameters(D, H, G, bias),
            ),
            Mistake(
                "Each head is counted with matrices of D by D. The heads share out the width D: "
                "together, those of one projection are as wide as one matrix.",
                lambda D, H, G, bias: H * 4 * D * D,
            ),
            Mistake(
                "Each head is counted with matrices of D by D, and with biases as long. The heads "
                "share out the width D: together they have one such matrix for each projection.",
                lambda D, H, G, bias: H * (4 * D * D + 4 * D * bias),
            ),
            Mistake(
                "Keys and values are counted with E outputs, as for one head. There are G of them.",
                lambda D, H, G, bias: _n_parameters(D, H, 1, bias),
            ),
        ],
        rtol=0.0,
        atol=0.0,
    ),
)


SCORE_MEMORY = Exercise(
    name="score_memory",
    title="The price of every pair",
    level=1,
    minutes=5,
    task=r"""
One layer of self-attention has 12 heads and reads one sequence of 4096 tokens. It stores its
scores in float32. How many **scores** are there, how many **MiB** ($2^{20}$ bytes) do they take,
and by which
**factor** do both grow when the sequence becomes twice as long?
""",
    stub="""
score_memory = (
    ...,  # number of scores
    ...,  # MiB
    ...,  # factor for a sequence of twice the length
)
""",
    hints=(
        "There is one score for each head, each query and each key. How many bytes does one "
        "float32 take?",
        "12 matrices of 4096 by 4096, 4 bytes an entry. 4096 is 2^12, so the division by 2^20 can "
        "be done in the head.",
    ),
    solution="""
n_scores = 12 * 4096**2
score_memory = (n_scores, n_scores * 4 / 2**20, 2**2)
""",
    why="12 · 2^24 scores of 4 bytes are 12 · 64 = 768 MiB, for one layer and one sequence, before "
    "the weights of the softmax are stored as well. Twice the length makes twice the queries and "
    "twice the keys. A fused kernel never stores this matrix, but still computes all its entries.",
    point="Every pair costs: twice the length is four times the scores, in memory for a kernel "
    "that stores them, in time for any.",
    check=same_value(
        (12 * 4096**2, 768.0, 4.0),
        [
            Mistake(
                "There is one score for each pair of a query and a key: 4096 · 4096 of them in "
                "each head, not 4096.",
                when=lambda got, _: _near(got[0], 12 * 4096),
            ),
            Mistake(
                "The heads are missing: each of the 12 has a matrix of scores of its own.",
                when=lambda got, _: _near(got[0], 4096**2),
            ),
            Mistake(
                "Half of the pairs would be left after a causal mask, but the matrix holds all of "
                "them.",
                when=lambda got, _: _near(got[0], 6 * 4096**2) or _near(got[0], 6 * 4096 * 4097),
            ),
            Mistake(
                "That many MiB would be 2 bytes a score, as in float16. A float32 takes 4.",
                when=lambda got, _: _near(got[1], 384),
            ),
            Mistake(
                "That is in MB of 10^6 bytes. A MiB has 2^20 = 1048576.",
                when=lambda got, _: _near(got[1], 12 * 4096**2 * 4 / 1e6),
            ),
            Mistake(
                "That is the number of bytes, or a power of 1024 too many or too few.",
                when=lambda got, _: any(_near(got[1], 768 * 1024.0**n) for n in (-1, 1, 2)),
            ),
            Mistake(
                "That would be the number of scores over 2^20: each takes 4 bytes.",
                when=lambda got, _: _near(got[1], 192),
            ),
            Mistake(
                "A factor of 2 would be linear. Twice the queries meet twice the keys.",
                when=lambda got, _: _near(got[2], 2),
            ),
            Mistake(
                "A factor of 8 would be cubic. Only queries and keys grow; the heads stay.",
                when=lambda got, _: _near(got[2], 8),
            ),
        ],
        names=("scores", "MiB", "factor"),
    ),
)


PATH_LENGTH = Exercise(
    name="path_length",
    title="How far apart are two words?",
    level=2,
    minutes=6,
    task=r"""
Information has to travel from the **first** of 1024 tokens to the **last**. Count the steps it
takes:

* in a recurrent network of one layer: how many applications of the recurrence carry it from the
  state at the first token to the state at the last?
* in a stack of causal convolutions of width 3 (an output sees its own position and the two before;
  no dilation): how many layers are needed?
* in causal self-attention: how many layers?
""",
    stub="""
path_length = (
    ...,  # recurrent steps
    ...,  # convolutional layers
    ...,  # attention layers
)
""",
    hints=(
        "How many positions does the information move in one step of each? And how many positions "
        "lie between the first token and the last?",
        "From position 0 to position 1023 it moves by 1023. The recurrence moves it by one at a "
        "time, the convolution by at most two in each layer, attention by any distance.",
    ),
    solution="""
distance = 1024 - 1
path_length = (distance, math.ceil(distance / 2), 1)
""",
    why="A recurrent state moves one position a step: 1023 steps, each of which may lose something."
    " A causal filter of width 3 reaches 2 positions back, so half as many layers, rounded up: 512."
    " In attention every pair is one step apart. Dilated convolutions, which double their reach in "
    "each layer, come down to about log2 of the distance.",
    point="In attention any two positions are one step apart; that is what is bought with the "
    "quadratic number of scores.",
    check=same_value(
        (1023, 512, 1),
        [
            Mistake(
                "The recurrence is counted from before the first token: between 1024 positions "
                "there are 1023 steps.",
                when=lambda got, _: _near(got[0] / 1024, 1) and got[0] != 1023,
                hint=2,
            ),
            Mistake(
                "The convolution is counted as if each layer moved information by one position. A "
                "causal filter of width 3 reaches two back.",
                when=lambda got, _: got[1] in (1022, 1023, 1024),
            ),
            Mistake(
                "The convolution is counted as if each layer moved information by three positions. "
                "Its width is 3, its own position included: it reaches two back.",
                when=lambda got, _: got[1] in (341, 342),
            ),
            Mistake(
                "Half a layer does not exist: round up, or the first token is not reached.",
                when=lambda got, _: got[1] in (511, 511.5),
                hint=2,
            ),
            Mistake(
                "A logarithm is right for dilated convolutions, whose reach doubles in each layer. "
                "These are not dilated: the reach grows by the same amount each time.",
                when=lambda got, _: 5 <= got[1] <= 12,
            ),
            Mistake(
                "Attention does not move along the sequence: each query looks at every earlier key "
                "at once.",
                when=lambda got, _: got[2] > 1,
            ),
            Mistake(
                "Something has to happen: in one layer of attention the last query looks at the "
                "first key.",
                when=lambda got, _: got[2] == 0,
            ),
        ],
        names=("recurrence", "convolution", "attention"),
        rtol=0.0,
        atol=0.0,
    ),
)


SHUFFLED_TOKENS = Exercise(
    name="shuffled_tokens",
    title="Shuffle the tokens",
    level=1,
    minutes=3,
    task=r"""
You shuffle the tokens of a sentence and feed them to a self-attention layer without mask and
without any information about positions. Compared with the output for the sentence in order, the
output

* **a)** is unchanged;
* **b)** consists of the same vectors, shuffled in the same way;
* **c)** consists of the same vectors, and each query's weights stay as they were, column for
column;
* **d)** consists of other vectors, because every query now meets its keys in another order;
* **e)** becomes the plain average of the values.

Answer with a letter.
""",
    stub="""
shuffled_tokens = ...  # "a", "b", "c", "d" or "e"
""",
    hints=(
        "Follow one token. Does its query change? Does the set of keys and values that it meets?",
        "A weighted sum does not depend on the order of its terms. So each token gets the same "
        "output vector as before; where does this vector stand now?",
    ),
    solution="""
shuffled_tokens = "b"
""",
    why="Each token's query is the same as before and meets the same keys and values, and a sum "
    "does not care for order, so its output vector is the same. It stands where the token now "
    "stands: the layer is permutation equivariant. The columns of the weights move along with the "
    "keys.",
    point="Without positions, attention sees a bag of tokens: 'dog bites man' and 'man bites dog' "
    "give the same vectors.",
    check=one_of(
        "b",
        {
            "a": "The output would be unchanged only if the layer ignored which row is which. Each "
            "row of the output belongs to a query, and the queries have moved.",
            "c": "The same vectors, yes; but the columns of the weights belong to keys, and the "
            "keys have moved, so the columns move with them.",
            "d": "The order in which a query meets its keys does not matter: the output is a sum "
            "over them.",
            "e": "A plain average would need equal scores. The scores depend on the contents of "
            "the tokens, which shuffling does not change.",
        },
    ),
)


# --- Positions: sinusoids ------------------------------------------------------------------------


def _sinusoid_cases() -> list[Case]:
    return [
        case("T=5, D=8", 5, 8),
        case("T=3, D=6", 3, 6),
        case("T=40, D=2", 40, 2),
        case("T=11, D=12", 11, 12),
    ]


def _sinusoid_loop(n_positions: int, d_model: int) -> Tensor:
    def entry(t: int, j: int) -> float:
        angle = t / 10_000 ** (2 * (j // 2) / d_model)
        return math.cos(angle) if j % 2 else math.sin(angle)

    return torch.tensor(
        [[entry(t, j) for j in range(d_model)] for t in range(n_positions)], dtype=torch.float64
    )


def _sinusoid(
    T: int,
    D: int,
    *,
    exponent: Callable[[Tensor], Tensor] | None = None,
    first: int = 0,
    order: int = 1,
    split: bool = False,
) -> Tensor:
    """The table with one thing changed. `exponent` maps the number of the pair to a power."""
    pair = torch.arange(D // 2, dtype=torch.float64)
    power = 2 * pair / D if exponent is None else exponent(pair)
    angle = torch.arange(first, first + T, dtype=torch.float64)[:, None] / 10_000**power
    parts = (angle.sin(), angle.cos())[::order]
    return torch.cat(parts, -1) if split else torch.stack(parts, -1).flatten(1)


SINUSOIDAL_TABLE = Exercise(
    name="sinusoidal_table",
    title="Sinusoidal positions",
    level=1,
    minutes=8,
    task=r"""
Write the table of Vaswani et al. (2017): for position $t = 0, \dots, T-1$ and pair $i = 0, \dots,
D/2-1$

$$p_{t,\,2i} = \sin\!\left(t / 10000^{2i/D}\right), \qquad
p_{t,\,2i+1} = \cos\!\left(t / 10000^{2i/D}\right).$$
""",
    stub='''
def sinusoidal_table(n_positions: int, d_model: int) -> Float[Tensor, "T D"]:
    """Sine and cosine of each position at D/2 frequencies, side by side."""
    raise NotImplementedError
''',
    hints=(
        "Make the angles first: one row for each position, one column for each pair, D/2 columns. "
        "Then there are two tables to weave together.",
        "`torch.arange(0, d_model, 2)` is already 2i, so the power is that over D. Write the sines "
        "into the even columns and the cosines into the odd ones (`table[:, 0::2]`).",
    ),
    solution='''
def sinusoidal_table(n_positions: int, d_model: int) -> Float[Tensor, "T D"]:
    """Sine and cosine of each position at D/2 frequencies, side by side."""
    pair = torch.arange(0, d_model, 2)  # 2i
    angle = torch.arange(n_positions)[:, None] / 10_000 ** (pair / d_model)  # (T, D/2)
    table = torch.empty(n_positions, d_model)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()
    return table
''',
    why="A sine and a cosine of one frequency form a pair: a hand on a clock face. Pair 0 turns by "
    "1 radian a position, each further pair more slowly by the same ratio, down to nearly 1/10000. "
    "Together they tell positions apart as the hands of a clock tell the time.",
    point="Each pair of features is a clock hand; position is read off D/2 hands that turn at "
    "geometrically falling speeds.",
    check=same_function(
        _sinusoid_loop,
        _sinusoid_cases,
        [
            Mistake(
                "The power is i/D instead of 2i/D, so the slowest hand turns about 100 times too "
                "fast. `arange(0, D, 2)` counts 2i already, `arange(D // 2)` counts i.",
                lambda T, D: _sinusoid(T, D, exponent=lambda i: i / D),
            ),
            Mistake(
                "The power is 4i/D instead of 2i/D: the 2 is there twice, once in `arange(0, D, "
                "2)`.",
                lambda T, D: _sinusoid(T, D, exponent=lambda i: 4 * i / D),
            ),
            Mistake(
                "All sines come first and then all cosines. Here they stand side by side, even and "
                "odd columns. (Both layouts are in use; a checkpoint fixes which.)",
                lambda T, D: _sinusoid(T, D, split=True),
            ),
            Mistake(
                "Sine and cosine have changed places: the even columns are sines, so position 0 "
                "begins 0, 1, 0, 1.",
                lambda T, D: _sinusoid(T, D, order=-1),
            ),
            Mistake(
                "The first row is position 1. Positions count from 0.",
                lambda T, D: _sinusoid(T, D, first=1),
            ),
            Mistake(
                "All columns turn at the same speed: the division by 10000^(2i/D) is missing.",
                lambda T, D: _sinusoid(T, D, exponent=lambda i: 0 * i),
            ),
            Mistake(
                "Each column j has a power of its own, j/D. A sine and its cosine share one "
                "frequency, that of their pair: columns 2i and 2i + 1 both take 2i/D.",
                lambda T, D: torch.stack(
                    [
                        (torch.arange(T) / 10_000 ** (j / D)).sin()
                        if j % 2 == 0
                        else (torch.arange(T) / 10_000 ** (j / D)).cos()
                        for j in range(D)
                    ],
                    -1,
                ),
                hint=2,
            ),
            Mistake(
                "The angles are multiplied by 10000^(2i/D) instead of divided.",
                lambda T, D: _sinusoid(T, D, exponent=lambda i: -2 * i / D),
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


def _shift(shift: int, d_model: int) -> Tensor:
    """Solve for the matrix: the only one that carries the table to the shifted table."""
    T = d_model + 1
    power = torch.arange(0, d_model, 2, dtype=torch.float64) / d_model
    matrix = torch.zeros(d_model, d_model, dtype=torch.float64)
    for i, p in enumerate(power.tolist()):
        t = torch.arange(T, dtype=torch.float64) / 10_000**p
        later = (torch.arange(T, dtype=torch.float64) + shift) / 10_000**p
        before = torch.stack((t.sin(), t.cos()), 1)
        after = torch.stack((later.sin(), later.cos()), 1)
        block = torch.linalg.lstsq(before, after, driver="gelsd").solution.T
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    return matrix


def _rotation(
    shift: int,
    D: int,
    *,
    sign: float = 1.0,
    minus: float = -1.0,
    one_speed: bool = False,
    split: bool = False,
) -> Tensor:
    """The matrix with one thing changed."""
    power = torch.arange(0, D, 2, dtype=torch.float64) / D
    angle = shift / 10_000 ** (0 * power if one_speed else power)
    sin, cos = sign * angle.sin(), angle.cos()
    if split:
        rows = (torch.cat((cos.diag(), sin.diag()), 1), torch.cat((-sin.diag(), cos.diag()), 1))
        return torch.cat(rows, 0)
    blocks = torch.stack((torch.stack((cos, sin), -1), torch.stack((minus * sin, cos), -1)), -2)
    return torch.block_diag(*blocks)


SHIFT_MATRIX = Exercise(
    name="shift_matrix",
    title="A shift is a rotation",
    level=3,
    minutes=12,
    task=r"""
The claim behind sinusoidal positions: moving by $s$ positions is a fixed **linear** map, the same
wherever one starts. Construct the matrix $M_s$ of shape $(D, D)$ with $p_{t+s} = M_s\, p_t$ for
every $t$, where $p_t$ is the row $t$ of the table (sine and cosine side by side, base 10000),
taken as a column vector. $s$ may be negative.
""",
    stub='''
def shift_matrix(shift: int, d_model: int) -> Float[Tensor, "D D"]:
    """The matrix that carries the vector of any position t to that of position t + shift."""
    raise NotImplementedError
''',
    hints=(
        "Look at one pair: sin(w(t + s)) and cos(w(t + s)). The addition theorems write both in "
        "terms of sin(wt) and cos(wt).",
        "sin(a + b) = sin a cos b + cos a sin b, and cos(a + b) = cos a cos b - sin a sin b. So "
        "each pair has a block of 2 by 2 with the angle w · s, and everything off the blocks is 0.",
    ),
    solution='''
def shift_matrix(shift: int, d_model: int) -> Float[Tensor, "D D"]:
    """The matrix that carries the vector of any position t to that of position t + shift."""
    matrix = torch.zeros(d_model, d_model)
    for i in range(0, d_model, 2):
        angle = shift / 10_000 ** (i / d_model)
        sin, cos = math.sin(angle), math.cos(angle)
        matrix[i, i], matrix[i, i + 1] = cos, sin  # sin(a + b) = sin a cos b + cos a sin b
        matrix[i + 1, i], matrix[i + 1, i + 1] = -sin, cos
    return matrix
''',
    why="Each pair is a hand that turns by w · s whatever it shows, so the map is a rotation of "
    "each pair by its own angle. It does not depend on t. Rotary embeddings take this rotation and "
    "apply it to queries and keys instead of adding a vector.",
    point="Moving by s positions rotates each pair by a fixed angle: relative position is a linear "
    "map, and rotary embeddings build on exactly this.",
    check=same_function(
        _shift,
        [
            case("shift 3, D=8", 3, 8),
            case("shift -2, D=6", -2, 6),
            case("shift 17, D=4", 17, 4),
            case("shift 1, D=2", 1, 2),
        ],
        [
            Mistake(
                "This matrix moves by -s: the signs of the two sines are swapped, so it is the "
                "transpose. (A vector times it from the left would be right.)",
                lambda s, D: _rotation(s, D, sign=-1.0),
            ),
            Mistake(
                "All pairs turn by the same angle. Each pair has its own frequency.",
                lambda s, D: _rotation(s, D, one_speed=True),
            ),
            Mistake(
                "The blocks are laid out for a table with all sines first. Here a sine and its "
                "cosine stand side by side, so the blocks lie on the diagonal.",
                lambda s, D: _rotation(s, D, split=True),
            ),
            Mistake(
                "One of the two sines needs a minus: cos(a + b) = cos a cos b - sin a sin b. As it "
                "is, the blocks are no rotations.",
                lambda s, D: _rotation(s, D, minus=1.0),
                hint=2,
            ),
            Mistake(
                "Only the cosines are there. They scale each hand; turning it takes the sines too.",
                lambda s, D: _rotation(s, D).diag().diag(),
                hint=2,
            ),
            Mistake(
                "The identity moves nothing.",
                lambda s, D: torch.eye(D),
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


# --- Positions: rotary ---------------------------------------------------------------------------


def _rope_cases() -> list[Case]:
    return [
        case("B=2, H=3, T=4, E=6, base 10000", normal(2, 3, 4, 6), torch.arange(4), 10_000.0),
        case(
            "B=1, H=2, E=8, positions 5 to 7, base 100",
            normal(1, 2, 3, 8, seed=1),
            torch.arange(5, 8),
            100.0,
        ),
        case(
            "B=2, H=1, E=4, positions 9, 2, 30, base 10000",
            normal(2, 1, 3, 4, seed=2),
            torch.tensor([9, 2, 30]),
            10_000.0,
        ),
    ]


def _rope_complex(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The rotation as a product of complex numbers."""
    E = x.shape[-1]
    speed = torch.tensor([base ** (-2 * i / E) for i in range(E // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None].double() * speed)
    turned = torch.complex(x.double()[..., : E // 2], x.double()[..., E // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def _rope(
    x: Tensor,
    positions: Tensor,
    base: float,
    *,
    sign: float = 1.0,
    neighbours: bool = False,
    power: float = 2.0,
    same_speed: bool = False,
) -> Tensor:
    """The rotation with one thing changed."""
    E = x.shape[-1]
    i = torch.arange(E // 2, dtype=torch.float64) * (0 if same_speed else 1)
    angle = positions[:, None] * base ** (-power * i / E)
    sin, cos = sign * angle.sin(), angle.cos()
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)


ROPE = Exercise(
    name="rope",
    title="Rotary positions",
    level=2,
    minutes=10,
    task=r"""
Rotate queries or keys by their position, in the layout of Hugging Face checkpoints: feature $i$ and
feature $i + E/2$ form a pair, for $i = 0, \dots, E/2 - 1$. At position $m$ the pair $(a, b)$ is
turned by the angle $\theta = m \cdot \mathrm{base}^{-2i/E}$:

$$a' = a \cos\theta - b \sin\theta, \qquad b' = b \cos\theta + a \sin\theta.$$
""",
    stub='''
def rope(
    x: Float[Tensor, "B H T E"], positions: Int[Tensor, "T"], base: float
) -> Float[Tensor, "B H T E"]:
    """Turn each pair of features by an angle that grows with the position."""
    raise NotImplementedError
''',
    hints=(
        "Angles first: a table with a row for each position and a column for each of the E/2 "
        "pairs. Then cut x in the two halves that hold the a's and the b's.",
        "`x.chunk(2, dim=-1)` gives all a's and all b's. Multiply with the cosines and sines (T, "
        "E/2), which broadcast over batch and heads, and join the new halves in the same order.",
    ),
    solution='''
def rope(
    x: Float[Tensor, "B H T E"], positions: Int[Tensor, "T"], base: float
) -> Float[Tensor, "B H T E"]:
    """Turn each pair of features by an angle that grows with the position."""
    d_head = x.shape[-1]
    pair = torch.arange(0, d_head, 2, device=x.device)  # 2i
    angle = positions[:, None] * base ** (-pair / d_head)  # (T, E/2)
    a, b = x.chunk(2, dim=-1)
    turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat(turned, dim=-1)
''',
    why="Each pair is turned like the hand of a clock, by an angle proportional to its position. "
    "The paper pairs neighbours (2i, 2i + 1) instead; both layouts give the same scores once the "
    "features of queries and keys are reordered alike, but a checkpoint trained with one gives "
    "nonsense with the other.",
    point="Rotation keeps lengths and changes angles, so a score depends on the contents and on "
    "the difference of the two positions. Which features form a pair is a convention: check it.",
    check=same_function(
        _rope_complex,
        _rope_cases,
        [
            Mistake(
                "Neighbouring features (2i, 2i + 1) are paired, as in the paper. Here the pair is "
                "(i, i + E/2), as in Hugging Face checkpoints.",
                lambda x, p, base: _rope(x, p, base, neighbours=True),
            ),
            Mistake(
                "It turns the other way: check which of the two products has the minus.",
                lambda x, p, base: _rope(x, p, base, sign=-1.0),
            ),
            Mistake(
                "Neighbouring features are paired, and they turn the other way.",
                lambda x, p, base: _rope(x, p, base, neighbours=True, sign=-1.0),
            ),
            Mistake(
                "All pairs turn at the same speed: the power of the base is missing.",
                lambda x, p, base: _rope(x, p, base, same_speed=True),
            ),
            Mistake(
                "The power is -i/E instead of -2i/E: the slow pairs turn too fast.",
                lambda x, p, base: _rope(x, p, base, power=1.0),
            ),
            Mistake(
                "The power has the wrong sign, so the pairs get faster instead of slower.",
                lambda x, p, base: _rope(x, p, base, power=-2.0),
            ),
            Mistake(
                "The base is 10000 whatever `base` says. Models differ in it.",
                lambda x, p, base: _rope(x, p, 10_000.0),
            ),
            Mistake(
                "The positions are not used: the rows are counted from 0. With a cache the new "
                "positions do not start at 0.",
                lambda x, p, base: _rope(x, torch.arange(len(p)), base),
                hint=2,
            ),
            Mistake(
                "The two halves have changed places in the result.",
                lambda x, p, base: _rope(x, p, base).roll(x.shape[-1] // 2, -1),
                hint=2,
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


ROPE_SCORE = Exercise(
    name="rope_score",
    title="What a rotated score depends on",
    level=2,
    minutes=5,
    task=r"""
A head of width 2 has a single pair, which turns by 1 radian a position. Before the rotation query
and key are both $(1, 0)$. The score is the plain dot product of the rotated vectors. What is the
score of a query at position 7 with a key at position 3? And of a query at position 107 with a key
at position 103?

Three decimals will do.
""",
    stub="""
rope_score = (
    ...,  # query at 7, key at 3
    ...,  # query at 107, key at 103
)
""",
    hints=(
        "Where does (1, 0) point after a turn of 7 radians, and after one of 3? What is the angle "
        "between the two?",
        "The dot product of two vectors of length 1 is the cosine of the angle between them. The "
        "angle is the difference of the two turns, in radians.",
    ),
    solution="""
rope_score = (math.cos(7 - 3), math.cos(107 - 103))
""",
    why="cos 7 cos 3 + sin 7 sin 3 = cos(7 - 3) = -0.654: the addition theorem leaves the "
    "difference only. Moving both by 100 turns both by the same angle and changes nothing.",
    point="After the rotation a score knows how far apart two tokens are, not where they stand.",
    check=same_value(
        (math.cos(4), math.cos(4)),
        [
            Mistake(
                "cos(7 + 3) has the sum of the positions. The angle between two hands is the "
                "difference of their turns.",
                when=lambda got, _: _near(got[0], math.cos(10)),
            ),
            Mistake(
                "cos 7 · cos 3 is the product of the first coordinates. The second coordinates, "
                "the two sines, belong to the dot product too.",
                when=lambda got, _: _near(got[0], math.cos(7) * math.cos(3)),
            ),
            Mistake(
                "The angle is taken in degrees. It is 4 radians, more than half a turn.",
                when=lambda got, _: _near(got[0], math.cos(math.radians(4))),
            ),
            Mistake(
                "4 is the angle between the two; the dot product is its cosine.",
                when=lambda got, _: _near(got[0], 4),
            ),
            Mistake(
                "A sine is 0 where the two point the same way; the dot product is the cosine.",
                when=lambda got, _: _near(abs(got[0]), abs(math.sin(4))),
            ),
            Mistake(
                "1 is the score without positions. The two are turned by different angles.",
                when=lambda got, _: _near(got[0], 1),
            ),
            Mistake(
                "The first is right. The second has the same difference of positions: what can "
                "have changed?",
                when=lambda got, _: _near(got[0], math.cos(4)),
                hint=2,
            ),
        ],
        names=("positions 7 and 3", "positions 107 and 103"),
        atol=2e-3,
    ),
)


SLOWEST_PAIR = Exercise(
    name="slowest_pair",
    title="The slowest hand",
    level=2,
    minutes=5,
    task=r"""
Rotary positions with $E = 128$ and base 10000: pair $i = 0, \dots, 63$ turns by $10000^{-2i/E}$
radians a position. After how many positions has the **slowest** pair turned once round?
""",
    stub="""
slowest_pair = ...
""",
    hints=(
        "Which i is the slowest pair, and how many radians does it turn by in one position? How "
        "many radians are a full turn?",
        "There are 64 pairs, counted from 0: the last is i = 63, so the power is 126/128, not 1. A "
        "full turn is 2π radians.",
    ),
    solution="""
slowest_pair = 2 * math.pi * 10_000 ** (126 / 128)
""",
    why="The slowest pair turns by 10000^(-126/128) = 1/8660 radians a position, so a full turn "
    "takes 2π · 8660 = 54410 positions. A model trained on contexts of 4096 tokens has seen only "
    "the first 27 degrees of it: at longer distances this pair shows angles that it has never met. "
    "That is where methods that stretch the context begin.",
    point="Fast pairs tell neighbours apart, slow ones distant tokens. In training the slow ones "
    "never turn all the way round, which is why longer contexts are new to them.",
    check=same_value(
        2 * math.pi * 10_000 ** (126 / 128),
        [
            Mistake(
                "The slowest pair is i = 63, since pairs count from 0: its power is 126/128, not "
                "1.",
                2 * math.pi * 10_000,
            ),
            Mistake(
                "That many positions turn it by 1 radian. A full turn is 2π of them.",
                10_000 ** (126 / 128),
            ),
            Mistake(
                "10000 would be 1 radian of a pair with power 1; the slowest has power 126/128, "
                "and a full turn is 2π radians.",
                10_000.0,
            ),
            Mistake("That is the fastest pair, i = 0: 1 radian a position.", 2 * math.pi),
            Mistake(
                "The power is 2i/E, with E = 128: for i = 63 it is 126/128. With i/E it would be "
                "63/128.",
                2 * math.pi * 10_000 ** (63 / 128),
            ),
            Mistake(
                "The power is 2i/E for whole i, at most 126/128. 127/128 belongs to no pair.",
                2 * math.pi * 10_000 ** (127 / 128),
                hint=2,
            ),
            Mistake(
                "A full turn is 2π radians, not 360: the angles are in radians.",
                360 * 10_000 ** (126 / 128),
            ),
        ],
        rtol=2e-3,
    ),
)


def _rope_cache_cases() -> list[Case]:
    rows = []
    for B, H, S, E, seed in ((2, 3, 4, 6, 130), (1, 2, 7, 8, 140), (3, 1, 1, 4, 150)):
        q, k = normal(B, H, 1, E, seed=seed), normal(B, H, 1, E, seed=seed + 1)
        cached = _rope_complex(normal(B, H, S, E, seed=seed + 2), torch.arange(S), 10_000.0).float()
        rows.append(case(f"S={S} cached keys, B={B}, H={H}, E={E}", q, k, cached))
    return rows


def _rope_cached(
    q: Tensor,
    k: Tensor,
    cached: Tensor,
    *,
    at: int = 0,
    key_at: int | None = None,
    zero: bool = False,
    again: bool = False,
    first: bool = False,
    scale: bool = True,
) -> Tensor:
    """Scores of a new query with a cache, with any of several mistakes."""
    S = cached.shape[2]
    here = torch.tensor([0 if zero else S + at])
    there = here if key_at is None else torch.tensor([key_at])
    q, k = _rope(q, here, 10_000.0).float(), _rope(k, there, 10_000.0).float()
    keys = torch.cat((k, cached) if first else (cached, k), 2)
    if again:
        keys = _rope(keys, torch.arange(S + 1), 10_000.0).float()
    return q @ keys.mT / (math.sqrt(q.shape[-1]) if scale else 1.0)


def _rope_cache_oracle(q: Tensor, k: Tensor, cached: Tensor) -> Tensor:
    """By relative position: the new pair stands together, the cached keys are turned back by S."""
    S = cached.shape[2]
    back = _rope_complex(cached, torch.full((S,), -S), 10_000.0)
    keys = torch.cat((back, k.double()), 2)
    return torch.einsum("bhte,bhse->bhts", q.double(), keys) / math.sqrt(q.shape[-1])


FIX_ROPE_CACHE = Exercise(
    name="fix_rope_cache",
    title="Rotary positions with a cache",
    level=3,
    minutes=12,
    task=r"""
A model with rotary positions writes well without a cache and nonsense with it. The cache holds $S$
keys that were rotated, at positions $0$ to $S-1$, when they were put in. This function should give
the scores of one new token's query with the cached keys and its own. It contains **two** mistakes.

`rope_angles` and `rope_rotate` are those of `llm_anatomy.positions`, and they are right.
""",
    stub='''
from llm_anatomy.positions import rope_angles, rope_rotate


def fix_rope_cache(
    q: Float[Tensor, "B H 1 E"], k: Float[Tensor, "B H 1 E"], cached_k: Float[Tensor, "B H S E"]
) -> Float[Tensor, "B H 1 S_plus_1"]:
    """Scores of a new query; q and k are not rotated yet, the cached keys are."""
    S, E = cached_k.shape[-2:]
    q = rope_rotate(q, *rope_angles(torch.arange(q.shape[-2]), E))
    keys = torch.cat((cached_k, k), dim=-2)
    keys = rope_rotate(keys, *rope_angles(torch.arange(S + 1), E))
    return q @ keys.mT / math.sqrt(E)
''',
    hints=(
        "For each of the three inputs ask two questions: at which position does it stand, and how "
        "many times has it been rotated when it reaches the dot product?",
        "`torch.arange(q.shape[-2])` is position 0, but the new token comes after S others. And "
        "the cached keys have their rotation already: only the new key still needs one.",
    ),
    solution='''
from llm_anatomy.positions import rope_angles, rope_rotate


def fix_rope_cache(
    q: Float[Tensor, "B H 1 E"], k: Float[Tensor, "B H 1 E"], cached_k: Float[Tensor, "B H S E"]
) -> Float[Tensor, "B H 1 S_plus_1"]:
    """Scores of a new query; q and k are not rotated yet, the cached keys are."""
    S, E = cached_k.shape[-2:]
    cos, sin = rope_angles(torch.arange(S, S + 1), E)
    q, k = rope_rotate(q, cos, sin), rope_rotate(k, cos, sin)
    keys = torch.cat((cached_k, k), dim=-2)
    return q @ keys.mT / math.sqrt(E)
''',
    why="A key is rotated once, when it enters the cache, by its own position; it never has to be "
    "touched again. The new token stands at position S. Starting each step at 0 makes every query "
    "believe that it is the first token; rotating the cache again doubles the positions of its "
    "keys, and in the next step triples them.",
    point="With a cache the position has to be told, not counted: rotate each key once, at its own "
    "position, before it is stored.",
    check=same_function(
        _rope_cache_oracle,
        _rope_cache_cases,
        [
            Mistake(
                "",
                lambda q, k, c: (
                    _rope(q, torch.tensor([0]), 10_000.0).float()
                    @ _rope(torch.cat((c, k), 2), torch.arange(c.shape[2] + 1), 10_000.0).float().mT
                    / math.sqrt(q.shape[-1])
                ),
                untouched=True,
            ),
            Mistake(
                "One mistake is left: the cached keys are rotated a second time, so they seem to "
                "stand at twice their position.",
                lambda q, k, c: (
                    _rope(q, torch.tensor([c.shape[2]]), 10_000.0).float()
                    @ _rope(torch.cat((c, k), 2), torch.arange(c.shape[2] + 1), 10_000.0).float().mT
                    / math.sqrt(q.shape[-1])
                ),
            ),
            Mistake(
                "One mistake is left: the query is rotated as if it stood at position 0. S tokens "
                "come before it.",
                lambda q, k, c: _rope_cached(q, k, c, zero=True, key_at=c.shape[2]),
            ),
            Mistake(
                "The new token's query and key are both placed at position 0. S tokens come before "
                "it.",
                lambda q, k, c: _rope_cached(q, k, c, zero=True),
            ),
            Mistake(
                "The new key is not rotated, which is the rotation of position 0. It stands at S, "
                "like the query.",
                lambda q, k, c: _rope_cached(q, k, c, key_at=0),
            ),
            Mistake(
                "The new token is placed one position too far: the cache holds 0 to S - 1, so the "
                "next is S.",
                lambda q, k, c: _rope_cached(q, k, c, at=1),
            ),
            Mistake(
                "The new token is placed where the last cached one stands: the cache holds 0 to S "
                "- 1, so the next is S.",
                lambda q, k, c: _rope_cached(q, k, c, at=-1),
            ),
            Mistake(
                "The new key is rotated twice, and the cached ones are rotated again.",
                lambda q, k, c: _rope_cached(q, k, c, again=True),
            ),
            Mistake(
                "The new key comes before the cached ones. Keys stay in the order of their "
                "positions.",
                lambda q, k, c: _rope_cached(q, k, c, first=True),
            ),
        ],
        rtol=1e-3,
        atol=1e-4,
    ),
)


# --- Positions: biases ---------------------------------------------------------------------------


def _slopes(n_heads: int) -> Tensor:
    return torch.tensor([2 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)])


ALIBI_SLOPES = Exercise(
    name="alibi_slopes",
    title="The slopes of ALiBi",
    level=1,
    minutes=4,
    task=r"""
ALiBi lowers each score by a slope times the distance. For $H = 2^n$ heads the slopes are a
geometric series that **starts at** $2^{-8/H}$, has this same number as its ratio, and therefore
**ends at** $2^{-8}$. Write them down for any such $H$.
""",
    stub='''
def alibi_slopes(n_heads: int) -> Float[Tensor, "H"]:
    """How fast each head's score falls with distance; n_heads is a power of two."""
    raise NotImplementedError
''',
    hints=(
        "In a geometric series whose first term is the ratio itself, the h-th term is a power of "
        "it. Which power has the first term?",
        "The exponents run from 1 to H: slope h is (2^(-8/H))^h. For H = 8 the slopes are 1/2, "
        "1/4, down to 1/256.",
    ),
    solution='''
def alibi_slopes(n_heads: int) -> Float[Tensor, "H"]:
    """How fast each head's score falls with distance; n_heads is a power of two."""
    return 2.0 ** (-8 / n_heads * torch.arange(1, n_heads + 1))
''',
    why="The ratio depends on H so that the series always ends at 1/256: more heads fill the same "
    "range more finely. The first head looks at its neighbours only, the last nearly everywhere.",
    point="The slopes are fixed, not learned: each head is given its own range of sight, from a "
    "few tokens to hundreds.",
    check=same_function(
        _slopes,
        [case("H=8", 8), case("H=4", 4), case("H=16", 16), case("H=1", 1)],
        [
            Mistake(
                "The exponents start at 0, so the first slope is 1 and the last is not 2^-8: start "
                "at 1.",
                lambda H: 2.0 ** (-8 / H * torch.arange(H)),
            ),
            Mistake(
                "The ratio 1/2 is that of 8 heads. For H heads it is 2^(-8/H).",
                lambda H: 2.0 ** -torch.arange(1.0, H + 1),
            ),
            Mistake(
                "These fall in equal steps. The series is geometric: each slope is the one before "
                "it times the same ratio.",
                lambda H: torch.linspace(2 ** (-8 / H), 2**-8, H),
            ),
            Mistake(
                "They come in the opposite order: the steepest slope is the first.",
                lambda H: _slopes(H).flip(0),
            ),
            Mistake(
                "The exponents lack their minus sign: slopes are between 0 and 1.",
                lambda H: 1 / _slopes(H),
            ),
            Mistake(
                "They are negative. The slope is positive; the bias, minus slope times distance, "
                "takes the sign.",
                lambda H: -_slopes(H),
            ),
            Mistake(
                "The exponents are those of base e. The series consists of powers of 2.",
                lambda H: torch.exp(-8 / H * torch.arange(1, H + 1)),
            ),
            Mistake(
                "The ratio is 2^(-H/8); it should be 2^(-8/H).",
                lambda H: 2.0 ** (-H / 8 * torch.arange(1, H + 1)),
            ),
        ],
        rtol=1e-4,
        atol=1e-7,
    ),
)


def _alibi_loop(slopes: Tensor, n_queries: int, n_keys: int) -> Tensor:
    T, S = n_queries, n_keys
    distance = [[max(S - T + t - s, 0) for s in range(S)] for t in range(T)]
    return -torch.tensor([[[m * d for d in row] for row in distance] for m in slopes.tolist()])


def _distance(T: int, S: int, first: int | None = None) -> Tensor:
    first = S - T if first is None else first
    return torch.arange(first, first + T)[:, None] - torch.arange(S)


ALIBI_BIAS = Exercise(
    name="alibi_bias",
    title="A bias for distance",
    level=2,
    minutes=8,
    task=r"""
From the slopes, make the bias that ALiBi adds to the scores of head $h$: **minus** slope times the
distance from the query back to the key. The $T$ queries are the last $T$ of the $S$ positions.
Keys after the query get 0; a causal mask hides them anyway.
""",
    stub='''
def alibi_bias(
    slopes: Float[Tensor, "H"], n_queries: int, n_keys: int
) -> Float[Tensor, "H T S"]:
    """What is added to the scores, in nats: 0 at the query itself, falling with distance."""
    raise NotImplementedError
''',
    hints=(
        "First make the (T, S) table of distances, position of the query minus position of the "
        "key. Where does the first query stand when S > T?",
        "The queries stand at S - T to S - 1. Clamp the distances at 0 from below, give the slopes "
        "two more axes so that they broadcast to (H, T, S), and mind the sign.",
    ),
    solution='''
def alibi_bias(
    slopes: Float[Tensor, "H"], n_queries: int, n_keys: int
) -> Float[Tensor, "H T S"]:
    """What is added to the scores, in nats: 0 at the query itself, falling with distance."""
    query = torch.arange(n_keys - n_queries, n_keys, device=slopes.device)
    key = torch.arange(n_keys, device=slopes.device)
    distance = (query[:, None] - key).clamp(min=0)  # (T, S)
    return -slopes[:, None, None] * distance
''',
    why="Adding -m · d to a score multiplies the weight by e^(-m d) before the softmax normalises:"
    " each head forgets exponentially, at its own rate. The table depends on differences only, so "
    "it can be made for any length, also one longer than in training.",
    point="A bias that depends on distance alone is the same everywhere in the text, and is defined"
    " for every length.",
    check=same_function(
        _alibi_loop,
        lambda: [
            case("H=2, T=4, S=4", torch.tensor([0.5, 0.25]), 4, 4),
            case("H=3, T=2, S=5", torch.tensor([0.5, 0.125, 0.0625]), 2, 5),
            case("H=1, T=1, S=6", torch.tensor([0.3]), 1, 6),
        ],
        [
            Mistake(
                "The sign is positive, which favours distant keys. The bias lowers the score.",
                lambda m, T, S: m[:, None, None] * _distance(T, S).clamp(min=0),
            ),
            Mistake(
                "Keys after the query get a bias too, by their distance. They should get 0 here.",
                lambda m, T, S: -m[:, None, None] * _distance(T, S).abs(),
            ),
            Mistake(
                "Keys after the query get a positive bias: the distance is negative there, and "
                "should be cut off at 0.",
                lambda m, T, S: -m[:, None, None] * _distance(T, S),
            ),
            Mistake(
                "The queries are placed at the start of the keys. They are the last T positions.",
                lambda m, T, S: -m[:, None, None] * _distance(T, S, 0).clamp(min=0),
                hint=2,
            ),
            Mistake(
                "The distances are counted the wrong way: key minus query is 0 or less for every "
                "key that may be seen, and only the keys after the query keep a bias.",
                lambda m, T, S: -m[:, None, None] * (-_distance(T, S)).clamp(min=0),
            ),
            Mistake(
                "The bias is the position of the key (with a minus). In each row that differs from "
                "the distance by a constant, which a softmax would not notice; but here the query "
                "itself should get 0.",
                lambda m, T, S: -m[:, None, None] * torch.arange(S).expand(len(m), T, S),
            ),
            Mistake(
                "The bias is slope times the position of the key. In each row that differs from "
                "minus the distance by a constant only, which a softmax does not notice: it would "
                "work. What is asked for is 0 at the query itself.",
                lambda m, T, S: m[:, None, None] * torch.arange(S).expand(len(m), T, S),
            ),
            Mistake(
                "The distance is one too large: a query is at distance 0 from itself.",
                lambda m, T, S: -m[:, None, None] * (_distance(T, S) + 1).clamp(min=0),
            ),
            Mistake(
                "The heads stand last. The shape is (H, T, S).",
                lambda m, T, S: -m * _distance(T, S).clamp(min=0)[..., None],
            ),
        ],
    ),
)


def _t5_offsets() -> list[Case]:
    # Where an offset is 16, 32 or 64 the logarithm hits a whole number, and rounding would decide.
    near = torch.arange(-15, 16)
    far = torch.tensor([[-300, -128, -127, -91, -90, -46], [17, 23, 45, 63, 100, 1000]])
    return [
        case("offsets -15 to 15", near[None]),
        case("offsets up to 1000", far),
        case("four queries and six keys", torch.arange(6) - torch.arange(4)[:, None]),
    ]


def _t5_loop(offset: Tensor) -> Tensor:
    def bucket(o: int) -> int:
        d, start = abs(o), 16 if o > 0 else 0
        if d < 8:
            return start + d
        return start + min(8 + math.floor(8 * math.log(d / 8) / math.log(128 / 8)), 15)

    return torch.tensor([[bucket(o) for o in row] for row in offset.tolist()])


def _t5(
    offset: Tensor,
    *,
    after: Callable[[Tensor], Tensor] = lambda o: o > 0,
    exact: int = 8,
    base: float = 128 / 8,
    clamp: int = 15,
    start: int | None = None,
) -> Tensor:
    """The buckets with one thing changed."""
    d = offset.abs()
    start = exact if start is None else start
    grow = (d.double() / exact).clamp(min=1).log() / math.log(base) * (16 - exact)
    far = (start + grow).long().clamp(max=clamp)
    return after(offset).long() * 16 + torch.where(d < exact, d, far)


T5_BUCKET = Exercise(
    name="t5_bucket",
    title="The buckets of T5",
    level=3,
    minutes=15,
    task=r"""
T5's encoder gives each offset $o$ (key position minus query position) one of 32 buckets, and
learns one number for each bucket and head. With the distance $d = |o|$:

* keys **after** the query ($o > 0$) use buckets 16 to 31, the others 0 to 15;
* within each half, distances below 8 have a bucket each: $d$;
* larger ones share: $8 + \left\lfloor 8 \cdot \dfrac{\ln(d/8)}{\ln(128/8)} \right\rfloor$, but
  never more than 15.

Return the bucket of every offset, as integers.
""",
    stub='''
def t5_bucket(offset: Int[Tensor, "T S"]) -> Int[Tensor, "T S"]:
    """The bucket, 0 to 31, of each offset (key position minus query position)."""
    raise NotImplementedError
''',
    hints=(
        "Three parts, each a tensor of its own: the start of the half (0 or 16), the bucket of a "
        "small distance, the bucket of a large one. How do you choose between the last two, entry "
        "by entry?",
        "`torch.where(distance < 8, small, large)`. The logarithm is computed for small distances "
        "too, so keep its argument at 1 or more; cut off the large buckets at 15; add 16 where the "
        "offset is positive.",
    ),
    solution='''
def t5_bucket(offset: Int[Tensor, "T S"]) -> Int[Tensor, "T S"]:
    """The bucket, 0 to 31, of each offset (key position minus query position)."""
    distance = offset.abs()
    growth = (distance / 8).clamp(min=1).log() / math.log(128 / 8)  # 0 at 8, 1 at 128
    large = (8 + 8 * growth).long().clamp(max=15)
    within_half = torch.where(distance < 8, distance, large)
    return within_half + 16 * (offset > 0).long()
''',
    why="Near tokens are told apart one by one, far ones by order of magnitude only, and everything"
    " from 128 on is simply far. `torch.where` computes both branches, so the logarithm must be "
    "harmless for small distances as well. In T5's decoder no key comes after the query, so all 32 "
    "buckets serve the one direction.",
    point="Exact nearby, logarithmic far away, constant beyond 128: the table has an entry for "
    "every distance, trained or not.",
    check=same_function(
        _t5_loop,
        _t5_offsets,
        [
            Mistake(
                "The halves are swapped: keys after the query (positive offsets) use 16 to 31.",
                lambda o: _t5(o, after=lambda o: o < 0),
            ),
            Mistake(
                "An offset of 0 is counted as after the query. The query itself is in bucket 0.",
                lambda o: _t5(o, after=lambda o: o >= 0),
            ),
            Mistake(
                "The two directions are not told apart: 16 is missing where the offset is "
                "positive.",
                lambda o: _t5(o, after=lambda o: torch.zeros_like(o)),
            ),
            Mistake(
                "Distances of 128 and more run out of their half: never more than 15 within it.",
                lambda o: _t5(o, clamp=10**6),
            ),
            Mistake(
                "16 distances have a bucket each, as in a decoder. With two directions only 8 "
                "have.",
                lambda o: _t5(o, exact=16, base=128 / 16, start=16, clamp=31),
            ),
            Mistake(
                "The logarithm is not divided by ln(128/8), so it reaches the last bucket too "
                "soon.",
                lambda o: _t5(o, base=math.e),
            ),
            Mistake(
                "The logarithm is divided by ln(128), not by ln(128/8): the buckets grow too "
                "slowly.",
                lambda o: _t5(o, base=128.0),
            ),
            Mistake(
                "The 8 in front of the logarithm's term is missing, so far distances share buckets "
                "with near ones.",
                lambda o: _t5(o, start=0),
            ),
            Mistake(
                "The buckets are not whole numbers: round down, and convert to integers.",
                when=lambda got, want: got.is_floating_point(),
                hint=2,
            ),
        ],
        rtol=0.0,
        atol=0.0,
    ),
)


BEYOND_TRAINING = Exercise(
    name="beyond_training",
    title="One token too many",
    level=1,
    minutes=3,
    task=r"""
Five models were trained on sequences of 512 tokens, positions 0 to 511. Each knows positions in
another way. Now they read 513 tokens. For which of them does the **computation itself** fail,
because the new position has no representation at all?

* **a)** sinusoidal vectors
* **b)** learned position vectors, one for each position
* **c)** rotary positions
* **d)** ALiBi
* **e)** T5's bucketed bias

Answer with a letter.
""",
    stub="""
beyond_training = ...  # "a", "b", "c", "d" or "e"
""",
    hints=(
        "Which of the five is a table with one row for each position, and which are formulas or "
        "tables over distances?",
        "A formula can be evaluated at 512; a bias over distances has an entry for every distance. "
        "Only one of the five looks the position itself up.",
    ),
    solution="""
beyond_training = "b"
""",
    why="Learned vectors are a table of 512 rows, and position 512 is not in it. The other four can"
    " be computed for any length. Whether the model still works there is another question: "
    "sinusoidal and rotary positions reach angles that training never showed, while a bias over "
    "distances changes little.",
    point="A learned table is a hard limit. The others run on, which does not yet mean that they "
    "run well: that has to be measured.",
    check=one_of(
        "b",
        {
            "a": "A sine can be evaluated at position 512 as at any other. The vector is new to "
            "the model, but it exists.",
            "c": "A rotation by the angle of position 512 is as easy as any other. The largest "
            "distances are new to the model, but the computation runs.",
            "d": "Slope times distance is defined for every distance; going on to longer sequences "
            "is what ALiBi was made for.",
            "e": "Everything from distance 128 on shares the last bucket, so a distance of 512 has "
            "one too.",
        },
    ),
)


CHAPTER = Chapter(
    __name__,
    [
        # Attention
        VARIANCE,
        SCALED_SCORES,
        SOFTMAX_ROWS,
        ENTROPY_LIMITS,
        EFFECTIVE_KEYS,
        CAUSAL_MASK,
        PADDING_MASK,
        PREFIX_MASK,
        MASKED_SOFTMAX,
        ATTEND,
        SPLIT_HEADS,
        MERGE_HEADS,
        CROSS_ATTENTION,
        FIX_MULTI_HEAD,
        REPEAT_KV,
        CACHED_STEP,
        COUNT_PARAMETERS,
        SCORE_MEMORY,
        PATH_LENGTH,
        SHUFFLED_TOKENS,
        # Positions
        SINUSOIDAL_TABLE,
        SHIFT_MATRIX,
        ROPE,
        ROPE_SCORE,
        SLOWEST_PAIR,
        FIX_ROPE_CACHE,
        ALIBI_SLOPES,
        ALIBI_BIAS,
        T5_BUCKET,
        BEYOND_TRAINING,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
