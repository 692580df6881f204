"""Exercises of the chapter "Soft prompts: what a text cannot say".

What is compared with: vectors that are joined, masks and positions that are widened, attention over
two parts, and counts.
"""

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
)

# --- Put it in front ------------------------------------------------------------------------------


def _front_cases() -> list[Case]:
    return [
        case(f"P={P}, B={B}, T={T}, D={D}", normal(P, D, seed=P), normal(B, T, D, seed=T))
        for P, B, T, D in ((4, 3, 5, 6), (1, 2, 7, 3))
    ]


def _front(prompt: Tensor, x: Tensor) -> Tensor:
    return torch.cat((prompt.expand(len(x), -1, -1), x), dim=1)


WITH_PROMPT = Exercise(
    name="with_prompt",
    title="Put it in front",
    level=1,
    minutes=4,
    task="""
A soft prompt is a matrix (P, D); the embedded texts of a batch are (B, T, D). Return what the first
layer reads, (B, P + T, D): the prompt **before** each text.
""",
    stub='''
def with_prompt(
    prompt: Float[Tensor, "P D"], x: Float[Tensor, "B T D"]
) -> Float[Tensor, "B N D"]:
    """The prompt, then the text, in each row; N = P + T."""
    raise NotImplementedError
''',
    hints=(
        "All rows of the batch get the same P vectors. Which axis counts the positions?",
        "Give the prompt a batch axis with `expand(len(x), -1, -1)`, then `torch.cat` along 1.",
    ),
    solution='''
def with_prompt(
    prompt: Float[Tensor, "P D"], x: Float[Tensor, "B T D"]
) -> Float[Tensor, "B N D"]:
    """The prompt, then the text, in each row; N = P + T."""
    return torch.cat((prompt.expand(len(x), -1, -1), x), dim=1)
''',
    why="`expand` repeats without copying, and the gradients of all rows add up in the one prompt. "
    "It must stand in front: in a causal model no token sees what comes after it.",
    point="One prompt serves every row, so its gradient is the sum over the batch.",
    check=same_function(
        _front,
        _front_cases,
        [
            Mistake(
                "The prompt stands after the text. In a causal model no token of the text would "
                "see it.",
                lambda p, x: torch.cat((x, p.expand(len(x), -1, -1)), dim=1),
            ),
            Mistake(
                "The prompt stands in the place of the first tokens, which are lost.",
                lambda p, x: torch.cat((p.expand(len(x), -1, -1), x[:, len(p) :]), dim=1),
            ),
            Mistake(
                "Every position gets the mean of the prompt added; it should have positions of its "
                "own.",
                lambda p, x: x + p.mean(dim=0),
            ),
            Mistake(
                "The P vectors are in the opposite order.",
                lambda p, x: _front(p.flip(0), x),
            ),
            Mistake(
                "All P positions get the same vector, the mean of the prompt.",
                lambda p, x: torch.cat((p.mean(dim=0).expand(len(x), len(p), -1), x), dim=1),
                hint=2,
            ),
        ],
    ),
)


# --- Labels ---------------------------------------------------------------------------------------


def _label_cases() -> list[Case]:
    rows = []
    for P, pad in ((3, 0), (1, 7)):
        tokens = torch.tensor([[5, 9, 2, 8, 4], [6, 1, 3, pad, pad]])
        rows.append(case(f"P={P}, padding {pad}", tokens, tokens != pad, P))
    return rows


def _labels(tokens: Tensor, keep: Tensor, P: int, *, front: int = -100, pad: bool = True) -> Tensor:
    labels = tokens.masked_fill(~keep, -100) if pad else tokens
    return F.pad(labels, (P, 0), value=front)


WIDENED_LABELS = Exercise(
    name="widened_labels",
    title="Virtual tokens have no label",
    level=1,
    minutes=6,
    task="""
A causal model of `transformers` is given `inputs_embeds` of P + T positions and `labels` of the
same length; it shifts the labels **itself**. Labels of $-100$ count for nothing. Make the labels
(B, P + T): those of the text are its tokens, and neither the P virtual tokens nor padding has one.
`keep` is `True` at real tokens.
""",
    stub='''
def widened_labels(
    tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"], P: int
) -> Int[Tensor, "B N"]:
    """Labels of P virtual tokens and of the text; N = P + T."""
    raise NotImplementedError
''',
    hints=(
        "Two kinds of positions have no label: which? And do you have to shift anything?",
        "`tokens.masked_fill(~keep, -100)`, and P columns of -100 in front of it (`F.pad` with a "
        "value).",
    ),
    solution='''
def widened_labels(
    tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"], P: int
) -> Int[Tensor, "B N"]:
    """Labels of P virtual tokens and of the text; N = P + T."""
    return F.pad(tokens.masked_fill(~keep, -100), (P, 0), value=-100)
''',
    why="After the model's shift the last virtual token is asked for the first word of the text, "
    "which is right: it has read the whole prompt. The other virtual tokens are asked for nothing.",
    point="With -100 in front the labels have the length of the inputs and count the text alone.",
    check=same_function(
        _labels,
        _label_cases,
        [
            Mistake(
                "The virtual tokens are labelled 0, so the model learns to write token 0 there.",
                lambda t, k, P: _labels(t, k, P, front=0),
            ),
            Mistake(
                "Padding is labelled with the padding token, so the model learns to write it.",
                lambda t, k, P: _labels(t, k, P, pad=False),
            ),
            Mistake(
                "The labels are not widened: the loss would compare them with other positions.",
                lambda t, k, P: t.masked_fill(~k, -100),
            ),
            Mistake(
                "The columns for the prompt stand behind the text.",
                lambda t, k, P: F.pad(t.masked_fill(~k, -100), (0, P), value=-100),
            ),
            Mistake(
                "The labels are shifted already. The model shifts them once more.",
                lambda t, k, P: F.pad(_labels(t, k, P)[:, 1:], (0, 1), value=-100),
                hint=1,
            ),
        ],
    ),
)


# --- Reading --------------------------------------------------------------------------------------


def _nearest_cases() -> list[Case]:
    rows = []
    for P, V, D, seed in ((4, 9, 5, 0), (3, 6, 8, 2)):
        table = normal(V, D, seed=V) * torch.linspace(0.3, 4, V)[:, None]
        rows.append(case(f"P={P}, V={V}, D={D}", 2 * normal(P, D, seed=seed), table))
    return rows


def _nearest(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=1) @ F.normalize(table, dim=1).T).argmax(dim=1)


NEAREST = Exercise(
    name="nearest",
    title="Read a soft prompt",
    level=2,
    minutes=6,
    task="""
Read a soft prompt (P, D): return for each of its vectors the id of the token in `table` (V, D)
whose vector points most nearly in the **same direction** (the largest cosine).
""",
    stub='''
def nearest(
    prompt: Float[Tensor, "P D"], table: Float[Tensor, "V D"]
) -> Int[Tensor, "P"]:
    """Ids of the tokens most alike in direction."""
    raise NotImplementedError
''',
    hints=(
        "A dot product prefers long vectors. What must be divided out? Does it matter for both?",
        "Divide each row of the table by its length, multiply, and take the largest along V.",
    ),
    solution='''
def nearest(
    prompt: Float[Tensor, "P D"], table: Float[Tensor, "V D"]
) -> Int[Tensor, "P"]:
    """Ids of the tokens most alike in direction."""
    cosines = F.normalize(prompt, dim=1) @ F.normalize(table, dim=1).T  # (P, V)
    return cosines.argmax(dim=1)
''',
    why="The length of the prompt's own vector is the same for all tokens and changes no ranking; "
    "the lengths of the tokens' vectors differ and would. Soft prompts are often much longer "
    "than tokens, so distances compare lengths more than directions.",
    point="A reading names the nearest words; it does not say how far away they are.",
    check=same_function(
        _nearest,
        _nearest_cases,
        [
            Mistake(
                "That is the largest dot product, which prefers tokens with long vectors.",
                lambda p, t: (p @ t.T).argmax(dim=1),
            ),
            Mistake(
                "That is the smallest distance, in which the lengths of the vectors count too.",
                lambda p, t: torch.cdist(p, t).argmin(dim=1),
            ),
            Mistake(
                "That is the smallest cosine: the token that points the other way.",
                lambda p, t: (F.normalize(p, dim=1) @ F.normalize(t, dim=1).T).argmin(dim=1),
            ),
            Mistake(
                "Each token looks for its nearest virtual token; it is the other way round.",
                lambda p, t: (F.normalize(p, dim=1) @ F.normalize(t, dim=1).T).argmax(dim=0),
            ),
            Mistake(
                "The coordinates are normalised over the tokens (axis 0), not each vector by its "
                "own length (axis 1).",
                lambda p, t: (F.normalize(p, dim=0) @ F.normalize(t, dim=0).T).argmax(dim=1),
                hint=2,
            ),
        ],
    ),
)


# --- The mask -------------------------------------------------------------------------------------


def _mask_cases() -> list[Case]:
    keep = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return [case("P=3, T=5", keep, 3), case("P=1, T=5", keep, 1), case("P=6, T=5", keep, 6)]


def _tril(T: int, S: int, offset: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(offset)


def _prefix_mask(keep: Tensor, P: int) -> Tensor:
    T = keep.shape[1]
    return _tril(T, P + T, P) & F.pad(keep, (P, 0), value=True)[:, None]


PREFIX_MASK = Exercise(
    name="prefix_mask",
    title="Open the mask for the prefix",
    level=2,
    minutes=8,
    task="""
A causal decoder has P learned keys in front of its T tokens. Make its mask (B, T, P + T), `True` =
may look: every token, padding too, sees the **whole** prefix, and of the text itself and what comes
before it, but no column of padding is open. `keep` (B, T) is `True` at real tokens.
""",
    stub='''
def prefix_mask(keep: Bool[Tensor, "B T"], P: int) -> Bool[Tensor, "B T S"]:
    """Rows for the T tokens, columns for P slots and then the tokens; S = P + T."""
    raise NotImplementedError
''',
    hints=(
        "A prefix has keys and values but no queries. So how many rows, and where do the new "
        "columns stand?",
        "`torch.ones(T, P + T).tril(P)` is causal behind an open prefix; combine it with `keep`, "
        "widened by P columns of True.",
    ),
    solution='''
def prefix_mask(keep: Bool[Tensor, "B T"], P: int) -> Bool[Tensor, "B T S"]:
    """Rows for the T tokens, columns for P slots and then the tokens; S = P + T."""
    T = keep.shape[1]
    causal = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    return causal & F.pad(keep, (P, 0), value=True)[:, None]
''',
    why="It is the mask of a decoder whose cache holds P positions. A mask widened by zeros "
    "has the right shape, raises nothing, and makes the prefix invisible.",
    point="Everything may look at a prefix, because everything comes after it.",
    check=same_function(
        _prefix_mask,
        _mask_cases,
        [
            Mistake(
                "The columns of the prefix are closed: nothing looks at it, and it learns nothing.",
                lambda k, P: _prefix_mask(k, P) & (torch.arange(P + k.shape[1]) >= P),
            ),
            Mistake(
                "The causal part starts at the first column, so the early tokens do not see the "
                "end of the prefix.",
                lambda k, P: (
                    _tril(k.shape[1], P + k.shape[1], 0) & F.pad(k, (P, 0), value=True)[:, None]
                ),
                hint=2,
            ),
            Mistake(
                "The columns of the prefix stand behind those of the text.",
                lambda k, P: torch.cat(
                    (_prefix_mask(k, P)[..., P:], _prefix_mask(k, P)[..., :P]), dim=-1
                ),
            ),
            Mistake(
                "The prefix has rows too. It has no queries: it is looked at and never looks.",
                lambda k, P: (
                    _tril(P + k.shape[1], P + k.shape[1], 0) & F.pad(k, (P, 0), value=True)[:, None]
                ),
            ),
            Mistake(
                "Padding is visible.",
                lambda k, P: _tril(k.shape[1], P + k.shape[1], P).expand(len(k), -1, -1),
            ),
            Mistake(
                "The rows of padding are closed too. Only its columns are: every row sees the "
                "prefix.",
                lambda k, P: _prefix_mask(k, P) & k[:, :, None],
            ),
            Mistake(
                "The text is not causal: tokens look ahead.",
                lambda k, P: F.pad(k, (P, 0), value=True)[:, None].expand(-1, k.shape[1], -1),
            ),
        ],
    ),
)


# --- Positions ------------------------------------------------------------------------------------


def _position_cases() -> list[Case]:
    left = torch.tensor([[False, False, True, True, True], [True] * 5])
    right = torch.tensor([[True, True, True, False, False], [True] * 5])
    return [case("padding on the left, P=3", left, 3), case("padding on the right, P=2", right, 2)]


def _positions(keep: Tensor, P: int) -> Tensor:
    return (keep.cumsum(dim=1) - 1 + P).masked_fill(~keep, P)


PREFIX_POSITIONS = Exercise(
    name="prefix_positions",
    title="Where the text stands",
    level=2,
    minutes=7,
    task="""
A model with learned positions reads texts after a prefix of P slots, which take the positions 0 to
P − 1. Return the position of each token (B, T). Real tokens (`keep`) are numbered one after the
other, on whichever side the padding is; padding gets the position of the first token of a text.
""",
    stub='''
def prefix_positions(keep: Bool[Tensor, "B T"], P: int) -> Int[Tensor, "B T"]:
    """The position of each token behind a prefix."""
    raise NotImplementedError
''',
    hints=(
        "Number the real tokens from 0 first: a running sum of `keep` does it. What do the P slots "
        "change?",
        "`keep.cumsum(dim=1) - 1 + P`, and P where `keep` is False.",
    ),
    solution='''
def prefix_positions(keep: Bool[Tensor, "B T"], P: int) -> Int[Tensor, "B T"]:
    """The position of each token behind a prefix."""
    return (keep.cumsum(dim=1) - 1 + P).masked_fill(~keep, P)
''',
    why="The prefix stands where a text of P tokens would. Numbered from 0 again, the same prefix "
    "gives other outputs than in the library that trained it, and nothing raises.",
    point="What a cache holds counts as read, whether or not anybody has read it.",
    check=same_function(
        _positions,
        _position_cases,
        [
            Mistake(
                "The text is numbered from 0, as if there were no prefix.",
                lambda k, P: (k.cumsum(dim=1) - 1).masked_fill(~k, 0),
            ),
            Mistake(
                "Padding on the left is counted: it shifts the text.",
                lambda k, P: (torch.arange(k.shape[1]) + P).expand(k.shape).masked_fill(~k, P),
            ),
            Mistake(
                "The positions are counted through, padding as well: on the left it shifts the "
                "text, on the right it does not get P.",
                lambda k, P: (torch.arange(k.shape[1]) + P).expand(k.shape),
            ),
            Mistake(
                "One too many: the first token stands at P, not at P + 1.",
                lambda k, P: (k.cumsum(dim=1) + P).masked_fill(~k, P),
            ),
            Mistake(
                "One too few: the last slot of the prefix stands at P − 1 already.",
                lambda k, P: (k.cumsum(dim=1) - 2 + P).masked_fill(~k, P),
            ),
            Mistake(
                "The real tokens are right, the padding is not: it gets P.",
                when=lambda got, want: bool((got == want).float().mean() > 0.6),
                hint=2,
            ),
        ],
    ),
)


# --- Attention with a prefix ----------------------------------------------------------------------


def _attention_cases() -> list[Case]:
    rows = []
    for P, T, E in ((3, 5, 4), (1, 6, 8)):
        q, k, v = (normal(T, E, seed=i) for i in range(3))
        rows.append(
            case(f"P={P}, T={T}, E={E}", q, k, v, normal(P, E, seed=8), normal(P, E, seed=9))
        )
    return rows


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def _with_prefix(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    T, P = len(q), len(pk)
    return _attend(q, torch.cat((pk, k)), torch.cat((pv, v)), _tril(T, P + T, P))


PREFIX_ATTENTION = Exercise(
    name="prefix_attention",
    title="One head with a prefix",
    level=2,
    minutes=9,
    task="""
Write one **causal** attention head over T tokens that also looks at a prefix of P learned keys and
values. All are (positions, E); scores are divided by the root of E. Return (T, E).
""",
    stub='''
def prefix_attention(
    q: Float[Tensor, "T E"],
    k: Float[Tensor, "T E"],
    v: Float[Tensor, "T E"],
    prefix_k: Float[Tensor, "P E"],
    prefix_v: Float[Tensor, "P E"],
) -> Float[Tensor, "T E"]:
    """The output at the T tokens."""
    raise NotImplementedError
''',
    hints=(
        "It is a decoder with a cache: what does it do with the keys and values that it holds?",
        "Join the prefix's keys with k and its values with v, in front; mask with "
        "`torch.ones(T, P + T).tril(P)`; one softmax over all P + T.",
    ),
    solution='''
def prefix_attention(
    q: Float[Tensor, "T E"],
    k: Float[Tensor, "T E"],
    v: Float[Tensor, "T E"],
    prefix_k: Float[Tensor, "P E"],
    prefix_v: Float[Tensor, "P E"],
) -> Float[Tensor, "T E"]:
    """The output at the T tokens."""
    T, P = len(q), len(prefix_k)
    k, v = torch.cat((prefix_k, k)), torch.cat((prefix_v, v))
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v
''',
    why="Nothing in attention asks where keys and values come from. One softmax runs over both "
    "parts, so that the prefix and the text compete.",
    point="A prefix is a cache that is never empty.",
    check=same_function(
        _with_prefix,
        _attention_cases,
        [
            Mistake(
                "Two attentions, each with its own softmax, are added. There is one softmax over "
                "the prefix and the text together.",
                lambda q, k, v, pk, pv: (
                    _attend(q, k, v, _tril(len(q), len(q), 0))
                    + _attend(q, pk, pv, torch.ones(len(q), len(pk), dtype=torch.bool))
                ),
            ),
            Mistake(
                "The prefix is not looked at.",
                lambda q, k, v, pk, pv: _attend(q, k, v, _tril(len(q), len(q), 0)),
            ),
            Mistake(
                "The causal mask starts at the first slot: the early tokens do not see the whole "
                "prefix, and none sees all that it may.",
                lambda q, k, v, pk, pv: _attend(
                    q, torch.cat((pk, k)), torch.cat((pv, v)), _tril(len(q), len(q) + len(pk), 0)
                ),
                hint=2,
            ),
            Mistake(
                "The head looks ahead: the text must stay causal.",
                lambda q, k, v, pk, pv: _attend(
                    q,
                    torch.cat((pk, k)),
                    torch.cat((pv, v)),
                    torch.ones(len(q), len(q) + len(pk), dtype=torch.bool),
                ),
            ),
            Mistake(
                "The scores are not divided by the root of E.",
                lambda q, k, v, pk, pv: _with_prefix(q * q.shape[-1] ** 0.5, k, v, pk, pv),
            ),
            Mistake(
                "Keys and values of the prefix have changed places.",
                lambda q, k, v, pk, pv: _with_prefix(q, k, v, pv, pk),
            ),
        ],
    ),
)


# --- The share ------------------------------------------------------------------------------------


def _share_cases() -> list[Case]:
    return [
        case(f"T={T}, S={S}, P={P}", 2 * normal(T, S, seed=S), normal(T, P, seed=P) + 0.5)
        for T, S, P in ((4, 6, 3), (2, 3, 5))
    ]


def _share(text: Tensor, prefix: Tensor) -> Tensor:
    return torch.sigmoid(prefix.logsumexp(dim=-1) - text.logsumexp(dim=-1))


PREFIX_SHARE = Exercise(
    name="prefix_share",
    title="What the prefix takes",
    level=3,
    minutes=9,
    task=r"""
With a prefix, the output of a head is $(1 - \lambda)\,A + \lambda\,B$: $A$ is attention over the
text alone, $B$ over the prefix alone. Given the scores before the softmax, of T queries against S
words and against P slots, return $\lambda$ for each query.
""",
    stub='''
def prefix_share(
    text_scores: Float[Tensor, "T S"], prefix_scores: Float[Tensor, "T P"]
) -> Float[Tensor, "T"]:
    """The share of the attention that goes to the prefix."""
    raise NotImplementedError
''',
    hints=(
        "The softmax over all S + P scores says how much goes where. What is asked is a sum of "
        "some of its weights.",
        "Join the scores, take the softmax over the last axis, and add up the weights of the P "
        "slots.",
    ),
    solution='''
def prefix_share(
    text_scores: Float[Tensor, "T S"], prefix_scores: Float[Tensor, "T P"]
) -> Float[Tensor, "T"]:
    """The share of the attention that goes to the prefix."""
    weights = torch.cat((prefix_scores, text_scores), dim=-1).softmax(dim=-1)
    return weights[:, : prefix_scores.shape[-1]].sum(dim=-1)
''',
    why="What is left of the text is the old attention times one minus the share: all words lose "
    "by the same factor, so their proportions stay. That is the limit of a prefix in one layer.",
    point="A prefix can outshout the text, and cannot rearrange it.",
    check=same_function(
        _share,
        _share_cases,
        [
            Mistake(
                "That is the share of the text, one minus what is asked.",
                lambda t, p: 1 - _share(t, p),
            ),
            Mistake(
                "The scores are added up without the exponential.",
                lambda t, p: p.sum(-1) / (p.sum(-1) + t.sum(-1)),
            ),
            Mistake(
                "That is the mass of the prefix over that of the text; divide by both together.",
                lambda t, p: (p.logsumexp(-1) - t.logsumexp(-1)).exp(),
                hint=2,
            ),
            Mistake(
                "That is P over P + S, which holds only where all scores are equal.",
                lambda t, p: torch.full((len(t),), p.shape[-1] / (p.shape[-1] + t.shape[-1])),
            ),
            Mistake(
                "That is the largest weight of one slot; all slots count.",
                lambda t, p: torch.cat((p, t), -1).softmax(-1)[:, : p.shape[-1]].amax(-1),
            ),
            Mistake(
                "The softmax runs over the prefix alone, where the weights add up to 1.",
                lambda t, p: p.softmax(-1).sum(-1),
            ),
        ],
    ),
)


# --- By layer -------------------------------------------------------------------------------------


def _layer_cases() -> list[Case]:
    return [
        case(f"P={P}, L={L}, H={H}, E={E}", normal(P, 2 * L * H * E, seed=P), L, H)
        for P, L, H, E in ((4, 3, 2, 5), (2, 4, 3, 1))
    ]


def _by_layer(flat: Tensor, L: int, H: int) -> Tensor:
    P = len(flat)
    return flat.view(P, L, 2, H, -1).permute(1, 2, 3, 0, 4)


BY_LAYER = Exercise(
    name="by_layer",
    title="Unpack a stored prefix",
    level=2,
    minutes=8,
    task="""
The `peft` library stores a prefix as a matrix with one row for each of its P slots. A row holds,
layer after layer, first the key of **all heads** (head after head, E numbers each) and then the
value. Return it as (L, 2, H, P, E): layer, key or value, head, slot, coordinate.
""",
    stub='''
def by_layer(flat: Float[Tensor, "P W"], L: int, H: int) -> Float[Tensor, "L 2 H P E"]:
    """Keys (0) and values (1) of each layer; W = 2 L H E."""
    raise NotImplementedError
''',
    hints=(
        "Read a row from left to right: which index changes slowest, and which fastest? Split the "
        "axis in this order first; move axes afterwards.",
        "`flat.view(P, L, 2, H, E)`, then `permute` the axes to (L, 2, H, P, E).",
    ),
    solution='''
def by_layer(flat: Float[Tensor, "P W"], L: int, H: int) -> Float[Tensor, "L 2 H P E"]:
    """Keys (0) and values (1) of each layer; W = 2 L H E."""
    P, W = flat.shape
    return flat.view(P, L, 2, H, W // (2 * L * H)).permute(1, 2, 3, 0, 4)
''',
    why="`view` splits an axis without moving anything; `permute` moves axes. To view the whole "
    "matrix in the final shape at once has the right shape, and mixes the slots.",
    point="Split in the order of storage, then permute; never reshape into the final order.",
    check=same_function(
        _by_layer,
        _layer_cases,
        [
            Mistake(
                "The matrix is viewed in the final shape at once, which mixes slots and layers.",
                lambda f, L, H: f.reshape(L, 2, H, len(f), -1),
            ),
            Mistake(
                "The row is read as all keys first and then all values; keys and values alternate "
                "from layer to layer.",
                lambda f, L, H: f.view(len(f), 2, L, H, -1).permute(2, 1, 3, 0, 4),
            ),
            Mistake(
                "Keys and values have changed places.",
                lambda f, L, H: _by_layer(f, L, H).flip(1),
            ),
            Mistake(
                "Within a key the heads are read as the fastest axis; the E numbers of a head "
                "stand together.",
                lambda f, L, H: f.view(len(f), L, 2, -1, H).permute(1, 2, 4, 0, 3),
                hint=2,
            ),
            Mistake(
                "The layers are in the opposite order.",
                lambda f, L, H: _by_layer(f, L, H).flip(0),
            ),
        ],
    ),
)


# --- Without the network --------------------------------------------------------------------------


def _network_cases() -> list[Case]:
    rows = []
    for P, D, M, W in ((4, 3, 5, 7), (2, 6, 3, 8)):
        parts = normal(P, D), normal(M, D, seed=1), normal(M, seed=2)
        rows.append(case(f"P={P}, D={D}", *parts, normal(W, M, seed=3), normal(W, seed=4)))
    return rows


def _network(e: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return (e @ w1.T + b1).tanh() @ w2.T + b2


WITHOUT_NETWORK = Exercise(
    name="without_network",
    title="Throw the network away",
    level=2,
    minutes=6,
    task=r"""
While it is learned, a prefix is made from P vectors $e$ by two layers,
$W_2 \tanh(W_1 e + b_1) + b_2$. Weights are stored as (out, in). After training the network goes
and one matrix stays, with which the model computes exactly the same. Return it.
""",
    stub='''
def without_network(
    e: Float[Tensor, "P D"],
    w1: Float[Tensor, "M D"],
    b1: Float[Tensor, "M"],
    w2: Float[Tensor, "W M"],
    b2: Float[Tensor, "W"],
) -> Float[Tensor, "P W"]:
    """What is kept of a reparametrised prefix."""
    raise NotImplementedError
''',
    hints=(
        "Does what the network returns depend on the text? Then how often must it run?",
        "Run it once on the P vectors: a linear map with its bias, tanh, another with its bias.",
    ),
    solution='''
def without_network(
    e: Float[Tensor, "P D"],
    w1: Float[Tensor, "M D"],
    b1: Float[Tensor, "M"],
    w2: Float[Tensor, "W M"],
    b2: Float[Tensor, "W"],
) -> Float[Tensor, "P W"]:
    """What is kept of a reparametrised prefix."""
    return F.linear(F.linear(e, w1, b1).tanh(), w2, b2)
''',
    why="The network has no input but its own parameters, so its output is a constant. Because of "
    "the tanh the two layers cannot be folded into one matrix for the vectors; their result can be "
    "stored.",
    point="What makes a constant is needed only while the constant changes.",
    check=same_function(
        _network,
        _network_cases,
        [
            Mistake(
                "The tanh between the layers is missing.",
                lambda e, w1, b1, w2, b2: (e @ w1.T + b1) @ w2.T + b2,
            ),
            Mistake(
                "A ReLU stands in the place of the tanh.",
                lambda e, w1, b1, w2, b2: (e @ w1.T + b1).relu() @ w2.T + b2,
            ),
            Mistake(
                "There is a tanh after the second layer too: a prefix is not bounded.",
                lambda *args: _network(*args).tanh(),
            ),
            Mistake(
                "The first bias is missing.",
                lambda e, w1, b1, w2, b2: (e @ w1.T).tanh() @ w2.T + b2,
            ),
            Mistake(
                "The last bias is missing.",
                lambda e, w1, b1, w2, b2: (e @ w1.T + b1).tanh() @ w2.T,
            ),
            Mistake(
                "The vectors that go into the network are kept, and not what comes out of it.",
                lambda e, w1, b1, w2, b2: e,
            ),
        ],
    ),
)


# --- Counts ---------------------------------------------------------------------------------------


def _count_cases() -> list[Case]:
    return [
        case(f"P={P}, L={L}, D={D}, M={M}", P, L, D, M)
        for P, L, D, M in ((20, 12, 768, 512), (5, 3, 48, 32))
    ]


def _counts(P: int, L: int, D: int, M: int) -> tuple[int, int, int]:
    return P * D, 2 * L * P * D, P * D + (D * M + M) + (M * 2 * L * D + 2 * L * D)


def _wrong_counts(P: int, L: int, D: int, M: int, which: str) -> tuple[int, int, int]:
    prompt, kept, made = _counts(P, L, D, M)
    if which == "values":
        return prompt, L * P * D, P * D + (D * M + M) + (M * L * D + L * D)
    if which == "biases":
        return prompt, kept, P * D + D * M + M * 2 * L * D
    if which == "vectors":
        return prompt, kept, made - P * D
    if which == "layers":
        return prompt, 2 * P * D, P * D + (D * M + M) + (M * 2 * D + 2 * D)
    if which == "both":
        return prompt, kept, made + kept
    return prompt * L, kept, made


COUNT_PREFIX = Exercise(
    name="count_prefix",
    title="Trained and kept",
    level=1,
    minutes=7,
    task="""
A model has L layers of width D, its heads together as wide. Count the numbers that train for P
virtual tokens: by **prompt tuning**; by **prefix tuning** as it is; and by prefix tuning through a
network, from P vectors of width D by a layer of width M (with bias) and a second one (with bias)
that makes all keys and values of a slot.
""",
    stub='''
def count_prefix(P: int, L: int, D: int, M: int) -> tuple[int, int, int]:
    """Prompt tuning, prefix tuning, prefix tuning through a network: what trains."""
    raise NotImplementedError
''',
    hints=(
        "How wide is what one slot needs in one layer? And in all of them?",
        "A slot takes 2LD numbers. The network: PD for the vectors, DM + M for the first layer, "
        "and 2LD(M + 1) for the second.",
    ),
    solution='''
def count_prefix(P: int, L: int, D: int, M: int) -> tuple[int, int, int]:
    """Prompt tuning, prefix tuning, prefix tuning through a network: what trains."""
    slot = 2 * L * D
    return P * D, P * slot, P * D + M * (D + 1) + slot * (M + 1)
''',
    why="For 20 slots in a model of the size of BERT-base and M = 512, what trains through the "
    "network is 27 times the prefix that it makes. It trains, and is not kept.",
    point="What trains and what is stored are two counts; papers and libraries report either.",
    check=same_function(
        _counts,
        _count_cases,
        [
            Mistake(
                "Keys and values are two: the counts of the prefix are half of the right ones.",
                lambda *a: _wrong_counts(*a, "values"),
            ),
            Mistake(
                "The biases of the network are missing.", lambda *a: _wrong_counts(*a, "biases")
            ),
            Mistake(
                "The P vectors that the network starts from train too.",
                lambda *a: _wrong_counts(*a, "vectors"),
            ),
            Mistake(
                "A prefix has keys and values of its own in every layer.",
                lambda *a: _wrong_counts(*a, "layers"),
            ),
            Mistake(
                "The network makes the keys and values, so these do not train beside it.",
                lambda *a: _wrong_counts(*a, "both"),
            ),
            Mistake(
                "Prompt tuning has vectors before the first layer only.",
                lambda *a: _wrong_counts(*a, "everywhere"),
            ),
        ],
        names=("prompt tuning", "prefix tuning", "through a network"),
    ),
)


# --- Work -----------------------------------------------------------------------------------------


def _work_cases() -> list[Case]:
    return [case(f"N={N}, T={T}, P={P}", N, T, P) for N, T, P in ((1000, 50, 10), (70_000, 20, 4))]


TRAINING_WORK = Exercise(
    name="training_work",
    title="Why a tiny prompt is no tiny step",
    level=3,
    minutes=8,
    task="""
Count multiplications and additions in the matrices of a model with N weights (forget attention's
own products). For each position a forward pass takes 2N operations, the gradient of all
activations 2N, the gradient of all weights 2N. Return the operations of a step of **full
fine-tuning** on a text of T tokens, and of **prompt tuning** with P virtual tokens before it.
""",
    stub='''
def training_work(N: int, T: int, P: int) -> tuple[int, int]:
    """Operations of a step: full fine-tuning, prompt tuning."""
    raise NotImplementedError
''',
    hints=(
        "Where does the prompt stand? What must the gradient pass through to reach it?",
        "Full: three times 2N for T positions. Prompt tuning: forward and the gradient of the "
        "activations, for P + T positions; no gradient of weights.",
    ),
    solution='''
def training_work(N: int, T: int, P: int) -> tuple[int, int]:
    """Operations of a step: full fine-tuning, prompt tuning."""
    return 6 * N * T, 4 * N * (P + T)
''',
    why="The prompt stands before the first layer, so the gradient passes through all. Only "
    "the weights' own gradients, a third of the work, fall away, and P positions are added: with "
    "P above T / 2 a step costs more than full fine-tuning.",
    point="Few numbers to train means little memory, not little computing.",
    check=same_function(
        lambda N, T, P: (6 * N * T, 4 * N * (P + T)),
        _work_cases,
        [
            Mistake(
                "Prompt tuning: the gradient has to pass through the frozen layers, which takes as "
                "much as the forward pass.",
                lambda N, T, P: (6 * N * T, 2 * N * (P + T)),
            ),
            Mistake(
                "Prompt tuning: the virtual tokens are positions too, and are computed.",
                lambda N, T, P: (6 * N * T, 4 * N * T),
            ),
            Mistake(
                "Prompt tuning: frozen weights need no gradient, so the last third falls away.",
                lambda N, T, P: (6 * N * T, 6 * N * (P + T)),
            ),
            Mistake(
                "Full fine-tuning has two gradients, of the activations and of the weights.",
                lambda N, T, P: (4 * N * T, 4 * N * (P + T)),
            ),
            Mistake(
                "Prompt tuning: only the P positions are counted; the text is read as well.",
                lambda N, T, P: (6 * N * T, 4 * N * P),
            ),
        ],
        names=("full fine-tuning", "prompt tuning"),
    ),
)


# --- The chapter ----------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        WITH_PROMPT,
        WIDENED_LABELS,
        NEAREST,
        PREFIX_MASK,
        PREFIX_POSITIONS,
        PREFIX_ATTENTION,
        PREFIX_SHARE,
        BY_LAYER,
        WITHOUT_NETWORK,
        COUNT_PREFIX,
        TRAINING_WORK,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
