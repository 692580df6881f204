"""Exercises of the chapter "PEFT compared".

What is compared with: layers and optimisers that are built and counted, autograd's own decision
which products to compute, the textbook's formulas for paired samples, and lists that are walked.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llm_anatomy.exercises._engine import (
    Case,
    Chapter,
    Exercise,
    Mistake,
    case,
    mixed,
    one_of,
    same_function,
    same_value,
)
from llm_anatomy.peft import adapter, lora, targets

# --- What trains ---------------------------------------------------------------------------------


def _percent_cases() -> list[Case]:
    rows = [
        ("BERT-base, rank 8", 12, 768, 8, 109_482_240),
        ("GPT-3, rank 1", 96, 12_288, 1, 174_604_259_328),
        ("a small model, rank 4", 3, 32, 4, 60_000),
    ]
    return [case(label, *sizes) for label, *sizes in rows]


def _percent(
    n_layers: int, d_model: int, r: int, n_base: int, matrices: int = 2, sides: int = 2
) -> float:
    return 100 * n_layers * matrices * sides * r * d_model / n_base


def _percent_built(n_layers: int, d_model: int, r: int, n_base: int) -> float:
    """From two layers that LoRA is put on, without memory."""
    with torch.device("meta"):
        block = nn.ModuleDict({n: nn.Linear(d_model, d_model) for n in ("q_proj", "v_proj")})
        lora.add(block, lora.LoRAConfig(r=r))
    return 100 * n_layers * sum(targets.trainable(block).values()) / n_base


LORA_PERCENT = Exercise(
    name="lora_percent",
    title="Trainable per cent of LoRA",
    level=1,
    minutes=5,
    task="""
LoRA of rank $r$ is put on the query and the value projection of each of `n_layers` blocks. Both are
square, $D \\times D$ with $D$ = `d_model`, and LoRA gives each a pair of factors, $r \\times D$ and
$D \\times r$. The base has `n_base` parameters. How many **per cent** of the base's number train?
""",
    stub='''
def lora_percent(n_layers: int, d_model: int, r: int, n_base: int) -> float:
    """Trainable parameters in per cent of the parameters of the base."""
    raise NotImplementedError
''',
    hints=(
        "Count first, divide then. How many matrices get factors, how many factors does one get, "
        "and how many numbers are in a factor?",
        "Each factor has r times D numbers. There are two factors a matrix, two matrices a block. "
        "A share becomes per cent by a factor of 100.",
    ),
    solution='''
def lora_percent(n_layers: int, d_model: int, r: int, n_base: int) -> float:
    """Trainable parameters in per cent of the parameters of the base."""
    trained = n_layers * 2 * (r * d_model + d_model * r)
    return 100 * trained / n_base
''',
    why="The base has on the order of 12 D² numbers a block, LoRA 4 r D: the share falls as 1/D. "
    "That is why the per cents that are quoted for large models cannot be had with small ones.",
    point="LoRA's share of a model falls as the model grows wider.",
    check=same_function(
        _percent_built,
        _percent_cases,
        [
            Mistake("That is the share, not per cent.", lambda *a: _percent(*a) / 100),
            Mistake(
                "One factor of each pair is missing: LoRA has two, r by D and D by r.",
                lambda *a: _percent(*a, sides=1),
            ),
            Mistake(
                "Queries, keys, values and output are counted. Only queries and values have LoRA.",
                lambda *a: _percent(*a, matrices=4),
            ),
            Mistake(
                "That counts a single block.",
                lambda L, D, r, n: _percent(1, D, r, n),
            ),
            Mistake(
                "The update B A has D² numbers, but what trains are its factors.",
                lambda L, D, r, n: 100 * L * 2 * D * D / n,
            ),
            Mistake(
                "The per cent are of base and LoRA together. Here the base alone is the whole.",
                lambda L, D, r, n: 100 * L * 4 * r * D / (n + L * 4 * r * D),
            ),
        ],
        rtol=1e-9,
    ),
)


# --- What training keeps in memory ---------------------------------------------------------------


def _bytes_cases() -> list[Case]:
    rows = [
        ("full fine-tuning", 1_000, 0, 1_000),
        ("a method that adds parameters", 5_000, 120, 120),
        ("a method that trains some of the base", 700, 0, 30),
    ]
    return [case(label, *sizes) for label, *sizes in rows]


def _training_bytes(n_base: int, n_added: int, n_trained: int) -> tuple[int, int, int]:
    """From an optimiser that has taken a step."""
    weights = [nn.Parameter(torch.zeros(n)) for n in (n_base - (n_trained - n_added), n_trained)]
    weights[0].requires_grad_(False)
    adam = torch.optim.AdamW([weights[1]])
    weights[1].sum().backward()
    adam.step()
    averages = [t for state in adam.state.values() for t in state.values() if t.ndim]

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    return size(weights), size([weights[1].grad]), size(averages)


TRAINING_BYTES = Exercise(
    name="training_bytes",
    title="Weights, gradients, averages",
    level=1,
    minutes=6,
    task="""
A base of `n_base` parameters is fine-tuned by a method that adds `n_added` parameters to it;
`n_trained` parameters train, added ones and perhaps some of the base. Everything is in 32-bit
numbers. How many **bytes** do these take once AdamW has made its first step?

* the **weights**, of the base and what was added;
* the **gradients**;
* AdamW's **running averages**, one of the gradient and one of its square.
""",
    stub='''
def training_bytes(n_base: int, n_added: int, n_trained: int) -> tuple[int, int, int]:
    """Bytes of weights, of gradients, and of AdamW's averages."""
    raise NotImplementedError
''',
    hints=(
        "A number of 32 bits takes 4 bytes. Which of the three hold a number for each parameter, "
        "and which for each that trains?",
        "A frozen parameter has no gradient, and the optimiser keeps nothing for it. One that "
        "trains has one gradient and two averages.",
    ),
    solution='''
def training_bytes(n_base: int, n_added: int, n_trained: int) -> tuple[int, int, int]:
    """Bytes of weights, of gradients, and of AdamW's averages."""
    return 4 * (n_base + n_added), 4 * n_trained, 8 * n_trained
''',
    why="Full fine-tuning takes 16 bytes a parameter: 4 for the weight, 4 for its gradient, 8 for "
    "the averages. Freezing saves 12 of the 16 and never the first 4: that is where a base in four "
    "bits comes in. What the backward pass needs of the activations comes on top.",
    point="Of 16 bytes a parameter, freezing saves 12.",
    check=same_function(
        _training_bytes,
        _bytes_cases,
        mixed(
            {
                "": lambda b, a, t: 4 * (b + a),
                "Weights: those that were added are not counted.": lambda b, a, t: 4 * b,
                "Weights: all that trains is added to the base. What trains of the base is in it "
                "already.": lambda b, a, t: 4 * (b + t),
                "Weights: only those that train. The frozen ones are needed to compute.": (
                    lambda b, a, t: 4 * t
                ),
                "Weights: that is their number; each takes 4 bytes.": lambda b, a, t: b + a,
            },
            {
                "": lambda b, a, t: 4 * t,
                "Gradients: a frozen parameter has none.": lambda b, a, t: 4 * (b + a),
                "Gradients: only the added parameters are counted.": lambda b, a, t: 4 * a,
                "Gradients: that is their number; each takes 4 bytes.": lambda b, a, t: t,
            },
            {
                "": lambda b, a, t: 8 * t,
                "Averages: there are two for each parameter that trains.": lambda b, a, t: 4 * t,
                "Averages: the optimiser keeps nothing for a frozen parameter.": (
                    lambda b, a, t: 8 * (b + a)
                ),
                "Averages: that is their number; each takes 4 bytes.": lambda b, a, t: 2 * t,
                "Averages: the gradient is counted again.": lambda b, a, t: 12 * t,
            },
        ),
        names=("weights", "gradients", "averages"),
        rtol=0.0,
    ),
)


# --- How many tasks fit --------------------------------------------------------------------------


def _fit_cases() -> list[Case]:
    rows = [
        ("a base of 440 MB, adapters of 1.2 MB", 440_000_000, 1_200_000, 1_000_000_000),
        ("the disk is full to the last byte", 100, 20, 200),
        ("almost room for one more", 100, 30, 219),
    ]
    return [case(label, *sizes) for label, *sizes in rows]


ADAPTERS_THAT_FIT = Exercise(
    name="adapters_that_fit",
    title="How many tasks fit on a disk?",
    level=1,
    minutes=4,
    task="""
A disk has `room` bytes, enough for the base at least. With full fine-tuning each task needs a model
of `base` bytes. With a parameter-efficient method the base is stored **once**, and each task adds
`adapter` bytes. How many tasks fit, in whole numbers: first with full fine-tuning (the base itself
need not be kept), then with adapters?
""",
    stub='''
def adapters_that_fit(base: int, adapter: int, room: int) -> tuple[int, int]:
    """Tasks that fit as whole models, and tasks that fit as adapters of one base."""
    raise NotImplementedError
''',
    hints=(
        "Without the base an adapter is of no use. How much room is left for adapters once the "
        "base is on the disk?",
        "Both are integer divisions, rounded down: of the whole room by a model, and of what the "
        "base leaves by an adapter.",
    ),
    solution='''
def adapters_that_fit(base: int, adapter: int, room: int) -> tuple[int, int]:
    """Tasks that fit as whole models, and tasks that fit as adapters of one base."""
    return room // base, (room - base) // adapter
''',
    why="Full fine-tuning costs the whole model for each task; adapters cost it once. With a "
    "handful of tasks the difference is small change, with hundreds it decides what can be served.",
    point="The base is paid for once, whatever the number of tasks.",
    check=same_function(
        lambda base, adapter, room: (
            sum(1 for _ in range(base, room + 1, base)),
            sum(1 for _ in range(base + adapter, room + 1, adapter)),
        ),
        _fit_cases,
        mixed(
            {
                "": lambda b, a, r: r // b,
                "Models: that is not a whole number of tasks.": lambda b, a, r: r / b,
                "Models: rounded up; the last one does not fit.": lambda b, a, r: -(-r // b),
                "Models: one is left out, but with full fine-tuning the base need not be kept.": (
                    lambda b, a, r: (r - b) // b
                ),
            },
            {
                "": lambda b, a, r: (r - b) // a,
                "Adapters: the base is not on the disk, and without it none of them works.": (
                    lambda b, a, r: r // a
                ),
                "Adapters: each is stored with a base of its own. One base serves them all.": (
                    lambda b, a, r: r // (b + a)
                ),
                "Adapters: that is not a whole number of tasks.": lambda b, a, r: (r - b) / a,
                "Adapters: rounded up; the last one does not fit.": (
                    lambda b, a, r: -(-(r - b) // a)
                ),
            },
        ),
        names=("tasks as whole models", "tasks as adapters"),
        rtol=0.0,
    ),
)


# --- What the backward pass computes -------------------------------------------------------------


def _products_cases() -> list[Case]:
    rows = [
        ("everything trains", [True] * 4, False),
        ("only the head, the last layer", [False, False, False, True], False),
        ("a soft prompt: no layer, but the input", [False] * 3, True),
        ("only the second of four", [False, True, False, False], False),
        ("the first and the last of five", [True, False, False, False, True], False),
    ]
    return [case(label, list(trains), prompt) for label, trains, prompt in rows]


def _products(trains: list[bool], prompt: bool) -> tuple[int, int, int]:
    """From autograd: each layer notes which of its two products the backward pass asks for."""
    asked = [0, 0]

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, Any]:
            x, weight = ctx.saved_tensors
            asked[0] += ctx.needs_input_grad[0]
            asked[1] += ctx.needs_input_grad[1]
            return gradient @ weight.T, x.T @ gradient

    x = torch.ones(2, 3).requires_grad_(prompt)
    for train in trains:
        x = Product.apply(x, torch.ones(3, 3).requires_grad_(train))
    x.sum().backward()
    return len(trains), *asked


def _to_inputs(trains: list[bool], prompt: bool) -> int:
    return len(trains) if prompt else len(trains) - 1 - trains.index(True)


BACKWARD_PRODUCTS = Exercise(
    name="backward_products",
    title="Which products does training compute?",
    level=3,
    minutes=12,
    task="""
A network is a chain of linear layers without biases. Layer $i$ computes $x_{i+1} = x_i W_i$, one
matrix product. The backward pass has at most two products for it: the gradient of its **weights**,
$x_i^\\top g$, and the gradient of its **input**, $g W_i^\\top$, which is handed on to the layers
below. Neither is computed unless something that trains needs it.

`trains[i]` says whether $W_i$ trains, and `prompt` whether the input $x_0$ does (a soft prompt);
something trains in any case. Count the products of one training step: forward, gradients of
inputs, gradients of weights.
""",
    stub='''
def backward_products(trains: list[bool], prompt: bool) -> tuple[int, int, int]:
    """Products of the forward pass, for gradients of inputs, and for gradients of weights."""
    raise NotImplementedError
''',
    hints=(
        "The gradient of a weight is needed where the weight trains. The gradient of a layer's "
        "input is needed where something before the layer trains.",
        "Find the first layer that trains. Every layer after it must hand the gradient on; it "
        "itself need not, nor any layer before it. With a prompt every layer must.",
    ),
    solution='''
def backward_products(trains: list[bool], prompt: bool) -> tuple[int, int, int]:
    """Products of the forward pass, for gradients of inputs, and for gradients of weights."""
    to_inputs = sum(prompt or any(trains[:i]) for i in range(len(trains)))
    return len(trains), to_inputs, sum(trains)
''',
    why="Freezing a layer saves one product of three. The other two, forward and the gradient that "
    "passes through, remain as long as anything trains below. So LoRA in every layer still costs "
    "two thirds of full fine-tuning, a soft prompt as well, and only a head on top is cheap.",
    point="A frozen layer still hands the gradient on to what trains below it.",
    check=same_function(
        _products,
        _products_cases,
        mixed(
            {"": lambda t, p: len(t)},
            {
                "": _to_inputs,
                "Inputs: as many as layers that train. But a frozen layer too hands the gradient "
                "on to what trains below it.": lambda t, p: sum(t),
                "Inputs: every layer is counted, even where nothing below trains.": (
                    lambda t, p: len(t)
                ),
                "Inputs: the first layer that trains need not hand its gradient on.": (
                    lambda t, p: len(t) if p else len(t) - t.index(True)
                ),
                "Inputs: the prompt lies below all layers and needs every one of their "
                "gradients.": lambda t, p: _to_inputs(t, False) if any(t) else 0,
                "Inputs: a frozen layer is taken for one that stops the gradient.": (
                    lambda t, p: sum(t[1:])
                ),
            },
            {
                "": lambda t, p: sum(t),
                "Weights: a frozen layer has no gradient of its weights.": lambda t, p: len(t),
                "Weights: the prompt is counted, which is no product of a layer.": (
                    lambda t, p: sum(t) + p
                ),
            },
        ),
        names=("forward", "gradients of inputs", "gradients of weights"),
        rtol=0.0,
    ),
)


# --- What inference costs ------------------------------------------------------------------------


def _macs_cases() -> list[Case]:
    rows = [("a square layer", 64, 64, 4, 8), ("up", 20, 80, 3, 5), ("down", 48, 12, 2, 6)]
    return [case(f"{label}, {i} to {o}", i, o, r, m) for label, i, o, r, m in rows]


def _macs(d_in: int, d_out: int, r: int, m: int) -> tuple[int, int, int]:
    """From the weights of layers that are built: one multiplication each for a token."""

    def size(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters() if p.ndim == 2)

    with torch.device("meta"):
        low = lora.LoRALinear(nn.Linear(d_in, d_out), lora.LoRAConfig(r=r))
        bottleneck = adapter.Adapter(nn.Linear(d_in, d_out), adapter.AdapterConfig(width=m))
        merged = nn.Linear(d_in, d_out)
    return size(low), size(merged), size(bottleneck)


INFERENCE_COST = Exercise(
    name="inference_cost",
    title="What a token costs after training",
    level=2,
    minutes=8,
    task="""
A linear layer maps `d_in` features to `d_out`: `d_in * d_out` multiplications for a token. How many
multiplications in matrix products does a token cost

* with LoRA of rank `r` **beside** the layer, as in training;
* with the same LoRA **merged** into the layer;
* with a bottleneck adapter of width `m` **after** the layer, on its `d_out` features?

Biases, scales and activations are not counted.
""",
    stub='''
def inference_cost(d_in: int, d_out: int, r: int, m: int) -> tuple[int, int, int]:
    """Multiplications a token: LoRA beside the layer, LoRA merged, and an adapter after it."""
    raise NotImplementedError
''',
    hints=(
        "Draw the matrices that a token meets on its way. A merged layer is one matrix again: of "
        "which shape?",
        "LoRA goes from d_in to r and from r to d_out. An adapter goes from d_out to m and back.",
    ),
    solution='''
def inference_cost(d_in: int, d_out: int, r: int, m: int) -> tuple[int, int, int]:
    """Multiplications a token: LoRA beside the layer, LoRA merged, and an adapter after it."""
    layer = d_in * d_out
    return layer + r * (d_in + d_out), layer, layer + 2 * m * d_out
''',
    why="W + BA has the shape of W, so a merged LoRA is free. An adapter has an activation between "
    "its matrices, which no single matrix can express: it cannot be merged.",
    point="Merged, LoRA costs nothing; an adapter costs its two matrices for ever.",
    check=same_function(
        _macs,
        _macs_cases,
        mixed(
            {
                "": lambda i, o, r, m: i * o + r * (i + o),
                "Beside: the layer itself is left out, which is computed too.": (
                    lambda i, o, r, m: r * (i + o)
                ),
                "Beside: one of LoRA's two factors is missing, or both are taken as d_in wide.": (
                    lambda i, o, r, m: i * o + 2 * r * i
                ),
                "Beside: that is the product B A, made anew. A token goes through A and then "
                "through B.": lambda i, o, r, m: i * o + r * i * o,
            },
            {
                "": lambda i, o, r, m: i * o,
                "Merged: the update is in the weight now, and costs nothing more.": (
                    lambda i, o, r, m: i * o + r * (i + o)
                ),
                "Merged: the update has the shape of the weight, and the two were added before "
                "any token came.": lambda i, o, r, m: 2 * i * o,
                "Merged: the layer itself remains.": lambda i, o, r, m: 0,
            },
            {
                "": lambda i, o, r, m: i * o + 2 * m * o,
                "Adapter: it reads what the layer puts out: its features are d_out on both ends.": (
                    lambda i, o, r, m: i * o + m * (i + o)
                ),
                "Adapter: the layer itself is left out.": lambda i, o, r, m: 2 * m * o,
                "Adapter: it cannot be merged, for there is an activation inside.": (
                    lambda i, o, r, m: i * o
                ),
                "Adapter: only one of its two matrices is counted.": (
                    lambda i, o, r, m: i * o + m * o
                ),
            },
        ),
        names=("LoRA beside the layer", "LoRA merged", "an adapter"),
        rtol=0.0,
    ),
)


# --- The same rate for all? ----------------------------------------------------------------------


def _rate_cases() -> list[Case]:
    lucky = [[[0.9, 0.8], [0.5, 0.6], [0.5, 0.5]], [[0.5, 0.5], [0.7, 0.9], [0.95, 0.5]]]
    tie = [[[0.75, 0.75], [0.5, 1.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.25], [1.0, 1.0]]]
    three = [
        [[0.6], [0.7], [0.9], [0.5]],
        [[0.9], [0.8], [0.2], [0.7]],
        [[0.1], [0.3], [0.2], [0.4]],
    ]
    rows = [
        ("two methods, two seeds", lucky, [0.001, 0.01, 0.1]),
        ("a tie, and rates that fall", tie, [0.1, 0.01, 0.001]),
        ("three methods, one seed", three, [0.0003, 0.003, 0.03, 0.3]),
    ]
    return [case(label, torch.tensor(scores), rates) for label, scores, rates in rows]


def _rates(
    scores: torch.Tensor, rates: Sequence[float], key: Callable[[float, list[float]], Any]
) -> list[float]:
    """The rate of each method whose scores, one a seed, have the largest key."""
    return [
        max(zip(rates, rows, strict=True), key=lambda pair: key(*pair))[0]
        for rows in scores.tolist()
    ]


CHOOSE_RATES = Exercise(
    name="choose_rates",
    title="A rate for each method",
    level=2,
    minutes=8,
    task="""
`scores` holds validation accuracies of $M$ methods at $R$ learning rates with $S$ seeds each, and
`rates` the $R$ rates in any order. Choose for **each method** the rate with the best **mean** over
its seeds; of equally good rates take the **smaller** one. Return a list of $M$ rates.
""",
    stub='''
def choose_rates(scores: Float[Tensor, "M R S"], rates: list[float]) -> list[float]:
    """The rate of each method that is best on validation data."""
    raise NotImplementedError
''',
    hints=(
        "One choice for each method, and the methods do not look at each other. What is compared "
        "within a method is a mean over seeds, not a seed.",
        "`max` returns the first of several equal ones: walk through the rates in rising order and "
        "the smaller one wins.",
    ),
    solution='''
def choose_rates(scores: Float[Tensor, "M R S"], rates: list[float]) -> list[float]:
    """The rate of each method that is best on validation data."""
    means = scores.mean(dim=-1)  # (M, R)
    rising = sorted(range(len(rates)), key=lambda i: rates[i])
    return [rates[max(rising, key=lambda i: row[i].item())] for row in means]
''',
    why="Small trained parts need far larger steps than a whole model. With one rate for all, the "
    "comparison would say which method likes that rate. The best single seed would reward luck.",
    point="Equal treatment is the same grid for all, not the same rate.",
    check=same_function(
        lambda scores, rates: _rates(scores, rates, lambda r, s: (statistics.fmean(s), -r)),
        _rate_cases,
        [
            Mistake(
                "The best single seed decides. Take the mean over the seeds: one lucky run is no "
                "evidence.",
                lambda scores, rates: _rates(scores, rates, lambda r, s: (max(s), -r)),
            ),
            Mistake(
                "All methods get the same rate, the best on average. Each has its own.",
                lambda scores, rates: [rates[int(scores.mean(dim=(0, 2)).argmax())]] * len(scores),
            ),
            Mistake(
                "Of equally good rates the larger one, or the first in the list, is taken.",
                lambda scores, rates: _rates(scores, rates, lambda r, s: (statistics.fmean(s), r)),
            ),
            Mistake(
                "That is the worst rate of each method.",
                lambda scores, rates: _rates(scores, rates, lambda r, s: -statistics.fmean(s)),
            ),
            Mistake(
                "The worst seed decides. That is cautious, but the mean was asked for.",
                lambda scores, rates: _rates(scores, rates, lambda r, s: (min(s), -r)),
            ),
            Mistake(
                "These are the mean scores, not the rates.",
                lambda scores, rates: scores.mean(dim=-1).amax(dim=-1).tolist(),
            ),
            Mistake(
                "These are the places of the rates in the list, not the rates.",
                lambda scores, rates: scores.mean(dim=-1).argmax(dim=-1).tolist(),
            ),
        ],
    ),
)


# --- The difference, and how sure it is ----------------------------------------------------------


def _paired_cases() -> list[Case]:
    rows = [
        ("five seeds that go up and down together", [0.9, 0.8, 0.95, 0.85, 0.7], 0.02),
        ("three seeds", [0.5, 0.75, 0.625], 0.1),
        ("four seeds, the first is worse", [0.25, 0.5, 0.75, 1.0], -0.125),
    ]
    wobble = (0.01, -0.02, 0.015, -0.005, 0.0)
    return [
        case(label, list(a), [x - gap + w for x, w in zip(a, wobble, strict=False)])
        for label, a, gap in rows
    ]


def _gap(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(a) - statistics.fmean(b)


def _spread(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


PAIRED_DIFFERENCE = Exercise(
    name="paired_difference",
    title="A difference and its standard error",
    level=2,
    minutes=10,
    task="""
Two methods were run with the same seeds: `a[i]` and `b[i]` share the batches and the first weights
of seed $i$. Return the mean of the differences $d_i = a_i - b_i$ and its **standard error**: the
standard deviation of the $d_i$, with $n - 1$ in its denominator, divided by $\\sqrt n$.
""",
    stub='''
def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b over the seeds, and the standard error of this mean."""
    raise NotImplementedError
''',
    hints=(
        "First make one list of differences, seed by seed. From there on the two methods play no "
        "part any more.",
        "torch's `std` divides by n - 1 already. A standard error is smaller than a standard "
        "deviation by the square root of n.",
    ),
    solution='''
def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b over the seeds, and the standard error of this mean."""
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return d.mean().item(), (d.std() / math.sqrt(len(d))).item()
''',
    why="A seed that is hard for both methods lowers both, and the difference does not see it. "
    "Treated as independent, the same numbers would have a larger error and hide what is there.",
    point="Pairing takes out what the seed does to both.",
    check=same_function(
        lambda a, b: (_gap(a, b), statistics.stdev(_spread(a, b)) / math.sqrt(len(a))),
        _paired_cases,
        mixed(
            {
                "": _gap,
                "Difference: its sign is turned round; a - b is asked for.": lambda a, b: _gap(
                    b, a
                ),
                "Difference: its absolute value is taken, so nobody can see which is better.": (
                    lambda a, b: statistics.fmean(map(abs, _spread(a, b)))
                ),
                "Difference: that is the sum over the seeds.": lambda a, b: sum(_spread(a, b)),
            },
            {
                "": lambda a, b: statistics.stdev(_spread(a, b)) / math.sqrt(len(a)),
                "Error: that is the standard deviation of one difference; the mean of n is surer "
                "by the root of n.": lambda a, b: statistics.stdev(_spread(a, b)),
                "Error: the runs are treated as independent. Those of a seed belong together.": (
                    lambda a, b: math.sqrt(
                        (statistics.variance(a) + statistics.variance(b)) / len(a)
                    )
                ),
                "Error: the standard deviation is divided by n instead of its root.": (
                    lambda a, b: statistics.stdev(_spread(a, b)) / len(a)
                ),
                "Error: n stands in the denominator of the variance instead of n - 1.": (
                    lambda a, b: statistics.pstdev(_spread(a, b)) / math.sqrt(len(a))
                ),
                "Error: that is the variance of the mean; its root is missing.": (
                    lambda a, b: statistics.variance(_spread(a, b)) / len(a)
                ),
            },
        ),
        names=("the difference", "the standard error"),
        rtol=1e-6,
    ),
)


def _verdict_cases() -> list[Case]:
    rows = [
        ("far above", 0.1, 0.01, 2.776),
        ("far below", -0.1, 0.01, 2.776),
        ("half an error away, five seeds", 0.01, 0.02, 2.776),
        ("1.1 errors away, five seeds", -0.022, 0.02, 2.776),
        ("1.5 errors away, five seeds", 0.03, 0.02, 2.776),
        ("two and a half errors away, five seeds", -0.05, 0.02, 2.776),
        ("two and a half errors away, twenty seeds", 0.05, 0.02, 2.093),
        ("no difference", 0.0, 0.01, 2.776),
        ("equal in each seed", 0.0, 0.0, 4.303),
    ]
    return [case(label, gap, error, t) for label, gap, error, t in rows]


def _said(gap: float, reach: float) -> str:
    if gap > reach:
        return "better"
    return "worse" if gap < -reach else "undecided"


VERDICT = Exercise(
    name="verdict",
    title="Better, worse, or undecided?",
    level=3,
    minutes=8,
    task="""
From a paired difference `gap` (method minus baseline) and its standard `error`, say what can be
said: "better" if the whole 95 % interval lies above 0, "worse" if it lies below, else "undecided".
The interval reaches `t * error` to either side. With few seeds `t` is not 1.96 but Student's: 4.303
for 3 seeds, 2.776 for 5, 2.093 for 20. It is given.
""",
    stub='''
def verdict(gap: float, error: float, t: float) -> str:
    """One of better, worse and undecided."""
    raise NotImplementedError
''',
    hints=(
        "Where are the two ends of the interval? The answer depends only on where they lie.",
        "Better if the lower end is above 0, worse if the upper end is below 0. An end that is "
        "exactly 0 decides nothing.",
    ),
    solution='''
def verdict(gap: float, error: float, t: float) -> str:
    """One of better, worse and undecided."""
    low, high = gap - t * error, gap + t * error
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
''',
    why="The error itself is estimated, from five numbers and badly. Student's t pays for that "
    "with a wider interval. Undecided is a finding as well: more seeds would be needed to tell.",
    point="With five seeds an interval reaches 2.8 errors, not 2.",
    check=same_function(
        lambda gap, error, t: _said(gap, t * error),
        _verdict_cases,
        [
            Mistake(
                "The sign alone decides. A difference within its error may be chance.",
                lambda gap, error, t: "better" if gap > 0 else "worse" if gap < 0 else "undecided",
            ),
            Mistake(
                "The interval reaches one standard error. For 95 % it has to be t of them.",
                lambda gap, error, t: _said(gap, error),
            ),
            Mistake(
                "1.96 is for many seeds. With few, the error is itself uncertain: use t.",
                lambda gap, error, t: _said(gap, 1.96 * error),
            ),
            Mistake(
                "Better and worse have changed places.",
                lambda gap, error, t: _said(-gap, t * error),
            ),
            Mistake(
                "An interval that only touches 0 decides nothing.",
                lambda gap, error, t: (
                    "better" if gap >= t * error else "worse" if gap <= -t * error else "undecided"
                ),
            ),
        ],
    ),
)


# --- A comparison that is not fair ---------------------------------------------------------------

UNFAIR = Exercise(
    name="unfair",
    title="Which comparison is not fair?",
    level=1,
    minutes=4,
    task="""
Five papers compare their new method with full fine-tuning. Which one favours its own method?

* **a)** Both are run with five seeds; the mean and its standard error are given for both.
* **b)** The rate of both is chosen from the same six, on validation data; the test data are used
  once.
* **c)** For each seed of the new method, the rate with the best **test** accuracy is reported; full
  fine-tuning runs at the rate that its authors recommend.
* **d)** The rates of the two differ by a factor of thirty.
* **e)** The new method trains 0.1 % of the parameters, full fine-tuning all of them.

Answer with a letter.
""",
    stub="""
unfair = ...  # "a", "b", "c", "d" or "e"
""",
    hints=(
        "Ask of each: does one side get to look at something, or to try something, that the other "
        "does not?",
        "The largest of several noisy numbers is too large on average. Where is a largest number "
        "reported, and of what data?",
    ),
    solution="""
unfair = "c"
""",
    why="Choosing on test data reports the luckiest of several draws, and only one side gets to "
    "draw. Different rates are fair if both were chosen in the same way, and different numbers of "
    "parameters are what is compared.",
    point="Whoever chooses on test data reports the luckiest of several draws.",
    check=one_of(
        "c",
        {
            "a": "Seeds and errors for both are what a comparison needs.",
            "b": "The same grid for both, chosen on validation data, is the fair way.",
            "d": "The rates may differ. What counts is how each was chosen.",
            "e": "The number of parameters is what is compared; it favours nobody.",
        },
    ),
)


TUNING_RUNS = Exercise(
    name="tuning_runs",
    title="How many runs does a comparison take?",
    level=1,
    minutes=5,
    task="""
Eleven methods are compared. The rate of each is chosen from **five** by validation accuracy, with
**two** seeds a rate. Then every method is trained with **five** other seeds at its rate. Give three
integers:

* runs to choose the rates;
* runs that are reported;
* runs to choose the rates if also **three** ranks (or widths, or lengths) were tried at each rate,
  by the **six** methods that have one, and the other five have nothing of the kind.
""",
    stub="""
tuning_runs = (
    ...,  # to choose the rates
    ...,  # reported
    ...,  # to choose rates and sizes
)
""",
    hints=(
        "Every combination is a run: methods times rates times seeds. Which of these factors does "
        "the second number not have?",
        "Split the eleven for the third number: six methods have three times as many combinations, "
        "five have as many as before.",
    ),
    solution="""
tuning_runs = (11 * 5 * 2, 11 * 5, (6 * 3 + 5) * 5 * 2)
""",
    why="Most of the work of a fair comparison is never shown: twice as many runs choose as are "
    "reported, and a second setting doubles them once more. A method with more settings has also "
    "had more chances to be lucky.",
    point="A fair comparison spends more on choosing than on what it reports.",
    check=same_value(
        lambda: (
            sum(1 for _ in range(11) for _ in range(5) for _ in range(2)),
            sum(1 for _ in range(11) for _ in range(5)),
            sum(2 * 5 * (3 if method < 6 else 1) for method in range(11)),
        ),
        [
            Mistake(
                "To choose: the two seeds of a rate are not counted.",
                when=lambda got, want: got[0] == 55,
            ),
            Mistake(
                "To choose: the five seeds of the report are counted with it.",
                when=lambda got, want: got[0] in (165, 275, 550),
            ),
            Mistake(
                "Reported: the rates are counted again. Each method is reported at one rate only.",
                when=lambda got, want: got[0] == want[0] and got[1] in (275, 550),
            ),
            Mistake(
                "Reported: each method runs with five seeds.",
                when=lambda got, want: got[0] == want[0] and got[1] in (11, 22),
            ),
            Mistake(
                "Rates and sizes: all eleven are given three sizes, but five methods have none.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == 330,
            ),
            Mistake(
                "Rates and sizes: the five methods without a size are left out.",
                when=lambda got, want: got[:2] == want[:2] and got[2] == 180,
            ),
            Mistake(
                "Rates and sizes: sizes are added to the rates. Every rate is tried with every "
                "size.",
                when=lambda got, want: got[:2] == want[:2] and got[2] in (128, 146, 206),
            ),
        ],
        names=("to choose the rates", "reported", "to choose rates and sizes"),
        rtol=0.0,
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        LORA_PERCENT,
        TRAINING_BYTES,
        ADAPTERS_THAT_FIT,
        BACKWARD_PRODUCTS,
        INFERENCE_COST,
        UNFAIR,
        CHOOSE_RATES,
        TUNING_RUNS,
        PAIRED_DIFFERENCE,
        VERDICT,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
