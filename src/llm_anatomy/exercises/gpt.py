"""Exercises of the chapter on GPT."""

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
    same_function,
)
from llm_anatomy.models.gpt2 import GPT2, GPT2Config

# --- The objective -------------------------------------------------------------------------------


def _ids(*shape: int, high: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, high, shape, generator=generator)


def _log_prob_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, V={V}",
            _ids(B, T, high=V, seed=seed),
            2 * normal(B, T, V, seed=seed + 1),
            torch.arange(T) < torch.tensor(lengths)[:, None],
        )
        for B, T, V, lengths, seed in (
            (2, 5, 7, (5, 3), 800),
            (3, 6, 4, (2, 6, 4), 810),
            (1, 4, 9, (3,), 820),
        )
    ]


def _text_scores(tokens: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    nll = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return -(nll * keep[:, 1:]).sum(dim=1)


def _unshifted(tokens: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    return -(F.cross_entropy(logits.mT, tokens, reduction="none") * keep).sum(dim=1)


def _backwards(tokens: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    nll = F.cross_entropy(logits[:, 1:].mT, tokens[:, :-1], reduction="none")
    return -(nll * keep[:, 1:]).sum(dim=1)


def _picked_logits(tokens: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    picked = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return (picked * keep[:, 1:]).sum(dim=1)


TEXT_LOG_PROB = Exercise(
    name="text_log_prob",
    title="How probable is a text?",
    level=1,
    minutes=6,
    task=r"""
A causal model has read a batch of texts, padded on the right, and gives `logits` of shape
$(B, T, V)$: at each position those of the token **after** it. Return for each text the natural
logarithm of its probability, given its first token:

$$\sum_{t=1}^{n-1} \ln p(x_t \mid x_0, \dots, x_{t-1})$$

with $n$ the number of real tokens (`keep` is `True` at these).
""",
    stub='''
def text_log_prob(
    tokens: Int[Tensor, "B T"], logits: Float[Tensor, "B T V"], keep: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Log-probability of each text after its first token."""
    raise NotImplementedError
''',
    hints=(
        "Write the tokens in one row and the logits in a row below. Which position has made the "
        "prediction of token 1? Which prediction is about nothing that you know?",
        "Cut the last position off the log-probabilities and the first one off the tokens; then "
        "gather, set what belongs to padding to zero, and sum over the positions.",
    ),
    solution='''
def text_log_prob(
    tokens: Int[Tensor, "B T"], logits: Float[Tensor, "B T V"], keep: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Log-probability of each text after its first token."""
    log_p = logits[:, :-1].log_softmax(dim=-1)
    said = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return said.masked_fill(~keep[:, 1:], 0.0).sum(dim=1)
''',
    why="The logits at position t are about token t + 1, so T positions give T - 1 terms: the last "
    "prediction has no token to be compared with, and the first token has no prediction. The chain "
    "rule makes the sum of the terms the log-probability of the whole text.",
    point="One pass of a causal model gives the probability of a text, factor by factor.",
    check=same_function(
        _text_scores,
        _log_prob_cases,
        [
            Mistake(
                "The logits at a position are compared with the token at the same position. They "
                "are about the next one.",
                _unshifted,
            ),
            Mistake(
                "The shift goes the wrong way: each position is compared with the token before it.",
                _backwards,
            ),
            Mistake(
                "Padding is counted as if it were text.",
                lambda x, z, k: _text_scores(x, z, torch.ones_like(k)),
            ),
            Mistake(
                "This is the mean over the tokens. The probability of a text is a product, so its "
                "logarithm is a sum.",
                lambda x, z, k: _text_scores(x, z, k) / k[:, 1:].sum(dim=1),
            ),
            Mistake(
                "The sign is that of a loss. A log-probability is not above zero.",
                lambda x, z, k: -_text_scores(x, z, k),
            ),
            Mistake("The logits are added up as they are, without a softmax.", _picked_logits),
            Mistake(
                "This is the probability itself. Return its logarithm.",
                lambda x, z, k: _text_scores(x, z, k).exp(),
            ),
            Mistake(
                "The first step is left out: token 1 is predicted from token 0.",
                lambda x, z, k: _text_scores(x[:, 1:], z[:, 1:], k[:, 1:]),
            ),
        ],
    ),
)


def _eos_cases() -> list[Case]:
    end = 0
    return [
        case(label, torch.tensor(rows), end)
        for label, rows in (
            ("texts of 4, 2 and 3 words", [[5, 3, 7, 2, 0], [4, 6, 0, 0, 0], [1, 9, 8, 0, 0]]),
            ("two texts", [[3, 3, 0, 0, 0, 0, 0], [2, 4, 6, 8, 1, 3, 0]]),
            ("one word, then only padding", [[7, 0, 0, 0]]),
        )
    ]


def _labels_of(tokens: Tensor, end: int, hidden: Tensor) -> Tensor:
    return tokens[:, 1:].masked_fill(hidden, -100)


def _after_first_end(tokens: Tensor, end: int) -> Tensor:
    return tokens[:, :-1] == end


LABELS_WITH_EOS = Exercise(
    name="labels_with_eos",
    title="When padding is the end token",
    level=2,
    minutes=8,
    task=r"""
GPT-2 has one special token, the end of a text, so people pad with it too. A batch $(B, T)$ holds
texts that end with `eos_id` and are filled up with `eos_id`. Return the labels $(B, T - 1)$ of
next-token prediction from the inputs `tokens[:, :-1]`: the next token, and $-100$ where it is
padding.

The **first** `eos_id` of a row belongs to the text: a model that is never asked for it never learns
to stop.
""",
    stub='''
def labels_with_eos(tokens: Int[Tensor, "B T"], eos_id: int) -> Int[Tensor, "B T-1"]:
    """The next tokens, one fewer, -100 where they are padding."""
    raise NotImplementedError
''',
    hints=(
        "When is a next token padding? Not when it is the end token, but when something has "
        "happened before it. What does the position that predicts it hold?",
        "The prediction counts exactly when the token that predicts is no end token itself. So "
        "hide a label where the *input* is the end token.",
    ),
    solution='''
def labels_with_eos(tokens: Int[Tensor, "B T"], eos_id: int) -> Int[Tensor, "B T-1"]:
    """The next tokens, one fewer, -100 where they are padding."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return labels.masked_fill(inputs == eos_id, -100)
''',
    why="Whatever follows an end token is padding, and nothing else is. Hiding every label that "
    "equals the end token also hides the one that matters: the loss still looks fine, and the "
    "model goes on writing for ever. Hiding none trains it mostly on predicting padding.",
    point="Mask what follows the end, not the end: a model stops because it was trained to.",
    check=same_function(
        lambda tokens, end: _labels_of(tokens, end, _after_first_end(tokens, end)),
        _eos_cases,
        [
            Mistake(
                "Every end token is hidden, the first one of each row too. This model will not "
                "learn to stop.",
                lambda x, end: _labels_of(x, end, x[:, 1:] == end),
            ),
            Mistake(
                "Nothing is hidden: most of the loss is about padding.",
                lambda x, end: x[:, 1:].clone(),
            ),
            Mistake(
                "The labels are not shifted: each is the input itself.",
                lambda x, end: _labels_of(
                    torch.cat((x[:, :1], x[:, :-1]), 1), end, _after_first_end(x, end)
                ),
            ),
            Mistake(
                "One label too many is kept: the first padding token is no target.",
                lambda x, end: _labels_of(x, end, ((x == end).cumsum(1) > 2)[:, 1:]),
            ),
            Mistake(
                "The mask is turned over: it hides the text and keeps the padding.",
                lambda x, end: _labels_of(x, end, ~_after_first_end(x, end)),
            ),
        ],
    ),
)


def _window_cases() -> list[Case]:
    return [
        case(f"{m} tokens, windows of {n}", torch.arange(m) * 3 + 1, n)
        for m, n in ((13, 4), (9, 2), (12, 4), (8, 7))
    ]


def _windows(stream: Tensor, n: int) -> tuple[Tensor, Tensor]:
    starts = range(0, len(stream) - n, n)
    inputs = torch.stack([stream[s : s + n] for s in starts])
    return inputs, torch.stack([stream[s + 1 : s + n + 1] for s in starts])


def _step_windows(stream: Tensor, n: int, step: int) -> tuple[Tensor, Tensor]:
    rows = stream.unfold(0, n + 1, step)
    return rows[:, :-1], rows[:, 1:]


def _short_windows(stream: Tensor, n: int) -> tuple[Tensor, Tensor]:
    rows = stream[: len(stream) // n * n].view(-1, n)
    return rows[:, :-1], rows[:, 1:]


def _rolled(stream: Tensor, n: int) -> tuple[Tensor, Tensor]:
    inputs, _ = _windows(stream, n)
    return inputs, inputs.roll(-1, dims=1)


WINDOWS = Exercise(
    name="windows",
    title="From a stream to windows",
    level=2,
    minutes=9,
    task=r"""
GPT-2 and GPT-3 were trained on one long stream of tokens, cut into windows of $N$ positions. Cut a
stream of $M$ tokens into windows, one after the other, so that **every token after the first is the
target of exactly one position**, up to a rest that does not fill a window. Return the inputs and
the targets, both $(K, N)$; targets are the inputs one token later. $M$ is larger than $N$.
""",
    stub='''
def windows(
    stream: Int[Tensor, "M"], N: int
) -> tuple[Int[Tensor, "K N"], Int[Tensor, "K N"]]:
    """Inputs and targets of all whole windows."""
    raise NotImplementedError
''',
    hints=(
        "A window of N inputs and N targets touches N + 1 tokens. Where must the next window start "
        "so that its first target is the one after the last target before?",
        "Two neighbouring windows share one token, the last target of one is the first input of "
        "the next. So the stream yields (M - 1) // N windows, and both results are views of it.",
    ),
    solution='''
def windows(
    stream: Int[Tensor, "M"], N: int
) -> tuple[Int[Tensor, "K N"], Int[Tensor, "K N"]]:
    """Inputs and targets of all whole windows."""
    K = (len(stream) - 1) // N
    return stream[: K * N].view(K, N), stream[1 : K * N + 1].view(K, N)
''',
    why="With N + 1 fresh tokens a window, the first token of each window is never a target: one "
    "in N + 1 is lost. With a step of one, each token is a target N times. With the step N, each "
    "counts once. What the first positions of a window lack is context, not a target.",
    point="Windows overlap by one token: the last target of one is the first input of the next.",
    check=same_function(
        _windows,
        _window_cases,
        [
            Mistake(
                "The windows do not overlap, so the first token of each is never a target.",
                lambda s, n: _step_windows(s, n, n + 1),
            ),
            Mistake(
                "A window starts at every token, so each token is a target many times.",
                lambda s, n: _step_windows(s, n, 1),
            ),
            Mistake(
                "The windows are one too short: N tokens hold only N - 1 pairs.",
                _short_windows,
            ),
            Mistake(
                "The last target of each window is its own first token. It is the first token of "
                "the next window.",
                _rolled,
            ),
            Mistake(
                "The targets are not shifted: they equal the inputs.",
                lambda s, n: (_windows(s, n)[0], _windows(s, n)[0]),
            ),
            Mistake(
                "Inputs and targets have changed places.",
                lambda s, n: _windows(s, n)[::-1],
            ),
            Mistake(
                "The last whole window is missing.",
                lambda s, n: tuple(t[:-1] for t in _windows(s, n)),
            ),
        ],
        names=("inputs", "targets"),
    ),
)


def _entropy_cases() -> list[Case]:
    return [
        case(label, torch.tensor(p), torch.tensor(n))
        for label, p, n in (
            ("three texts", [0.5, 0.3, 0.2], [2, 5, 9]),
            ("four texts", [0.1, 0.2, 0.3, 0.4], [3, 4, 8, 1]),
            ("a text that is never said", [0.25, 0.0, 0.75], [6, 3, 2]),
        )
    ]


def _surprise(p: Tensor) -> Tensor:
    return torch.special.entr(p.double())


def _lowest(p: Tensor, n: Tensor) -> float:
    return (_surprise(p).sum() / (p.double() * n).sum()).item()


LOWEST_LOSS = Exercise(
    name="lowest_loss",
    title="The floor under the loss",
    level=2,
    minutes=8,
    task=r"""
A language has finitely many texts. Text $i$ is said with probability $p_i$ and has $n_i$ tokens,
its end token included. What is the **lowest loss**, in nats a token, that a language model can
reach on many texts of it? (The mean runs over all tokens of all texts, as in training.) A text with
$p_i = 0$ counts for nothing.
""",
    stub='''
def lowest_loss(p: Float[Tensor, "N"], n_tokens: Int[Tensor, "N"]) -> float:
    """Nats a token of a perfect model."""
    raise NotImplementedError
''',
    hints=(
        "The losses of the tokens of a text add up to one number, by the chain rule. Which, for a "
        "model that knows the language? And how many tokens do many texts have?",
        "A perfect model loses -ln p on a text. Take the expected loss of a text, and divide it by "
        "the expected number of tokens: a ratio of means.",
    ),
    solution='''
def lowest_loss(p: Float[Tensor, "N"], n_tokens: Int[Tensor, "N"]) -> float:
    """Nats a token of a perfect model."""
    said = p > 0
    nats = -(p[said] * p[said].log()).sum()
    return (nats / (p * n_tokens).sum()).item()
''',
    why="The factors p(x_t | before) multiply to the probability of the text, so the losses of its "
    "tokens add up to -ln p, whichever way the grammar makes it. Over many texts, all nats are "
    "divided by all tokens. A mean of the texts' own means would weigh a token of a short text "
    "more than one of a long text.",
    point="The floor is the entropy of a text over its mean length; below it lies only a leak.",
    check=same_function(
        _lowest,
        _entropy_cases,
        [
            Mistake(
                "This is the entropy of a whole text. Divide by the mean number of tokens.",
                lambda p, n: _surprise(p).sum().item(),
            ),
            Mistake(
                "Each text's loss is divided by its own length first. Training averages over all "
                "tokens, not over texts.",
                lambda p, n: (_surprise(p) / n).sum().item(),
            ),
            Mistake(
                "The lengths are averaged as if all texts were equally likely.",
                lambda p, n: (_surprise(p).sum() / n.double().mean()).item(),
            ),
            Mistake(
                "This is in bits. A loss is in nats.",
                lambda p, n: _lowest(p, n) / torch.tensor(2.0).log().item(),
            ),
            Mistake(
                "The end token is not counted: it is predicted like any other, and `n_tokens` "
                "holds it already.",
                lambda p, n: (_surprise(p).sum() / (p.double() * (n - 1)).sum()).item(),
            ),
            Mistake("A loss is not negative.", lambda p, n: -_lowest(p, n)),
            Mistake(
                "This is the perplexity, e to the loss.",
                lambda p, n: torch.tensor(_lowest(p, n)).exp().item(),
            ),
            Mistake(
                "0 · ln 0 is nan for a computer. Leave out the texts that are never said.",
                when=lambda got, want: got != got,
            ),
        ],
    ),
)


# --- The model -----------------------------------------------------------------------------------


class _Attend(nn.Module):
    """Uniform attention with a linear map: enough to see a mask and a wiring."""

    def __init__(self, D: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("weight", normal(D, D, seed=seed) / D**0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shares = mask.float() / mask.float().sum(dim=-1, keepdim=True).clamp(min=1)
        return shares @ (x @ self.weight)


class _Widen(nn.Module):
    def __init__(self, D: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("weight", normal(D, D, seed=seed) / D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class _Norm(nn.Module):
    def __init__(self, D: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("gain", normal(D, seed=seed) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.gain


def _block_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, D={D}",
            2 * normal(B, T, D, seed=seed),
            _Attend(D, seed + 1),
            _Widen(D, seed + 2),
            _Norm(D, seed + 3),
            _Norm(D, seed + 4),
        )
        for B, T, D, seed in ((2, 4, 6, 830), (1, 5, 3, 840), (3, 3, 4, 850))
    ]


def _look_back(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def _pre_norm(
    x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module, mask: Tensor | None = None
) -> Tensor:
    x = x + a(n(x), _look_back(x) if mask is None else mask)
    return x + f(m(x))


def _given_block(x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module) -> Tensor:
    y = n(x)
    x = y + a(y, _look_back(x).mT)
    return m(x + f(x))


def _post_norm(x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module) -> Tensor:
    x = n(x + a(x, _look_back(x)))
    return m(x + f(x))


def _norm_on_path(x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module) -> Tensor:
    y = n(x)
    x = y + a(y, _look_back(x))
    return x + f(m(x))


def _late_norm(x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module) -> Tensor:
    x = x + a(n(x), _look_back(x))
    return m(x + f(x))


def _from_the_old(x: Tensor, a: nn.Module, f: nn.Module, n: nn.Module, m: nn.Module) -> Tensor:
    return x + a(n(x), _look_back(x)) + f(m(x))


FIX_BLOCK = Exercise(
    name="fix_block",
    title="Three mistakes in a block of GPT-2",
    level=2,
    minutes=8,
    task=r"""
This block runs, keeps the shape and would train. It should be a block of **GPT-2**: causal, and
with each norm at the input of its sub-block, so that nothing but sums lies on the residual path. It
holds **three** mistakes. Repair them.

`attention(x, mask)` takes a mask $(T, T)$ with `True` = may look, rows for queries; `norm_1`
belongs to the attention, `norm_2` to the feed-forward layer.
""",
    stub='''
def fix_block(
    x: Float[Tensor, "B T D"],
    attention: nn.Module,
    ffn: nn.Module,
    norm_1: nn.Module,
    norm_2: nn.Module,
) -> Float[Tensor, "B T D"]:
    """One block of GPT-2."""
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).triu()
    x = norm_1(x)
    x = x + attention(x, mask)
    return norm_2(x + ffn(x))
''',
    hints=(
        "Follow the residual path with a finger: what does x pass on its way from the input to the "
        "output? Then ask what position 0 may look at.",
        "Both norms lie on the path, one before the first sum and one after the last. And the "
        "triangle is the upper one, which shows the future.",
    ),
    solution='''
def fix_block(
    x: Float[Tensor, "B T D"],
    attention: nn.Module,
    ffn: nn.Module,
    norm_1: nn.Module,
    norm_2: nn.Module,
) -> Float[Tensor, "B T D"]:
    """One block of GPT-2."""
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    x = x + attention(norm_1(x), mask)
    return x + ffn(norm_2(x))
''',
    why="A norm that overwrites x is on the path: the stream is rescaled and what was in it cannot "
    "be undone by adding. In GPT-2 each sub-block reads a normalised copy and adds its answer to "
    "the stream as it was. The upper triangle lets a position see itself and what comes later, "
    "so the loss would fall to almost nothing, and the model could not write.",
    point="Read a normalised copy, write to the stream, and look back only.",
    check=same_function(
        _pre_norm,
        _block_cases,
        [
            Mistake("untouched", _given_block, untouched=True),
            Mistake(
                "One thing is left: the mask is the upper triangle, which looks ahead.",
                lambda x, a, f, n, m: _pre_norm(x, a, f, n, m, _look_back(x).mT),
            ),
            Mistake(
                "This is post-norm, the wiring of GPT-1: the sums are normalised.",
                _post_norm,
            ),
            Mistake(
                "The first norm still overwrites x, so it lies on the residual path.",
                _norm_on_path,
            ),
            Mistake(
                "The second norm still stands after the sum. It belongs to the input of the "
                "feed-forward layer.",
                _late_norm,
            ),
            Mistake(
                "The feed-forward layer reads the block's input. It has to read the stream after "
                "the attention.",
                _from_the_old,
            ),
            Mistake(
                "The two norms have changed places.",
                lambda x, a, f, n, m: _pre_norm(x, a, f, m, n),
            ),
            Mistake(
                "There is no mask any more: every position sees all others.",
                lambda x, a, f, n, m: _pre_norm(
                    x, a, f, n, m, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
                ),
            ),
            Mistake(
                "A position may look at itself too; the diagonal is missing.",
                lambda x, a, f, n, m: _pre_norm(x, a, f, n, m, _look_back(x).tril(-1)),
            ),
        ],
    ),
)


def _count_cases() -> list[Case]:
    return [
        case(f"V={V}, N={N}, L={L}, D={D}", V, N, L, D)
        for V, N, L, D in ((50, 16, 2, 8), (1000, 64, 3, 12), (50257, 1024, 12, 768))
    ]


def _meta_count(V: int, N: int, L: int, D: int) -> int:
    config = GPT2Config(vocab_size=V, n_positions=N, n_layers=L, n_heads=1, d_model=D, d_ff=4 * D)
    with torch.device("meta"):
        return sum(p.numel() for p in GPT2(config).parameters())


COUNT_GPT2 = Exercise(
    name="count_gpt2",
    title="The size of any GPT-2",
    level=2,
    minutes=10,
    task=r"""
Count the parameters of a GPT-2 with $V$ tokens, $N$ positions, $L$ blocks and width $D$, exactly. A
block has an attention with four maps of $D \times D$, a feed-forward layer of width $4D$, and two
norms; every map has a bias, every norm a gain and a bias. One more norm stands after the last
block. The output uses the token table again, without a bias.
""",
    stub='''
def count_gpt2(V: int, N: int, L: int, D: int) -> int:
    """The number of parameters."""
    raise NotImplementedError
''',
    hints=(
        "Go through the model once: two tables, L times a block, a norm. In the block write the "
        "matrices first and then everything that is a vector.",
        "The matrices of a block hold twelve D squared. Its vectors: four and five D for the "
        "biases of attention and feed-forward layer, and four D for its norms.",
    ),
    solution='''
def count_gpt2(V: int, N: int, L: int, D: int) -> int:
    """The number of parameters."""
    attention = 4 * (D * D + D)
    ffn = D * 4 * D + 4 * D + 4 * D * D + D
    norm = 2 * D
    return V * D + N * D + L * (attention + ffn + 2 * norm) + norm
''',
    why="A block has 12 D² + 13 D parameters. For the smallest GPT-2 it makes 124,439,808 in all, "
    "a third of them in tables. At the width of GPT-3 the vectors and tables vanish beside "
    "12 L D², which is why this product is the usual estimate.",
    point="Twelve times L D², plus the tables: the size of a GPT in one line.",
    check=same_function(
        _meta_count,
        _count_cases,
        [
            Mistake(
                "The output has no table of its own: it uses that of the tokens.",
                lambda V, N, L, D: _meta_count(V, N, L, D) + V * D,
            ),
            Mistake(
                "The norm after the last block is missing.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - 2 * D,
            ),
            Mistake(
                "The position table is missing: GPT-2 learns its positions.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - N * D,
            ),
            Mistake(
                "The biases of the maps are missing: 4 D in an attention, 5 D in a feed-forward "
                "layer.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - 9 * L * D,
            ),
            Mistake(
                "Only the large matrices are counted: this is the estimate, not the number.",
                lambda V, N, L, D: 12 * L * D * D,
            ),
            Mistake(
                "A feed-forward layer has two maps, up and down. One is missing.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - L * (4 * D * D + D),
            ),
            Mistake(
                "The attention has four maps: queries, keys, values, and the output.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - L * (D * D + D),
            ),
            Mistake(
                "A norm has a gain and a bias: 2 D each.",
                lambda V, N, L, D: _meta_count(V, N, L, D) - (2 * L + 1) * D,
            ),
            Mistake(
                "The output's scores have no bias in GPT-2.",
                lambda V, N, L, D: _meta_count(V, N, L, D) + V,
            ),
        ],
        rtol=0.0,
        atol=0.0,
    ),
)


def _work_cases() -> list[Case]:
    return [
        case(f"a prompt of {p}, {n} new tokens", p, n)
        for p, n in ((5, 4), (1, 10), (12, 1), (100, 28))
    ]


def _work(p: int, n: int) -> tuple[int, int]:
    return p + n - 1, sum(p + i for i in range(n))


CACHE_WORK = Exercise(
    name="cache_work",
    title="What a cache saves",
    level=1,
    minutes=6,
    task=r"""
A decoder has a prompt of $P$ tokens and shall write $N \geq 1$ new ones, one at a time. Count how
many token positions go through the blocks in all: **with** a KV cache (the prompt once, then each
token that was written, when it is needed), and **without** one (everything so far, again for each
new token). The last token written is never read.
""",
    stub='''
def cache_work(P: int, N: int) -> tuple[int, int]:
    """Positions computed with a cache, then without."""
    raise NotImplementedError
''',
    hints=(
        "Write a prompt of 2 and 3 new tokens down, pass by pass. What does each pass read, with a "
        "cache and without?",
        "The first pass reads P in both cases and yields the first token. Each later pass reads "
        "one token with a cache, and one more than the pass before without it.",
    ),
    solution='''
def cache_work(P: int, N: int) -> tuple[int, int]:
    """Positions computed with a cache, then without."""
    cached = P + (N - 1)
    uncached = N * P + N * (N - 1) // 2
    return cached, uncached
''',
    why="The first new token comes from the pass over the prompt, so N tokens take N passes, and "
    "the last one is not read. Without a cache pass i reads P + i positions. The saving in "
    "positions grows with N; attention still looks at all earlier keys, cache or not.",
    point="With a cache the positions computed grow linearly, without one quadratically.",
    check=same_function(
        _work,
        _work_cases,
        [
            Mistake(
                "The last token is counted as read. Nothing is predicted from it.",
                lambda p, n: (p + n, sum(p + i for i in range(n + 1))),
            ),
            Mistake(
                "With a cache: the last token is counted as read.",
                lambda p, n: (p + n, _work(p, n)[1]),
            ),
            Mistake(
                "With a cache the prompt has to be read too, once.",
                lambda p, n: (n, _work(p, n)[1]),
            ),
            Mistake(
                "Without a cache each pass reads more than the prompt: also what was written.",
                lambda p, n: (p + n - 1, n * p),
            ),
            Mistake(
                "Without a cache: each pass is counted as if it read the whole final text.",
                lambda p, n: (p + n - 1, n * (p + n)),
            ),
            Mistake(
                "Without a cache: the first pass yields a token too, it reads P, not P + 1.",
                lambda p, n: (p + n - 1, sum(p + i + 1 for i in range(n))),
            ),
            Mistake(
                "The two numbers have changed places.",
                lambda p, n: _work(p, n)[::-1],
            ),
            Mistake(
                "These are passes. Count the token positions in them.",
                lambda p, n: (n, n),
            ),
        ],
        names=("with a cache", "without a cache"),
        rtol=0.0,
        atol=0.0,
    ),
)


# --- Fine-tuning ---------------------------------------------------------------------------------


def _last_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, D={D}",
            normal(B, T, D, seed=seed),
            torch.arange(T) < torch.tensor(lengths)[:, None],
        )
        for B, T, D, lengths, seed in (
            (3, 5, 4, (5, 2, 3), 860),
            (2, 4, 6, (1, 3), 870),
            (4, 6, 2, (6, 6, 4, 5), 880),
        )
    ]


def _last(x: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([row[mask][-1] for row, mask in zip(x, keep, strict=True)])


LAST_TOKEN = Exercise(
    name="last_token",
    title="The only position that has read everything",
    level=1,
    minutes=5,
    task=r"""
To classify texts with a causal model, GPT reads the hidden state of the **last real token**. Texts
are padded on the right; `keep` is `True` at real tokens. Return these states, one for each text.
""",
    stub='''
def last_token(
    hidden: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]
) -> Float[Tensor, "B D"]:
    """The hidden state at the last real token of each text."""
    raise NotImplementedError
''',
    hints=(
        "Under a causal mask, which position has seen the whole text? In a padded batch, it is at "
        "another place in each row.",
        "The number of real tokens minus one is the place. Index rows and places together: "
        "hidden[arange(B), places].",
    ),
    solution='''
def last_token(
    hidden: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]
) -> Float[Tensor, "B D"]:
    """The hidden state at the last real token of each text."""
    places = keep.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden)), places]
''',
    why="BERT can read [CLS] at position 0 because every position sees all others. In a causal "
    "model position 0 has seen one token. The last column of the batch is padding in all but the "
    "longest texts, a state computed from nothing that was said.",
    point="In a causal model only the last real token has read the whole text.",
    check=same_function(
        _last,
        _last_cases,
        [
            Mistake(
                "The last column of the batch is padding for the shorter texts.",
                lambda x, k: x[:, -1],
            ),
            Mistake(
                "The first position is where BERT's [CLS] stands. A causal model has read one "
                "token there.",
                lambda x, k: x[:, 0],
            ),
            Mistake(
                "This is the mean over the real tokens. One position is asked for.",
                lambda x, k: (x * k[..., None]).sum(1) / k.sum(1, keepdim=True),
            ),
            Mistake(
                "This is the mean over all positions, padding included.",
                lambda x, k: x.mean(dim=1),
            ),
            Mistake(
                "One too far: a text of n tokens ends at position n - 1.",
                lambda x, k: x[torch.arange(len(x)), k.sum(1).clamp(max=x.shape[1] - 1)],
            ),
            Mistake(
                "One too early: this is the token before the last.",
                lambda x, k: x[torch.arange(len(x)), (k.sum(1) - 2).clamp(min=0)],
            ),
            Mistake(
                "The place of the longest text is used for all rows: index row by row.",
                lambda x, k: x[:, int(k.sum(1).max()) - 1],
            ),
            Mistake(
                "This picks every place in every row. Rows and places have to be paired.",
                lambda x, k: x[:, k.sum(1) - 1],
            ),
        ],
    ),
)


def _objective_cases() -> list[Case]:
    return [
        case(
            f"B={B}, T={T}, weight {weight}",
            normal(B, C, seed=seed),
            torch.randint(C, (B,), generator=torch.Generator().manual_seed(seed)),
            normal(B, T, V, seed=seed + 1),
            _ids(B, T, high=V, seed=seed + 2),
            torch.arange(T) < torch.tensor(lengths)[:, None],
            weight,
        )
        for B, T, V, C, lengths, weight, seed in (
            (3, 5, 6, 2, (5, 2, 4), 0.5, 890),
            (2, 4, 7, 3, (3, 4), 0.25, 900),
            (4, 6, 5, 4, (6, 3, 2, 5), 1.5, 910),
        )
    ]


def _lm_loss(z: Tensor, x: Tensor, k: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1][k[:, 1:]], x[:, 1:][k[:, 1:]])


def _lm_by_text(z: Tensor, x: Tensor, k: Tensor) -> Tensor:
    nll = F.cross_entropy(z[:, :-1].mT, x[:, 1:], reduction="none") * k[:, 1:]
    return (nll.sum(1) / k[:, 1:].sum(1)).mean()


FINE_TUNING_LOSS = Exercise(
    name="fine_tuning_loss",
    title="GPT-1's two losses",
    level=2,
    minutes=9,
    task=r"""
When GPT-1 is fine-tuned, it goes on as a language model beside the task (its equation 5): the loss
is the task's cross-entropy plus $\lambda$ times that of next-token
prediction. Each of the two is a mean: over the texts, and over all real targets of the batch. Texts
are padded on the right, and padding is no target.
""",
    stub='''
def fine_tuning_loss(
    class_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, "B"],
    lm_logits: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    keep: Bool[Tensor, "B T"],
    weight: float,
) -> Float[Tensor, ""]:
    """The task's loss plus `weight` times the language model's."""
    raise NotImplementedError
''',
    hints=(
        "Write the two losses one below the other. For the second: which logits belong to which "
        "token, and which pairs are left out?",
        "Shift as always, turn padded targets into -100, and let F.cross_entropy take the mean "
        "over what is left. Only this second loss is multiplied by the weight.",
    ),
    solution='''
def fine_tuning_loss(
    class_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, "B"],
    lm_logits: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    keep: Bool[Tensor, "B T"],
    weight: float,
) -> Float[Tensor, ""]:
    """The task's loss plus `weight` times the language model's."""
    task = F.cross_entropy(class_logits, labels)
    targets = tokens[:, 1:].masked_fill(~keep[:, 1:], -100)
    language = F.cross_entropy(lm_logits[:, :-1].flatten(0, 1), targets.flatten())
    return task + weight * language
''',
    why="The auxiliary loss keeps the model a language model while it learns the task; GPT-1 uses "
    "the weight 0.5 and reports that it helps on larger data sets and not on smaller ones. The "
    "mean runs over the batch's real targets, so a long text weighs more than a short one, as in "
    "pre-training.",
    point="Task plus a share of the old objective: the head learns, and the model remembers.",
    check=same_function(
        lambda c, y, z, x, k, w: F.cross_entropy(c, y) + w * _lm_loss(z, x, k),
        _objective_cases,
        [
            Mistake(
                "Padding counts as a target of the language model.",
                lambda c, y, z, x, k, w: (
                    F.cross_entropy(c, y) + w * _lm_loss(z, x, torch.ones_like(k))
                ),
            ),
            Mistake(
                "The language model's logits are not shifted against the tokens.",
                lambda c, y, z, x, k, w: F.cross_entropy(c, y) + w * F.cross_entropy(z[k], x[k]),
            ),
            Mistake(
                "The weight is missing: both losses count the same.",
                lambda c, y, z, x, k, w: F.cross_entropy(c, y) + _lm_loss(z, x, k),
            ),
            Mistake(
                "The weight stands at the task's loss. It belongs to the language model's.",
                lambda c, y, z, x, k, w: w * F.cross_entropy(c, y) + _lm_loss(z, x, k),
            ),
            Mistake(
                "This mixes the two as (1 - weight) and weight. The task counts fully.",
                lambda c, y, z, x, k, w: (1 - w) * F.cross_entropy(c, y) + w * _lm_loss(z, x, k),
            ),
            Mistake(
                "Each text's loss is averaged first. The mean runs over all targets of the batch.",
                lambda c, y, z, x, k, w: F.cross_entropy(c, y) + w * _lm_by_text(z, x, k),
            ),
            Mistake(
                "Only the task's loss is left: the auxiliary one is missing.",
                lambda c, y, z, x, k, w: F.cross_entropy(c, y),
            ),
            Mistake(
                "The language model's loss is summed, not averaged.",
                lambda c, y, z, x, k, w: (
                    F.cross_entropy(c, y) + w * k[:, 1:].sum() * _lm_loss(z, x, k)
                ),
            ),
        ],
    ),
)


# --- Learning from the context -------------------------------------------------------------------


def _guess_cases() -> list[Case]:
    tasks = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 4], [5, 5, 2, 3], [5, 1, 2, 4]])
    prior = torch.tensor([0.4, 0.1, 0.3, 0.2])
    wide = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 0, 3], [0, 0, 1, 1, 1]])
    rows = [
        ("one example", tasks, prior, [2], [2], 3, 6),
        ("no example", tasks, prior, [], [], 0, 6),
        ("two examples", tasks, prior, [0, 1], [0, 1], 2, 6),
        ("two examples, the other way round", tasks, prior, [1, 0], [1, 0], 2, 6),
        ("three tasks", wide, torch.tensor([0.2, 0.5, 0.3]), [0, 2], [0, 1], 4, 4),
    ]
    return [
        case(
            label,
            table,
            p,
            torch.tensor(shown, dtype=torch.long),
            torch.tensor(said, dtype=torch.long),
            query,
            V,
        )
        for label, table, p, shown, said, query, V in rows
    ]


def _guess(tasks: Tensor, prior: Tensor, shown: Tensor, said: Tensor, query: int, V: int) -> Tensor:
    fits = torch.tensor([all(t[s] == a for s, a in zip(shown, said, strict=True)) for t in tasks])
    posterior = prior * fits / (prior * fits).sum()
    return F.one_hot(tasks[:, query], V).float().T @ posterior


def _partly(tasks: Tensor, prior: Tensor, shown: Tensor, said: Tensor, query: int, V: int):
    hits = (tasks[:, shown] == said).any(dim=1) if len(shown) else torch.ones(len(tasks)).bool()
    return F.one_hot(tasks[:, query], V).float().T @ (prior * hits / (prior * hits).sum())


def _likeliest(tasks: Tensor, prior: Tensor, shown: Tensor, said: Tensor, query: int, V: int):
    fits = (tasks[:, shown] == said).all(dim=1)
    return F.one_hot(tasks[(prior * fits).argmax(), query], V).float()


def _soft(tasks: Tensor, prior: Tensor, shown: Tensor, said: Tensor, query: int, V: int) -> Tensor:
    hits = prior * (1 + (tasks[:, shown] == said).sum(dim=1))
    return F.one_hot(tasks[:, query], V).float().T @ (hits / hits.sum())


BEST_GUESS = Exercise(
    name="best_guess",
    title="The best that examples can teach",
    level=3,
    minutes=12,
    task=r"""
A prompt shows examples of a task and asks a question, as in `dog -> dogs , cat -> cats , pig ->`.
Which answers would a perfect reader expect?

There are $N$ tasks, and task $i$ answers question $j$ with the word `tasks[i, j]` (of $V$ words). A
prompt follows one task, drawn with probability `prior[i]`. Given the questions `shown` and their
answers `said`, return the probability of each of the $V$ words as the answer to `query`. There may
be no example at all.
""",
    stub='''
def best_guess(
    tasks: Int[Tensor, "N Q"],
    prior: Float[Tensor, "N"],
    shown: Int[Tensor, "K"],
    said: Int[Tensor, "K"],
    query: int,
    V: int,
) -> Float[Tensor, "V"]:
    """Probability of each word as the answer."""
    raise NotImplementedError
''',
    hints=(
        "Before the examples a task has its prior. What becomes of a task that contradicts one "
        "example? And what of the others, whose probabilities must add up to 1 again?",
        "Keep the tasks that agree with all examples, divide their priors by the sum, and add each "
        "to the word that this task answers.",
    ),
    solution='''
def best_guess(
    tasks: Int[Tensor, "N Q"],
    prior: Float[Tensor, "N"],
    shown: Int[Tensor, "K"],
    said: Int[Tensor, "K"],
    query: int,
    V: int,
) -> Float[Tensor, "V"]:
    """Probability of each word as the answer."""
    fits = (tasks[:, shown] == said).all(dim=1)
    posterior = prior * fits
    posterior = posterior / posterior.sum()
    return torch.zeros(V).index_add(0, tasks[:, query], posterior)
''',
    why="This is Bayes' rule with a likelihood of 0 or 1: an example removes the tasks that it "
    "contradicts and leaves the ratios of the others alone. No weight of a model has to change "
    "for that. A model that was trained to predict such prompts is pulled to this distribution, "
    "because no other has a lower loss.",
    point="Predicting well in context means to weigh all tasks that fit, and that is Bayes' rule.",
    check=same_function(
        _guess,
        _guess_cases,
        [
            Mistake(
                "The examples are not used: this is the guess before any example.",
                lambda t, p, s, a, q, V: _guess(t, p, s[:0], a[:0], q, V),
            ),
            Mistake(
                "The prior is not used: every task that fits counts the same.",
                lambda t, p, s, a, q, V: _guess(t, torch.ones_like(p), s, a, q, V),
            ),
            Mistake("A task that fits one example of several is kept. It must fit all.", _partly),
            Mistake(
                "Only the likeliest task answers. The others that fit have a say as well.",
                _likeliest,
            ),
            Mistake(
                "The shares do not add up to 1: divide by the sum of the priors that are left.",
                lambda t, p, s, a, q, V: (
                    F.one_hot(t[:, q], V).float().T @ (p * (t[:, s] == a).all(dim=1))
                ),
            ),
            Mistake(
                "A task that contradicts an example is out, not just less likely.",
                _soft,
            ),
            Mistake(
                "Only the last example is used.",
                lambda t, p, s, a, q, V: _guess(t, p, s[-1:], a[-1:], q, V),
            ),
        ],
    ),
)


def _score_cases() -> list[Case]:
    rows = []
    for H, P, seed in ((3, 4, 920), (2, 6, 930), (4, 3, 940)):
        scores = 2 * normal(H, 2 * P, 2 * P, seed=seed)
        mask = torch.ones(2 * P, 2 * P, dtype=torch.bool).tril()
        rows.append(case(f"H={H}, P={P}", scores.masked_fill(~mask, float("-inf")).softmax(-1), P))
    return rows


def _stripe(weights: Tensor, P: int, back: int, start: int | None = None) -> Tensor:
    rows = range(P if start is None else start, 2 * P)
    return torch.stack([weights[:, i, i - back] for i in rows]).mean(dim=0)


INDUCTION_SCORE = Exercise(
    name="induction_score",
    title="Find the induction heads",
    level=2,
    minutes=9,
    task=r"""
A model reads $P$ random tokens and then the same $P$ tokens again, so $T = 2P$. An **induction
head** at a token of the second half looks at the token that came right **after** the same token in
the first half, because that is what comes next.

Given the attention weights of $H$ heads, return each head's *induction score*: its weight on that
position, averaged over all queries of the second half.
""",
    stub='''
def induction_score(weights: Float[Tensor, "H T T"], P: int) -> Float[Tensor, "H"]:
    """Mean weight on the token after the earlier occurrence, a number for each head."""
    raise NotImplementedError
''',
    hints=(
        "Take P = 4 and the query at position 5. Where did its token stand before, and where is "
        "the one after it?",
        "A query at i looks at i - P + 1: a stripe parallel to the diagonal. Take it for all i "
        "from P on.",
    ),
    solution='''
def induction_score(weights: Float[Tensor, "H T T"], P: int) -> Float[Tensor, "H"]:
    """Mean weight on the token after the earlier occurrence, a number for each head."""
    query = torch.arange(P, 2 * P)
    return weights[:, query, query - P + 1].mean(dim=1)
''',
    why="Token i of the second half stood at i - P in the first, and what followed it there stands "
    "at i - P + 1. A head that looks at i - P finds its own token again, which tells nothing about "
    "what comes next. The rows of the first half do not count: there is no earlier occurrence.",
    point="An induction head shows as one stripe, P - 1 below the diagonal.",
    check=same_function(
        lambda w, P: _stripe(w, P, P - 1),
        _score_cases,
        [
            Mistake(
                "This is the weight on the same token before. The head looks at the one after it.",
                lambda w, P: _stripe(w, P, P),
            ),
            Mistake(
                "This is the weight on the previous token, the score of the other kind of head.",
                lambda w, P: _stripe(w, P, 1),
            ),
            Mistake(
                "One too far: this is the second token after the earlier occurrence.",
                lambda w, P: _stripe(w, P, P - 2),
            ),
            Mistake(
                "The first half is counted too; its rows have no earlier occurrence.",
                lambda w, P: _stripe(w, P, P - 1, start=P - 1),
            ),
            Mistake(
                "The weights are summed over the queries, not averaged.",
                lambda w, P: P * _stripe(w, P, P - 1),
            ),
            Mistake(
                "The sum is divided by all T queries. Only those of the second half count.",
                lambda w, P: _stripe(w, P, P - 1) / 2,
            ),
            Mistake(
                "Queries and keys have changed places: rows are the queries.",
                lambda w, P: _stripe(w.mT, P, P - 1),
            ),
            Mistake(
                "The heads are averaged too. One number for each head is asked for.",
                lambda w, P: _stripe(w, P, P - 1).mean(),
            ),
        ],
    ),
)


def _rule_cases() -> list[Case]:
    return [
        case(label, torch.tensor(rows))
        for label, rows in (
            ("two texts", [[3, 5, 3, 7, 3, 5, 5, 3], [1, 2, 3, 4, 1, 2, 2, 1]]),
            ("nothing repeats", [[4, 2, 6, 1]]),
            ("one token only", [[2, 2, 2], [0, 0, 0]]),
            ("three texts", [[8, 6, 8, 6, 6], [6, 8, 8, 8, 6], [1, 0, 1, 1, 0]]),
        )
    ]


def _by_search(tokens: Tensor, pick, start: int = 0, shift: int = 1) -> Tensor:
    found = torch.full_like(tokens, -1)
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row):
            places = [j for j in range(t + start) if row[j] == token and j + shift <= t]
            if places:
                found[b, t] = row[pick(places) + shift]
    return found


def _most_common(tokens: Tensor) -> Tensor:
    found = torch.full_like(tokens, -1)
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row):
            after = [row[j + 1] for j in range(t) if row[j] == token]
            if after:
                found[b, t] = max(sorted(set(after)), key=after.count)
    return found


def _leaking(tokens: Tensor) -> Tensor:
    """The token that follows, where the current one has occurred before: the answer itself."""
    found = _by_search(tokens, max)
    nexts = torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1)
    return torch.where(found >= 0, nexts, found)


INDUCTION_RULE = Exercise(
    name="induction_rule",
    title="What an induction head predicts",
    level=3,
    minutes=12,
    task=r"""
Two heads, one above the other, can carry out a rule: *find the latest earlier occurrence of the
current token, and predict the token that followed it there.* In `A B … A` it predicts `B`.

Write the rule for a batch of token ids. At position $t$ let $j < t$ be the latest earlier position
with the same token: the prediction is the token at $j + 1$. Where there is none, it is $-1$. It
must be causal: a prediction uses tokens up to $t$ only.
""",
    stub='''
def induction_rule(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """At each position the token that followed the same token last time, or -1."""
    raise NotImplementedError
''',
    hints=(
        "Make a table (B, T, T) that says for each query t and key j whether the tokens are equal "
        "and j lies before t. Which entry of a row is wanted?",
        "Give each allowed match the number of its column and everything else -1; the maximum of a "
        "row is the latest match. Then gather the token one further on.",
    ),
    solution='''
def induction_rule(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """At each position the token that followed the same token last time, or -1."""
    T = tokens.shape[1]
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)
    match = (tokens[:, :, None] == tokens[:, None, :]) & before
    latest = torch.where(match, torch.arange(T), -1).amax(dim=-1)
    after = tokens.gather(1, (latest + 1).clamp(max=T - 1))
    return torch.where(latest >= 0, after, -1)
''',
    why="The comparison of all tokens with all is an attention pattern. One layer cannot make it: "
    "its keys know a token but not the token before it, and the pattern has to be found at j + 1, "
    "where the next token stands. So a head in the first layer copies to each position what came "
    "before it, and a head in the second compares with that.",
    point="Match the present with what came before, copy what came after: two layers, one rule.",
    check=same_function(
        lambda tokens: _by_search(tokens, max),
        _rule_cases,
        [
            Mistake(
                "This takes the earliest occurrence. The latest one is asked for.",
                lambda x: _by_search(x, min),
            ),
            Mistake(
                "This returns the token that was found, not the one that followed it.",
                lambda x: _by_search(x, max, shift=0),
            ),
            Mistake(
                "The position itself counts as an occurrence, so the prediction is the current "
                "token everywhere.",
                lambda x: x.clone(),
            ),
            Mistake("This takes the token that followed most often, not last time.", _most_common),
            Mistake(
                "It looks ahead: where the token has occurred before, it returns what comes next.",
                _leaking,
            ),
            Mistake(
                "Where there is no earlier occurrence, it returns the first token instead of -1.",
                lambda x: torch.where(
                    _by_search(x, max) >= 0, _by_search(x, max), x[:, :1].expand_as(x)
                ),
            ),
            Mistake(
                "Where there is no earlier occurrence, it returns 0, which is a token. The mark "
                "is -1.",
                lambda x: _by_search(x, max).clamp(min=0),
            ),
        ],
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        TEXT_LOG_PROB,
        LABELS_WITH_EOS,
        WINDOWS,
        LOWEST_LOSS,
        FIX_BLOCK,
        COUNT_GPT2,
        CACHE_WORK,
        LAST_TOKEN,
        FINE_TUNING_LOSS,
        BEST_GUESS,
        INDUCTION_SCORE,
        INDUCTION_RULE,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
