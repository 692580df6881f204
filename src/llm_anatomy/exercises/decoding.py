"""Exercises of the chapter "From probabilities to text".

What is compared with: `llm_anatomy.decoding`, which equals transformers, and loops in float64.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_anatomy import decoding
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

NOTHING = torch.zeros(1, 1, dtype=torch.long)  # tokens, for filters that do not look at them
INF = float("inf")


def _package(filter_: decoding.Filter) -> Callable[[Tensor], Tensor]:
    """A filter of the package on rows (B, V)."""
    return lambda logits: filter_(logits.double(), NOTHING).float()


def _logit_rows(*shape: int, seed: int) -> Tensor:
    return 2 * normal(*shape, seed=seed)


# --- Temperature ---------------------------------------------------------------------------------

SOFTMAX_AT = Exercise(
    name="softmax_at",
    title="Softmax at a temperature",
    level=1,
    minutes=4,
    task=r"""
Turn logits into the probabilities of the next token at the temperature $\tau > 0$:
$p_i \propto e^{z_i / \tau}$. Each row is one distribution.
""",
    stub='''
def softmax_at(logits: Float[Tensor, "B V"], tau: float) -> Float[Tensor, "B V"]:
    """Probabilities of the next token at temperature tau."""
    raise NotImplementedError
''',
    hints=(
        "The temperature acts on the logits, before anything is exponentiated. Which way: does a "
        "small tau make their differences larger or smaller?",
        "Divide the logits by tau, and take the softmax over the vocabulary, the last axis. "
        "Nothing else is needed.",
    ),
    solution='''
def softmax_at(logits: Float[Tensor, "B V"], tau: float) -> Float[Tensor, "B V"]:
    """Probabilities of the next token at temperature tau."""
    return (logits / tau).softmax(dim=-1)
''',
    why="Dividing all logits by tau stretches their differences when tau is below 1 and shrinks "
    "them when it is above. In terms of probabilities it raises each to the power 1/tau and "
    "divides by the sum, so the order of the tokens never changes.",
    point="A temperature changes how sure the distribution is, never which token leads it.",
    check=same_function(
        lambda z, tau: F.softmax(z.double() * (1 / tau), dim=1).float(),
        lambda: [
            case(f"B={B}, V={V}, tau={tau}", _logit_rows(B, V, seed=seed), tau)
            for B, V, tau, seed in ((2, 5, 0.5, 900), (3, 7, 2.0, 901), (1, 4, 0.1, 902))
        ],
        [
            Mistake(
                "The logits are multiplied by tau. A low temperature has to sharpen.",
                lambda z, tau: (z * tau).softmax(dim=-1),
            ),
            Mistake(
                "The probabilities are divided, after the softmax, so they no longer sum to one.",
                lambda z, tau: z.softmax(dim=-1) / tau,
            ),
            Mistake(
                "The temperature has no effect: dividing probabilities and normalising again "
                "gives what was there before.",
                lambda z, tau: z.softmax(dim=-1),
            ),
            Mistake(
                "The softmax runs over the batch. Each row is a distribution of its own.",
                lambda z, tau: (z / tau).softmax(dim=0),
            ),
            Mistake(
                "These are log-probabilities. The softmax is asked for, not its logarithm.",
                lambda z, tau: (z / tau).log_softmax(dim=-1),
            ),
            Mistake(
                "These are the powers 1/tau of the probabilities, without a new normalisation.",
                lambda z, tau: z.softmax(dim=-1) ** (1 / tau),
                hint=2,
            ),
        ],
        rtol=1e-4,
        atol=1e-6,
    ),
)


# --- Filters -------------------------------------------------------------------------------------


def _top_k_cases() -> list[Case]:
    tied = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0], [0.5, 0.5, 0.5, -2.0, 0.0]])
    return [
        case("B=3, V=7, k=3", _logit_rows(3, 7, seed=910), 3),
        case("B=2, V=5, k=2 (equal logits)", tied, 2),
        case("B=2, V=6, k=1", _logit_rows(2, 6, seed=911) - 4, 1),
        case("B=1, V=4, k=9", _logit_rows(1, 4, seed=912), 9),
    ]


def _top_k(z: Tensor, k: int, *, fill: float = -INF, largest: bool = True, off: int = 0) -> Tensor:
    k = min(max(k + off, 1), z.shape[-1])
    kth = z.topk(k, largest=largest).values[:, -1:]
    return z.masked_fill(z < kth if largest else z > kth, fill)


KEEP_TOP_K = Exercise(
    name="keep_top_k",
    title="Keep the k most likely",
    level=1,
    minutes=6,
    task=r"""
Write the top-k filter: in each row the $k$ largest logits stay as they are, and every other one
becomes $-\infty$. Tokens that are exactly as likely as the $k$-th stay too. If $k$ is larger than
the vocabulary, everything stays.
""",
    stub='''
def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Forbid all but the k most likely tokens of each row."""
    raise NotImplementedError
''',
    hints=(
        "One number a row decides: the k-th largest logit. What is smaller than it has to go. "
        "Which value makes a token impossible after the softmax?",
        "torch.topk gives the k largest of each row in falling order, so the last of them is the "
        "threshold. Guard k against the size of the vocabulary, and fill with minus infinity.",
    ),
    solution='''
def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Forbid all but the k most likely tokens of each row."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)
''',
    why="A threshold a row, and a strict comparison, so that ties with the k-th survive: this is "
    "what transformers does. Minus infinity is the logit of probability zero; a logit of zero "
    "would be an ordinary, often large, value.",
    point="A filter takes logits and gives logits; minus infinity is how it says never.",
    check=same_function(
        lambda z, k: _package(decoding.top_k(k))(z),
        _top_k_cases,
        [
            Mistake(
                "Forbidden tokens get the logit 0, which is a probability like any other.",
                lambda z, k: _top_k(z, k, fill=0.0),
            ),
            Mistake(
                "The k smallest are kept.",
                lambda z, k: _top_k(z, k, largest=False),
            ),
            Mistake(
                "One token too few is kept: the k-th itself has to stay.",
                lambda z, k: _top_k(z, k, off=-1) if k > 1 else torch.full_like(z, -INF),
            ),
            Mistake("One token too many is kept.", lambda z, k: _top_k(z, k, off=1)),
            Mistake(
                "The threshold is one for the whole batch. Each row has its own.",
                lambda z, k: z.masked_fill(
                    z < z.flatten().topk(min(k, z.shape[-1])).values[-1], -INF
                ),
            ),
            Mistake(
                "Tokens as likely as the k-th are dropped. All of them stay.",
                lambda z, k: torch.full_like(z, -INF).scatter(
                    1,
                    z.topk(min(k, z.shape[-1])).indices,
                    z.topk(min(k, z.shape[-1])).values,
                ),
                hint=2,
            ),
        ],
    ),
)


def _top_p_cases() -> list[Case]:
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.26, 0.24, 0.23, 0.27]]).log()
    return [
        case("B=2, V=4, p=0.7", p, 0.7),
        case("B=3, V=8, p=0.9", _logit_rows(3, 8, seed=920), 0.9),
        case("B=2, V=5, p=0.05", _logit_rows(2, 5, seed=921), 0.05),
    ]


def _top_p(z: Tensor, p: float, *, late: bool = False, up: bool = False) -> Tensor:
    probabilities, order = z.softmax(dim=-1).sort(dim=-1, descending=not up)
    total = probabilities.cumsum(dim=-1)
    drop = (total > p) if late else (total - probabilities >= p)
    return z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -INF)


def _top_p_unsorted_back(z: Tensor, p: float) -> Tensor:
    probabilities = z.softmax(dim=-1).sort(dim=-1, descending=True).values
    return z.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= p, -INF)


KEEP_TOP_P = Exercise(
    name="keep_top_p",
    title="The nucleus",
    level=2,
    minutes=12,
    task=r"""
Write the top-p filter: in each row keep the **smallest** set of most likely tokens whose
probabilities sum to **at least** $p$, and make every other logit $-\infty$. So the token that takes
the sum past $p$ still belongs to the set, and there is always at least one.
""",
    stub='''
def keep_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Forbid all tokens outside the nucleus of each row."""
    raise NotImplementedError
''',
    hints=(
        "Sort the probabilities of a row from the largest down. For each token, how much do the "
        "tokens before it hold together? From which amount on is it not needed any more?",
        "A token goes when the likelier tokens already hold p or more: the running sum minus its "
        "own probability. That mask is in sorted order; scatter it back with the sort's indices.",
    ),
    solution='''
def keep_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Forbid all tokens outside the nucleus of each row."""
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    held_by_likelier = probabilities.cumsum(dim=-1) - probabilities
    not_needed = held_by_likelier >= p  # in sorted order
    drop = torch.zeros_like(not_needed).scatter(-1, order, not_needed)
    return logits.masked_fill(drop, -math.inf)
''',
    why="The first token has nothing before it, so it always stays. The token that crosses p has "
    "less than p before it, so it stays as well. Whoever compares the running sum itself drops "
    "that token, and for a small p all tokens. The mask is made in sorted order and has to go "
    "back to the places of the tokens.",
    point="The size of the nucleus follows the distribution: few tokens when it is sure, many "
    "when it is not.",
    check=same_function(
        lambda z, p: _package(decoding.top_p(p))(z),
        _top_p_cases,
        [
            Mistake(
                "The token that crosses p is dropped. Without it the set holds less than p.",
                lambda z, p: _top_p(z, p, late=True),
            ),
            Mistake(
                "The sum starts at the least likely token.",
                lambda z, p: _top_p(z, p, up=True),
            ),
            Mistake(
                "The mask was made in sorted order and never put back to the tokens' places.",
                _top_p_unsorted_back,
                hint=2,
            ),
            Mistake(
                "Tokens with a probability below p are dropped, one by one. The sum counts.",
                lambda z, p: z.masked_fill(z.softmax(dim=-1) < p, -INF),
            ),
            Mistake(
                "This is min-p: a share of the largest probability.",
                lambda z, p: z.masked_fill(
                    z.softmax(dim=-1) < p * z.softmax(dim=-1).amax(dim=-1, keepdim=True), -INF
                ),
            ),
            Mistake(
                "The sum runs over the tokens in the order of their ids, not of their probability.",
                lambda z, p: z.masked_fill(
                    z.softmax(dim=-1).cumsum(dim=-1) - z.softmax(dim=-1) >= p, -INF
                ),
            ),
            Mistake(
                "Forbidden tokens get the logit 0 here. Minus infinity forbids.",
                lambda z, p: _top_p(z, p).nan_to_num(neginf=0.0),
            ),
        ],
    ),
)


KEEP_MIN_P = Exercise(
    name="keep_min_p",
    title="A share of the favourite",
    level=2,
    minutes=6,
    task=r"""
Write the min-p filter: a token stays if its probability is at least `share` times that of the most
likely token of its row. Do it **without** computing a softmax: a ratio of probabilities is a
difference of logits.
""",
    stub='''
def keep_min_p(logits: Float[Tensor, "B V"], share: float) -> Float[Tensor, "B V"]:
    """Forbid all tokens less likely than a share of the most likely one."""
    raise NotImplementedError
''',
    hints=(
        "Two tokens of a row share the same normaliser. What is the logarithm of the ratio of "
        "their probabilities, in terms of their logits?",
        "The threshold of a row is its largest logit plus the logarithm of the share, which is "
        "negative. Keep the axis when you take the maximum.",
    ),
    solution='''
def keep_min_p(logits: Float[Tensor, "B V"], share: float) -> Float[Tensor, "B V"]:
    """Forbid all tokens less likely than a share of the most likely one."""
    floor = logits.amax(dim=-1, keepdim=True) + math.log(share)  # (B, 1)
    return logits.masked_fill(logits < floor, -math.inf)
''',
    why="p_i / p_max = exp(z_i - z_max), whatever the normaliser. So min-p is a band of fixed "
    "width below the largest logit: everything within log(1/share) nats of the favourite stays.",
    point="Min-p is a band below the largest logit; its width in nats is log(1/share).",
    check=same_function(
        lambda z, share: _package(decoding.min_p(share))(z),
        lambda: [
            case(f"B={B}, V={V}, share={share}", scale * normal(B, V, seed=seed), share)
            for B, V, share, scale, seed in (
                (3, 7, 0.1, 2.0, 930),
                (2, 9, 0.4, 2.0, 931),
                (4, 5, 0.05, 2.0, 932),
                (3, 8, 0.6, 0.4, 933),
            )
        ],
        [
            Mistake(
                "The share is an absolute threshold here. It is a share of the largest one.",
                lambda z, s: z.masked_fill(z.softmax(dim=-1) < s, -INF),
            ),
            Mistake(
                "The largest logit is multiplied by the share. Logits are logarithms: a factor "
                "becomes a summand.",
                lambda z, s: z.masked_fill(z < s * z.amax(dim=-1, keepdim=True), -INF),
            ),
            Mistake(
                "The share itself is subtracted. Its logarithm is the difference of logits.",
                lambda z, s: z.masked_fill(z < z.amax(dim=-1, keepdim=True) - s, -INF),
                hint=2,
            ),
            Mistake(
                "This is top-p: a share of the whole.",
                lambda z, s: _package(decoding.top_p(s))(z),
            ),
            Mistake(
                "The maximum is that of the whole batch. Each row has its own favourite.",
                lambda z, s: z.masked_fill(z < z.max() + math.log(s), -INF),
            ),
            Mistake(
                "The comparison is turned round: the likely tokens go.",
                lambda z, s: z.masked_fill(z >= z.amax(dim=-1, keepdim=True) + math.log(s), -INF),
            ),
        ],
    ),
)


# --- Against repetition --------------------------------------------------------------------------


def _penalised(
    z: Tensor,
    tokens: Tensor,
    theta: float,
    *,
    positive: Callable[[Tensor, float], Tensor] = lambda a, t: a / t,
    negative: Callable[[Tensor, float], Tensor] = lambda a, t: a * t,
    times: bool = False,
    unseen: bool = False,
) -> Tensor:
    z = z.clone()
    for row, said in zip(z, tokens.tolist(), strict=True):
        everything = set(range(len(row))) - set(said) if unseen else (said if times else set(said))
        for i in everything:
            row[i] = positive(row[i], theta) if row[i] > 0 else negative(row[i], theta)
    return z


PENALISE = Exercise(
    name="penalise",
    title="A penalty on both sides of zero",
    level=2,
    minutes=8,
    task=r"""
Write the repetition penalty: the logit of each token that occurs among `tokens` becomes
**smaller**. A positive logit is divided by $\theta > 1$; a negative one has to be treated so that
it becomes smaller too. How often a token has occurred does not matter.
""",
    stub='''
def penalise(
    logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B T"], theta: float
) -> Float[Tensor, "B V"]:
    """Make every token that has occurred less likely."""
    raise NotImplementedError
''',
    hints=(
        "What happens to -2 when you divide it by 1.5? Is the token then more or less likely than "
        "before?",
        "Gather the logits of the tokens so far, choose between dividing and multiplying by their "
        "sign, and scatter the result back. A token that occurs twice is written twice, with the "
        "same value.",
    ),
    solution='''
def penalise(
    logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B T"], theta: float
) -> Float[Tensor, "B V"]:
    """Make every token that has occurred less likely."""
    seen = logits.gather(-1, tokens)  # (B, T)
    weaker = torch.where(seen > 0, seen / theta, seen * theta)
    return logits.scatter(-1, tokens, weaker)
''',
    why="Dividing a negative logit by a number above 1 moves it towards zero, which helps the "
    "token. The formula of the CTRL paper divides always; its code, and everybody after it, "
    "multiplies negative logits. Because a logit is only defined up to a constant, the effect "
    "depends on where zero happens to lie: the penalty is a useful trick, not a principle.",
    point="A penalty that divides helps the tokens whose logit is negative; both signs need care.",
    check=same_function(
        lambda z, t, theta: decoding.repetition_penalty(theta)(z.double(), t).float(),
        lambda: [
            case(
                f"B={B}, V={V}, T={T}, theta={theta}",
                _logit_rows(B, V, seed=seed),
                torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(seed)),
                theta,
            )
            for B, V, T, theta, seed in ((3, 7, 5, 1.5, 940), (2, 6, 9, 1.2, 941))
        ],
        [
            Mistake(
                "Negative logits are divided as well, which makes these tokens more likely.",
                lambda z, t, c: _penalised(z, t, c, negative=lambda a, c: a / c),
            ),
            Mistake(
                "Positive logits are multiplied too, which rewards repetition.",
                lambda z, t, c: _penalised(z, t, c, positive=lambda a, c: a * c),
            ),
            Mistake(
                "The two cases have changed places: this rewards every token that has occurred.",
                lambda z, t, c: _penalised(
                    z, t, c, positive=lambda a, c: a * c, negative=lambda a, c: a / c
                ),
            ),
            Mistake(
                "The penalty is applied once for each time a token has occurred. Once is enough.",
                lambda z, t, c: _penalised(z, t, c, times=True),
            ),
            Mistake(
                "It is subtracted. This penalty is a factor.",
                lambda z, t, c: _penalised(
                    z, t, c, positive=lambda a, c: a - c, negative=lambda a, c: a - c
                ),
            ),
            Mistake(
                "The tokens that have not occurred are punished.",
                lambda z, t, c: _penalised(z, t, c, unseen=True),
            ),
        ],
    ),
)


def _banned_by_loop(tokens: Tensor, n: int, vocab_size: int) -> Tensor:
    said = tokens.tolist()
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    for i in range(len(said) - n + 1):
        if said[i : i + n - 1] == said[len(said) - n + 1 :]:
            banned[said[i + n - 1]] = True
    return banned


def _banned(
    tokens: Tensor, n: int, vocab_size: int, *, grams: int = 0, last: bool = False
) -> Tensor:
    """With `grams` another n; with `last` only the latest occurrence counts."""
    said, n = tokens.tolist(), n + grams
    found = [
        said[i + n - 1]
        for i in range(len(said) - n + 1)
        if said[i : i + n - 1] == said[len(said) - n + 1 :]
    ]
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    banned[found[-1:] if last else found] = True
    return banned


def _banned_all_seen(tokens: Tensor, n: int, vocab_size: int) -> Tensor:
    return torch.zeros(vocab_size, dtype=torch.bool).scatter(0, tokens, True)


BANNED_TOKENS = Exercise(
    name="banned_tokens",
    title="No n-gram twice",
    level=2,
    minutes=10,
    task=r"""
A text so far is `tokens`. Which tokens of the vocabulary may **not** come next, if no $n$-gram may
occur twice? Return True for each of them. In `a b c a b` with $n = 3$, the last two tokens `a b`
were followed by `c` before, so `c` is banned.
""",
    stub='''
def banned_tokens(tokens: Int[Tensor, "T"], n: int, vocab_size: int) -> Bool[Tensor, "V"]:
    """True at each token that would complete an n-gram which has occurred before."""
    raise NotImplementedError
''',
    hints=(
        "The new n-gram consists of the last n - 1 tokens and the new one. Where did those n - 1 "
        "tokens stand before, and what followed them?",
        "Slide over all starts of an n-gram in the text, compare its first n - 1 tokens with the "
        "last n - 1 of the text, and mark its last token where they agree. For n = 1 there is "
        "nothing to compare, so every token so far is marked.",
    ),
    solution='''
def banned_tokens(tokens: Int[Tensor, "T"], n: int, vocab_size: int) -> Bool[Tensor, "V"]:
    """True at each token that would complete an n-gram which has occurred before."""
    T = len(tokens)
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    context = tokens[T - n + 1 :]  # the last n - 1, none for n = 1
    for start in range(T - n + 1):
        gram = tokens[start : start + n]
        if torch.equal(gram[:-1], context):
            banned[gram[-1]] = True
    return banned
''',
    why="Only the tokens that followed the same n - 1 tokens before are banned, all of them, not "
    "just the latest. Slices that end at -0 are the classic trap: tokens[-(n - 1):] is the whole "
    "text for n = 1, so count from the front.",
    point="An n-gram ban looks up what followed the last n - 1 tokens before, and forbids exactly "
    "that.",
    check=same_function(
        _banned_by_loop,
        lambda: [
            case("T=8, n=3", torch.tensor([0, 1, 2, 0, 1, 3, 0, 1]), 3, 6),
            case("T=7, n=2", torch.tensor([4, 4, 1, 2, 4, 0, 4]), 2, 6),
            case("T=4, n=1", torch.tensor([3, 1, 3, 0]), 1, 5),
            case("T=2, n=3", torch.tensor([1, 1]), 3, 4),
            case("T=5, n=4", torch.tensor([2, 2, 2, 2, 2]), 4, 4),
        ],
        [
            Mistake("Every token so far is banned, whatever n is.", _banned_all_seen),
            Mistake(
                "It compares one token too few before the new one: (n - 1)-grams are banned.",
                lambda t, n, v: _banned(t, n, v, grams=-1) if n > 1 else _banned(t, n, v),
            ),
            Mistake(
                "It compares one token too many before the new one.",
                lambda t, n, v: _banned(t, n, v, grams=1),
            ),
            Mistake(
                "Only what followed last time is banned. Every earlier continuation counts.",
                lambda t, n, v: _banned(t, n, v, last=True),
            ),
            Mistake(
                "True and False are swapped: these are the tokens that may come.",
                lambda t, n, v: ~_banned_by_loop(t, n, v),
            ),
            Mistake(
                "For n = 1 nothing is banned here. Every token so far is a 1-gram.",
                lambda t, n, v: _banned_by_loop(t, n, v) if n > 1 else torch.zeros(v).bool(),
                hint=2,
            ),
        ],
    ),
)


# --- Search --------------------------------------------------------------------------------------

TREE_BY_HAND = Exercise(
    name="tree_by_hand",
    title="A search by hand",
    level=1,
    minutes=6,
    task=r"""
Texts have two tokens. The first is `A` with probability 0.5, `B` with 0.3, or `C` with 0.2. After
`A` the second token is 0.4 / 0.3 / 0.3, after `B` it is 0.9 / 0.1 / 0, and after `C` it is
1 / 0 / 0 for `A` / `B` / `C`. Give three probabilities: that of the text that **greedy** search
finds, that of the text that **beam search of width 2** finds, and that of the **second likeliest**
of all nine texts.
""",
    stub="""
tree_by_hand = (
    ...,  # probability of greedy's text
    ...,  # probability of the beam's text, width 2
    ...,  # the second largest probability of all nine texts
)
""",
    hints=(
        "Write the nine products down, three a branch. Greedy looks at one branch only; a beam of "
        "width 2 follows the two likeliest first tokens.",
        "The branches hold 0.5, 0.3 and 0.2 in all, shared out by the second token. Find the two "
        "largest products: one lies in the middle branch, and for the other look at all three.",
    ),
    solution="""
tree_by_hand = (
    0.5 * 0.4,
    0.3 * 0.9,
    0.2,  # 0.5 * 0.4 and 0.2 * 1.0 tie
)
""",
    why="Greedy takes A, then A: 0.20. A beam of two keeps A and B, and finds BA: 0.27, the "
    "likeliest text of all. CA has 0.2 · 1 = 0.20, as much as AA, though its first token is the "
    "least likely one: a narrow beam never sees it.",
    point="A good beginning and a good text are two things; a beam keeps some bad beginnings.",
    check=same_value(
        (0.2, 0.27, 0.2),
        [
            Mistake(
                "Probabilities of a text are products. Here they are added.",
                when=lambda got, _: math.isclose(got[0], 0.9, rel_tol=1e-3),
            ),
            Mistake(
                "That is the probability of the first token. The text has two.",
                when=lambda got, _: math.isclose(got[0], 0.5, rel_tol=1e-3),
            ),
            Mistake(
                "That is the probability of the second token given the first.",
                when=lambda got, _: math.isclose(got[0], 0.4, rel_tol=1e-3),
            ),
            Mistake(
                "The beam finds what greedy finds here. But width 2 also follows B, whose best "
                "text is likelier.",
                when=lambda got, _: math.isclose(got[1], 0.2, rel_tol=1e-3),
            ),
            Mistake(
                "That is the likeliest text. The second likeliest is asked for.",
                when=lambda got, _: math.isclose(got[2], 0.27, rel_tol=1e-3),
            ),
            Mistake(
                "That is third or fourth: AA and CA are likelier.",
                when=lambda got, _: math.isclose(got[2], 0.15, rel_tol=1e-3),
            ),
        ],
        names=("greedy", "beam", "second"),
    ),
)


RESCORE = Exercise(
    name="rescore",
    title="Long texts and short ones",
    level=1,
    minutes=4,
    task=r"""
Candidates of different length are compared by $\log p / n^{\alpha}$, where $n$ is the number of new
tokens and $\alpha$ the length penalty. Return the index of the candidate that wins.
""",
    stub='''
def rescore(log_p: Float[Tensor, "K"], lengths: Int[Tensor, "K"], alpha: float) -> int:
    """Index of the best candidate under the length penalty."""
    raise NotImplementedError
''',
    hints=(
        "Log-probabilities are negative, and longer texts have larger negative ones. Which of two "
        "negative scores is the better one?",
        "Divide each log-probability by its own length to the power alpha, and take the index of "
        "the largest quotient, as a Python number.",
    ),
    solution='''
def rescore(log_p: Float[Tensor, "K"], lengths: Int[Tensor, "K"], alpha: float) -> int:
    """Index of the best candidate under the length penalty."""
    return int((log_p / lengths**alpha).argmax())
''',
    why="For alpha = 0 the sum counts and short texts win, since each token costs something. For "
    "alpha = 1 the mean per token counts. Because the scores are negative, dividing by a larger "
    "number makes them better: what is called a penalty rewards length.",
    point="A positive length penalty favours long texts, because log-probabilities are negative.",
    check=same_function(
        lambda log_p, n, a: max(range(len(n)), key=lambda i: log_p[i].item() / n[i].item() ** a),
        [
            case(
                f"lengths {n}, alpha={a}",
                torch.tensor(p),
                torch.tensor(n),
                a,
            )
            for p, n, a in (
                ([-4.0, -6.0, -9.0, -20.0], [2, 5, 9, 11], 0.0),
                ([-4.0, -6.0, -9.0, -20.0], [2, 5, 9, 11], 1.0),
                ([-4.0, -5.0, -9.0, -20.0], [2, 5, 9, 40], 0.5),
                ([-4.0, -5.0, -9.0, -20.0], [2, 5, 9, 40], 1.0),
                ([-4.0, -4.5, -9.0], [5, 2, 3], 1.0),
            )
        ],
        [
            Mistake(
                "The smallest score wins here. Scores are negative, and the largest is the best.",
                lambda p, n, a: int((p / n**a).argmin()),
            ),
            Mistake(
                "It is multiplied by the length, so long texts lose by even more.",
                lambda p, n, a: int((p * n**a).argmax()),
            ),
            Mistake(
                "The length penalty has no effect: the sum of the log-probabilities decides.",
                lambda p, n, a: int(p.argmax()),
            ),
            Mistake(
                "The length to the power alpha: here it is multiplied by alpha.",
                lambda p, n, a: (
                    int((p / (n * a)).nan_to_num(neginf=-1e9).argmax()) if a else int(p.argmax())
                ),
            ),
            Mistake(
                "The mean a token is taken whatever alpha is.",
                lambda p, n, a: int((p / n).argmax()),
            ),
        ],
    ),
)


def _beam_step(total: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    W, V = log_p.shape
    every = sorted(
        ((total[w].item() + log_p[w, v].item(), w, v) for w in range(W) for v in range(V)),
        key=lambda row: -row[0],
    )[:W]
    return (
        torch.tensor([score for score, _, _ in every]),
        torch.tensor([w for _, w, _ in every]),
        torch.tensor([v for _, _, v in every]),
    )


def _from_scores(scores: Tensor, W: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    best, where = scores.flatten().topk(W)
    return best, where // V, where % V


def _beam_each(total: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best token of each beam alone."""
    best, ids = log_p.max(dim=-1)
    return total + best, torch.arange(len(total)), ids


BEAM_STEP = Exercise(
    name="beam_step",
    title="One step of beam search",
    level=3,
    minutes=12,
    task=r"""
Beam search of width $W$ holds $W$ beginnings with log-probabilities `total`. The model gives the
log-probabilities of the next token of each, `log_p`. Choose the $W$ best continuations **of all
$W \cdot V$**, the best first, and return three things: their log-probabilities, the beam that each
continues, and the token that it adds.
""",
    stub='''
def beam_step(
    total: Float[Tensor, "W"], log_p: Float[Tensor, "W V"]
) -> tuple[Float[Tensor, "W"], Int[Tensor, "W"], Int[Tensor, "W"]]:
    """The W best continuations: log-probability, which beam, which token."""
    raise NotImplementedError
''',
    hints=(
        "Two children of one beam may both win, and another beam may die out. So all continuations "
        "compete with each other. What is the log-probability of one of them?",
        "Add each beam's total to its row, flatten the W times V scores, and take the largest W. A "
        "flat index divided by V, without remainder, is the beam, and the remainder is the token.",
    ),
    solution='''
def beam_step(
    total: Float[Tensor, "W"], log_p: Float[Tensor, "W V"]
) -> tuple[Float[Tensor, "W"], Int[Tensor, "W"], Int[Tensor, "W"]]:
    """The W best continuations: log-probability, which beam, which token."""
    W, V = log_p.shape
    scores = (total[:, None] + log_p).flatten()  # all W * V continuations compete
    best, index = scores.topk(W)
    return best, index // V, index % V
''',
    why="Logarithms of products add. The competition is over all beams together; if each beam kept "
    "its own best child, the search would be W greedy searches side by side. In real code the "
    "second return value is what reorders the cache.",
    point="All continuations of all beams compete: that is what makes it one search, not several.",
    check=same_function(
        _beam_step,
        lambda: [
            case(
                f"W={W}, V={V}",
                -2 * normal(W, seed=seed).abs(),
                _logit_rows(W, V, seed=seed + 1).log_softmax(dim=-1),
            )
            for W, V, seed in ((2, 5, 950), (3, 7, 952), (4, 3, 954))
        ],
        [
            Mistake(
                "Each beam keeps its own best token. All continuations have to compete.",
                _beam_each,
            ),
            Mistake(
                "The totals of the beams are missing: only the last token counts.",
                lambda t, lp: _from_scores(lp, *lp.shape),
            ),
            Mistake(
                "The beam and the token are exchanged.",
                lambda t, lp: (lambda s, w, v: (s, v, w))(
                    *_from_scores(t[:, None] + lp, *lp.shape)
                ),
                hint=2,
            ),
            Mistake(
                "The flat index is divided by the number of beams. A row has V entries.",
                lambda t, lp: (lambda s, i: (s, i // len(t), i % len(t)))(
                    *(t[:, None] + lp).flatten().topk(len(t))
                ),
                hint=2,
            ),
            Mistake(
                "Log-probabilities are multiplied. Logarithms of products add.",
                lambda t, lp: _from_scores(t[:, None] * lp, *lp.shape),
            ),
            Mistake(
                "These are the worst continuations.",
                lambda t, lp: (lambda s, i: (s, i // lp.shape[1], i % lp.shape[1]))(
                    *(t[:, None] + lp).flatten().topk(len(t), largest=False)
                ),
            ),
        ],
        names=("log-probabilities", "beams", "tokens"),
    ),
)


def _contrastive(
    p: Tensor,
    states: Tensor,
    earlier: Tensor,
    alpha: float,
    *,
    mean: bool = False,
    cosine: bool = True,
    sign: float = -1.0,
    swap: bool = False,
) -> Tensor:
    if cosine:
        states, earlier = F.normalize(states, dim=-1), F.normalize(earlier, dim=-1)
    likeness = states @ earlier.T  # (k, T)
    likeness = likeness.mean(dim=-1) if mean else likeness.amax(dim=-1)
    a, b = (alpha, 1 - alpha) if swap else (1 - alpha, alpha)
    return a * p + sign * b * likeness


def _contrastive_by_loop(p: Tensor, states: Tensor, earlier: Tensor, alpha: float) -> Tensor:
    scores = []
    for i in range(len(p)):
        worst = max(F.cosine_similarity(states[i], h, dim=0).item() for h in earlier)
        scores.append((1 - alpha) * p[i].item() - alpha * worst)
    return torch.tensor(scores)


CONTRASTIVE_SCORES = Exercise(
    name="contrastive_scores",
    title="Likely, and unlike what was said",
    level=3,
    minutes=8,
    task=r"""
Contrastive search scores each of $k$ candidate tokens by
$(1 - \alpha)\, p - \alpha \max_j \cos(h, h_j)$: its probability, less the largest cosine of the
state $h$ that it would have with the state $h_j$ of any earlier token. Return the $k$ scores.
""",
    stub='''
def contrastive_scores(
    p: Float[Tensor, "k"],
    states: Float[Tensor, "k D"],
    earlier: Float[Tensor, "T D"],
    alpha: float,
) -> Float[Tensor, "k"]:
    """Score of each candidate: its probability less its likeness to what was said."""
    raise NotImplementedError
''',
    hints=(
        "A cosine is a dot product of two vectors of length one. How many cosines does one "
        "candidate have, and which of them counts?",
        "Normalise both sets of states along their last axis, multiply one by the transpose of "
        "the other for all (k, T) cosines, take the largest of each row, and combine.",
    ),
    solution='''
def contrastive_scores(
    p: Float[Tensor, "k"],
    states: Float[Tensor, "k D"],
    earlier: Float[Tensor, "T D"],
    alpha: float,
) -> Float[Tensor, "k"]:
    """Score of each candidate: its probability less its likeness to what was said."""
    cosines = F.normalize(states, dim=-1) @ F.normalize(earlier, dim=-1).T  # (k, T)
    return (1 - alpha) * p - alpha * cosines.amax(dim=-1)
''',
    why="The largest cosine counts, because one near-copy is enough for a repetition; a mean over "
    "a long text would hide it. Alpha = 0 is greedy search. The score compares a probability with "
    "a cosine, two scales that have nothing to do with each other, so alpha has to be tuned to a "
    "model.",
    point="Contrastive search pays for likeness to any one earlier state, not to their average.",
    check=same_function(
        _contrastive_by_loop,
        lambda: [
            case(
                f"k={k}, T={T}, D={D}, alpha={a}",
                normal(k, seed=seed).softmax(dim=-1),
                normal(k, D, seed=seed + 1),
                normal(T, D, seed=seed + 2),
                a,
            )
            for k, T, D, a, seed in ((4, 6, 3, 0.6, 960), (3, 5, 8, 0.3, 964), (5, 2, 4, 0.0, 968))
        ],
        [
            Mistake(
                "The mean likeness is taken. One near-copy is enough: the largest counts.",
                lambda *a: _contrastive(*a, mean=True),
            ),
            Mistake(
                "The states are not brought to length one: dot products are no cosines.",
                lambda *a: _contrastive(*a, cosine=False),
            ),
            Mistake(
                "Likeness is rewarded: the sign of the second term is wrong.",
                lambda *a: _contrastive(*a, sign=1.0),
            ),
            Mistake(
                "The two weights have changed places: alpha = 0 has to be greedy.",
                lambda *a: _contrastive(*a, swap=True),
            ),
            Mistake(
                "The penalty is missing: the probability alone decides.",
                lambda p, s, e, a: p.clone(),
            ),
            Mistake(
                "The probability is not weighted with one minus alpha.",
                lambda p, s, e, a: _contrastive(p, s, e, a) + a * p,
                hint=2,
            ),
        ],
    ),
)


# --- All together --------------------------------------------------------------------------------


def _pipeline(logits: Tensor, tokens: Tensor, theta: float, tau: float, k: int, p: float) -> Tensor:
    z = logits.double()
    for change in (
        decoding.repetition_penalty(theta),
        decoding.temperature(tau),
        decoding.top_k(k),
        decoding.top_p(p),
    ):
        z = change(z, tokens)
    return z.softmax(dim=-1).float()


def _mistaken(
    logits: Tensor,
    tokens: Tensor,
    theta: float,
    tau: float,
    k: int,
    p: float,
    *,
    divides: bool = False,
    crossing: bool = False,
    late: bool = False,
) -> Tensor:
    """The pipeline with any of the three mistakes of the stub."""
    seen = logits.gather(-1, tokens)
    weak = seen / theta if divides else torch.where(seen > 0, seen / theta, seen * theta)
    z = logits.scatter(-1, tokens, weak)
    if not late:
        z = z / tau
    z = decoding.top_k(k)(z, tokens)
    if crossing:
        probabilities, order = z.softmax(dim=-1).sort(dim=-1, descending=True)
        drop = probabilities.cumsum(dim=-1) > p
        drop[:, 0] = False
        z = z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -INF)
    else:
        z = decoding.top_p(p)(z, tokens)
    return ((z / tau) if late else z).softmax(dim=-1)


_KINDS = {
    "divides": "The penalty divides negative logits as well, so those tokens gain.",
    "crossing": "Top-p drops the token that crosses p.",
    "late": "The temperature comes last, so top-p measured another distribution.",
}

FIX_PIPELINE = Exercise(
    name="fix_pipeline",
    title="Three mistakes in a sampler",
    level=3,
    minutes=15,
    task=r"""
This function makes the distribution that the next token is drawn from. It should do what
`transformers` does with the same settings, in its order: repetition penalty, temperature, top-k,
top-p. It runs, and its rows sum to one. It contains **three** mistakes. Find and repair them.
""",
    stub='''
def fix_pipeline(
    logits: Float[Tensor, "B V"],
    tokens: Int[Tensor, "B T"],
    theta: float,
    tau: float,
    k: int,
    p: float,
) -> Float[Tensor, "B V"]:
    """Probabilities of the next token after penalty, temperature, top-k and top-p."""
    seen = logits.gather(-1, tokens)
    z = logits.scatter(-1, tokens, seen / theta)
    kth = z.topk(k).values[:, -1:]
    z = z.masked_fill(z < kth, -math.inf)
    probabilities, order = z.softmax(dim=-1).sort(dim=-1, descending=True)
    drop = probabilities.cumsum(dim=-1) > p
    drop[:, 0] = False
    z = z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)
    return (z / tau).softmax(dim=-1)
''',
    hints=(
        "Take the steps one by one. What does each do to a negative logit, to the token that just "
        "crosses p, and to the distribution that the next step looks at?",
        "The penalty needs two cases. Top-p has to ask how much the likelier tokens hold, without "
        "the token itself. And the order is wrong: top-p has to see the tempered distribution.",
    ),
    solution='''
def fix_pipeline(
    logits: Float[Tensor, "B V"],
    tokens: Int[Tensor, "B T"],
    theta: float,
    tau: float,
    k: int,
    p: float,
) -> Float[Tensor, "B V"]:
    """Probabilities of the next token after penalty, temperature, top-k and top-p."""
    seen = logits.gather(-1, tokens)
    z = logits.scatter(-1, tokens, torch.where(seen > 0, seen / theta, seen * theta))
    z = z / tau
    kth = z.topk(k).values[:, -1:]
    z = z.masked_fill(z < kth, -math.inf)
    probabilities, order = z.softmax(dim=-1).sort(dim=-1, descending=True)
    drop = probabilities.cumsum(dim=-1) - probabilities >= p
    z = z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)
    return z.softmax(dim=-1)
''',
    why="The penalty must lower negative logits too. Top-p keeps the token that crosses p, "
    "otherwise the set holds less than p. And the temperature comes before top-p: a higher "
    "temperature flattens the distribution, so the nucleus grows. Top-k does not care about the "
    "temperature, since the order of the tokens stays.",
    point="Filters compose, and their order is part of the setting.",
    check=same_function(
        _pipeline,
        lambda: [
            case(
                f"B={B}, V={V}, T={T}, theta={theta}, tau={tau}, k={k}, p={p}",
                _logit_rows(B, V, seed=seed),
                torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed)),
                theta,
                tau,
                k,
                p,
            )
            for B, V, T, theta, tau, k, p, seed in (
                (4, 9, 3, 1.6, 2.0, 7, 0.8, 970),
                (5, 8, 4, 1.3, 0.6, 6, 0.7, 971),
                (3, 12, 5, 2.0, 1.5, 10, 0.9, 972),
            )
        ],
        [
            Mistake(
                "This is the code as it was given.",
                lambda *a: _mistaken(*a, divides=True, crossing=True, late=True),
                untouched=True,
            ),
            *(
                Mistake(
                    " ".join(_KINDS[name] for name in left),
                    lambda *a, left=left: _mistaken(*a, **dict.fromkeys(left, True)),
                    hint=2,
                )
                for left in (
                    ("divides",),
                    ("crossing",),
                    ("late",),
                    ("divides", "crossing"),
                    ("divides", "late"),
                    ("crossing", "late"),
                )
            ),
        ],
    ),
)


STUCK = Exercise(
    name="stuck",
    title="How long is a loop?",
    level=1,
    minutes=5,
    task=r"""
A model has just repeated a sentence, and repeats it again each time with probability $q$,
independently. You **sample**. For $q = 0.9$, give the probability that the sentence comes **at
least three more times**, the **mean number** of further repetitions, and the mean number for
$q = 0.99$.
""",
    stub="""
stuck = (
    ...,  # probability of at least three more repetitions, q = 0.9
    ...,  # mean number of further repetitions, q = 0.9
    ...,  # the same for q = 0.99
)
""",
    hints=(
        "Each further repetition needs another success of probability q. How many successes in a "
        "row does the first question ask for?",
        "The mean is the sum over n of the probability of at least n repetitions: a geometric "
        "series that starts at q, not at 1.",
    ),
    solution="""
stuck = (
    0.9**3,
    0.9 / (1 - 0.9),
    0.99 / (1 - 0.99),
)
""",
    why="At least n more repetitions have the probability q^n, so the mean is q + q² + ... = "
    "q/(1 - q): 9 for 0.9 and 99 for 0.99. Sampling leaves a loop sooner or later; greedy search "
    "never does once q is above one half. And self-reinforcement is dangerous because the mean "
    "explodes as q comes near 1.",
    point="Sampling leaves a loop after q/(1 - q) repetitions on average; greedy search, never.",
    check=same_value(
        (0.9**3, 9.0, 99.0),
        [
            Mistake(
                "That is exactly three repetitions and then a stop. At least three are asked for.",
                when=lambda got, _: math.isclose(got[0], 0.0729, rel_tol=2e-2),
            ),
            Mistake(
                "The probabilities of three repetitions are multiplied, not added.",
                when=lambda got, _: math.isclose(got[0], 2.7, rel_tol=1e-2),
            ),
            Mistake(
                "That is the probability of fewer than three. Take the other side.",
                when=lambda got, _: math.isclose(got[0], 1 - 0.9**3, rel_tol=1e-2),
            ),
            Mistake(
                "The power is off by one: three further repetitions are three factors.",
                when=lambda got, _: any(math.isclose(got[0], 0.9**n, rel_tol=1e-2) for n in (2, 4)),
            ),
            Mistake(
                "1/(1 - q) counts the failure that ends the loop as well. The series starts at q.",
                when=lambda got, _: math.isclose(got[1], 10.0, rel_tol=1e-2),
            ),
            Mistake(
                "The last number grows far faster than q: it is q/(1 - q) again.",
                when=lambda got, _: got[2] < 50,
            ),
        ],
        names=("three more", "mean at 0.9", "mean at 0.99"),
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        SOFTMAX_AT,
        KEEP_TOP_K,
        KEEP_TOP_P,
        KEEP_MIN_P,
        FIX_PIPELINE,
        TREE_BY_HAND,
        BEAM_STEP,
        RESCORE,
        PENALISE,
        BANNED_TOKENS,
        CONTRASTIVE_SCORES,
        STUCK,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
