"""Exercises of the chapter "The Transformer".

What is compared with: torch's own layers and losses in float64, or loops that spell the definition
out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_anatomy.exercises._engine import (
    Case,
    Chapter,
    Exercise,
    Mistake,
    call,
    case,
    mixed,
    normal,
    require,
    same_function,
    same_value,
    unrepaired,
)

# --- Shared by several checks --------------------------------------------------------------------


def _integers(*shape: int, low: int, high: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu")


# --- Layer norm ----------------------------------------------------------------------------------


def _layer_norm_cases() -> list[Case]:
    rows = []
    for B, T, D, eps, scale, seed in (
        (2, 3, 5, 1e-5, 2.0, 0),
        (3, 2, 8, 0.5, 1.0, 10),
        (1, 4, 6, 1e-3, 0.01, 20),
    ):
        x = scale * (normal(B, T, D, seed=seed) + 1.5)
        gain, bias = 1 + 0.5 * normal(D, seed=seed + 1), normal(D, seed=seed + 2)
        rows.append(case(f"B={B}, T={T}, D={D}, eps={eps}", x, gain, bias, eps))
    return rows


def _normed(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dim: int | tuple[int, ...] = -1,
    unbiased: bool = False,
    outside: bool = False,
) -> Tensor:
    """Layer norm with any of three mistakes."""
    centred = x - x.mean(dim, keepdim=True)
    variance = x.var(dim, keepdim=True, correction=int(unbiased))
    spread = variance.sqrt() + eps if outside else (variance + eps).sqrt()
    return gain * centred / spread + bias


LAYER_NORM = Exercise(
    name="layer_norm",
    title="Layer norm by hand",
    level=1,
    minutes=7,
    task=r"""
Write layer norm without `layer_norm`, `nn.LayerNorm` or `std`. Each token is normalised on its own,
over its $D$ features:

$$\begin{aligned}
y &= g \cdot \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + b \\
\mu &= \frac{1}{D} \sum_i x_i \\
\sigma^2 &= \frac{1}{D} \sum_i (x_i - \mu)^2
\end{aligned}$$
""",
    stub='''
def layer_norm(
    x: Float[Tensor, "B T D"], gain: Float[Tensor, "D"], bias: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "B T D"]:
    """Each token with mean 0 and variance 1 over its features, then scaled and shifted."""
    raise NotImplementedError
''',
    hints=(
        "The mean and the variance belong to one token: over which axis are they taken, and what "
        "shape must they keep to be subtracted from x? Read off the formula by what the sum of "
        "squares is divided.",
        "Take the mean over the last axis with the axis kept, subtract it, and take the mean of "
        "the squares in the same way. Add eps to that before the root. Gain and bias come last.",
    ),
    solution='''
def layer_norm(
    x: Float[Tensor, "B T D"], gain: Float[Tensor, "D"], bias: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "B T D"]:
    """Each token with mean 0 and variance 1 over its features, then scaled and shifted."""
    centred = x - x.mean(dim=-1, keepdim=True)  # (B, T, D)
    variance = centred.square().mean(dim=-1, keepdim=True)  # (B, T, 1)
    return gain * centred / torch.sqrt(variance + eps) + bias
''',
    why="The statistics come from one token alone, so neither the batch nor the other positions "
    "change the result, and training and inference do the same. The variance is divided by D, "
    "while `var` and `std` of torch divide by D - 1 unless told otherwise. With eps inside the "
    "root, a token whose features are all equal gives 0/sqrt(eps) = 0.",
    point="Layer norm looks at one token at a time: no statistic crosses a position or a sequence.",
    check=same_function(
        lambda x, gain, bias, eps: F.layer_norm(
            x.double(), x.shape[-1:], gain.double(), bias.double(), eps
        ),
        _layer_norm_cases,
        [
            Mistake(
                "The variance is divided by D - 1, which is torch's default in `var`. Layer norm "
                "divides by D.",
                lambda *a: _normed(*a, unbiased=True),
            ),
            Mistake(
                "eps is added after the root. It belongs to the variance, inside the root.",
                lambda *a: _normed(*a, outside=True),
            ),
            Mistake(
                "The standard deviation is that of `x.std()`: divided by D - 1, and eps is added "
                "to it after the root. Two things differ from the formula.",
                lambda *a: _normed(*a, unbiased=True, outside=True),
            ),
            Mistake(
                "The statistics are taken over the positions. Each token is normalised over its "
                "own features, the last axis.",
                lambda *a: _normed(*a, dim=1),
            ),
            Mistake(
                "The statistics are taken over the batch, as in batch norm. Each token is "
                "normalised over its own features, the last axis.",
                lambda *a: _normed(*a, dim=0),
            ),
            Mistake(
                "Mean and variance are those of the whole sequence. Each token has its own.",
                lambda *a: _normed(*a, dim=(1, 2)),
            ),
            Mistake(
                "Mean and variance are those of the whole tensor. Each token has its own.",
                lambda *a: _normed(*a, dim=(0, 1, 2)),
            ),
            Mistake(
                "The gain is missing: the normalised features are multiplied by it.",
                lambda x, gain, bias, eps: _normed(x, torch.ones_like(gain), bias, eps),
            ),
            Mistake(
                "The bias is missing: it is added at the end.",
                lambda x, gain, bias, eps: _normed(x, gain, torch.zeros_like(bias), eps),
            ),
            Mistake(
                "Gain and bias are missing: the result is only normalised.",
                lambda x, gain, bias, eps: _normed(
                    x, torch.ones_like(gain), torch.zeros_like(bias), eps
                ),
            ),
            Mistake(
                "The bias is added before the gain multiplies, so it is scaled as well.",
                lambda x, gain, bias, eps: gain * _normed(x, torch.ones_like(gain), bias, eps),
                hint=2,
            ),
            Mistake(
                "The mean is not subtracted from the features, only used in the variance.",
                lambda x, gain, bias, eps: (
                    gain * x / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() + bias
                ),
            ),
            Mistake(
                "It is divided by the root mean square and no mean is subtracted: that is RMS "
                "norm.",
                lambda x, gain, bias, eps: (
                    gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() + bias
                ),
            ),
            Mistake(
                "The squares are summed, not averaged: the sum is divided by D.",
                lambda x, gain, bias, eps: (
                    gain
                    * (x - x.mean(-1, keepdim=True))
                    / (x.var(-1, keepdim=True, correction=0) * x.shape[-1] + eps).sqrt()
                    + bias
                ),
            ),
            Mistake(
                "It is divided by the variance. The root is missing.",
                lambda x, gain, bias, eps: (
                    gain
                    * (x - x.mean(-1, keepdim=True))
                    / (x.var(-1, keepdim=True, correction=0) + eps)
                    + bias
                ),
            ),
        ],
    ),
)


# --- Feed-forward --------------------------------------------------------------------------------


def _feed_forward_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, D={D}, F={width}",
            normal(B, T, D, seed=seed),
            normal(D, width, seed=seed + 1) / math.sqrt(D),
            normal(width, seed=seed + 2),
            normal(width, D, seed=seed + 3) / math.sqrt(width),
            normal(D, seed=seed + 4),
        )
        for B, T, D, width, seed in ((2, 3, 5, 11, 30), (3, 4, 6, 2, 40), (1, 7, 4, 9, 50))
    ]


FEED_FORWARD = Exercise(
    name="feed_forward",
    title="The feed-forward layer",
    level=1,
    minutes=4,
    task=r"""
Write the position-wise feed-forward layer of the Transformer. It widens each token from $D$ to $F$
features and narrows it back. The residual sum is not part of it.

$$\max(0,\, x W_1 + b_1)\, W_2 + b_2$$
""",
    stub='''
def feed_forward(
    x: Float[Tensor, "B T D"],
    w_1: Float[Tensor, "D F"],
    b_1: Float[Tensor, "F"],
    w_2: Float[Tensor, "F D"],
    b_2: Float[Tensor, "D"],
) -> Float[Tensor, "B T D"]:
    """Widen each token, cut off what is negative, and narrow it back."""
    raise NotImplementedError
''',
    hints=(
        "Count what the formula holds: two matrix products, two biases, one maximum. Where exactly "
        "does the maximum stand?",
        "Only the wide layer in the middle goes through the maximum with 0 (ReLU), after its bias "
        "was added. The result of the second product may be negative.",
    ),
    solution='''
def feed_forward(
    x: Float[Tensor, "B T D"],
    w_1: Float[Tensor, "D F"],
    b_1: Float[Tensor, "F"],
    w_2: Float[Tensor, "F D"],
    b_2: Float[Tensor, "D"],
) -> Float[Tensor, "B T D"]:
    """Widen each token, cut off what is negative, and narrow it back."""
    wide = F.relu(x @ w_1 + b_1)  # (B, T, F)
    return wide @ w_2 + b_2
''',
    why="Without the maximum, the two products would be one matrix of rank at most D, and the "
    "width F would buy nothing. A second maximum at the end would let the residual stream only "
    "grow. `@` works on the last axis, so every position goes through the same two matrices and "
    "none sees another.",
    point="Attention moves information between positions; the feed-forward layer works on each "
    "position alone.",
    check=same_function(
        lambda x, w_1, b_1, w_2, b_2: F.linear(
            F.linear(x.double(), w_1.double().T, b_1.double()).clamp(min=0),
            w_2.double().T,
            b_2.double(),
        ),
        _feed_forward_cases,
        [
            Mistake(
                "There is no maximum with 0: the two products are one linear map.",
                lambda x, w_1, b_1, w_2, b_2: (x @ w_1 + b_1) @ w_2 + b_2,
            ),
            Mistake(
                "The maximum stands after the second product. It belongs between the two.",
                lambda x, w_1, b_1, w_2, b_2: F.relu((x @ w_1 + b_1) @ w_2 + b_2),
            ),
            Mistake(
                "There is a second maximum at the end. What a layer adds to the residual stream "
                "may be negative.",
                lambda x, w_1, b_1, w_2, b_2: F.relu(F.relu(x @ w_1 + b_1) @ w_2 + b_2),
            ),
            Mistake(
                "The maximum is applied to the input. It belongs to the wide layer in the middle.",
                lambda x, w_1, b_1, w_2, b_2: (F.relu(x) @ w_1 + b_1) @ w_2 + b_2,
            ),
            Mistake(
                "The first bias is missing.",
                lambda x, w_1, b_1, w_2, b_2: F.relu(x @ w_1) @ w_2 + b_2,
            ),
            Mistake(
                "The second bias is missing.",
                lambda x, w_1, b_1, w_2, b_2: F.relu(x @ w_1 + b_1) @ w_2,
            ),
            Mistake(
                "Both biases are missing.",
                lambda x, w_1, b_1, w_2, b_2: F.relu(x @ w_1) @ w_2,
            ),
            Mistake(
                "The first bias is added after the maximum. It comes before, so that it decides "
                "where each feature is cut off.",
                lambda x, w_1, b_1, w_2, b_2: (F.relu(x @ w_1) + b_1) @ w_2 + b_2,
                hint=2,
            ),
            Mistake(
                "This is GELU, which BERT and GPT-2 use. The Transformer cuts off with a plain "
                "maximum.",
                lambda x, w_1, b_1, w_2, b_2: F.gelu(x @ w_1 + b_1) @ w_2 + b_2,
            ),
            Mistake(
                "The input is added to the result. The residual sum is made outside.",
                lambda x, w_1, b_1, w_2, b_2: x + F.relu(x @ w_1 + b_1) @ w_2 + b_2,
            ),
        ],
    ),
)


# --- Post-norm and pre-norm ----------------------------------------------------------------------


def _residual_cases() -> list[Case]:
    rows = []
    for B, T, D, seed in ((2, 3, 5, 60), (1, 4, 8, 70), (3, 2, 6, 80)):
        w, gain = normal(D, D, seed=seed + 1), 1 + 0.5 * normal(D, seed=seed + 2)
        x = 2 * normal(B, T, D, seed=seed) + 1
        rows.append(
            case(
                f"B={B}, T={T}, D={D}",
                x,
                lambda x, w=w: torch.tanh(x @ w.to(x.dtype)),
                lambda x, gain=gain: F.layer_norm(x, x.shape[-1:], gain.to(x.dtype)),
            )
        )
    return rows


RESIDUAL_BLOCKS = Exercise(
    name="residual_blocks",
    title="Post-norm and pre-norm",
    level=2,
    minutes=6,
    task=r"""
A sublayer $f$ (attention or feed-forward) and a norm $n$ can be wired into a residual stream in two
ways. The Transformer of 2017 normalises the **sum** (post-norm). Most later models normalise only
what **enters the sublayer** (pre-norm), so that the stream itself is never normalised. Return both.
""",
    stub='''
def residual_blocks(
    x: Float[Tensor, "B T D"],
    sublayer: nn.Module,
    norm: nn.Module,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """The stream after the sublayer: with post-norm, then with pre-norm."""
    raise NotImplementedError
''',
    hints=(
        "In both wirings x itself is one of the two terms of a sum. Draw the sum first, then ask "
        "where the norm stands: behind the sum, or on the way into the sublayer?",
        "Post-norm: the norm is the last thing that happens, and it sees the sum. Pre-norm: the "
        "norm is the first thing the branch does, and the sum is the last; x goes in unchanged.",
    ),
    solution='''
def residual_blocks(
    x: Float[Tensor, "B T D"],
    sublayer: nn.Module,
    norm: nn.Module,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """The stream after the sublayer: with post-norm, then with pre-norm."""
    post_norm = norm(x + sublayer(x))
    pre_norm = x + sublayer(norm(x))
    return post_norm, pre_norm
''',
    why="In the pre-norm block the derivative of the output by x is the identity plus that of the "
    "branch, so a gradient reaches the first layer through a path of sums. In the post-norm block "
    "the norm lies on that path and rescales the gradient in each layer. The price of pre-norm is "
    "a stream that grows with depth, so one more norm stands at the end of the stack.",
    point="Pre-norm leaves a path from the last layer to the first on which there is nothing but "
    "sums.",
    check=same_function(
        lambda x, f, n: (n(x.double() + f(x.double())), f(n(x.double())).add(x.double())),
        _residual_cases,
        [
            Mistake(
                "The two are right, and have changed places: post-norm comes first.",
                lambda x, f, n: (x + f(n(x)), n(x + f(x))),
            ),
            *mixed(
                {
                    "": lambda x, f, n: n(x + f(x)),
                    "Post-norm: the norm is applied to the sublayer's output, before the sum. It "
                    "should see the sum.": lambda x, f, n: x + n(f(x)),
                    "Post-norm: the skip is missing, x is not added.": lambda x, f, n: n(f(x)),
                    "Post-norm: the sum is not normalised.": lambda x, f, n: x + f(x),
                    "Post-norm: x is added after the norm as well.": (
                        lambda x, f, n: x + n(x + f(x))
                    ),
                    "Post-norm: the sublayer's input is normalised too. It reads x as it is.": (
                        lambda x, f, n: n(x + f(n(x)))
                    ),
                },
                {
                    "": lambda x, f, n: x + f(n(x)),
                    "Pre-norm: the residual path is normalised too. What is added to the branch is "
                    "x itself.": lambda x, f, n: n(x) + f(n(x)),
                    "Pre-norm: without the skip, x is lost; the branch is only added to it.": (
                        lambda x, f, n: f(n(x))
                    ),
                    "Pre-norm: the sublayer reads x without a norm.": lambda x, f, n: x + f(x),
                    "Pre-norm: the norm stands behind the sublayer instead of before it.": (
                        lambda x, f, n: x + n(f(x))
                    ),
                    "Pre-norm: the sum is normalised as well, so the stream is not free.": (
                        lambda x, f, n: n(x + f(n(x)))
                    ),
                },
            ),
        ],
        names=("post-norm", "pre-norm"),
    ),
)


# --- Teacher forcing -----------------------------------------------------------------------------


def _targets(B: int, T: int, pad_id: int, seed: int) -> Tensor:
    """Rows of tokens 5 and above that end in 2 and go on with padding; the first has none."""
    target = _integers(B, T, low=5, high=50, seed=seed)
    for b in range(B):
        target[b, T - 1 - b] = 2
        target[b, T - b :] = pad_id
    return target


def _forced(
    target: Tensor, start_id: int, pad_id: int, *, inputs: str = "", labels: str = ""
) -> tuple[Tensor, Tensor]:
    hidden = target.masked_fill(target == pad_id, -100)
    start = torch.full_like(target[:, :1], start_id)
    pad = torch.full_like(start, pad_id)
    first = {
        "": torch.cat((start, target[:, :-1]), 1),
        "left": torch.cat((target[:, 1:], pad), 1),
        "same": target.clone(),
        "roll": target.roll(1, 1),
        "pad": torch.cat((pad, target[:, :-1]), 1),
        "zero": torch.cat((torch.zeros_like(start), target[:, :-1]), 1),
        "hidden": torch.cat((start, hidden[:, :-1]), 1),
        "long": torch.cat((start, target), 1),
        "short": target[:, :-1],
    }[inputs]
    second = {
        "": hidden,
        "padding": target.clone(),
        "left": torch.cat((hidden[:, 1:], torch.full_like(start, -100)), 1),
        "short": hidden[:, 1:],
        "short padding": target[:, 1:],
        "inputs": first.clone(),
    }[labels]
    return first, second


def _forced_by_loops(target: Tensor, start_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    rows = target.tolist()
    inputs = [[start_id, *row[: len(row) - 1]] for row in rows]
    labels = [[-100 if token == pad_id else token for token in row] for row in rows]
    return torch.tensor(inputs), torch.tensor(labels)


TEACHER_FORCING = Exercise(
    name="teacher_forcing",
    title="What the decoder reads, and what it must say",
    level=1,
    minutes=6,
    task=r"""
In training, the decoder reads the true target one step late: at each position it must say the token
that it has not read yet. A batch of targets comes as token ids $(B, T)$; each row ends with an
end-of-sequence token and is filled up with `pad_id`. Return

* the decoder's **inputs** $(B, T)$: `start_id`, then the target without its last column;
* the **labels** $(B, T)$: the target, with $-100$ where it is padding, so that the loss skips it.
""",
    stub='''
def teacher_forcing(
    target: Int[Tensor, "B T"], start_id: int, pad_id: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The decoder's inputs, then the labels."""
    raise NotImplementedError
''',
    hints=(
        "Write one short row by hand: target A B end. What has the decoder read when it must say "
        "A? And when it must say B? Write inputs and labels below each other.",
        "Inputs are a column of start_id, joined along the positions with all columns but the "
        "last. Labels stay where they are; only their padding changes. Do not hide the padding "
        "before you make the inputs: an embedding has no row -100.",
    ),
    solution='''
def teacher_forcing(
    target: Int[Tensor, "B T"], start_id: int, pad_id: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The decoder's inputs, then the labels."""
    start = torch.full_like(target[:, :1], start_id)
    inputs = torch.cat((start, target[:, :-1]), dim=1)
    labels = target.masked_fill(target == pad_id, -100)
    return inputs, labels
''',
    why="Position t reads the tokens before t and is asked for token t, so the inputs lag by one "
    "and the labels do not move. The causal mask hides later inputs; without the shift the model "
    "would read the very token it is asked for and learn to copy. -100 is the label that torch's "
    "cross-entropy skips; in the inputs it would be no token at all.",
    point="One shift makes every position of the target a training example, all in one pass.",
    check=same_function(
        _forced_by_loops,
        lambda: [
            case("B=3, T=6, start_id=1, pad_id=0", _targets(3, 6, 0, 1), 1, 0),
            case("B=2, T=5, start_id=3, pad_id=3", _targets(2, 5, 3, 2), 3, 3),
            case("B=4, T=7, start_id=4, pad_id=1", _targets(4, 7, 1, 3), 4, 1),
        ],
        [
            Mistake(
                "The inputs are shifted to the left: each position reads the token after the one "
                "it must say.",
                lambda *a: _forced(*a, inputs="left"),
            ),
            Mistake(
                "The inputs are not shifted: each position reads the token it must say.",
                lambda *a: _forced(*a, inputs="same"),
            ),
            Mistake(
                "The last column has come round to the front (roll). The first column is start_id.",
                lambda *a: _forced(*a, inputs="roll"),
                hint=2,
            ),
            Mistake(
                "The inputs begin with the padding token, not with start_id.",
                lambda *a: _forced(*a, inputs="pad"),
            ),
            Mistake(
                "The inputs begin with 0 whatever start_id is.",
                lambda *a: _forced(*a, inputs="zero"),
            ),
            Mistake(
                "The inputs hold -100 where the target is padded. Only labels are hidden; an "
                "embedding has no such row.",
                lambda *a: _forced(*a, inputs="hidden"),
                hint=2,
            ),
            Mistake(
                "The padding is left in the labels, so the loss would count it. Put -100 there.",
                lambda *a: _forced(*a, labels="padding"),
            ),
            Mistake(
                "The labels are shifted as well, so start_id is asked for and the last token is "
                "not.",
                lambda *a: _forced(*a, labels="inputs"),
            ),
            Mistake(
                "The labels are moved to the left on top of the shift of the inputs: together "
                "they skip a token.",
                lambda *a: _forced(*a, labels="left"),
            ),
            Mistake(
                "The target is cut in two overlapping pieces, as for a decoder that has no start "
                "token: the first token is never asked for. Here the inputs gain a start_id.",
                lambda *a: _forced(*a, inputs="short", labels="short"),
            ),
            Mistake(
                "The target is cut in two overlapping pieces, as for a target that begins with a "
                "start token. This one does not: put start_id in front. The labels also need -100 "
                "at their padding.",
                lambda *a: _forced(*a, inputs="short", labels="short padding"),
            ),
            Mistake(
                "The last column of the inputs is not dropped: they are one longer than the "
                "labels.",
                lambda *a: _forced(*a, inputs="long"),
            ),
        ],
        names=("inputs", "labels"),
    ),
)


# --- The three masks -----------------------------------------------------------------------------


def _keep(lengths: list[int], n: int) -> Tensor:
    return torch.tensor([[i < length for i in range(n)] for length in lengths])


def _keys(keep: Tensor, T: int) -> Tensor:
    return keep[:, None, :].expand(-1, T, -1).clone()


def _rows(keep: Tensor) -> Tensor:
    return keep[:, :, None]


def _tril(T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril()


def _masks_by_loops(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    src, tgt = source.tolist(), target.tolist()
    B, S, T = len(src), len(src[0]), len(tgt[0])
    return (
        torch.tensor([[[src[b][j] for j in range(S)] for _ in range(S)] for b in range(B)]),
        torch.tensor(
            [[[j <= i and tgt[b][j] for j in range(T)] for i in range(T)] for b in range(B)]
        ),
        torch.tensor([[[src[b][j] for j in range(S)] for _ in range(T)] for b in range(B)]),
    )


DECODER_MASKS = Exercise(
    name="three_masks",
    title="Three attentions, three masks",
    level=2,
    minutes=8,
    task=r"""
The Transformer attends in three places: the encoder to itself, the decoder to itself, and the
decoder to the encoder's output. Given which tokens of source and target are real (`True`) and which
are padding, build the three masks (`True` = may look; one row for each query, one column for each
key):

* encoder, $(B, S, S)$; decoder to itself, $(B, T, T)$; cross-attention, $(B, T, S)$.

Padding is never looked **at**. A query that is padding itself keeps its row, like any other: hide
columns only.
""",
    stub='''
def three_masks(
    source_keep: Bool[Tensor, "B S"], target_keep: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "B S S"], Bool[Tensor, "B T T"], Bool[Tensor, "B T S"]]:
    """The masks of encoder, decoder and cross-attention."""
    raise NotImplementedError
''',
    hints=(
        "For each of the three ask: whose are the keys? Their padding is what must be hidden. "
        "Then: would a key give away a token that is still to be said?",
        "Only the decoder's own attention is causal, and it hides the target's padding too. The "
        "source is known in full from the start, so cross-attention hides nothing but the "
        "source's padding, the same for each of the T queries.",
    ),
    solution='''
def three_masks(
    source_keep: Bool[Tensor, "B S"], target_keep: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "B S S"], Bool[Tensor, "B T T"], Bool[Tensor, "B T S"]]:
    """The masks of encoder, decoder and cross-attention."""
    S, T = source_keep.shape[1], target_keep.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=target_keep.device).tril()
    encoder = source_keep[:, None, :].expand(-1, S, -1)
    decoder = causal & target_keep[:, None, :]
    cross = source_keep[:, None, :].expand(-1, T, -1)
    return encoder, decoder, cross
''',
    why="A mask hides keys, so its padding is that of whoever supplies the keys: the source in the "
    "encoder and in cross-attention, the target in the decoder. Only the target is still being "
    "written, so only there is the future hidden.",
    point="A mask follows its keys: the source's padding twice, the target's once, and the future "
    "only where it is still being written.",
    check=same_function(
        _masks_by_loops,
        lambda: [
            case("B=2, S=5, T=4", _keep([3, 5], 5), _keep([4, 2], 4)),
            case("B=3, S=2, T=6", _keep([2, 1, 2], 2), _keep([1, 5, 6], 6)),
            case("B=1, S=7, T=3", _keep([4], 7), _keep([2], 3)),
        ],
        mixed(
            {
                "": lambda s, t: _keys(s, s.shape[1]),
                "Encoder: it is causal, yet the source is known in full.": (
                    lambda s, t: _keys(s, s.shape[1]) & _tril(s.shape[1], s.shape[1])
                ),
                "Encoder: the padding of the source can be seen.": (
                    lambda s, t: torch.ones_like(_keys(s, s.shape[1]))
                ),
                "Encoder: the rows of the padding are hidden, not its columns.": (
                    lambda s, t: _keys(s, s.shape[1]).mT
                ),
                "Encoder: padding loses its rows too. Hide its columns only.": (
                    lambda s, t: _keys(s, s.shape[1]) & _rows(s)
                ),
            },
            {
                "": lambda s, t: _keys(t, t.shape[1]) & _tril(t.shape[1], t.shape[1]),
                "Decoder: it can see the future; its own attention is causal.": (
                    lambda s, t: _keys(t, t.shape[1])
                ),
                "Decoder: the padding of the target can be seen.": (
                    lambda s, t: _tril(t.shape[1], t.shape[1]) | torch.zeros_like(t)[..., None]
                ),
                "Decoder: it sees the future instead of the past, the triangle is turned over.": (
                    lambda s, t: _keys(t, t.shape[1]) & _tril(t.shape[1], t.shape[1]).T
                ),
                "Decoder: a position cannot see itself. The diagonal belongs to the past.": (
                    lambda s, t: _keys(t, t.shape[1]) & _tril(t.shape[1], t.shape[1]).tril(-1)
                ),
                "Decoder: padding loses its rows. Hide its columns only.": (
                    lambda s, t: _tril(t.shape[1], t.shape[1]) & _rows(t)
                ),
            },
            {
                "": lambda s, t: _keys(s, t.shape[1]),
                "Cross-attention: it is causal, yet every target position may read the whole "
                "source.": lambda s, t: _keys(s, t.shape[1]) & _tril(t.shape[1], s.shape[1]),
                "Cross-attention: the padding of the source can be seen.": (
                    lambda s, t: torch.ones_like(_keys(s, t.shape[1]))
                ),
                "Cross-attention: the padding is that of the target. The keys come from the "
                "source.": lambda s, t: t[..., None].expand(-1, -1, s.shape[1]).clone(),
                "Cross-attention: the target's padding loses its rows. Hide the source's columns "
                "only.": lambda s, t: _keys(s, t.shape[1]) & _rows(t),
                "Cross-attention: its axes have changed places; queries are the rows.": (
                    lambda s, t: _keys(s, t.shape[1]).mT
                ),
            },
        ),
        names=("encoder", "decoder", "cross-attention"),
    ),
)


# --- Embedding and output ------------------------------------------------------------------------


def _tied_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, D={D}, V={V}",
            _integers(B, T, low=0, high=V, seed=seed),
            normal(B, T, D, seed=seed + 1),
            normal(V, D, seed=seed + 2) / math.sqrt(D),
        )
        for B, T, D, V, seed in ((2, 3, 8, 11, 90), (3, 4, 5, 7, 100), (1, 6, 12, 9, 110))
    ]


TIED_EMBEDDING = Exercise(
    name="tied_embedding",
    title="One table at both ends",
    level=1,
    minutes=5,
    task=r"""
The Transformer uses one table $W$ of shape $(V, D)$ at both ends. On the way in, a token's row is
multiplied by $\sqrt{D}$. On the way out, a hidden vector is compared with every row, which gives
$V$ logits. Return both: the embedded tokens, and the logits of the hidden vectors.
""",
    stub='''
def tied_embedding(
    tokens: Int[Tensor, "B T"], hidden: Float[Tensor, "B T D"], table: Float[Tensor, "V D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T V"]]:
    """The embedded tokens, then the logits of the hidden vectors."""
    raise NotImplementedError
''',
    hints=(
        "On the way in, a row is picked; on the way out, all rows are compared. At which of the "
        "two ends does the task mention a factor?",
        "Index the table with the tokens and multiply by the square root of its width. The logits "
        "are a matrix product that sums over D: turn the table over. There is no factor in it.",
    ),
    solution='''
def tied_embedding(
    tokens: Int[Tensor, "B T"], hidden: Float[Tensor, "B T D"], table: Float[Tensor, "V D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T V"]]:
    """The embedded tokens, then the logits of the hidden vectors."""
    embedded = table[tokens] * math.sqrt(table.shape[-1])
    logits = hidden @ table.T
    return embedded, logits
''',
    why="Rows whose entries have a standard deviation of 1/sqrt(D) give logits of spread about 1 "
    "for hidden vectors of unit variance. The same rows would be small beside the sines and "
    "cosines of the positions, so on the way in they are multiplied by sqrt(D), which brings "
    "their entries to a spread of 1.",
    point="One table serves both ends because the factor sqrt(D) stands at one of them only.",
    check=same_function(
        lambda tokens, hidden, table: (
            F.embedding(tokens, table.double()) * table.shape[1] ** 0.5,
            torch.einsum("btd,vd->btv", hidden.double(), table.double()),
        ),
        _tied_cases,
        mixed(
            {
                "": lambda i, h, w: w[i] * math.sqrt(w.shape[1]),
                "The embedding is not scaled by sqrt(D).": lambda i, h, w: w[i],
                "The embedding is divided by sqrt(D) instead of multiplied.": (
                    lambda i, h, w: w[i] / math.sqrt(w.shape[1])
                ),
                "The embedding is multiplied by D instead of its square root.": (
                    lambda i, h, w: w[i] * w.shape[1]
                ),
                "The embedding is multiplied by the square root of V, the number of tokens, not "
                "of the width.": lambda i, h, w: w[i] * math.sqrt(w.shape[0]),
            },
            {
                "": lambda i, h, w: h @ w.T,
                "The logits are scaled as well: the factor belongs to the way in.": (
                    lambda i, h, w: h @ w.T * math.sqrt(w.shape[1])
                ),
                "The logits are divided by sqrt(D), as scores of attention are. These are not.": (
                    lambda i, h, w: h @ w.T / math.sqrt(w.shape[1])
                ),
                "The logits went through a softmax: they should be the bare products.": (
                    lambda i, h, w: (h @ w.T).softmax(-1)
                ),
                "The logits went through a log-softmax: they should be the bare products.": (
                    lambda i, h, w: (h @ w.T).log_softmax(-1)
                ),
            },
        ),
        names=("embedded", "logits"),
    ),
)


# --- Counting ------------------------------------------------------------------------------------


def _base_by_building() -> tuple[int, int, int, int]:
    def count(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    encoder = count(nn.TransformerEncoderLayer(512, 8, 2048, device="meta"))
    decoder = count(nn.TransformerDecoderLayer(512, 8, 2048, device="meta"))
    table = 37_000 * 512
    return encoder, decoder, table, 6 * (encoder + decoder) + table


_ATTENTION = 4 * (512 * 512 + 512)
_FFN = 2 * 512 * 2048 + 2048 + 512
_NORM = 2 * 512
_ENCODER = _ATTENTION + _FFN + 2 * _NORM
_DECODER = 2 * _ATTENTION + _FFN + 3 * _NORM
_TABLE = 37_000 * 512


BASE_PARAMETERS = Exercise(
    name="base_parameters",
    title="How large is the base model?",
    level=2,
    minutes=10,
    task=r"""
Count the parameters of the Transformer's base model: $D = 512$, $F = 2048$, 8 heads, 6 layers in
the encoder and 6 in the decoder, and one table of 37 000 tokens shared by encoder, decoder and
output. Every projection has a bias (the output has none), every norm has a gain and a bias, the
norms follow each residual sum, and the positions are sinusoids.

Give four exact numbers: one encoder layer, one decoder layer, the table, the whole model. Table 3
of Vaswani et al. (2017) prints 65 million for it, and their text says *about* 37 000 tokens.
""",
    stub="""
base_parameters = (
    ...,  # one encoder layer
    ...,  # one decoder layer
    ...,  # the shared table
    ...,  # the whole model
)
""",
    hints=(
        "Count a layer by its parts: attention, feed-forward, norms. How many of each does an "
        "encoder layer have, and what does a decoder layer have more?",
        "Attention: four matrices D by D and four biases. Feed-forward: two matrices D by F, a "
        "bias of F and one of D. A norm: 2 D. An encoder layer has 1, 1 and 2 of them; a decoder "
        "layer has 2, 1 and 3. Sinusoids have no parameters.",
    ),
    solution="""
D, d_ff, V = 512, 2048, 37_000
attention = 4 * (D * D + D)
ffn = D * d_ff + d_ff + d_ff * D + D
norm = 2 * D
encoder_layer = attention + ffn + 2 * norm
decoder_layer = 2 * attention + ffn + 3 * norm
base_parameters = (
    encoder_layer,
    decoder_layer,
    V * D,
    6 * encoder_layer + 6 * decoder_layer + V * D,
)
""",
    why="The layers hold 44.1 million and the table 18.9 million, 63.1 million in all. The number "
    "of heads does not enter. The 65 million of the paper would need a table of about 40 700 rows "
    "by this count, and its text gives the vocabulary only as about 37 000. Three separate tables "
    "would have cost 38 million more.",
    point="A decoder layer is an encoder layer with one more attention and one more norm, and the "
    "shared table is three tenths of the model.",
    check=same_value(
        _base_by_building,
        [
            Mistake(
                "One encoder layer: the biases of the projections are missing.",
                when=lambda got, _: got[0] == _ENCODER - 4 * 512 - 2048 - 512,
            ),
            Mistake(
                "One encoder layer: the norms are missing, two of them with gain and bias.",
                when=lambda got, _: got[0] == _ENCODER - 2 * _NORM,
            ),
            Mistake(
                "One encoder layer: both the biases and the norms are missing.",
                when=lambda got, _: got[0] == 4 * 512**2 + 2 * 512 * 2048,
            ),
            Mistake(
                "One encoder layer: it has two norms, one for each residual sum; one is counted.",
                when=lambda got, _: got[0] == _ENCODER - _NORM,
            ),
            Mistake(
                "One encoder layer: a norm has a gain and a bias, 2 D; only one of them is "
                "counted.",
                when=lambda got, _: got[0] == _ENCODER - 2 * 512,
                hint=2,
            ),
            Mistake(
                "One encoder layer: the output projection of attention is missing.",
                when=lambda got, _: got[0] == _ENCODER - 512 * 512 - 512,
                hint=2,
            ),
            Mistake(
                "One encoder layer: attention is counted once for each head. The heads share out "
                "the width.",
                when=lambda got, _: got[0] == _ENCODER + 7 * _ATTENTION,
            ),
            Mistake(
                "One decoder layer: the second attention is missing, with its norm. A decoder "
                "layer reads the encoder's output as well.",
                when=lambda got, _: got[0] == _ENCODER and got[1] == _ENCODER,
            ),
            Mistake(
                "One decoder layer: it has three norms; two are counted.",
                when=lambda got, _: got[0] == _ENCODER and got[1] == _DECODER - _NORM,
                hint=2,
            ),
            Mistake(
                "The table is counted three times. It is shared by encoder, decoder and output.",
                when=lambda got, want: got[2] == 3 * _TABLE or got[3] == want[3] + 2 * _TABLE,
            ),
            Mistake(
                "The whole model counts the table twice. It is shared at both ends.",
                when=lambda got, want: got[3] == want[3] + _TABLE,
            ),
            Mistake(
                "The whole model is without the table.",
                when=lambda got, want: got[3] == want[3] - _TABLE,
            ),
            Mistake(
                "That is the paper's rounded number. The parts you counted add up to another.",
                when=lambda got, _: got[3] == 65_000_000,
            ),
            Mistake(
                "The whole model has six layers on each side; three of each are counted.",
                when=lambda got, want: got[3] == 3 * (_ENCODER + _DECODER) + _TABLE,
            ),
        ],
        names=("encoder layer", "decoder layer", "table", "model"),
        rtol=0.0,
        atol=0.0,
    ),
)


# --- Label smoothing -----------------------------------------------------------------------------


def _smooth_cases() -> list[Case]:
    rows = []
    for B, T, V, eps, seed in ((2, 5, 7, 0.1, 120), (3, 4, 5, 0.3, 130), (1, 6, 11, 0.2, 140)):
        labels = _integers(B, T, low=0, high=V, seed=seed)
        for b in range(B):
            labels[b, T - 1 - b :] = -100
        logits = 2 * normal(B, T, V, seed=seed + 1)
        rows.append(case(f"B={B}, T={T}, V={V}, smoothing={eps}", logits, labels, eps))
    return rows


def _smoothed(
    logits: Tensor,
    labels: Tensor,
    eps: float,
    *,
    others: bool = False,
    keep: float | None = None,
    mean: str = "tokens",
    padding: bool = False,
    total: bool = False,
    dim: int = -1,
) -> Tensor:
    """The smoothed loss with any of several mistakes."""
    log_p = logits.log_softmax(dim)
    V = logits.shape[-1]
    hit = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    spread = log_p.sum(-1)
    if others:  # eps shared among the V - 1 other tokens
        loss = -((1 - eps) * hit + eps / (V - 1) * (spread - hit))
    else:
        share = eps if total else eps / V
        loss = -((1 - eps if keep is None else keep) * hit + share * spread)
    real = torch.ones_like(labels, dtype=torch.bool) if padding else labels != -100
    loss = loss * real
    if mean == "tokens":
        return loss.sum() / real.sum()
    if mean == "sequences":
        return (loss.sum(1) / real.sum(1)).mean()
    return loss.sum() if mean == "sum" else loss.mean()


SMOOTHED_LOSS = Exercise(
    name="smoothed_loss",
    title="Label smoothing by hand",
    level=2,
    minutes=10,
    task=r"""
Label smoothing asks for the true token with probability $1 - \varepsilon$ and spreads $\varepsilon$
evenly over **all** $V$ tokens, the true one included. The loss of a position is the cross-entropy
of the model's distribution against this target, in nats. Return the mean over all positions whose
label is not $-100$. Do it without `cross_entropy`; `log_softmax` is allowed.
""",
    stub='''
def smoothed_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], smoothing: float
) -> Float[Tensor, ""]:
    """The mean loss of the positions that have a label."""
    raise NotImplementedError
''',
    hints=(
        "Write the target distribution of one position: what stands at the true token, what at "
        "the others? The loss is minus its dot product with the logarithms of the model's "
        "probabilities. Which positions are averaged?",
        "It is a mixture: (1 - smoothing) times the usual loss, plus smoothing times the mean of "
        "-log p over the V tokens. Pick out the positions with a label first (-100 is no index), "
        "then average over them and nothing else.",
    ),
    solution='''
def smoothed_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], smoothing: float
) -> Float[Tensor, ""]:
    """The mean loss of the positions that have a label."""
    real = labels != -100
    log_p = logits[real].log_softmax(dim=-1)  # (N, V)
    hit = log_p.gather(-1, labels[real][:, None])[:, 0]  # (N,)
    return -((1 - smoothing) * hit + smoothing * log_p.mean(dim=-1)).mean()
''',
    why="The target is (1 - eps) of a one-hot vector plus eps of the uniform distribution, and the "
    "cross-entropy is linear in the target, so the loss is the same mixture of two losses. The "
    "true token ends with 1 - eps + eps/V. Selecting the real positions first keeps -100 away "
    "from `gather` and makes the mean that of the tokens.",
    point="A smoothed loss cannot reach 0: its minimum is the entropy of the smoothed target, and "
    "infinite confidence makes it worse.",
    check=same_function(
        lambda logits, labels, eps: F.cross_entropy(
            logits.double().flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            label_smoothing=eps,
        ),
        _smooth_cases,
        [
            Mistake(
                "The smoothing is shared among the V - 1 other tokens. Here all V get their part, "
                "the true one too.",
                lambda *a: _smoothed(*a, others=True),
            ),
            Mistake(
                "There is no smoothing: this is the ordinary cross-entropy.",
                lambda z, y, eps: _smoothed(z, y, 0.0),
            ),
            Mistake(
                "The true token keeps its whole weight of 1, and the smoothing is added to it: the "
                "target sums to more than 1.",
                lambda *a: _smoothed(*a, keep=1.0),
            ),
            Mistake(
                "Each of the V tokens gets the whole smoothing instead of a V-th of it.",
                lambda *a: _smoothed(*a, total=True),
                hint=2,
            ),
            Mistake(
                "The two weights have changed places: the true token gets 1 - smoothing.",
                lambda z, y, eps: _smoothed(z, y, 1 - eps),
            ),
            Mistake(
                "The sum is divided by all B · T positions, those without a label too.",
                lambda *a: _smoothed(*a, mean="all"),
            ),
            Mistake(
                "Positions without a label are counted, as if their label were token 0.",
                lambda *a: _smoothed(*a, padding=True),
            ),
            Mistake(
                "Each sequence is averaged first, then the sequences: tokens of short ones weigh "
                "more. Average over all tokens at once.",
                lambda *a: _smoothed(*a, mean="sequences"),
            ),
            Mistake(
                "It is the sum over the positions. The mean is asked for.",
                lambda *a: _smoothed(*a, mean="sum"),
            ),
            Mistake(
                "The softmax runs over the positions. It runs over the V tokens, the last axis.",
                lambda *a: _smoothed(*a, dim=1),
            ),
            Mistake(
                "The logarithm is that to base 2, which gives bits. A loss in nats takes the "
                "natural one.",
                lambda *a: _smoothed(*a) / math.log(2),
            ),
            Mistake(
                "The sign is turned over: a loss is minus the logarithm.",
                lambda *a: -_smoothed(*a),
            ),
            Mistake(
                "The smoothed part is missing, while the true token is already weighed by "
                "1 - smoothing.",
                lambda z, y, eps: (1 - eps) * _smoothed(z, y, 0.0),
                hint=2,
            ),
        ],
    ),
)


# --- Schedule ------------------------------------------------------------------------------------


def _rate_by_branches(step: int, d_model: int, warmup: int) -> float:
    peak = 1 / math.sqrt(d_model * warmup)
    return peak * step / warmup if step <= warmup else peak * math.sqrt(warmup / step)


def _rate(step: int, d_model: int, warmup: int) -> float:
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


PAPER_SCHEDULE = Exercise(
    name="paper_schedule",
    title="Warm up, then slow down",
    level=1,
    minutes=5,
    task=r"""
Write the learning rate of the Transformer. It rises in a straight line for $w$ (`warmup`) steps and
then falls with the inverse square root of the step $t$, which counts from 1:

$$\eta = D^{-1/2} \min(t^{-1/2},\, t\, w^{-3/2})$$
""",
    stub='''
def paper_schedule(step: int, d_model: int, warmup: int) -> float:
    """The learning rate of a step."""
    raise NotImplementedError
''',
    hints=(
        "Of the two terms, one rises with the step and one falls. At which step are they equal, "
        "and which of them is smaller before it?",
        "Three factors of powers: the width to -1/2, the step to -1/2, the warm-up to -3/2. The "
        "smaller of the two terms counts. With step = warmup, both are 1/sqrt(warmup).",
    ),
    solution='''
def paper_schedule(step: int, d_model: int, warmup: int) -> float:
    """The learning rate of a step."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
''',
    why="The two terms meet at step = warmup, since w · w^(-3/2) = w^(-1/2). Before it the line is "
    "the smaller one, after it the root. The peak is 1/sqrt(D · warmup): for the base model, with "
    "a width of 512 and 4000 steps, 0.0007. Wider models get smaller steps.",
    point="The two branches meet at the end of the warm-up, where the rate has its peak of "
    "1/sqrt(D · warmup).",
    check=same_function(
        _rate_by_branches,
        [
            case("step=1, d_model=512, warmup=4000", 1, 512, 4000),
            case("step=100, d_model=512, warmup=4000", 100, 512, 4000),
            case("step=7, d_model=64, warmup=7", 7, 64, 7),
            case("step=50, d_model=256, warmup=8", 50, 256, 8),
            case("step=100000, d_model=1024, warmup=4000", 100_000, 1024, 4000),
        ],
        [
            Mistake(
                "It takes the larger of the two terms: the rate is huge at first and grows without "
                "end. The smaller one counts.",
                lambda t, D, w: D**-0.5 * max(t**-0.5, t * w**-1.5),
            ),
            Mistake(
                "The factor of the width, 1/sqrt(D), is missing.",
                lambda t, D, w: min(t**-0.5, t * w**-1.5),
            ),
            Mistake(
                "It is multiplied by sqrt(D) instead of divided: wider models get smaller steps.",
                lambda t, D, w: D * _rate(t, D, w),
            ),
            Mistake(
                "It is divided by D, not by its square root.",
                lambda t, D, w: D**-0.5 * _rate(t, D, w),
            ),
            Mistake(
                "The steps are counted from 0: the formula is used with step + 1.",
                lambda t, D, w: _rate(t + 1, D, w),
            ),
            Mistake(
                "There is no warm-up: the rate falls from the first step on.",
                lambda t, D, w: D**-0.5 * t**-0.5,
            ),
            Mistake(
                "There is only the warm-up: the rate rises for ever.",
                lambda t, D, w: D**-0.5 * t * w**-1.5,
            ),
            Mistake(
                "The warm-up has the power -1/2. It takes -3/2 for the two branches to meet at "
                "step = warmup.",
                lambda t, D, w: D**-0.5 * min(t**-0.5, t * w**-0.5),
                hint=2,
            ),
            Mistake(
                "The line rises as step · warmup^(-1/2). It takes the power -3/2 for it to end "
                "where the root begins.",
                lambda t, D, w: D**-0.5 * (t * w**-0.5 if t <= w else t**-0.5),
                hint=2,
            ),
            Mistake(
                "The warm-up takes 4000 steps whatever warmup is.",
                lambda t, D, w: _rate(t, D, 4000),
            ),
            Mistake(
                "The line is step / warmup. With that, the branches do not meet at step = warmup.",
                lambda t, D, w: D**-0.5 * min(t**-0.5, t / w),
                hint=2,
            ),
        ],
        rtol=1e-4,
        atol=1e-10,
    ),
)


# --- Greedy decoding -----------------------------------------------------------------------------

_START, _EOS, _PAD, _WORDS = 1, 2, 0, 9  # words are the tokens from 3 to 8


def _toy_encode(source: Tensor) -> Tensor:
    return F.one_hot(source, _WORDS).float()


def _toy_decode(target: Tensor, memory: Tensor) -> Tensor:
    """Logits that depend on the source and on the token before; `end` is the source's first."""
    source = memory.argmax(-1)
    T, S = target.shape[1], source.shape[1]
    t = torch.arange(T)
    word = 3 + (target + source[:, t % S] + t) % (_WORDS - 3)
    following = torch.where(t == source[:, :1], _EOS, word)
    return 4 * F.one_hot(following, _WORDS).float() - 0.1 * torch.arange(_WORDS)


def _greedy_cases() -> list[Case]:
    ends = (
        ("rows that end at steps 3, 5 and 2, n_max=9", [2, 4, 1], 4, 9),
        ("rows that end at steps 4 and 1, n_max=4", [3, 0], 3, 4),
        ("a row that would end after n_max=5", [6, 2], 5, 5),
        ("one row that ends at step 6, n_max=8", [5], 2, 8),
    )
    rows = []
    for i, (label, first, S, n_max) in enumerate(ends):
        source = _integers(len(first), S, low=3, high=_WORDS, seed=150 + i)
        source[:, 0] = torch.tensor(first)
        args = (_toy_encode, _toy_decode, source, _START, _EOS, _PAD, n_max)
        rows.append(case(label, *args))
    return rows


def _greedy_by_rows(
    encode: Any, decode: Any, source: Tensor, start: int, eos: int, pad: int, n_max: int
) -> Tensor:
    rows = []
    for one in source:
        said = [start]
        memory = encode(one[None])
        while len(said) <= n_max and (len(said) == 1 or said[-1] != eos):
            said.append(int(decode(torch.tensor([said]), memory)[0, -1].argmax()))
        rows.append(said[1:])
    n = max(map(len, rows))
    return torch.tensor([row + [pad] * (n - len(row)) for row in rows])


def _greedy(*bugs: str) -> Callable[..., Tensor]:
    """Greedy decoding with any of several mistakes."""

    def decode_all(
        encode: Any, decode: Any, source: Tensor, start: int, eos: int, pad: int, n_max: int
    ) -> Tensor:
        memory = encode(source)
        said = torch.full((len(source), 1), start)
        done = torch.zeros(len(source), dtype=torch.bool)
        n_steps = 50 if "no limit" in bugs else n_max
        for _ in range(n_steps + ("one more" in bugs) - ("one less" in bugs)):
            logits = decode(said[:, -1:] if "last token" in bugs else said, memory)
            token = logits[:, 0 if "first" in bugs else -1].argmax(-1)
            if "go on" not in bugs:
                token = torch.where(done, eos if "eos" in bugs else pad, token)
            said = torch.cat((said, token[:, None]), 1)
            done = token == eos if "at once" in bugs else done | (token == eos)
            if "never" not in bugs and (done.any() if "any" in bugs else done.all()):
                break
        said = said if "start" in bugs else said[:, 1:]
        return said.masked_fill(said == eos, pad) if "drop" in bugs else said

    return decode_all


_GREEDY = same_function(
    _greedy_by_rows,
    _greedy_cases,
    [
        Mistake(
            "It stops when the first row has ended. The others still have something to say.",
            _greedy("any"),
        ),
        Mistake(
            "It always takes n_max steps. Stop when every row has ended.",
            _greedy("never"),
        ),
        Mistake(
            "Rows that have ended go on writing words. After its end a row holds pad_id.",
            _greedy("go on"),
        ),
        Mistake(
            "Rows that have ended go on writing words, and it always takes n_max steps.",
            _greedy("go on", "never"),
        ),
        Mistake(
            "It stops only if all rows say eos_id in the same step, and rows that have ended go on "
            "writing. Keep in mind which rows have ended.",
            _greedy("go on", "at once"),
        ),
        Mistake(
            "Rows that have ended go on writing words, and n_max is no limit.",
            _greedy("go on", "no limit"),
        ),
        Mistake("It goes on beyond n_max steps.", _greedy("no limit")),
        Mistake(
            "Rows that have ended are filled with eos_id. After the first one, pad_id follows.",
            _greedy("eos"),
        ),
        Mistake(
            "The start token is returned as well. Return what was generated.",
            _greedy("start"),
        ),
        Mistake(
            "The next token is read off the first position. The logits of the last position "
            "belong to it.",
            _greedy("first"),
            hint=2,
        ),
        Mistake(
            "The decoder gets only the newest token. It has no cache here: give it all that was "
            "said so far.",
            _greedy("last token"),
            hint=2,
        ),
        Mistake("It may take one step more than n_max.", _greedy("one more")),
        Mistake("It stops one step before n_max.", _greedy("one less")),
        Mistake(
            "The end token is missing in what is returned. It is generated too, and stays.",
            _greedy("drop"),
        ),
    ],
)


def _check_greedy(answer: Any) -> None:
    _GREEDY(answer)
    calls = 0

    def counted(source: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return _toy_encode(source)

    row = _greedy_cases()[0]
    call(answer, counted, *row.args[1:])
    require(
        calls == 1,
        f"For {row.label}: the tokens are right, and the encoder ran {calls} times.",
        "The encoder is called again in each step or for each row. The source does not change: "
        "encode the batch once, before the loop.",
        2,
    )


GREEDY_DECODE = Exercise(
    name="greedy_decode",
    title="Translate a batch greedily",
    level=3,
    minutes=15,
    task=r"""
Write greedy decoding for an encoder-decoder. `encode(source)` gives the memory $(B, S, D)$;
`decode(target, memory)` gives logits $(B, T, V)$ for the token after each position of the target so
far, which begins with `start_id`. In each step, every row takes its most probable token.

Rows end at different steps. Once a row has said `eos_id`, it gets `pad_id` from then on. Stop when
every row has ended, and after `n_max` steps at the latest. Return what was **generated**: the end
token belongs to it, the start token does not. Run the encoder once.
""",
    stub='''
def greedy_decode(
    encode: nn.Module,
    decode: nn.Module,
    source: Int[Tensor, "B S"],
    start_id: int,
    eos_id: int,
    pad_id: int,
    n_max: int,
) -> Int[Tensor, "B T"]:
    """The generated tokens of each row, filled up with pad_id after its end."""
    raise NotImplementedError
''',
    hints=(
        "Keep two things from step to step: what each row has said, and which rows have ended. "
        "What has to happen before the loop, and which position's logits hold the next token?",
        "In each step: logits of the last position, argmax, pad_id for rows that had already "
        "ended, join, then mark the rows that have just said eos_id. Leave the loop when all are "
        "marked. A row's end token must not be overwritten, so mark after joining.",
    ),
    solution='''
def greedy_decode(
    encode: nn.Module,
    decode: nn.Module,
    source: Int[Tensor, "B S"],
    start_id: int,
    eos_id: int,
    pad_id: int,
    n_max: int,
) -> Int[Tensor, "B T"]:
    """The generated tokens of each row, filled up with pad_id after its end."""
    memory = encode(source)
    target = torch.full_like(source[:, :1], start_id)
    ended = torch.zeros_like(target, dtype=torch.bool)
    for _ in range(n_max):
        token = decode(target, memory)[:, -1:].argmax(dim=-1)  # (B, 1)
        token = token.masked_fill(ended, pad_id)
        target = torch.cat((target, token), dim=1)
        ended = ended | (token == eos_id)
        if ended.all():
            break
    return target[:, 1:]
''',
    why="The rows of a batch share each call of the decoder, so a row that has ended is carried "
    "along and its tokens are replaced. The memory depends on the source only, so it is computed "
    "once. Each step here runs the decoder over all positions again; a cache of keys and values "
    "saves that work and changes no token.",
    point="One encoder pass, then a decoder pass for each token: writing is the slow half.",
    check=_check_greedy,
)


# --- Find the mistakes ---------------------------------------------------------------------------


class _Part:
    """A part of torch's own decoder layer, called the way the exercise calls it."""

    def __init__(self, layer: nn.TransformerDecoderLayer, run: Callable[..., Tensor]) -> None:
        self.layer = layer
        self.run = run

    def __call__(self, *args: Any) -> Tensor:
        return self.run(*args)


def _attention_of(layer: nn.MultiheadAttention) -> Callable[..., Tensor]:
    def run(x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        H = layer.num_heads
        full = mask.expand(x.shape[0], x.shape[1], context.shape[1])
        hidden = ~full.repeat_interleave(H, 0)
        return layer(x, context, context, attn_mask=hidden, need_weights=False)[0]

    return run


def _decoder_cases() -> list[Case]:
    rows = []
    for B, T, S, D, H, seed in ((2, 4, 5, 12, 3, 160), (3, 5, 3, 8, 2, 170), (1, 3, 6, 10, 5, 180)):
        layer = nn.TransformerDecoderLayer(D, H, 3 * D, 0.0, batch_first=True, device="cpu")
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(0.5 * normal(*p.shape, seed=seed + 10 * i) + (p.ndim == 1))
        parts = (
            _attention_of(layer.self_attn),
            _attention_of(layer.multihead_attn),
            lambda x, layer=layer: layer.linear2(F.relu(layer.linear1(x))),
            layer.norm1,
            layer.norm2,
            layer.norm3,
        )
        keep = _keep([S - b for b in range(B)], S)
        x, memory = normal(B, T, D, seed=seed + 1), normal(B, S, D, seed=seed + 2)
        label = f"B={B}, T={T}, S={S}, D={D}, H={H}"
        rows.append(case(label, x, memory, keep, *(_Part(layer, part) for part in parts)))
    return rows


def _decoder_oracle(x: Tensor, memory: Tensor, keep: Tensor, part: _Part, *_: Any) -> Tensor:
    T = x.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return part.layer(x, memory, tgt_mask=future, memory_key_padding_mask=~keep)


def _wired(*bugs: str) -> Callable[..., Tensor]:
    """A decoder layer with any of the four mistakes of the exercise."""

    def layer(
        x: Tensor,
        memory: Tensor,
        keep: Tensor,
        attend: Any,
        cross: Any,
        ffn: Any,
        norm_1: Any,
        norm_2: Any,
        norm_3: Any,
    ) -> Tensor:
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool)
        causal = causal if "future" in bugs else causal.tril()
        x = norm_1(x + attend(x, x, causal))
        keys = torch.ones_like(keep) if "blind" in bugs else keep
        seen = cross(x, x, causal) if "side" in bugs else cross(x, memory, keys[:, None, :])
        x = norm_2(seen if "skip" in bugs else x + seen)
        return (norm_2 if "norm" in bugs else norm_3)(x + ffn(x))

    return layer


_WIRING = {
    "future": "the decoder's own attention sees the future",
    "side": "cross-attention takes its keys and values from the decoder, not from the memory",
    "skip": "the sum around cross-attention lacks the stream that went into it",
    "norm": "the last sum is normalised by a norm that belongs to another sublayer",
}


def _wiring_mistakes() -> list[Mistake]:
    """One for each set of mistakes that may be left."""
    blind = Mistake(
        "The four are repaired, but cross-attention sees the padding of the source: it needs "
        "memory_keep, with an axis for the queries.",
        _wired("blind"),
    )
    return [*unrepaired(_WIRING, _wired), blind]


_DECODER_SIGNATURE = '''
def fix_decoder_layer(
    x: Float[Tensor, "B T D"],
    memory: Float[Tensor, "B S D"],
    memory_keep: Bool[Tensor, "B S"],
    self_attention: nn.Module,
    cross_attention: nn.Module,
    ffn: nn.Module,
    norm_1: nn.Module,
    norm_2: nn.Module,
    norm_3: nn.Module,
) -> Float[Tensor, "B T D"]:
    """A decoder layer of the Transformer, post-norm."""
'''


FIX_DECODER_LAYER = Exercise(
    name="fix_decoder_layer",
    title="Four mistakes in a decoder layer",
    level=3,
    minutes=12,
    task=r"""
This decoder layer (post-norm, as in 2017) runs, gives the right shape and would even train. It
contains **four** mistakes of wiring. Find and repair them.

An attention is called as `attention(x, context, mask)`: queries from `x`, keys and values from
`context`, and a mask that broadcasts to $(B, T, S)$ with `True` = may look. `memory_keep` is `True`
at the real tokens of the source. The three norms belong to the three sublayers in their order.
""",
    stub=_DECODER_SIGNATURE
    + """
    T = x.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool)
    x = norm_1(x + self_attention(x, x, causal))
    x = norm_2(cross_attention(x, x, causal))
    x = norm_2(x + ffn(x))
    return x
""".lstrip("\n"),
    hints=(
        "Three sublayers, and each should look the same from outside: a sum of the stream and the "
        "sublayer, then its own norm. Then ask of each attention whose keys it reads, and which of "
        "them it may see.",
        "The mask of the first attention hides nothing. The second attention never touches the "
        "memory, and nothing is added to its result. The last norm was used before.",
    ),
    solution=_DECODER_SIGNATURE
    + """
    T = x.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    x = norm_1(x + self_attention(x, x, causal))
    x = norm_2(x + cross_attention(x, memory, memory_keep[:, None, :]))
    x = norm_3(x + ffn(x))
    return x
""".lstrip("\n"),
    why="A mask of ones hides nothing, so the layer reads the token it is asked for: the training "
    "loss is wonderful and the model cannot write. Attention from the decoder to itself, twice, "
    "is a language model that ignores the source. A missing sum cuts the stream. A norm used "
    "twice ties the gains of two sublayers and leaves the third without training. No shape shows "
    "any of it.",
    point="Wiring mistakes keep every shape, so compare the values with somebody else's layer.",
    check=same_function(_decoder_oracle, _decoder_cases, _wiring_mistakes()),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        LAYER_NORM,
        FEED_FORWARD,
        RESIDUAL_BLOCKS,
        TEACHER_FORCING,
        DECODER_MASKS,
        TIED_EMBEDDING,
        BASE_PARAMETERS,
        SMOOTHED_LOSS,
        PAPER_SCHEDULE,
        GREEDY_DECODE,
        FIX_DECODER_LAYER,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
