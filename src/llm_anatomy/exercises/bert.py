"""Exercises of the chapter "BERT: reading in both directions".

What is compared with: loops over single positions in float64, sums over all spans, and Bayes' rule
written out. None of it calls the package's model.
"""

import itertools
import math
from collections.abc import Callable, Sequence

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
    one_of,
    same_function,
    same_value,
)

# --- Input ----------------------------------------------------------------------------------------

CLS, SEP, MASK = 2, 3, 4


def _pair(
    a: Sequence[int],
    b: Sequence[int],
    cls: int,
    sep: int,
    *,
    first: bool = True,
    middle: bool = True,
    last: bool = True,
    split: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The input of a pair, with any of several mistakes; `split` is where segment 1 starts."""
    front = [cls] * first + list(a) + [sep] * middle
    tokens = front + list(b) + [sep] * last
    split = len(front) if split is None else split
    return torch.tensor(tokens), torch.tensor([int(i >= split) for i in range(len(tokens))])


INPUT_PAIR = Exercise(
    name="input_pair",
    title="Two texts, one input",
    level=1,
    minutes=5,
    task=r"""
BERT reads a pair of texts as **one** sequence: `[CLS]`, the first text, `[SEP]`, the second text,
`[SEP]`. A second sequence of the same length says which segment a token belongs to: 0 for
everything up to and including the first `[SEP]`, 1 for the rest. Return both as tensors of
integers.
""",
    stub='''
def input_pair(
    a: list[int], b: list[int], cls: int, sep: int
) -> tuple[Int[Tensor, "T"], Int[Tensor, "T"]]:
    """Token ids and segments of the pair a, b."""
    raise NotImplementedError
''',
    hints=(
        "Build the tokens as a list first. How many tokens lie before the first one of the second "
        "text, and how many from there to the end?",
        "With two special tokens around it the first text makes len(a) + 2 zeros; the second text "
        "and the last separator make len(b) + 1 ones.",
    ),
    solution='''
def input_pair(
    a: list[int], b: list[int], cls: int, sep: int
) -> tuple[Int[Tensor, "T"], Int[Tensor, "T"]]:
    """Token ids and segments of the pair a, b."""
    first = [cls, *a, sep]
    second = [*b, sep]
    segments = [0] * len(first) + [1] * len(second)
    return torch.tensor(first + second), torch.tensor(segments)
''',
    why="The encoder sees one sequence, so each token of one text may look at each token of the "
    "other from the first layer on. Only the separators and the segment embedding tell the two "
    "apart. The last separator closes the second text; a single text is [CLS], text, [SEP] with "
    "segments of 0.",
    point="A pair is one sequence to the encoder: comparing two texts is ordinary self-attention.",
    check=same_function(
        _pair,
        [
            case("texts of 3 and 2 tokens", [11, 12, 13], [21, 22], CLS, SEP),
            case("texts of 1 and 4 tokens", [9], [8, 7, 6, 5], 101, 102),
            case("texts of 5 and 1 tokens", [30, 31, 32, 33, 34], [40], 1, 0),
        ],
        [
            Mistake(
                "The last separator is missing: it closes the second text as well.",
                lambda *x: _pair(*x, last=False),
            ),
            Mistake(
                "Nothing separates the two texts: the first [SEP] is missing.",
                lambda *x: _pair(*x, middle=False),
            ),
            Mistake(
                "[CLS] is missing, and with it the vector that stands for the whole input.",
                lambda *x: _pair(*x, first=False),
            ),
            Mistake(
                "The first separator belongs to the text that it closes, so it has segment 0.",
                lambda *x: _pair(*x, split=len(x[0]) + 1),
                hint=2,
            ),
            Mistake(
                "[CLS] is counted as no part of segment 0, so the zeros are one too few at the "
                "front and segment 1 begins one token late.",
                lambda *x: _pair(*x, split=len(x[0]) + 3),
                hint=2,
            ),
            Mistake(
                "All segments are 0: the model could not tell the two texts apart by them.",
                lambda *x: _pair(*x, split=len(x[0]) + len(x[1]) + 9),
            ),
            Mistake(
                "The segments are counted from 1. They index a table of two rows, from 0.",
                lambda *x: (_pair(*x)[0], _pair(*x)[1] + 1),
            ),
        ],
        names=("tokens", "segments"),
    ),
)


def _embed_cases() -> list[Case]:
    rows = []
    for seed, (B, T, V, P, D) in ((500, (2, 5, 9, 7, 6)), (510, (3, 4, 11, 12, 10))):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(V, (B, T), generator=g)
        segments = (torch.arange(T) >= torch.tensor([[T // 2]])).long().expand(B, T).clone()
        tables = [normal(n, D, seed=seed + i) for i, n in enumerate((V, P, 2), start=1)]
        norm = [normal(D, seed=seed + 8), normal(D, seed=seed + 9)]
        rows.append(case(f"B={B}, T={T}, D={D}", tokens, segments, *tables, *norm))
    return rows


def _embed(
    tokens: Tensor,
    segments: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    gain: Tensor,
    bias: Tensor,
    *,
    scale: float = 1.0,
    restart: bool = False,
    late: bool = False,
    with_segments: bool = True,
    with_positions: bool = True,
    start: int = 0,
) -> Tensor:
    """BERT's embedding, one token at a time, with any of several mistakes."""
    B, T = tokens.shape
    out = torch.zeros(B, T, len(gain), dtype=torch.float64)
    for b, t in itertools.product(range(B), range(T)):
        place = start + t
        if restart:
            place = t - (segments[b, :t] != segments[b, t]).sum().item()
        parts = [token_table[tokens[b, t]].double() * scale]
        if with_positions:
            parts.append(position_table[place].double())
        if with_segments:
            parts.append(segment_table[segments[b, t]].double())
        if late:
            parts = [F.layer_norm(part, part.shape, eps=1e-12) for part in parts]
            out[b, t] = sum(parts) * gain + bias
        else:
            x = sum(parts)
            out[b, t] = F.layer_norm(x, x.shape, gain.double(), bias.double(), eps=1e-12)
    return out.to(gain.dtype)


EMBED = Exercise(
    name="embed",
    title="Three embeddings, one vector",
    level=2,
    minutes=8,
    task=r"""
The first layer of BERT: add the vectors of the **token**, of its **position** and of its
**segment**, and normalise the sum over its features, with `gain`, `bias` and $\epsilon = 10^{-12}$.
Positions count from 0 at `[CLS]`, over both segments.
""",
    stub='''
def embed(
    tokens: Int[Tensor, "B T"],
    segments: Int[Tensor, "B T"],
    token_table: Float[Tensor, "V D"],
    position_table: Float[Tensor, "P D"],
    segment_table: Float[Tensor, "2 D"],
    gain: Float[Tensor, "D"],
    bias: Float[Tensor, "D"],
) -> Float[Tensor, "B T D"]:
    """What enters BERT's first block."""
    raise NotImplementedError
''',
    hints=(
        "An embedding is a row of a table, picked by a number. Which three numbers does each token "
        "have, and what is done to the sum?",
        "Index two of the tables by the ids, take the first T rows of the position table, add, and "
        "hand the sum to F.layer_norm over the last axis, with all of its parameters.",
    ),
    solution='''
def embed(
    tokens: Int[Tensor, "B T"],
    segments: Int[Tensor, "B T"],
    token_table: Float[Tensor, "V D"],
    position_table: Float[Tensor, "P D"],
    segment_table: Float[Tensor, "2 D"],
    gain: Float[Tensor, "D"],
    bias: Float[Tensor, "D"],
) -> Float[Tensor, "B T D"]:
    """What enters BERT's first block."""
    T = tokens.shape[1]
    total = token_table[tokens] + position_table[:T] + segment_table[segments]
    return F.layer_norm(total, total.shape[-1:], gain, bias, 1e-12)
''',
    why="Three tables, three rows a token, one sum. The Transformer of 2017 multiplies the token's "
    "vector by the root of D and adds sines; BERT multiplies by nothing, learns its positions, and "
    "normalises the sum before the first block. That is why its blocks may end in a norm and the "
    "stack needs none at the end.",
    point="Everything that BERT knows about order and about segments enters here, by addition.",
    check=same_function(
        _embed,
        _embed_cases,
        [
            Mistake(
                "The token's vector is multiplied by the root of D. That is the Transformer of "
                "2017; BERT adds it as it is.",
                lambda *x: _embed(*x, scale=math.sqrt(len(x[-1]))),
            ),
            Mistake(
                "The sum is not normalised.",
                lambda t, s, a, p, c, gain, bias: a[t] + p[: t.shape[1]] + c[s],
            ),
            Mistake(
                "The segments are missing from the sum.",
                lambda *x: _embed(*x, with_segments=False),
            ),
            Mistake(
                "The positions are missing from the sum: any order of the tokens looks the same.",
                lambda *x: _embed(*x, with_positions=False),
            ),
            Mistake(
                "The positions start again in the second segment. They run on over both.",
                lambda *x: _embed(*x, restart=True),
            ),
            Mistake(
                "Each part is normalised before the sum. The sum is normalised, once.",
                lambda *x: _embed(*x, late=True),
                hint=2,
            ),
            Mistake(
                "The positions count from 1. The first token has position 0.",
                lambda *x: _embed(*x, start=1),
            ),
            Mistake(
                "The norm's gain and bias are not applied.",
                lambda *x: _embed(*x[:-2], torch.ones_like(x[-2]), torch.zeros_like(x[-1])),
                hint=2,
            ),
        ],
    ),
)


# --- Counting -------------------------------------------------------------------------------------


def _count(
    vocab_size: int,
    n_positions: int,
    n_segments: int,
    n_layers: int,
    d_model: int,
    d_ff: int,
    *,
    norms: int = 2,
    biases: bool = True,
    embedding_norm: bool = True,
    pooler: bool = True,
    tables: tuple[bool, bool] = (True, True),
) -> int:
    """Parameters of BertModel, written as a list of all shapes."""
    D = d_model
    positions, segments = tables
    shapes = [(vocab_size, D), (n_positions * positions, D), (n_segments * segments, D)]
    shapes += [(2, D)] * embedding_norm
    for _ in range(n_layers):
        for n_in, n_out in ((D, D), (D, D), (D, D), (D, D), (D, d_ff), (d_ff, D)):
            shapes += [(n_in, n_out), (1, n_out * biases)]
        shapes += [(2, D)] * norms
    if pooler:
        shapes += [(D, D), (1, D * biases)]
    return sum(a * b for a, b in shapes)


COUNT_BERT = Exercise(
    name="count_bert",
    title="How many parameters has BERT?",
    level=2,
    minutes=10,
    task=r"""
Count the parameters of BERT's encoder with its pooler. There are three embedding tables and a norm
after them. Each of the $L$ blocks has four attention projections, a feed-forward layer of width
$F$, and two norms. The pooler is one layer from $D$ to $D$. Every layer has a bias; a norm has a
gain and a bias for each feature.
""",
    stub='''
def count_bert(
    vocab_size: int, n_positions: int, n_segments: int, n_layers: int, d_model: int, d_ff: int
) -> int:
    """Parameters of the embeddings, the blocks and the pooler."""
    raise NotImplementedError
''',
    hints=(
        "Write the shape of every tensor, in three groups: embeddings, one block, pooler. Do heads "
        "change the count? Which tensors are vectors?",
        "The embeddings have one row more than V + P + S for the norm's gain, and another for its "
        "bias. A block has 4 D² + 4 D in attention, 2 D F + F + D in the feed-forward layer, and "
        "two norms of 2 D each.",
    ),
    solution='''
def count_bert(
    vocab_size: int, n_positions: int, n_segments: int, n_layers: int, d_model: int, d_ff: int
) -> int:
    """Parameters of the embeddings, the blocks and the pooler."""
    D, norm = d_model, 2 * d_model
    embeddings = (vocab_size + n_positions + n_segments) * D + norm
    attention = 4 * (D * D + D)
    feed_forward = (D * d_ff + d_ff) + (d_ff * D + D)
    block = attention + norm + feed_forward + norm
    pooler = D * D + D
    return embeddings + n_layers * block + pooler
''',
    why="With 30,522 tokens, 512 positions, 2 segments, 12 layers, D = 768 and F = 3072 it gives "
    "109,482,240, which the paper rounds to 110 million. Heads cut D into pieces and change "
    "nothing. Another vocabulary changes the first table alone, and by a lot: it holds 23 million.",
    point="A count that is derived agrees with the code to the last parameter, or it is wrong.",
    check=same_function(
        _count,
        [
            case(f"V={a[0]}, P={a[1]}, S={a[2]}, L={a[3]}, D={a[4]}, F={a[5]}", *a)
            for a in ((30_522, 512, 2, 12, 768, 3072), (97, 16, 3, 1, 8, 20), (50, 9, 2, 3, 12, 7))
        ],
        [
            Mistake("The pooler is missing.", lambda *a: _count(*a, pooler=False)),
            Mistake(
                "The norm after the embeddings is missing.",
                lambda *a: _count(*a, embedding_norm=False),
            ),
            Mistake(
                "The biases of the layers are missing: one number for each output.",
                lambda *a: _count(*a, biases=False),
            ),
            Mistake(
                "A block has two norms, one after each half. Here one is counted.",
                lambda *a: _count(*a, norms=1),
            ),
            Mistake("The norms of the blocks are missing.", lambda *a: _count(*a, norms=0)),
            Mistake(
                "The segment embeddings are missing.",
                lambda *a: _count(*a, tables=(True, False)),
            ),
            Mistake(
                "The position embeddings are missing. BERT learns them: they are parameters.",
                lambda *a: _count(*a, tables=(False, True)),
            ),
            Mistake(
                "The feed-forward layer is taken to be four times as wide as the model. Here its "
                "width F is an argument.",
                lambda *a: _count(*a[:5], 4 * a[4]),
            ),
            Mistake(
                "The blocks are counted once. There are L of them.",
                lambda V, P, S, L, D, F: _count(V, P, S, 1, D, F),
            ),
        ],
        rtol=0.0,
        atol=0.0,
    ),
)


# --- Which way ------------------------------------------------------------------------------------

DIRECTIONS = Exercise(
    name="directions",
    title="Who can have a say?",
    level=1,
    minutes=4,
    task=r"""
A text has **6** tokens, numbered from 0. Look at the final vector at position **2**. From how many
of the 6 inputs can it depend, its own included

* in GPT, with causal self-attention;
* in BERT;
* in the **backward** LSTM of ELMo, which reads from right to left;
* in ELMo's vector, the forward and the backward state side by side?
""",
    stub="""
directions = (
    ...,  # GPT
    ...,  # BERT
    ...,  # backward LSTM
    ...,  # forward and backward LSTM side by side
)
""",
    hints=(
        "Write the six numbers in a row and mark which of them each reader has met when it stands "
        "at position 2. Does it meet its own input?",
        "From the left one has met 0 to 2, from the right 5 down to 2. Both include position 2 "
        "itself; side by side they cover everything.",
    ),
    solution="""
directions = (
    3,
    6,
    4,
    6,
)
""",
    why="Reading from the left, position 2 has met 0, 1, 2; from the right 5, 4, 3, 2. ELMo puts "
    "the two states side by side, so its vector depends on all six inputs as BERT's does. The "
    "difference is not how much is seen but where the two sides meet: in BERT in every layer, in "
    "ELMo after the last one.",
    point="Both BERT and ELMo see both sides; in BERT the two sides meet inside every layer.",
    check=same_value(
        (3, 6, 4, 6),
        [
            Mistake(
                "A causal position sees itself too: 0, 1 and 2.",
                when=lambda got, _: got[0] == 2,
            ),
            Mistake(
                "GPT looks to the left only. All six would be an encoder.",
                when=lambda got, _: got[0] == 6,
            ),
            Mistake(
                "BERT's own position counts as well: nothing is left out.",
                when=lambda got, _: got[1] == 5,
            ),
            Mistake(
                "BERT has no mask: it does not stop at its own position.",
                when=lambda got, _: got[1] == 3,
            ),
            Mistake(
                "The backward LSTM reads the token at its own position too: 5, 4, 3 and 2.",
                when=lambda got, _: got[2] == 3,
            ),
            Mistake(
                "The backward LSTM starts at the right end. At position 2 it has met 5, 4, 3, 2.",
                when=lambda got, _: got[2] == 6,
            ),
            Mistake(
                "Position 2 is counted twice: it is in both halves, but it is one input.",
                when=lambda got, _: got[3] == 7,
            ),
        ],
        names=("GPT", "BERT", "backward", "side by side"),
    ),
)

WHY_MASK = Exercise(
    name="why_mask",
    title="Why are words hidden?",
    level=1,
    minutes=3,
    task=r"""
A model that reads from left to right is trained on every next word and hides nothing. BERT hides
15 % of its input. Why does it have to?

* **a)** Because attention in both directions is only possible with masked words.
* **b)** Because with both sides in view the word to be predicted stands in the input, and could be
  copied.
* **c)** Because a vocabulary of 30,000 words is too large to predict every position.
* **d)** Because hidden words make training faster: there is less to read.
* **e)** Because the hidden words turn an encoder into a decoder.

Answer with a letter.
""",
    stub="""
why_mask = ...  # "a", "b", "c", "d" or "e"
""",
    hints=(
        "Take a bidirectional encoder and ask position t for the token at t + 1, without hiding "
        "anything. Where can it read the answer?",
        "What makes the encoder look both ways is its mask over attention, not the task. The task "
        "must be one that looking cannot solve.",
    ),
    solution="""
why_mask = "b"
""",
    why="Without a causal mask position t sees t + 1, so next-token prediction is a copy and its "
    "loss falls to zero without a word being understood. Hiding the target makes the question "
    "honest again. The price is that only 15 % of the positions give a loss.",
    point="The architecture looks both ways; the hidden words keep the task from being trivial.",
    check=one_of(
        "b",
        {
            "a": "The encoder looks both ways on any input: nothing in attention needs [MASK].",
            "c": "GPT predicts every position over a larger vocabulary. Size is no obstacle.",
            "d": "[MASK] takes as much work as a word, and fewer positions give a loss: training "
            "needs more steps, not fewer.",
            "e": "A decoder has a causal mask. Hidden words leave the encoder an encoder.",
        },
    ),
)


# --- Hiding ---------------------------------------------------------------------------------------


def _mask_cases() -> list[Case]:
    rows = []
    for seed, (B, T, V) in ((530, (3, 40, 50)), (540, (2, 60, 90))):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(5, V, (B, T), generator=g)
        chosen = torch.rand(B, T, generator=g) < 0.5
        fate = torch.rand(B, T, generator=g)
        noise = torch.randint(5, V, (B, T), generator=g)
        rows.append(case(f"B={B}, T={T}", tokens, chosen, fate, noise, MASK))
    return rows


def _hide(
    tokens: Tensor,
    chosen: Tensor,
    fate: Tensor,
    noise: Tensor,
    mask_id: int,
    *,
    masked: float = 0.8,
    replaced: float = 0.9,
    everywhere: bool = False,
    targets: str = "chosen",
) -> tuple[Tensor, Tensor]:
    """The 80/10/10 rule, one token at a time, with any of several mistakes."""
    inputs, wanted = tokens.tolist(), torch.full_like(tokens, -100).tolist()
    for b, t in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):
        old, picked = inputs[b][t], bool(chosen[b, t]) or everywhere
        if picked and fate[b, t] < masked:
            inputs[b][t] = mask_id
        elif picked and fate[b, t] < replaced:
            inputs[b][t] = int(noise[b, t])
        is_target = {
            "chosen": bool(chosen[b, t]),
            "masked": bool(chosen[b, t]) and inputs[b][t] == mask_id,
            "changed": bool(chosen[b, t]) and not fate[b, t] >= replaced,
            "all": True,
            "inputs": bool(chosen[b, t]),
        }[targets]
        if is_target:
            wanted[b][t] = inputs[b][t] if targets == "inputs" else old
    return torch.tensor(inputs), torch.tensor(wanted)


MASK_TOKENS = Exercise(
    name="mask_tokens",
    title="80, 10 and 10 per cent",
    level=2,
    minutes=10,
    task=r"""
BERT's rule, with the dice already thrown. `chosen` is True at the positions that were picked.
At a chosen position the number `fate`, between 0 and 1, decides: below 0.8 the token becomes
`mask_id`; from 0.8 to below 0.9 it becomes the token of `noise` there; from 0.9 on it stays.
Return the inputs, and targets that hold the **original** token at **every** chosen position and
$-100$ elsewhere.
""",
    stub='''
def mask_tokens(
    tokens: Int[Tensor, "B T"],
    chosen: Bool[Tensor, "B T"],
    fate: Float[Tensor, "B T"],
    noise: Int[Tensor, "B T"],
    mask_id: int,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and targets of masked language modelling."""
    raise NotImplementedError
''',
    hints=(
        "Make one boolean tensor for each of the two changes, and apply each with torch.where. "
        "Which positions are asked for: those that changed, or those that were chosen?",
        "The first change holds where chosen and fate below 0.8; the second where chosen and fate "
        "in [0.8, 0.9). The targets depend on chosen alone, and come from the untouched tokens.",
    ),
    solution='''
def mask_tokens(
    tokens: Int[Tensor, "B T"],
    chosen: Bool[Tensor, "B T"],
    fate: Float[Tensor, "B T"],
    noise: Int[Tensor, "B T"],
    mask_id: int,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and targets of masked language modelling."""
    hidden = chosen & (fate < 0.8)
    swapped = chosen & (fate >= 0.8) & (fate < 0.9)
    inputs = torch.where(swapped, noise, tokens)
    inputs = torch.where(hidden, mask_id, inputs)
    targets = torch.where(chosen, tokens, -100)
    return inputs, targets
''',
    why="All chosen positions are targets, also those that stay as they are: only so does the "
    "model have to keep, at each visible token, an opinion about what belongs there. The three "
    "fates are shares of the chosen tokens, not of all.",
    point="What is asked for is decided by the choice; what is seen there is decided by the fate.",
    check=same_function(
        _hide,
        _mask_cases,
        [
            Mistake(
                "Only [MASK] positions are asked for. Replaced and kept ones are targets too.",
                lambda *x: _hide(*x, targets="masked"),
            ),
            Mistake(
                "Kept positions are no targets here. They are chosen, so they are asked for.",
                lambda *x: _hide(*x, targets="changed"),
            ),
            Mistake(
                "Every position is a target. Only chosen ones are; the others hold -100.",
                lambda *x: _hide(*x, targets="all"),
            ),
            Mistake(
                "The targets hold what the model sees. They must hold the original token.",
                lambda *x: _hide(*x, targets="inputs"),
            ),
            Mistake(
                "Positions that were not chosen are changed as well.",
                lambda *x: _hide(*x, everywhere=True),
            ),
            Mistake(
                "Every chosen token becomes [MASK]: the 10 % and 10 % are missing.",
                lambda *x: _hide(*x, masked=2.0),
            ),
            Mistake(
                "From 0.9 on a token stays. Here it is replaced too: 20 % of random tokens.",
                lambda *x: _hide(*x, replaced=2.0),
                hint=2,
            ),
            Mistake(
                "No token is replaced: those from 0.8 to 0.9 stay as they are.",
                lambda *x: _hide(*x, replaced=0.8),
                hint=2,
            ),
        ],
        names=("inputs", "targets"),
    ),
)

MASK_SHARES = Exercise(
    name="mask_shares",
    title="Of a thousand tokens",
    level=1,
    minutes=4,
    task=r"""
A text has 1000 ordinary tokens. By BERT's rule, how many of them do we expect

* to be asked for (to give a loss);
* to read `[MASK]` in the input;
* to have been replaced by a random token (count it even if chance draws the same one);
* to be **visible and unchanged**, whether asked for or not?
""",
    stub="""
mask_shares = (
    ...,  # asked for
    ...,  # [MASK]
    ...,  # random token
    ...,  # visible and unchanged
)
""",
    hints=(
        "Fifteen per cent are chosen. The shares of 80, 10 and 10 per cent divide the chosen ones.",
        "The first three are 15 %, 80 % of 15 % and 10 % of 15 %. What is left over of all tokens "
        "after the last two is visible and unchanged.",
    ),
    solution="""
mask_shares = (
    1000 * 0.15,
    1000 * 0.15 * 0.8,
    1000 * 0.15 * 0.1,
    1000 * (1 - 0.15 * 0.9),
)
""",
    why="150 are chosen; 120 of them are hidden, 15 replaced and 15 kept. So 850 + 15 stand "
    "unchanged. Random tokens are 1.5 % of the text: this small share, not the 15 %, is what the "
    "paper has in mind when it says that the model's understanding of language is not harmed.",
    point="Twelve per cent of the text are hidden, and one and a half per cent are wrong.",
    check=same_value(
        (150.0, 120.0, 15.0, 865.0),
        [
            Mistake(
                "80 % of all tokens would be hidden here. The shares divide the chosen 15 %.",
                when=lambda got, _: math.isclose(got[1], 800),
            ),
            Mistake(
                "The tokens asked for are all chosen ones, not only those with [MASK].",
                when=lambda got, _: math.isclose(got[0], 120),
            ),
            Mistake(
                "All chosen tokens are counted as [MASK]. Only 80 % of them are hidden.",
                when=lambda got, _: math.isclose(got[1], 150),
            ),
            Mistake(
                "Random are 10 % of the chosen tokens, not of all tokens.",
                when=lambda got, _: math.isclose(got[2], 100),
            ),
            Mistake(
                "Random and kept tokens are counted together as random.",
                when=lambda got, _: math.isclose(got[2], 30),
            ),
            Mistake(
                "The tokens that were chosen and kept stand unchanged as well.",
                when=lambda got, _: math.isclose(got[3], 850),
            ),
            Mistake(
                "A replaced token is visible, but not unchanged.",
                when=lambda got, _: math.isclose(got[3], 880),
            ),
        ],
        names=("asked for", "[MASK]", "random", "unchanged"),
    ),
)


def _posterior(context: Tensor, seen: int, *, mistake: str = "") -> Tensor:
    """Bayes' rule, one word at a time."""
    V = len(context)
    channel = [0.1 / V + (0.1 if word == seen else 0.0) for word in range(V)]
    prior = context.double().tolist()
    if mistake == "flat":
        prior = [1 / V] * V
    if mistake == "0.8":
        channel = [0.1 / V + (0.8 if word == seen else 0.0) for word in range(V)]
    if mistake == "unspread":
        channel = [0.1 + (0.1 if word == seen else 0.0) for word in range(V)]
    if mistake == "prior":
        channel = [1.0] * V
    if mistake == "either":
        channel = [0.1 / (V - 1) if word != seen else 0.1 for word in range(V)]
    joint = [p * q for p, q in zip(prior, channel, strict=True)]
    if mistake == "half":
        return torch.tensor(
            [0.5 * p + 0.5 * (word == seen) for word, p in enumerate(prior)], dtype=context.dtype
        )
    if mistake == "certain":
        return torch.tensor([float(word == seen) for word in range(V)], dtype=context.dtype)
    total = 1.0 if mistake == "unnormalised" else sum(joint)
    return torch.tensor([p / total for p in joint], dtype=context.dtype)


def _posterior_cases() -> list[Case]:
    rows = []
    for seed, V, seen in ((550, 6, 2), (560, 9, 0), (570, 4, 3)):
        context = normal(V, seed=seed).mul(1.5).softmax(dim=0)
        rows.append(case(f"V={V}, seen={seen}", context, seen))
    return rows


POSTERIOR_OF_SEEN = Exercise(
    name="posterior_of_seen",
    title="Is this word the right one?",
    level=3,
    minutes=12,
    task=r"""
A position is asked for, and the model sees the token `seen` there, not `[MASK]`. So the token was
either kept (10 % of chosen positions) or drawn at random from all $V$ tokens (another 10 %; the
draw may hit the original). `context` holds $q(w)$, the probability of each original word given the
**other** words. Return the probability of each original word given the other words **and** what is
seen: the best prediction that a trained BERT can make here.
""",
    stub='''
def posterior_of_seen(context: Float[Tensor, "V"], seen: int) -> Float[Tensor, "V"]:
    """Probability of each original word, given the context and the visible token."""
    raise NotImplementedError
''',
    hints=(
        "Bayes' rule: prior times likelihood, divided by their sum. The prior is q. How likely is "
        "it to see this very token if the original is w, in two cases?",
        "If the original is another word, only a random draw can show `seen`: 0.1 divided by V. If "
        "it is the word itself, it was kept, or drawn by chance: both terms are added. Multiply by "
        "q and divide by the sum.",
    ),
    solution='''
def posterior_of_seen(context: Float[Tensor, "V"], seen: int) -> Float[Tensor, "V"]:
    """Probability of each original word, given the context and the visible token."""
    V = len(context)
    likelihood = torch.full_like(context, 0.1 / V)
    likelihood[seen] += 0.1
    joint = context * likelihood
    return joint / joint.sum()
''',
    why="A word that fits its place is almost certainly the original: with V = 255 the odds are "
    "multiplied by 256. A word that cannot stand there is almost certainly an impostor, and the "
    "prediction falls back on the context. So BERT has to judge every visible token by its "
    "neighbours. With 100 % [MASK] no such judgement is ever asked for.",
    point="The last 10 and 10 per cent make BERT weigh each visible word against its context.",
    check=same_function(
        _posterior,
        _posterior_cases,
        [
            Mistake(
                "The context is not used: a word that does not fit would be believed all the same.",
                lambda *x: _posterior(*x, mistake="flat"),
            ),
            Mistake(
                "What is seen is not used: this is the prior.",
                lambda *x: _posterior(*x, mistake="prior"),
            ),
            Mistake(
                "The visible token is taken for certain. It may be a random one.",
                lambda *x: _posterior(*x, mistake="certain"),
            ),
            Mistake(
                "Half of the time kept, half of the time random holds before looking. How well the "
                "token fits its place changes these odds.",
                lambda *x: _posterior(*x, mistake="half"),
            ),
            Mistake(
                "80 % is the share of [MASK]. Of the visible ones as many were kept as were drawn.",
                lambda *x: _posterior(*x, mistake="0.8"),
            ),
            Mistake(
                "A random draw shows this very token in one of V cases: 0.1 / V, not 0.1.",
                lambda *x: _posterior(*x, mistake="unspread"),
                hint=2,
            ),
            Mistake(
                "The draw is from all V tokens, so it may hit the original: its likelihood is the "
                "sum of both cases.",
                lambda *x: _posterior(*x, mistake="either"),
                hint=2,
            ),
            Mistake(
                "It does not sum to 1: divide by the probability of what is seen.",
                lambda *x: _posterior(*x, mistake="unnormalised"),
            ),
        ],
        rtol=1e-4,
        atol=1e-7,
    ),
)


# --- Next sentence --------------------------------------------------------------------------------


def _nsp(follows: Tensor, random: Tensor, *, mistake: str = "") -> float:
    """The best score, summed pair by pair."""
    right, n = 0.0, len(follows)
    for i, j in itertools.product(range(n), range(follows.shape[1])):
        p, q = follows[i, j].item(), random[j].item()
        best = {
            "": max(p, q),
            "min": min(p, q),
            "follows": p,
            "positive": max(p, q) if p > 0 else 0.0,
            "sum": p + q if p > 0 else 0.0,
            "hard": (p if p > 0 else 0.0) + (q if p == 0 else 0.0),
        }[mistake if mistake in ("min", "follows", "positive", "sum", "hard") else ""]
        right += best
    if mistake == "twice":
        return right / n
    if mistake == "total":
        return right / 2
    return right / (2 * n)


def _nsp_cases() -> list[Case]:
    rows = []
    for seed, n, k in ((580, 3, 5), (590, 2, 4), (600, 5, 7)):
        scores = normal(n, k, seed=seed).mul(2)
        scores[normal(n, k, seed=seed + 1) > 0.6] = -math.inf
        scores[:, 0] = scores[:, 0].clamp(min=0.1)  # no first sentence is without a second
        follows = scores.softmax(dim=1)
        rows.append(case(f"{n} first and {k} second sentences", follows, follows.mean(dim=0)))
    return rows


NSP_OPTIMUM = Exercise(
    name="nsp_optimum",
    title="The best score for the next sentence",
    level=2,
    minutes=8,
    task=r"""
Next-sentence prediction: with probability 1/2 the second sentence is drawn from what **follows**
the first one, else from the whole corpus. Row $i$ of `follows` holds $p(j \mid i)$ for $N$ equally
likely first sentences and $K$ second ones; `random` holds $q(j)$. What share of right answers does
the best possible judge reach?
""",
    stub='''
def nsp_optimum(follows: Float[Tensor, "N K"], random: Float[Tensor, "K"]) -> float:
    """Accuracy of the best judge, who knows both distributions."""
    raise NotImplementedError
''',
    hints=(
        "For one pair (i, j): how probable is it that it comes up as a true pair, and how probable "
        "as a random one? Which answer does the best judge give, and how often is it right?",
        "A pair has probability p(j|i) / 2N as a true one and q(j) / 2N as a random one. The judge "
        "takes the larger, and is right with that probability. Sum over all pairs.",
    ),
    solution='''
def nsp_optimum(follows: Float[Tensor, "N K"], random: Float[Tensor, "K"]) -> float:
    """Accuracy of the best judge, who knows both distributions."""
    N = len(follows)
    right = torch.maximum(follows, random).sum()
    return (right / (2 * N)).item()
''',
    why="Each pair is answered in favour of the likelier origin, so the score is half the mean, "
    "over first sentences, of Σ max(p, q). It is 1 only if no random sentence could have "
    "followed. The easier it is to see that a random sentence comes from elsewhere, the higher the "
    "score, and the less there is to learn: a word of the topic is enough.",
    point="A task has a best possible score, and it says how much of it was luck of the draw.",
    check=same_function(
        _nsp,
        _nsp_cases,
        [
            Mistake(
                "This is the error of the best judge. The score is one minus it.",
                lambda *x: _nsp(*x, mistake="min"),
            ),
            Mistake(
                "A judge who always says that it follows is right half of the time. The judge may "
                "choose for each pair.",
                lambda *x: _nsp(*x, mistake="follows"),
            ),
            Mistake(
                "The 1/2 is missing: each of the two origins has probability one half.",
                lambda *x: _nsp(*x, mistake="twice"),
                hint=2,
            ),
            Mistake(
                "It is summed over the first sentences. They are N equally likely ones: divide.",
                lambda *x: _nsp(*x, mistake="total"),
                hint=2,
            ),
            Mistake(
                "Pairs that can never follow are left out. There the judge is right every time.",
                lambda *x: _nsp(*x, mistake="positive"),
            ),
            Mistake(
                "The judge here says that it follows whenever it could. Where the random origin is "
                "likelier, the other answer is better.",
                lambda *x: _nsp(*x, mistake="hard"),
            ),
        ],
    ),
)


# --- Heads ----------------------------------------------------------------------------------------


def _spans(
    tags: Sequence[str],
    *,
    merge: bool = False,
    last: bool = True,
    orphans: bool = False,
    end: int = 0,
) -> list[tuple[str, int, int]]:
    """Entities of BIO tags, with any of several mistakes."""
    found: list[tuple[str, int, int]] = []
    kind, start = None, 0
    for i, tag in enumerate([*tags, "O"]):
        inside = tag.startswith("I-") and kind == tag[2:]
        joined = merge and tag.startswith("B-") and kind == tag[2:]
        if kind is not None and not (inside or joined):
            if last or i < len(tags):
                found.append((kind, start, i - 1 + end))
            kind = None
        if (tag.startswith("B-") and not joined) or (orphans and tag[:2] == "I-" and kind is None):
            kind, start = tag[2:], i
    return found


_TAGS = (
    "B-PER I-PER O O B-LOC I-LOC I-LOC O",
    "O B-PER B-PER I-PER O B-LOC",
    "B-LOC O I-PER O B-PER I-LOC B-LOC I-LOC",
    "O O B-LOC B-LOC",
)

ENTITY_SPANS = Exercise(
    name="entity_spans",
    title="From tags to names",
    level=2,
    minutes=10,
    task=r"""
A tagging head says for each word `O` (outside), `B-X` (an entity of kind X begins) or `I-X` (it
goes on). Collect the entities as tuples `(kind, first, last)`, both positions included, in order.
An `I-X` continues only an entity of the same kind that reaches up to it; any other `I-X` is no
entity at all.
""",
    stub='''
def entity_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Kind, first and last position of each entity."""
    raise NotImplementedError
''',
    hints=(
        "Walk through the tags with the entity that is open at the moment, if any. Which tags "
        "close it? What must happen after the last tag?",
        "B- always closes what is open and opens a new one. I- of the same kind prolongs it. "
        "Anything else closes it. At the end, what is still open counts.",
    ),
    solution='''
def entity_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Kind, first and last position of each entity."""
    spans, open_kind = [], None
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "B":
            spans.append((kind, i, i))
            open_kind = kind
        elif prefix == "I" and kind == open_kind:
            spans[-1] = (kind, spans[-1][1], i)
        else:
            open_kind = None
    return spans
''',
    why="The head tags each word on its own; names are what these tags spell. B- exists to part "
    "two names of one kind that touch. An I- without its beginning can come out of a head that "
    "judges words one by one; here it is dropped. Scores of named-entity recognition count whole "
    "names: one wrong word loses the name.",
    point="A tagger is judged by names, not by words: a name is right only if all of it is.",
    check=same_function(
        lambda tags: _spans(tags),
        [case(row, row.split()) for row in _TAGS],
        [
            Mistake(
                "Two names of one kind that touch are merged. B- begins a new one.",
                lambda tags: _spans(tags, merge=True),
            ),
            Mistake(
                "A name at the end of the text is lost: nothing closes it there.",
                lambda tags: _spans(tags, last=False),
            ),
            Mistake(
                "An I- without a beginning of its kind is taken for a name.",
                lambda tags: _spans(tags, orphans=True),
            ),
            Mistake(
                "The last position is one too far: both ends are included.",
                lambda tags: _spans(tags, end=1),
            ),
            Mistake(
                "Each tag is taken alone: I- has to prolong the name that is open.",
                lambda tags: [(t[2:], i, i) for i, t in enumerate(tags) if t != "O"],
            ),
            Mistake(
                "Only the first word of each name is kept.",
                lambda tags: [(t[2:], i, i) for i, t in enumerate(tags) if t[:2] == "B-"],
            ),
        ],
    ),
)


def _best(
    start: Tensor, end: Tensor, context: Tensor, longest: int, *, mistake: str = ""
) -> tuple[int, int]:
    """The best span among all, with any of several mistakes."""
    T = len(start)
    allowed = [True] * T if mistake == "anywhere" else context.tolist()
    places = [i for i in range(T) if allowed[i]]
    first = max(places, key=lambda i: start[i].item())
    last = max(places, key=lambda i: end[i].item())
    if mistake == "independent":
        return first, last
    limit = longest + {"long": 1, "short": -1, "endless": 10**6}.get(mistake, 0)
    pairs = [
        (i, j)
        for i, j in itertools.product(places, places)
        if (mistake == "backward" or i <= j) and j - i < limit
    ]
    if mistake == "greedy":
        pairs = [(i, j) for i, j in pairs if i == first]
    if mistake == "greedy end":
        pairs = [(i, j) for i, j in pairs if j == last]
    if mistake == "one":
        pairs = [(i, i) for i in places]
    return max(pairs, key=lambda ij: start[ij[0]].item() + end[ij[1]].item())


def _span_cases() -> list[Case]:
    rows = []
    for seed, T, first, longest in ((3, 9, 3, 3), (4, 12, 4, 2), (8, 10, 2, 4), (10, 14, 5, 3)):
        context = torch.arange(T) >= first
        rows.append(
            case(
                f"T={T}, context from {first}, at most {longest}",
                3 * normal(T, seed=610 + seed),
                3 * normal(T, seed=640 + seed),
                context,
                longest,
            )
        )
    return rows


BEST_SPAN = Exercise(
    name="best_span",
    title="The best answer span",
    level=3,
    minutes=12,
    task=r"""
A question-answering head scores every position as the **first** and as the **last** token of the
answer. Return the pair `(first, last)`, as integers, whose two scores have the largest **sum**,
among the spans that lie in the context (`context` is True there; it is one block), do not run
backwards, and have at most `longest` tokens.
""",
    stub='''
def best_span(
    start: Float[Tensor, "T"], end: Float[Tensor, "T"], context: Bool[Tensor, "T"], longest: int
) -> tuple[int, int]:
    """First and last position of the best answer."""
    raise NotImplementedError
''',
    hints=(
        "The best start and the best end need not belong together. Score all pairs at once: a "
        "table with starts as rows and ends as columns.",
        "start[:, None] + end[None, :] is that table. Allow an entry if both positions are in the "
        "context and the distance from row to column lies between 0 and longest - 1; set the "
        "others to minus infinity and find the largest.",
    ),
    solution='''
def best_span(
    start: Float[Tensor, "T"], end: Float[Tensor, "T"], context: Bool[Tensor, "T"], longest: int
) -> tuple[int, int]:
    """First and last position of the best answer."""
    T = len(start)
    scores = start[:, None] + end[None, :]  # (T, T): rows are starts, columns ends
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    allowed = (distance >= 0) & (distance < longest) & context[:, None] & context[None, :]
    place = scores.masked_fill(~allowed, -math.inf).argmax().item()
    return place // T, place % T
''',
    why="The head makes two independent distributions, and nothing in it stops the best end from "
    "standing before the best start or in the question. The sum of two logits is, up to a "
    "constant, the log-probability of the pair, so the largest sum is the likeliest span. A table "
    "of T by T scores holds all of them.",
    point="The constraints of the task enter when the answer is read off, not in the head.",
    check=same_function(
        _best,
        _span_cases,
        [
            Mistake(
                "Start and end are chosen on their own: together they need not be a legal span.",
                lambda *x: _best(*x, mistake="independent"),
            ),
            Mistake(
                "The span may lie in the question here. The context is not respected.",
                lambda *x: _best(*x, mistake="anywhere"),
            ),
            Mistake(
                "The span may run backwards here: the last token must not stand before the first.",
                lambda *x: _best(*x, mistake="backward"),
            ),
            Mistake(
                "The best start is fixed first, then an end is sought. A worse start with a better "
                "end can win.",
                lambda *x: _best(*x, mistake="greedy"),
            ),
            Mistake(
                "The best end is fixed first, then a start is sought. The sum decides.",
                lambda *x: _best(*x, mistake="greedy end"),
            ),
            Mistake(
                "The limit on the length is one off: longest tokens reach from i to i + longest "
                "- 1, and here one more is allowed.",
                lambda *x: _best(*x, mistake="long"),
                hint=2,
            ),
            Mistake(
                "The limit on the length is not applied.",
                lambda *x: _best(*x, mistake="endless"),
            ),
            Mistake(
                "Only spans of one token are considered.",
                lambda *x: _best(*x, mistake="one"),
            ),
        ],
        names=("first", "last"),
    ),
)


# --- A score for a whole text ---------------------------------------------------------------------


def _toy_model(seed: int, V: int, T: int) -> Callable[[Tensor], Tensor]:
    """A bidirectional "model": each position's log-probabilities depend on every token it sees."""
    tokens, places = normal(V, V, seed=seed), normal(T, T, seed=seed + 1)
    own = normal(V, V, seed=seed + 2).mul(2)

    def log_probs(ids: Tensor) -> Tensor:
        mixed = places[: len(ids), : len(ids)] @ tokens[ids]  # (T, V)
        return (mixed + own[ids]).log_softmax(dim=-1)

    return log_probs


def _pll_cases() -> list[Case]:
    rows = []
    for seed, T, V in ((700, 5, 8), (710, 7, 6)):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, V, (T,), generator=g)
        rows.append(case(f"T={T}, V={V}", _toy_model(seed, V, T), ids, 0))
    return rows


def _pll(
    log_probs: Callable[[Tensor], Tensor], ids: Tensor, mask_id: int, *, mistake: str = ""
) -> float:
    total = 0.0
    for t in range(len(ids)):
        hidden = ids.clone()
        if mistake == "all":
            hidden[:] = mask_id
        elif mistake == "rest":
            hidden[t:] = mask_id
        elif mistake == "past":
            hidden[: t + 1] = mask_id
        elif mistake != "open":
            hidden[t] = mask_id
        row = log_probs(hidden)[t].double()
        total += row.max().item() if mistake == "best" else row[ids[t]].item()
        if mistake == "next" and t + 1 < len(ids):
            total += log_probs(hidden)[t + 1, ids[t + 1]].item() - row[ids[t]].item()
    if mistake == "mean":
        return total / len(ids)
    return -total if mistake == "sign" else total


PSEUDO_LOG_LIKELIHOOD = Exercise(
    name="pseudo_log_likelihood",
    title="How well does a text fit together?",
    level=3,
    minutes=12,
    task=r"""
A masked language model gives no probability of a whole text, but a score: hide **one** token at a
time, all others in view, and add up the log-probabilities of the hidden ones,
$\sum_t \log p(w_t \mid w_{\text{all but } t})$. `log_probs(ids)` returns log-probabilities
$(T, V)$ for a text with some tokens set to `mask_id`. Return the score as a number.
""",
    stub='''
def pseudo_log_likelihood(log_probs, ids: Int[Tensor, "T"], mask_id: int) -> float:
    """Sum of log p(token | all other tokens)."""
    raise NotImplementedError
''',
    hints=(
        "T tokens are T questions, and each needs its own input. Which entry of the (T, V) answer "
        "do you read?",
        "In a loop over t: copy the ids, set position t to mask_id, call the model, and read row t "
        "at the column of the original token. Then add.",
    ),
    solution='''
def pseudo_log_likelihood(log_probs, ids: Int[Tensor, "T"], mask_id: int) -> float:
    """Sum of log p(token | all other tokens)."""
    score = 0.0
    for t, token in enumerate(ids.tolist()):
        hidden = ids.clone()
        hidden[t] = mask_id
        score += log_probs(hidden)[t, token].item()
    return score
''',
    why="Each term sees the whole rest of the text, so the terms are no chain of conditional "
    "probabilities and exp of the score is no probability: over all texts it does not sum to one. "
    "As a score for comparing sentences it is useful. It costs T passes, where a causal model "
    "needs one for its exact log-probability.",
    point="A masked model scores a text by T questions; only a causal model gives it a "
    "probability.",
    check=same_function(
        _pll,
        _pll_cases,
        [
            Mistake(
                "Nothing is hidden: the model sees the token that it is asked for.",
                lambda *x: _pll(*x, mistake="open"),
            ),
            Mistake(
                "All tokens are hidden at once. Each term may see all others.",
                lambda *x: _pll(*x, mistake="all"),
            ),
            Mistake(
                "The tokens to the right are hidden as well. That is a left-to-right score.",
                lambda *x: _pll(*x, mistake="rest"),
            ),
            Mistake(
                "The tokens to the left are hidden as well. Each term may see both sides.",
                lambda *x: _pll(*x, mistake="past"),
            ),
            Mistake(
                "It is the mean. The score is the sum over the tokens.",
                lambda *x: _pll(*x, mistake="mean"),
            ),
            Mistake(
                "The sign is turned: log-probabilities are negative, and so is the score.",
                lambda *x: _pll(*x, mistake="sign"),
            ),
            Mistake(
                "The best token's probability is added, not that of the token in the text.",
                lambda *x: _pll(*x, mistake="best"),
                hint=2,
            ),
        ],
    ),
)


# --- The chapter ----------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        INPUT_PAIR,
        EMBED,
        COUNT_BERT,
        DIRECTIONS,
        WHY_MASK,
        MASK_TOKENS,
        MASK_SHARES,
        POSTERIOR_OF_SEEN,
        NSP_OPTIMUM,
        ENTITY_SPANS,
        BEST_SPAN,
        PSEUDO_LOG_LIKELIHOOD,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
