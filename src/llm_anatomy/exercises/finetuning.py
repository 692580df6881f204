"""Exercises of the chapter "Fine-tuning: pre-train once, adapt many times".

What is compared with: the package's schedule of layers, gradients by autograd, and models that are
built and counted.
"""

import itertools
import math
from collections.abc import Callable

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
from llm_anatomy.models.bert import BERT_BASE, BertForSequenceClassification

# --- How many steps ------------------------------------------------------------------------------

STEPS_OF_EPOCHS = Exercise(
    name="steps_of_epochs",
    title="From epochs to steps",
    level=1,
    minutes=4,
    task="""
A task has 3,668 labelled pairs. We train for 3 epochs in batches of 32; the last batch of an epoch
is smaller, and is kept. The rate rises during the first 10 % of all steps, rounded **down** to a
whole number. Give three integers.
""",
    stub="""
steps_of_epochs = (
    ...,  # steps of one epoch
    ...,  # steps in all
    ...,  # steps of the warm-up
)
""",
    hints=(
        "An optimiser takes one step a batch. How many batches does it take until each pair was "
        "in one of them?",
        "3,668 / 32 is 114.6: after 114 full batches some pairs are left, and they make one more "
        "batch. A tenth of the steps in all is rounded down.",
    ),
    solution="""
per_epoch = math.ceil(3668 / 32)
steps_of_epochs = (per_epoch, 3 * per_epoch, 3 * per_epoch // 10)
""",
    why="The schedule is laid over the steps, so it has to know how many there will be. Loaders "
    "that drop the last batch give 114 steps an epoch; libraries differ in their default.",
    point="Epochs say how often each example is seen; steps say how often the weights change.",
    check=same_value(
        lambda: (115, 345, 34),
        [
            Mistake(
                "Steps of an epoch: the last, smaller batch was dropped. It is kept here.",
                when=lambda got, want: got[0] == 114,
            ),
            Mistake(
                "Steps of an epoch: a fraction. A step is a whole batch, even if a small one.",
                when=lambda got, want: 114 < got[0] < 115,
            ),
            Mistake(
                "Steps of an epoch: those are the pairs. One step takes 32 of them.",
                when=lambda got, want: got[0] == 3668,
            ),
            Mistake(
                "Steps in all: that is one epoch. There are three.",
                when=lambda got, want: got[0] == want[0] and got[1] == want[0],
            ),
            Mistake(
                "Steps in all: the smaller batches were joined over the epochs. Each epoch ends "
                "with its own.",
                when=lambda got, want: got[0] == want[0] and got[1] in (343, 344),
            ),
            Mistake(
                "Warm-up: a tenth of one epoch. It is a tenth of all steps.",
                when=lambda got, want: got[:2] == want[:2] and 11 <= got[2] <= 12,
            ),
            Mistake(
                "Warm-up: not rounded down.",
                when=lambda got, want: got[:2] == want[:2] and 34 < got[2] <= 35,
            ),
        ],
        names=("steps of an epoch", "steps in all", "steps of the warm-up"),
        rtol=0.0,
    ),
)


# --- The schedule --------------------------------------------------------------------------------


def _schedule_cases() -> list[Case]:
    rows = [(1, 20, 0.5, 4), (4, 20, 0.5, 4), (5, 20, 0.5, 4), (12, 20, 0.5, 4), (20, 20, 0.5, 4)]
    rows += [(1, 10, 2e-3, 0), (7, 10, 2e-3, 0), (3, 30, 5e-5, 9), (29, 30, 5e-5, 9)]
    return [
        case(f"step {s} of {n}, peak {p}, warm-up {w}", step=s, n_steps=n, peak=p, warmup=w)
        for s, n, p, w in rows
    ]


def _linear(
    step: int,
    n_steps: int,
    peak: float,
    warmup: int,
    *,
    rise: Callable[[int, int], float] = lambda s, w: s / w,
    fall: Callable[[int, int, int], float] = lambda s, n, w: (n - s) / (n - w),
) -> float:
    return peak * (rise(step, warmup) if step <= warmup else fall(step, n_steps, warmup))


def _linear_but(**parts: Callable) -> Callable[..., float]:
    return lambda step, n_steps, peak, warmup: _linear(step, n_steps, peak, warmup, **parts)


LINEAR_WARMUP = Exercise(
    name="linear_warmup",
    title="Up and down in straight lines",
    level=1,
    minutes=6,
    task="""
BERT's learning rate: it rises in a straight line and reaches `peak` at step `warmup`; from there it
falls in a straight line and is 0 at step `n_steps`. Steps count from **1**. `warmup` may be 0: then
it only falls.
""",
    stub='''
def linear_warmup(step: int, n_steps: int, peak: float, warmup: int) -> float:
    """Learning rate of a step, counted from 1."""
    raise NotImplementedError
''',
    hints=(
        "Two cases. In the first the share of the peak is the share of the warm-up that is over. "
        "How many steps does the second line have?",
        "The second line takes n_steps - warmup steps, and n_steps - step of them are still to "
        "come. Take care that a warm-up of 0 never divides.",
    ),
    solution='''
def linear_warmup(step: int, n_steps: int, peak: float, warmup: int) -> float:
    """Learning rate of a step, counted from 1."""
    if step <= warmup:
        return peak * step / warmup
    return peak * (n_steps - step) / (n_steps - warmup)
''',
    why="Both lines meet at the peak. A tenth of the steps is the usual warm-up: Adam's first "
    "estimates come from few gradients, and the new head is random.",
    point="The rate that is named in a paper is the peak; most steps are taken at less.",
    check=same_function(
        _linear,
        _schedule_cases,
        [
            Mistake(
                "The warm-up starts at 0: its first step changes nothing. Steps count from 1.",
                _linear_but(rise=lambda s, w: (s - 1) / w),
                hint=2,
            ),
            Mistake(
                "It never falls. After the warm-up the second line begins.",
                _linear_but(fall=lambda s, n, w: 1.0),
            ),
            Mistake(
                "The second line is counted from the first step on, so the rate jumps down where "
                "the warm-up ends.",
                _linear_but(fall=lambda s, n, w: (n - s) / n),
                hint=2,
            ),
            Mistake(
                "That is the cosine of the chapter. BERT's rate falls in a straight line.",
                _linear_but(fall=lambda s, n, w: 0.5 * (1 + math.cos(math.pi * (s - w) / (n - w)))),
            ),
            Mistake(
                "There is no warm-up: the rate starts at its peak.",
                _linear_but(rise=lambda s, w: 1.0),
            ),
            Mistake(
                "That is a share of the peak, not yet a rate: `peak` is missing.",
                lambda step, n_steps, peak, warmup: _linear(step, n_steps, 1.0, warmup),
            ),
            Mistake(
                "It never reaches 0. At the last step nothing of the line is left.",
                _linear_but(fall=lambda s, n, w: (n - s + 1) / (n - w)),
                hint=2,
            ),
        ],
        atol=1e-9,
    ),
)


# --- A rate for each layer -----------------------------------------------------------------------


def _rate_cases() -> list[Case]:
    rows = [(0.01, 4, 1 / 2.6), (2e-3, 7, 0.5), (0.3, 2, 0.9), (1.0, 1, 0.25)]
    return [
        case(f"peak {p}, {n} layers, decay {d:.2f}", peak=p, n_layers=n, decay=d)
        for p, n, d in rows
    ]


LAYER_RATES = Exercise(
    name="layer_rates",
    title="A rate for each layer",
    level=1,
    minutes=6,
    task="""
ULMFiT's discriminative rates: the **last** layer, nearest to the output, learns at the rate `peak`;
each layer below it at `decay` times the rate of the layer above. Return the rates as a list, from
the input to the output.
""",
    stub='''
def layer_rates(peak: float, n_layers: int, decay: float) -> list[float]:
    """Learning rates of the layers, that of the embeddings first."""
    raise NotImplementedError
''',
    hints=(
        "Which layer is to change least, and where in the list does it stand? Start from the "
        "layer whose rate is given.",
        "Layer i, counted from 0 at the input, has n_layers - 1 - i layers above it: so often "
        "the peak is multiplied by the decay.",
    ),
    solution='''
def layer_rates(peak: float, n_layers: int, decay: float) -> list[float]:
    """Learning rates of the layers, that of the embeddings first."""
    return [peak * decay ** (n_layers - 1 - i) for i in range(n_layers)]
''',
    why="With 1/2.6 and four layers the embeddings learn at 6 % of the head's rate: what lies near "
    "the input is shared by all tasks, what lies near the output is of one task.",
    point="Layer-wise rates are a soft form of freezing, strongest at the input.",
    check=same_function(
        lambda peak, n_layers, decay: [peak * decay**i for i in range(n_layers)][::-1],
        _rate_cases,
        [
            Mistake(
                "The order is reversed: the embeddings learn fastest and the head slowest.",
                lambda peak, n_layers, decay: [peak * decay**i for i in range(n_layers)],
            ),
            Mistake(
                "The last layer is slowed down as well. Its rate is the peak.",
                lambda peak, n_layers, decay: [
                    peak * decay ** (n_layers - i) for i in range(n_layers)
                ],
                hint=2,
            ),
            Mistake(
                "All layers below the last have the same rate. Each is slower than the one above "
                "it.",
                lambda peak, n_layers, decay: [peak * decay] * (n_layers - 1) + [peak],
            ),
            Mistake(
                "Divided where it should be multiplied: the rates grow towards the input.",
                lambda peak, n_layers, decay: [peak / decay**i for i in range(n_layers)][::-1],
            ),
            Mistake(
                "The rates fall by equal differences. They fall by equal factors.",
                lambda peak, n_layers, decay: [peak * (i + 1) / n_layers for i in range(n_layers)],
            ),
            Mistake(
                "All layers have the peak. That is plain fine-tuning.",
                lambda peak, n_layers, decay: [peak] * n_layers,
            ),
        ],
        atol=1e-9,
    ),
)


# --- Unfreezing ----------------------------------------------------------------------------------


def _unfreeze_cases() -> list[Case]:
    rows = [(1, 4, 10), (10, 4, 10), (11, 4, 10), (25, 4, 10), (31, 4, 10), (99, 4, 10)]
    rows += [(3, 6, 2), (1, 2, 1), (7, 5, 3)]
    return [
        case(f"step {s}, {n} layers, every {e}", step=s, n_layers=n, every=e) for s, n, e in rows
    ]


def _open(n: int, n_layers: int) -> list[bool]:
    n = min(n, n_layers)
    return [False] * (n_layers - n) + [True] * n


LEARNING_LAYERS = Exercise(
    name="learning_layers",
    title="Thaw from the top",
    level=2,
    minutes=7,
    task="""
Gradual unfreezing: in the first `every` steps only the last layer learns, in the next `every` steps
the last two, and so on, until all do. Return for each layer, from the input to the output, whether
it learns in a step. Steps count from 1.
""",
    stub='''
def learning_layers(step: int, n_layers: int, every: int) -> list[bool]:
    """True for each layer that learns in this step, the embeddings first."""
    raise NotImplementedError
''',
    hints=(
        "Find first how many layers learn in a step; then which ones they are. Look at the steps "
        "`every` and `every` + 1.",
        "In step 1 one layer learns, in step every + 1 a second one. A whole division of step - 1 "
        "counts the periods that are over. There are never more than n_layers.",
    ),
    solution='''
def learning_layers(step: int, n_layers: int, every: int) -> list[bool]:
    """True for each layer that learns in this step, the embeddings first."""
    n = 1 + (step - 1) // every
    return [i >= n_layers - n for i in range(n_layers)]
''',
    why="What has thawed goes on learning: the layers add up. In another scheme, chain-thaw, each "
    "layer is trained by itself in turn.",
    point="The head comes first because it is random; what it sends down at first is noise.",
    check=same_function(
        lambda step, n_layers, every: _open(math.ceil(step / every), n_layers),
        _unfreeze_cases,
        [
            Mistake(
                "The order is reversed: the embeddings learn first, and the head last.",
                lambda step, n_layers, every: _open(math.ceil(step / every), n_layers)[::-1],
            ),
            Mistake(
                "Only the layer that has just thawed learns. Those above it go on learning.",
                lambda step, n_layers, every: [
                    i == max(0, n_layers - math.ceil(step / every)) for i in range(n_layers)
                ],
            ),
            Mistake(
                "One step off: a new layer joins in the last step of the old period.",
                lambda step, n_layers, every: _open(1 + step // every, n_layers),
                hint=2,
            ),
            Mistake(
                "Nothing learns in the first period. The last layer learns from the first step on.",
                lambda step, n_layers, every: _open((step - 1) // every, n_layers),
                hint=2,
            ),
            Mistake(
                "All layers learn from the start. That is plain fine-tuning.",
                lambda step, n_layers, every: [True] * n_layers,
            ),
            Mistake(
                "It says which layers are frozen. Asked is which ones learn.",
                lambda step, n_layers, every: [
                    not on for on in _open(math.ceil(step / every), n_layers)
                ],
            ),
        ],
    ),
)


# --- Labels of words -----------------------------------------------------------------------------


def _label_cases() -> list[Case]:
    rows = [
        ([None, 0, 1, 1, 2, None], [3, 1, 4]),
        ([None, 0, 0, 0, 1, 2, 2, None, None], [2, 5, 1]),
        ([None, 0, 1, 2, None], [1, 1, 2]),
    ]
    return [
        case(f"{len(tags)} words in {len(owners)} tokens", list(owners), list(tags))
        for owners, tags in rows
    ]


def _first(owners: list, i: int) -> bool:
    return owners[i] is not None and owners[i] not in owners[:i]


def _labels(pick: Callable[[list, int], bool], special: int = -100, other: int = -100) -> Callable:
    def labels(owners: list, tags: list) -> list[int]:
        return [
            special if word is None else tags[word] if pick(owners, i) else other
            for i, word in enumerate(owners)
        ]

    return labels


WORD_LABELS = Exercise(
    name="word_labels",
    title="One label a word, several tokens",
    level=2,
    minutes=7,
    task="""
A tagging task has one tag for each **word**, but a tokenizer may cut a word into several tokens.
`owners` says for each token the number of its word, or None for `[CLS]`, `[SEP]` and padding.
BERT's way: the **first** token of a word carries its tag; all other tokens get $-100$ and do not
count in the loss. Return the labels of the tokens.
""",
    stub='''
def word_labels(owners: list[int | None], tags: list[int]) -> list[int]:
    """A label for each token, -100 where none is asked for."""
    raise NotImplementedError
''',
    hints=(
        "Three kinds of token: a special one, the first of a word, a later one of a word. How can "
        "you see that a token is the first of its word?",
        "Walk along the tokens and remember the word of the token before. Where the word is "
        "another one, and not None, its tag belongs.",
    ),
    solution='''
def word_labels(owners: list[int | None], tags: list[int]) -> list[int]:
    """A label for each token, -100 where none is asked for."""
    labels, before = [], None
    for word in owners:
        asked = word is not None and word != before
        labels.append(tags[word] if asked else -100)
        before = word
    return labels
''',
    why="PyTorch's cross-entropy ignores -100. If every piece had the tag, long words would "
    "count more often than short ones, and B-PER would be said twice of one name.",
    point="A word counts once, however many tokens it is cut into.",
    check=same_function(
        _labels(_first),
        _label_cases,
        [
            Mistake(
                "Every token of a word has the tag, so a word that is cut counts several times.",
                _labels(lambda o, i: True),
            ),
            Mistake(
                "The last token of a word carries its tag. BERT takes the first.",
                _labels(lambda o, i: o[i] not in o[i + 1 :]),
            ),
            Mistake(
                "Special tokens have the label 0. They would be trained as a class of their own.",
                _labels(_first, special=0),
            ),
            Mistake(
                "Later tokens of a word have the label 0, that of one of the classes.",
                _labels(_first, other=0),
            ),
            Mistake(
                "Special tokens and later pieces have the label 0: all of them would count.",
                _labels(_first, special=0, other=0),
            ),
            Mistake(
                "These are the tags of the words: one label a token is needed.",
                lambda owners, tags: tags,
            ),
        ],
    ),
)


# --- The loss of a tagger ------------------------------------------------------------------------


def _tagging_cases() -> list[Case]:
    rows = []
    for B, T, C, seed in ((2, 5, 3, 0), (3, 4, 6, 1), (4, 7, 2, 2)):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, C, (B, T), generator=g)
        labels[:, 0] = -100
        for b in range(B):
            labels[b, T - 1 - b % (T - 2) :] = -100
        rows.append(case(f"B={B}, T={T}, C={C}", normal(B, T, C, seed=seed), labels))
    return rows


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")  # (B, T)


TAGGING_LOSS = Exercise(
    name="tagging_loss",
    title="The loss of a tagger",
    level=2,
    minutes=8,
    task="""
Write the loss of a tagging head: the mean of $-\\log p(\\text{label})$ over all tokens of the batch
that have a label. A label of $-100$ marks `[CLS]`, `[SEP]`, padding and later pieces of a word;
such tokens do not count. Do not use `F.cross_entropy` or `F.nll_loss`.
""",
    stub='''
def tagging_loss(
    logits: Float[Tensor, "B T C"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean over the tokens that have a label, in nats."""
    raise NotImplementedError
''',
    hints=(
        "First choose the tokens that count; a mask turns (B, T) into a plain list of them. Then "
        "no other token can get in.",
        "labels != -100 is the mask. Index logits and labels by it, take the log-softmax over the "
        "classes, gather the entry of each label, and average.",
    ),
    solution='''
def tagging_loss(
    logits: Float[Tensor, "B T C"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean over the tokens that have a label, in nats."""
    counted = labels != -100
    log_p = logits[counted].log_softmax(dim=-1)  # (N, C)
    return -log_p.gather(-1, labels[counted][:, None]).mean()
''',
    why="Padding that counts would be the largest class of many batches: the loss falls nicely, "
    "because the model learns to tag padding.",
    point="The mean is over the tokens that count, not over all, and not over rows.",
    check=same_function(
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        _tagging_cases,
        [
            Mistake(
                "Padding counts, as if its label were the first class.",
                lambda logits, labels: _each(logits, labels).mean(),
            ),
            Mistake(
                "Padding counts, as if its label were the last class: -100 was used as an index.",
                lambda logits, labels: F.cross_entropy(
                    logits.flatten(0, 1),
                    labels.where(labels >= 0, torch.tensor(logits.shape[2] - 1)).flatten(),
                ),
            ),
            Mistake(
                "The sum is right, but it is divided by all positions, padding included.",
                lambda logits, labels: (_each(logits, labels) * (labels >= 0)).mean(),
            ),
            Mistake(
                "That is the sum over the tokens. The mean is asked for.",
                lambda logits, labels: (_each(logits, labels) * (labels >= 0)).sum(),
            ),
            Mistake(
                "First the mean of each row, then the mean of the rows: tokens of short texts "
                "count more than others.",
                lambda logits, labels: (
                    (_each(logits, labels) * (labels >= 0)).sum(1) / (labels >= 0).sum(1)
                ).mean(),
            ),
            Mistake(
                "The sign is missing: log p is negative, a loss is not.",
                lambda logits, labels: (
                    -(_each(logits, labels) * (labels >= 0)).sum() / (labels >= 0).sum()
                ),
            ),
        ],
    ),
)


# --- Which epoch ---------------------------------------------------------------------------------


def _epoch_cases() -> list[Case]:
    rows = [
        ([0.61, 0.78, 0.84, 0.82], [0.60, 0.80, 0.79, 0.83]),
        ([0.70, 0.74, 0.74, 0.71, 0.69], [0.71, 0.70, 0.75, 0.76, 0.68]),
        ([0.55, 0.52, 0.54], [0.51, 0.56, 0.57]),
    ]
    return [case(f"{len(dev)} epochs", list(dev), list(test)) for dev, test in rows]


def _argmax(scores: list[float]) -> int:
    return scores.index(max(scores))


BEST_EPOCH = Exercise(
    name="best_epoch",
    title="Which epoch do you report?",
    level=1,
    minutes=5,
    task="""
After each epoch a model was scored on development data and on test data. Choose the epoch and
report its score in the way that stays an honest estimate for new data. Of equally good epochs take
the earliest. Return the number of the epoch, counted from **1**, and the reported score.
""",
    stub='''
def best_epoch(development: list[float], test: list[float]) -> tuple[int, float]:
    """Number of the epoch, from 1, and the score to report."""
    raise NotImplementedError
''',
    hints=(
        "One of the two lists is there to decide, the other to report. Which one would be spoiled "
        "by being looked at for a decision?",
        "Decide by the development scores alone. Then look up what the test says of that epoch, "
        "be it good or bad.",
    ),
    solution='''
def best_epoch(development: list[float], test: list[float]) -> tuple[int, float]:
    """Number of the epoch, from 1, and the score to report."""
    i = max(range(len(development)), key=lambda i: development[i])
    return i + 1, test[i]
''',
    why="The largest of several noisy scores is too large on average. Whoever chooses on the test "
    "set reports luck, and a rate, a seed or a number of epochs is a choice as well.",
    point="What has been used to choose cannot be used to judge.",
    check=same_function(
        lambda dev, test: (_argmax(dev) + 1, test[_argmax(dev)]),
        _epoch_cases,
        [
            Mistake(
                "The epoch was picked on the test set, so its score there is too good to be true.",
                lambda dev, test: (_argmax(test) + 1, max(test)),
            ),
            Mistake(
                "The development score is reported. It was used to choose, so it flatters.",
                lambda dev, test: (_argmax(dev) + 1, max(dev)),
            ),
            Mistake(
                "The last epoch is reported. It need not be the best on the development data.",
                lambda dev, test: (len(dev), test[-1]),
            ),
            Mistake(
                "The epoch is right, the score is the best of the test, which comes from another "
                "one.",
                lambda dev, test: (_argmax(dev) + 1, max(test)),
            ),
            Mistake(
                "Epochs count from 1 here.",
                lambda dev, test: (_argmax(dev), test[_argmax(dev)]),
                hint=2,
            ),
            Mistake(
                "Of equally good epochs the latest is taken. Ask for the earliest.",
                lambda dev, test: (
                    len(dev) - _argmax(dev[::-1]),
                    test[len(dev) - 1 - _argmax(dev[::-1])],
                ),
                hint=2,
            ),
            Mistake(
                "The worst epoch is chosen. These are scores, not losses.",
                lambda dev, test: (dev.index(min(dev)) + 1, test[dev.index(min(dev))]),
            ),
        ],
        names=("the epoch", "the score"),
    ),
)


# --- What learns ---------------------------------------------------------------------------------


def _trainable() -> tuple[int, int, int, int]:
    """From a model that is built and counted."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BERT_BASE)

    def size(*parts: torch.nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    head = size(model.classifier)
    pooled = head + size(model.pooler)
    return head, pooled, pooled + size(model.bert.blocks[-1]), size(model)


TRAINABLE_COUNTS = Exercise(
    name="trainable_counts",
    title="How much of BERT learns?",
    level=2,
    minutes=8,
    task="""
BERT-base with two classes: $D = 768$, $F = 3072$, 12 blocks. How many parameters learn

* if only the new linear layer on top of the pooler does;
* if the pooler, one layer from $D$ to $D$, does as well;
* if also the last block does: four attention projections, the feed-forward layer, two norms (gain
  and bias);
* if everything does? (The encoder and its pooler have 109,482,240.)

Every layer has a bias.
""",
    stub="""
trainable_counts = (
    ...,  # the new layer
    ...,  # and the pooler
    ...,  # and the last block
    ...,  # everything
)
""",
    hints=(
        "A linear layer from m to n features has m times n weights and n biases. Add the parts up "
        "one by one.",
        "The block: 4 (D² + D), then 2 D F + F + D, then 4 D. The first three answers are each "
        "contained in the next.",
    ),
    solution="""
D, d_ff = 768, 3072
new = 2 * D + 2
pooled = new + D * D + D
block = 4 * (D * D + D) + (2 * D * d_ff + d_ff + D) + 4 * D
trainable_counts = (new, pooled, pooled + block, 109_482_240 + new)
""",
    why="0.0014 %, 0.5 %, 7 % and all. Between head and everything there is a wide range, in which "
    "the methods of the next chapter live.",
    point="The new layer of a classifier is a vanishing part of the model.",
    check=same_value(
        _trainable,
        [
            Mistake(
                "The new layer: its biases are missing, one for each class.",
                when=lambda got, want: got[0] == 1536,
            ),
            Mistake(
                "The new layer: with two classes it has two outputs, not one.",
                when=lambda got, want: got[0] in (768, 769),
            ),
            Mistake(
                "The pooler: its biases are missing, one for each of its outputs.",
                when=lambda got, want: got[0] == want[0] and got[1] == want[1] - 768,
            ),
            Mistake(
                "The pooler by itself. The new layer learns as well.",
                when=lambda got, want: got[0] == want[0] and got[1] == want[1] - want[0],
            ),
            Mistake(
                "The last block: its norms are missing, two with a gain and a bias each.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == want[2] - 4 * 768,
            ),
            Mistake(
                "The last block: one of the four attention projections is missing.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == want[2] - 768 * 769,
            ),
            Mistake(
                "The last block: it has no biases.",
                when=lambda got, want: (
                    got[:2] == want[:2] and want[2] - got[2] == 4 * 768 + 3072 + 768
                ),
            ),
            Mistake(
                "Everything: the new layer is not among the 109,482,240.",
                when=lambda got, want: got[:3] == want[:3] and got[3] == 109_482_240,
            ),
        ],
        names=("the new layer", "with the pooler", "with the last block", "everything"),
        rtol=0.0,
    ),
)


# --- Several tasks at once -----------------------------------------------------------------------


def _mixture_cases() -> list[Case]:
    rows = [([400_000, 3_000, 9_000], 10_000), ([50, 50, 200, 700], 1000), ([90, 60, 30], 40)]
    return [case(f"sizes {s}, limit {k}", list(s), k) for s, k in rows]


def _shares(parts: list) -> list[float]:
    return [part / sum(parts) for part in parts]


MIXTURE_RATES = Exercise(
    name="mixture_rates",
    title="Who is asked how often?",
    level=2,
    minutes=6,
    task="""
Several tasks are trained together, and each step draws one of them. T5 draws a task in proportion
to its number of examples, but counts no task as larger than a limit:
$r_m = \\min(e_m, K) / \\sum_n \\min(e_n, K)$. Return the rates.
""",
    stub='''
def mixture_rates(sizes: list[int], limit: int) -> list[float]:
    """Probability of each task."""
    raise NotImplementedError
''',
    hints=(
        "First make every size as large as it may count, and only then turn the sizes into shares.",
        "Take the smaller of size and limit for each task. The shares are these numbers, divided "
        "by the sum of these numbers.",
    ),
    solution='''
def mixture_rates(sizes: list[int], limit: int) -> list[float]:
    """Probability of each task."""
    counted = [min(size, limit) for size in sizes]
    return [part / sum(counted) for part in counted]
''',
    why="Without a limit a task with 400,000 examples takes 97 % of the steps, and the small ones "
    "are hardly seen. With equal shares the small ones are repeated until they are known by heart.",
    point="A mixture is a choice: it decides which task pays for which.",
    check=same_function(
        lambda sizes, limit: _shares([min(size, limit) for size in sizes]),
        _mixture_cases,
        [
            Mistake(
                "The limit is not used: large tasks crowd out the small ones.",
                lambda sizes, limit: _shares(sizes),
            ),
            Mistake(
                "All tasks have the same rate, whatever their size.",
                lambda sizes, limit: [1 / len(sizes)] * len(sizes),
            ),
            Mistake(
                "These are counts. Divide by their sum to get rates.",
                lambda sizes, limit: [min(size, limit) for size in sizes],
            ),
            Mistake(
                "Divided by the sum of the full sizes, so the rates do not sum to 1.",
                lambda sizes, limit: [min(size, limit) / sum(sizes) for size in sizes],
            ),
            Mistake(
                "The larger of size and limit is taken. The limit is an upper one.",
                lambda sizes, limit: _shares([max(size, limit) for size in sizes]),
            ),
        ],
    ),
)


# --- Adam's first step ---------------------------------------------------------------------------


def _move_cases() -> list[Case]:
    rows = []
    for D, K, rate, seed in ((5, 3, 0.1, 0), (9, 2, 2e-3, 1), (4, 6, 0.5, 2)):
        x = normal(D, seed=seed)
        rows.append(case(f"D={D}, K={K}, rate {rate}", x, normal(K, seed=seed + 9), rate))
    return rows


def _moved(x: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """By Adam itself."""
    weight = torch.zeros(len(gradient), len(x), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=rate, eps=1e-12)
    weight.grad = torch.outer(gradient, x).double()
    adam.step()
    return (weight.detach() @ x.double()).float()


ADAM_MOVE = Exercise(
    name="adam_move",
    title="How far does one step of Adam go?",
    level=3,
    minutes=12,
    task="""
A layer $y = xW$ has $D$ inputs and $K$ outputs, and `gradient` is the gradient of the loss with
respect to $y$. Adam takes its **first** step with a learning rate `rate`. After bias correction
both of its averages hold the first gradient alone, so each weight moves by the rate, against the
sign of its own gradient ($\\epsilon$ is negligible). By how much does $y$ change, for the same $x$?
""",
    stub='''
def adam_move(
    x: Float[Tensor, "D"], gradient: Float[Tensor, "K"], rate: float
) -> Float[Tensor, "K"]:
    """Change of y after the first step."""
    raise NotImplementedError
''',
    hints=(
        "The gradient of weight (d, k) is a product of two numbers. What is its sign, and what "
        "does the change of that weight add to output k?",
        "Weight (d, k) has the gradient x[d] gradient[k]. It moves by the rate times minus the "
        "sign of that. Multiplied by x[d], sign and x[d] make an absolute value: sum it over d.",
    ),
    solution='''
def adam_move(
    x: Float[Tensor, "D"], gradient: Float[Tensor, "K"], rate: float
) -> Float[Tensor, "K"]:
    """Change of y after the first step."""
    return -rate * gradient.sign() * x.abs().sum()
''',
    why="All D terms have the same sign, so they add up: the move grows with the width, and a rate "
    "that suits 64 features is twelve times too large for 768. The size of the gradient drops out.",
    point="Adam's step does not know how wide a layer is; the rate has to.",
    check=same_function(
        _moved,
        _move_cases,
        [
            Mistake(
                "That is gradient descent: the size of the gradient counts. Adam divides it away.",
                lambda x, g, rate: -rate * g * x.square().sum(),
            ),
            Mistake(
                "It goes uphill: the sign is that of the gradient.",
                lambda x, g, rate: rate * g.sign() * x.abs().sum(),
            ),
            Mistake(
                "The inputs are added with their signs, so they cancel. Each weight's own gradient "
                "has the sign of x[d] in it.",
                lambda x, g, rate: -rate * g.sign() * x.sum(),
            ),
            Mistake(
                "The Euclidean length of x: that would be so if the whole gradient were divided by "
                "its length. Adam divides each weight's gradient by itself.",
                lambda x, g, rate: -rate * g.sign() * x.norm(),
            ),
            Mistake(
                "The mean over the inputs. The output is a sum over them, so width counts.",
                lambda x, g, rate: -rate * g.sign() * x.abs().mean(),
            ),
            Mistake(
                "The sign of the weight's gradient is right, the input that it meets again is "
                "forgotten.",
                lambda x, g, rate: -rate * g.sign() * x.sign().abs().sum(),
            ),
        ],
    ),
)


# --- num_labels ----------------------------------------------------------------------------------

NUM_LABELS_AFTER = Exercise(
    name="num_labels_after",
    title="A number, set afterwards",
    level=1,
    minutes=3,
    task="""
A script loads `BertModel`, the encoder without a head, and then writes
`model.config.num_labels = 2`. What has changed?

* **a)** The model has a new classifier with two outputs, its weights random.
* **b)** The pooler gives two numbers now.
* **c)** A number in a configuration that this model never reads again: no layer, no output.
* **d)** Calling the model raises an error, since its labels are missing.
* **e)** The model is loaded again at the next call, with a head.

Answer with a letter.
""",
    stub="""
num_labels_after = ...  # "a", "b", "c", "d" or "e"
""",
    hints=(
        "When is a model's list of layers made: when it is built, or when it is called?",
        "Layers are made in __init__. Ask yourself who would read the new number after that.",
    ),
    solution="""
num_labels_after = "c"
""",
    why="A configuration is a plan, and the building stands already. The head belongs to another "
    "class, `AutoModelForSequenceClassification`, and its size is passed when it is built.",
    point="Choose the class with the head, and say the number of labels when it is loaded.",
    check=one_of(
        "c",
        {
            "a": "No layer is made by writing to a configuration. Layers are made when a model is "
            "built.",
            "b": "The pooler is a layer from D to D, and its weights stay as they are.",
            "d": "It runs as before, which is worse: nothing says that the head is missing.",
            "e": "Nothing watches the configuration. A model is loaded once.",
        },
    ),
)


# --- Find the bugs -------------------------------------------------------------------------------

_BUGS = {
    "padding": "Labels of -100 count, as if they were the first class.",
    "sum": "The loss is a sum over the examples, so the step grows with the batch.",
    "frozen": "The body moves although it is frozen.",
    "scale": "The head got the body's smaller rate, and the body the full one.",
}


def _step(
    body: Tensor,
    head: Tensor,
    x: Tensor,
    labels: Tensor,
    rate: float,
    body_scale: float,
    frozen: bool,
    *,
    bugs: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The gradients by hand."""
    counted = torch.ones_like(labels, dtype=torch.bool) if "padding" in bugs else labels >= 0
    features = (x @ body).tanh()
    p = (features @ head).softmax(dim=-1)
    error = (p - F.one_hot(labels.clamp(min=0), p.shape[1])) * counted[:, None]
    error = error if "sum" in bugs else error / counted.sum()
    g_head = features.T @ error
    g_body = x.T @ ((error @ head.T) * (1 - features.square()))
    of_body, of_head = (1.0, body_scale) if "scale" in bugs else (body_scale, 1.0)
    if frozen and "frozen" not in bugs:
        of_body = 0.0
    return body - rate * of_body * g_body, head - rate * of_head * g_head


def _step_cases() -> list[Case]:
    rows = []
    for N, D, W, C, scale, frozen, seed in (
        (6, 4, 5, 3, 0.4, False, 0),
        (5, 3, 4, 2, 0.1, True, 10),
        (7, 5, 3, 4, 0.5, True, 20),
        (4, 2, 6, 3, 0.3, False, 30),
    ):
        labels = torch.arange(N) % C
        labels[1::3] = -100
        rows.append(
            case(
                f"N={N}, D={D}, F={W}, C={C}, frozen={frozen}",
                normal(D, W, seed=seed),
                normal(W, C, seed=seed + 1),
                normal(N, D, seed=seed + 2),
                labels,
                0.2,
                scale,
                frozen,
            )
        )
    return rows


FIX_TUNE_STEP = Exercise(
    name="fix_tune_step",
    title="Four bugs in one step",
    level=3,
    minutes=15,
    task="""
A step of fine-tuning by plain gradient descent: a pre-trained `body` $(D, F)$ with tanh, and a new
`head` $(F, C)$. It should

* take the **mean** cross-entropy over the examples that have a label ($-100$ marks the others);
* move the head at the full rate, and the body at `body_scale` times the rate;
* leave the body exactly as it is where `frozen` is True.

The code runs, and it has four bugs. Repair it.
""",
    stub='''
def fix_tune_step(
    body: Float[Tensor, "D F"],
    head: Float[Tensor, "F C"],
    x: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    rate: float,
    body_scale: float,
    frozen: bool,
) -> tuple[Float[Tensor, "D F"], Float[Tensor, "F C"]]:
    """The body and the head after one step."""
    body, head = body.clone().requires_grad_(), head.clone().requires_grad_()
    logits = (x @ body).tanh() @ head  # (N, C)
    loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="sum")
    loss.backward()
    if frozen:
        body.requires_grad_(False)
    with torch.no_grad():
        body = body - rate * body.grad
        head = head - rate * body_scale * head.grad
    return body, head
''',
    hints=(
        "Go through the three demands one by one, and ask of each line which of them it breaks. "
        "When does a gradient come into being, and what does freezing after that change?",
        "The loss: two bugs, one in its labels and one in its reduction. The update: one rate "
        "stands at the wrong part. And a gradient that is there already is used, frozen or not.",
    ),
    solution='''
def fix_tune_step(
    body: Float[Tensor, "D F"],
    head: Float[Tensor, "F C"],
    x: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    rate: float,
    body_scale: float,
    frozen: bool,
) -> tuple[Float[Tensor, "D F"], Float[Tensor, "F C"]]:
    """The body and the head after one step."""
    body, head = body.clone().requires_grad_(not frozen), head.clone().requires_grad_()
    logits = (x @ body).tanh() @ head  # (N, C)
    F.cross_entropy(logits, labels, ignore_index=-100).backward()
    with torch.no_grad():
        head = head - rate * head.grad
        if not frozen:
            body = body - rate * body_scale * body.grad
    return body.detach(), head
''',
    why="Frozen means that no gradient is made, so it must be said before the backward pass. An "
    "optimiser that already holds a gradient, momentum or weight decay moves the parameter all "
    "the same.",
    point="A frozen part is bit for bit the same after training: assert it.",
    check=same_function(
        _step,
        _step_cases,
        [
            Mistake(
                " ".join(text for bug, text in _BUGS.items() if bug in left),
                lambda *args, left=left: _step(*args, bugs=left),
                untouched=len(left) == len(_BUGS),
            )
            for n in range(1, 5)
            for left in itertools.combinations(_BUGS, n)
        ],
        names=("the body", "the head"),
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        TRAINABLE_COUNTS,
        NUM_LABELS_AFTER,
        BEST_EPOCH,
        STEPS_OF_EPOCHS,
        LINEAR_WARMUP,
        ADAM_MOVE,
        LAYER_RATES,
        LEARNING_LAYERS,
        FIX_TUNE_STEP,
        WORD_LABELS,
        TAGGING_LOSS,
        MIXTURE_RATES,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
