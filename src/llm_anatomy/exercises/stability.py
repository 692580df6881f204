"""Exercises of the chapter "Why deep networks fail to train".

What is compared with: autograd, numerical integration and numpy-like loops in float64, or torch's
own routines.
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
    case,
    mixed,
    normal,
    same_function,
    same_value,
)

# --- A chain of factors --------------------------------------------------------------------------

SIGMOID_CHAIN = Exercise(
    name="sigmoid_chain",
    title="Ten sigmoids in a row",
    level=1,
    minutes=5,
    task=r"""
A chain of ten scalar layers, $h_l = \sigma(w\, h_{l-1})$ with the sigmoid $\sigma$. Its gradient
$\left|\mathrm{d}h_{10} / \mathrm{d}h_0\right|$ is a product of ten factors.

Give three numbers: the largest value that this gradient can have by the bound on each factor, for
$w = 1$; the same for $\tanh$ in place of the sigmoid; and the size of $w$ up to which the bound
does not let the gradient of the **sigmoid** chain grow with depth.
""",
    stub="""
sigmoid_chain = (
    ...,  # bound of ten sigmoid layers, w = 1
    ...,  # bound of ten tanh layers, w = 1
    ...,  # the sigmoid chain's gradient cannot grow while |w| is at most this
)
""",
    hints=(
        "Each layer contributes one factor: the derivative of the activation times w. What is the "
        "largest value that each derivative takes, and at which input?",
        "The sigmoid's derivative is s (1 - s), at most one quarter, and that of tanh is at most "
        "one. Ten factors are multiplied. For the last number, ask when a quarter of w reaches 1.",
    ),
    solution="""
sigmoid_chain = (
    0.25**10,
    1.0**10,
    1 / 0.25,
)
""",
    why="The derivative of the sigmoid is s(1 - s), largest at s = 1/2, where it is 1/4; that of "
    "tanh is 1 - tanh², at most 1. The chain rule multiplies one factor |w| times the derivative a "
    "layer. So with w = 1 ten sigmoids pass on less than one part in a million, and tanh may pass "
    "on everything, though only at inputs near 0. Up to |w| = 4 each sigmoid factor is at most 1. "
    "A larger w need not help: it also pushes the inputs to where the derivative is tiny.",
    point="With a sigmoid and weights of one, every layer costs at least a factor of four.",
    check=same_value(
        (0.25**10, 1.0, 4.0),
        [
            Mistake(
                "The ten factors are added. The chain rule multiplies them.",
                when=lambda got, _: math.isclose(got[0], 2.5),
            ),
            Mistake(
                "The first number is the bound of one layer. There are ten.",
                when=lambda got, _: math.isclose(got[0], 0.25),
            ),
            Mistake(
                "One half is the sigmoid's value at 0. Its derivative there is a quarter.",
                when=lambda got, _: math.isclose(got[0], 0.5**10, rel_tol=1e-2),
            ),
            Mistake(
                "The power is off by one: ten layers are ten factors, from h_0 to h_10.",
                when=lambda got, _: any(
                    math.isclose(got[0], 0.25**n, rel_tol=1e-2) for n in (9, 11)
                ),
            ),
            Mistake(
                "The derivative of tanh is not that of the sigmoid: it is four times as high.",
                when=lambda got, _: math.isclose(got[1], 0.25**10, rel_tol=1e-2),
            ),
            Mistake(
                "The last number is turned over: the weight has to make up for a quarter.",
                when=lambda got, _: math.isclose(got[2], 0.25),
            ),
            Mistake(
                "A weight of 1 is not the limit: the derivative takes away three quarters as well.",
                when=lambda got, _: math.isclose(got[2], 1.0),
            ),
        ],
    ),
)


# --- Backpropagation by hand ---------------------------------------------------------------------


def _layer_cases() -> list[Case]:
    return [
        case(
            f"L={L}, D={D}",
            gain * normal(L, D, D, seed=seed) / math.sqrt(D),
            normal(D, seed=seed + 1),
            normal(D, seed=seed + 2),
        )
        for L, D, gain, seed in ((4, 3, 1.0, 400), (2, 7, 2.0, 410), (6, 5, 1.5, 420))
    ]


def _gradients_by_autograd(weights: Tensor, x: Tensor, top: Tensor) -> Tensor:
    states = [x.double().requires_grad_()]
    for weight in weights.double():
        states.append(torch.tanh(states[-1] @ weight))
    found = torch.autograd.grad(states[-1], states, top.double())
    return torch.stack([g.norm() for g in found])


def _gradients(
    weights: Tensor,
    x: Tensor,
    top: Tensor,
    *,
    slope: str = "output",
    transposed: bool = True,
    late: bool = False,
    upward: bool = False,
    squared: bool = False,
) -> Tensor:
    """Backpropagation through tanh layers, with any of several mistakes."""
    states = [x]
    for weight in weights:
        states.append(torch.tanh(states[-1] @ weight))
    gradient, norms = top, [top.norm()]
    for i in reversed(range(len(weights))):
        weight = weights[i].T if transposed else weights[i]
        factor = {
            "output": 1 - states[i + 1] ** 2,
            "input": 1 - states[i] ** 2,
            "value": states[i + 1],
            "sigmoid": states[i + 1] * (1 - states[i + 1]),
            "none": torch.ones_like(x),
        }[slope]
        gradient = (gradient @ weight) * factor if late else (gradient * factor) @ weight
        norms.append(gradient.norm())
    norms = norms if upward else norms[::-1]
    return torch.stack(norms) ** 2 if squared else torch.stack(norms)


LAYER_GRADIENTS = Exercise(
    name="layer_gradients",
    title="Backpropagation by hand",
    level=3,
    minutes=15,
    task=r"""
A stack of $L$ layers $h_{l+1} = \tanh(h_l W_l)$ starts at $h_0 = x$. The loss has the gradient
`top` with respect to the last state $h_L$. Carry it down by the chain rule, without `autograd` or
`backward`, and return the **norm** of the gradient at each state, from $h_0$ to $h_L$: $L + 1$
numbers, the last of which is the norm of `top`.
""",
    stub='''
def layer_gradients(
    weights: Float[Tensor, "L D D"], x: Float[Tensor, "D"], top: Float[Tensor, "D"]
) -> Float[Tensor, "L+1"]:
    """Norm of the loss's gradient at h_0, h_1, ..., h_L."""
    raise NotImplementedError
''',
    hints=(
        "Two passes: upward you compute and keep the states, downward you carry a gradient. What "
        "does one layer do to a gradient on its way down, and in which order?",
        "The derivative of tanh is one minus the square of its output, so the kept states are all "
        "you need. Multiply the gradient by it, component by component, then by the transposed "
        "weights. Collect norms on the way down, and turn the list over at the end.",
    ),
    solution='''
def layer_gradients(
    weights: Float[Tensor, "L D D"], x: Float[Tensor, "D"], top: Float[Tensor, "D"]
) -> Float[Tensor, "L+1"]:
    """Norm of the loss's gradient at h_0, h_1, ..., h_L."""
    states = [x]
    for weight in weights:
        states.append(torch.tanh(states[-1] @ weight))
    gradient, norms = top, [top.norm()]
    for weight, output in zip(weights.flip(0), reversed(states), strict=False):
        gradient = (gradient * (1 - output**2)) @ weight.T
        norms.append(gradient.norm())
    return torch.stack(norms[::-1])
''',
    why="Forward a layer multiplies by W and then applies tanh; backward the order is turned "
    "round: first the derivative of tanh, at this layer's output, then W transposed. That is one "
    "factor of the product of Jacobians. Autograd keeps the same states for the same reason, which "
    "is why training needs memory in proportion to depth.",
    point="Backpropagation is one matrix product a layer, and each may shrink or stretch the "
    "gradient.",
    check=same_function(
        _gradients_by_autograd,
        _layer_cases,
        [
            Mistake(
                "The derivative of tanh is missing: the weights alone are multiplied.",
                lambda *a: _gradients(*a, slope="none"),
            ),
            Mistake(
                "The weights are not transposed. Forward h W, backward the gradient times W "
                "transposed.",
                lambda *a: _gradients(*a, transposed=False),
            ),
            Mistake(
                "The derivative is taken at the layer's input. It is 1 - tanh², so it is "
                "computed from the output.",
                lambda *a: _gradients(*a, slope="input"),
                hint=2,
            ),
            Mistake(
                "It is multiplied by tanh itself, not by its derivative.",
                lambda *a: _gradients(*a, slope="value"),
            ),
            Mistake(
                "h (1 - h) is the derivative of the sigmoid. These layers use tanh.",
                lambda *a: _gradients(*a, slope="sigmoid"),
            ),
            Mistake(
                "The two steps of a layer have changed places: on the way down the derivative "
                "comes first, then the weights.",
                lambda *a: _gradients(*a, late=True),
                hint=2,
            ),
            Mistake(
                "The numbers are right, from the top down. The first one belongs to h_0.",
                lambda *a: _gradients(*a, upward=True),
                hint=2,
            ),
            Mistake(
                "These are squared norms. The root is missing.",
                lambda *a: _gradients(*a, squared=True),
            ),
            Mistake(
                "The norm of `top` is missing: L + 1 states have a gradient.",
                lambda *a: _gradients(*a)[:-1],
            ),
        ],
    ),
)


# --- Initialisation ------------------------------------------------------------------------------

INIT_STDS = Exercise(
    name="init_stds",
    title="Xavier and He",
    level=1,
    minutes=4,
    task=r"""
A layer has `n_in` inputs and `n_out` outputs. Give the **standard deviation** of normally
distributed weights by Xavier (Glorot), whose variance is the inverse of the **mean** of the two
sizes, and by He, whose variance is two over the number of **inputs**.
""",
    stub='''
def init_stds(n_in: int, n_out: int) -> tuple[float, float]:
    """Standard deviations of the weights: by Xavier, then by He."""
    raise NotImplementedError
''',
    hints=(
        "Both rules are stated for the variance. What is the mean of the two sizes, and what do "
        "you do to a variance to get a standard deviation?",
        "The inverse of a mean of two numbers is two over their sum. Take the root of each "
        "variance; only the first depends on the number of outputs.",
    ),
    solution='''
def init_stds(n_in: int, n_out: int) -> tuple[float, float]:
    """Standard deviations of the weights: by Xavier, then by He."""
    xavier = math.sqrt(2 / (n_in + n_out))
    he = math.sqrt(2 / n_in)
    return xavier, he
''',
    why="Forward a layer sums n_in products, so a variance of 1/n_in keeps the signal; backward it "
    "sums n_out, so 1/n_out keeps the gradient. Xavier takes the mean of the two sizes. ReLU sets "
    "half of the mean square to zero, and He's factor of two makes up for it.",
    point="The variance of a weight is about one over the number of terms that are summed, times "
    "what the activation takes away.",
    check=same_function(
        lambda n_in, n_out: ((0.5 * (n_in + n_out)) ** -0.5, (0.5 * n_in) ** -0.5),
        [case(f"n_in={a}, n_out={b}", a, b) for a, b in ((512, 2048), (3, 10), (100, 25))],
        [
            Mistake(
                "The two are right, and have changed places: Xavier comes first.",
                lambda a, b: (math.sqrt(2 / a), math.sqrt(2 / (a + b))),
            ),
            Mistake(
                "These are variances. A standard deviation is the root of it.",
                lambda a, b: (2 / (a + b), 2 / a),
            ),
            *mixed(
                {
                    "": lambda a, b: math.sqrt(2 / (a + b)),
                    "Xavier: 1/n_in looks at the forward pass alone. Both sizes count.": (
                        lambda a, b: math.sqrt(1 / a)
                    ),
                    "Xavier: it is divided by the sum of the sizes; their mean is half of it.": (
                        lambda a, b: math.sqrt(1 / (a + b))
                    ),
                    "Xavier: this is the limit of the uniform version, sqrt(6 / sum). Its standard "
                    "deviation is smaller by the root of 3.": lambda a, b: math.sqrt(6 / (a + b)),
                },
                {
                    "": lambda a, b: math.sqrt(2 / a),
                    "He: it is divided by the outputs. He's rule keeps the forward signal, a sum "
                    "over inputs.": lambda a, b: math.sqrt(2 / b),
                    "He: the factor of two for ReLU is missing.": lambda a, b: math.sqrt(1 / a),
                    "He: this is the limit of the uniform version, sqrt(6 / n_in).": (
                        lambda a, b: math.sqrt(6 / a)
                    ),
                    "He: the two stands outside the root.": lambda a, b: 2 / math.sqrt(a),
                },
            ),
        ],
        names=("xavier", "he"),
        rtol=1e-6,
        atol=0.0,
    ),
)


def _signal_by_loop(start: float, width: int, std: float, n_layers: int, relu: bool) -> float:
    for _ in range(n_layers):
        start = start * width * std**2
        start = start / 2 if relu else start
    return start


STACK_SIGNAL = Exercise(
    name="stack_signal",
    title="How strong is the signal after L layers?",
    level=2,
    minutes=8,
    task=r"""
$L$ layers of equal width $D$, $h_{l+1} = \phi(h_l W_l)$, with independent normal weights of mean 0
and standard deviation $s$. The entries of $h_0$ have the mean square $q_0$. Derive the expected
**mean square** of the entries of $h_L$, once without activation ($\phi$ is the identity) and once
with ReLU.
""",
    stub='''
def stack_signal(start: float, width: int, std: float, n_layers: int, relu: bool) -> float:
    """Expected mean square of the entries after the last layer; `start` is that of h_0."""
    raise NotImplementedError
''',
    hints=(
        "Work out one layer: an entry of h W is a sum of D independent products. What is its "
        "variance? Then: which share of the mean square of a symmetric number survives a ReLU?",
        "One layer multiplies the mean square by D s² without activation. The products are "
        "symmetric around zero, so ReLU keeps exactly half of the mean square. L layers, L equal "
        "factors.",
    ),
    solution='''
def stack_signal(start: float, width: int, std: float, n_layers: int, relu: bool) -> float:
    """Expected mean square of the entries after the last layer; `start` is that of h_0."""
    factor = width * std**2
    if relu:
        factor = factor / 2  # a symmetric number is negative half of the time
    return start * factor**n_layers
''',
    why="With independent weights of mean zero the cross terms vanish, so an entry of hW has the "
    "variance D · s² · mean square of h. It is symmetric around zero, so ReLU removes exactly half "
    "of its mean square. The factor is 1 for s² = 1/D without activation, and for s² = 2/D with "
    "ReLU: He's rule.",
    point="One number a layer, raised to the power of the depth, decides whether a signal lives.",
    check=same_function(
        _signal_by_loop,
        [
            case(f"D={D}, s={s}, L={L}, ReLU={relu}", q, D, s, L, relu)
            for q, D, s, L, relu in (
                (1.5, 64, 0.25, 3, True),
                (0.7, 50, 0.1, 4, False),
                (2.0, 8, 0.6, 5, True),
                (3.0, 100, 0.12, 2, False),
            )
        ],
        [
            Mistake(
                "The standard deviation is not squared: variances add, and multiply by s².",
                lambda q, D, s, L, relu: q * (D * s / (1 + relu)) ** L,
            ),
            Mistake(
                "The width is missing: D products are summed in each entry.",
                lambda q, D, s, L, relu: q * (s**2 / (1 + relu)) ** L,
            ),
            Mistake(
                "ReLU is treated like the identity. It removes half of the mean square.",
                lambda q, D, s, L, relu: q * (D * s**2) ** L,
            ),
            Mistake(
                "The half is taken in both cases. Without activation nothing is cut off.",
                lambda q, D, s, L, relu: q * (D * s**2 / 2) ** L,
            ),
            Mistake(
                "The half for ReLU is taken once. Every layer has a ReLU.",
                lambda q, D, s, L, relu: q * (D * s**2) ** L / (1 + relu),
                hint=2,
            ),
            Mistake(
                "The layers are added up: L times the factor. Layers multiply.",
                lambda q, D, s, L, relu: q * L * D * s**2 / (1 + relu),
            ),
            Mistake(
                "This is the root of it: the size of an entry. The mean square is asked for.",
                lambda q, D, s, L, relu: math.sqrt(q * (D * s**2 / (1 + relu)) ** L),
            ),
            Mistake(
                "The mean square at the start is missing.",
                lambda q, D, s, L, relu: (D * s**2 / (1 + relu)) ** L,
            ),
            Mistake(
                "It is multiplied by two for ReLU. He's factor of two is the remedy; what ReLU "
                "does is to halve.",
                lambda q, D, s, L, relu: q * (D * s**2 * (1 + relu)) ** L,
            ),
        ],
        rtol=1e-4,
        atol=0.0,
    ),
)


def _expectation(f: Callable[[Tensor], Tensor]) -> float:
    """Mean of f(z) for standard normal z, by the trapezoid rule."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(f(z) * density, z).item()


def _variance(phi: Callable[[Tensor], Tensor]) -> float:
    return _expectation(lambda z: phi(z) ** 2) - _expectation(phi) ** 2


def _mean_slope_square(phi: Callable[[Tensor], Tensor]) -> float:
    step = 1e-4
    return _expectation(lambda z: ((phi(z + step) - phi(z - step)) / (2 * step)) ** 2)


ACTIVATION_GAIN = Exercise(
    name="activation_gain",
    title="The gain of any activation",
    level=2,
    minutes=10,
    task=r"""
Weights of standard deviation $g / \sqrt{D}$ keep the mean square of a signal at 1 through a layer
$\phi(hW)$ if $g^2 \, \mathbb{E}\!\left[\phi(z)^2\right] = 1$ for a standard normal $z$. Compute
the **gain** $g$ of any activation, to within one per cent. Integrate on a grid, or draw a million
numbers with a seed of your own.
""",
    stub='''
def activation_gain(activation: nn.Module) -> float:
    """The g for which g² E[activation(z)²] = 1, with z standard normal."""
    raise NotImplementedError
''',
    hints=(
        "Solve the equation for g first. Then the only thing to compute is one expectation: of "
        "what, exactly?",
        "Take a fine grid of z from about -8 to 8, weight the squares of the activation with the "
        "normal density, and normalise the weights to sum 1. The gain is one over the root.",
    ),
    solution='''
def activation_gain(activation: nn.Module) -> float:
    """The g for which g² E[activation(z)²] = 1, with z standard normal."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.softmax(-0.5 * z**2, dim=0)  # the normal density on the grid
    mean_square = (weight * activation(z) ** 2).sum().item()
    return 1 / math.sqrt(mean_square)
''',
    why="For ReLU the mean square is 1/2 and the gain is the root of 2, He's number. The square is "
    "not centred: the next layer's sum runs over the activations as they are, mean included. The "
    "argument holds the input at mean square 1, so it says nothing about how the signal returns "
    "once it has left. PyTorch's 5/3 for tanh is a rounder, larger number.",
    point="A gain makes up for what an activation takes out of the mean square.",
    check=same_function(
        lambda phi: _expectation(lambda z: phi(z) ** 2) ** -0.5,
        [
            case("ReLU", nn.ReLU()),
            case("tanh", nn.Tanh()),
            case("sigmoid", nn.Sigmoid()),
            case("GELU", nn.GELU()),
            case("the identity", nn.Identity()),
        ],
        [
            Mistake(
                "The root is missing: this is g squared.",
                lambda phi: 1 / _expectation(lambda z: phi(z) ** 2),
            ),
            Mistake(
                "It is turned over: the root of the mean square is what the activation leaves.",
                lambda phi: _expectation(lambda z: phi(z) ** 2) ** 0.5,
            ),
            Mistake(
                "The mean is subtracted: this uses the variance of the activation. The next layer "
                "sums the activations with their mean.",
                lambda phi: _variance(phi) ** -0.5,
            ),
            Mistake(
                "This uses the mean of the absolute value. The mean of the square is asked for.",
                lambda phi: 1 / _expectation(lambda z: phi(z).abs()),
            ),
            Mistake(
                "This is the mean square itself, not the gain.",
                lambda phi: _expectation(lambda z: phi(z) ** 2),
            ),
            Mistake(
                "This uses the slope of the activation, so it keeps gradients, not the signal.",
                lambda phi: _mean_slope_square(phi) ** -0.5,
            ),
        ],
        rtol=0.01,
        atol=0.0,
    ),
)


# --- Activations ---------------------------------------------------------------------------------


def _dead_cases() -> list[Case]:
    rows = []
    for N, D, width, shift, seed in (
        (7, 3, 20, -2.0, 430),
        (5, 4, 12, -1.0, 440),
        (9, 2, 25, -3.0, 450),
    ):
        rows.append(
            case(
                f"N={N}, D={D}, F={width}",
                normal(N, D, seed=seed) + 0.5,
                normal(D, width, seed=seed + 1),
                normal(width, seed=seed + 2) + shift,
            )
        )
    return rows


def _dead_by_loop(x: Tensor, weight: Tensor, bias: Tensor) -> float:
    dead = 0
    for unit in range(weight.shape[1]):
        values = x.double() @ weight[:, unit].double() + bias[unit].double()
        dead += int(max(values.tolist()) <= 0)
    return dead / weight.shape[1]


def _open(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias > 0


DEAD_UNITS = Exercise(
    name="dead_units",
    title="Dead ReLU units",
    level=1,
    minutes=5,
    task=r"""
A layer computes $\mathrm{ReLU}(xW + b)$ for $N$ examples and $F$ units. A unit is **dead** on these
examples if its output is 0 for **all** of them: then no gradient reaches its weights. Return the
share of the units that are dead.
""",
    stub='''
def dead_units(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "D F"], bias: Float[Tensor, "F"]
) -> float:
    """Share of the F units that no example opens, between 0 and 1."""
    raise NotImplementedError
''',
    hints=(
        "Make the table of outputs, N rows and F columns. A unit is one column of it. What must "
        "hold for a whole column, and over which axis do you ask?",
        "For each unit ask whether its value before the ReLU is positive for any example, over the "
        "axis of the examples. The dead ones are the others; their mean as numbers is the share.",
    ),
    solution='''
def dead_units(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "D F"], bias: Float[Tensor, "F"]
) -> float:
    """Share of the F units that no example opens, between 0 and 1."""
    alive = (x @ weight + bias > 0).any(dim=0)  # (F,)
    return (~alive).double().mean().item()
''',
    why="An output of zero is no harm by itself: half of a healthy ReLU layer's outputs are zero. "
    "A unit is lost when it is zero on every example, because the derivative is then zero "
    "everywhere and gradient descent on these examples cannot move it back.",
    point="A zero output is normal; a unit that is zero for every example has stopped learning.",
    check=same_function(
        _dead_by_loop,
        _dead_cases,
        [
            Mistake(
                "This is the share of all outputs that are zero. A unit is dead only if it is zero "
                "for every example.",
                lambda *a: (~_open(*a)).double().mean().item(),
            ),
            Mistake(
                "These units are closed for at least one example. Dead means closed for all.",
                lambda *a: (~_open(*a)).any(dim=0).double().mean().item(),
            ),
            Mistake(
                "The question runs over the wrong axis: these are examples that open no unit.",
                lambda *a: (~_open(*a)).all(dim=1).double().mean().item(),
            ),
            Mistake(
                "This is the number of dead units. The share is asked for.",
                lambda *a: float((~_open(*a)).all(dim=0).sum()),
            ),
            Mistake(
                "This is the share of the units that live.",
                lambda *a: _open(*a).any(dim=0).double().mean().item(),
            ),
            Mistake(
                "The bias is missing. It decides where a unit opens.",
                lambda x, w, b: (~_open(x, w, 0 * b)).all(dim=0).double().mean().item(),
            ),
            Mistake(
                "This asks whether the mean over the examples is negative. One example that opens "
                "the unit is enough for a gradient.",
                lambda x, w, b: (x @ w + b).mean(dim=0).le(0).double().mean().item(),
            ),
        ],
    ),
)


# --- Residual connections and norms --------------------------------------------------------------

RESIDUAL_BOUNDS = Exercise(
    name="residual_bounds",
    title="What a skip connection guarantees",
    level=2,
    minutes=7,
    task=r"""
Each of $L$ layers is $h \mapsto h + f(h)$, and the Jacobian $J$ of every branch $f$ has
$\lVert J \rVert \le c$. Derive between which two numbers the ratio

$$\frac{\lVert \text{gradient at the bottom} \rVert}{\lVert \text{gradient at the top} \rVert}$$

must lie. For $c \ge 1$ the lower one is 0: a branch may then undo the skip.
""",
    stub='''
def residual_bounds(c: float, n_layers: int) -> tuple[float, float]:
    """Smallest and largest ratio that the bound c on each branch allows."""
    raise NotImplementedError
''',
    hints=(
        "The Jacobian of one layer is the identity plus J. How short, and how long, can a vector "
        "become when something of length at most c is added to it?",
        "By the triangle inequality a unit vector ends between 1 - c and 1 + c. Layers multiply. A "
        "length is never negative, so mind what happens to 1 - c for a c above one.",
    ),
    solution='''
def residual_bounds(c: float, n_layers: int) -> tuple[float, float]:
    """Smallest and largest ratio that the bound c on each branch allows."""
    lower = max(0.0, 1 - c) ** n_layers
    upper = (1 + c) ** n_layers
    return lower, upper
''',
    why="For any vector v, |v + Jv| lies between |v| - |Jv| and |v| + |Jv|. Without the skip the "
    "lower bound is 0 for every c: a branch may always lose the gradient. With it, branches that "
    "start small keep the gradient alive whatever they compute. It is a bound, not a promise of "
    "1: for c = 1/4 and forty layers it still allows a loss by a factor of a hundred thousand.",
    point="A skip connection puts a floor under the gradient, as long as its branches stay small.",
    check=same_function(
        lambda c, L: (
            math.prod(max(0.0, 1 - c) for _ in range(L)),
            math.prod(1 + c for _ in range(L)),
        ),
        [case(f"c={c}, L={L}", c, L) for c, L in ((0.1, 6), (0.5, 3), (1.5, 2), (2.5, 3))],
        mixed(
            {
                "": lambda c, L: max(0.0, 1 - c) ** L,
                "Lower: (1 - c) to the power of L turns positive or negative for c above 1. A "
                "length cannot; the bound is 0 there.": lambda c, L: (1 - c) ** L,
                "Lower: the skip is counted as a guarantee of 1. The branch may subtract from "
                "it.": lambda c, L: 1.0,
                "Lower: one layer only. The layers multiply.": lambda c, L: max(0.0, 1 - c),
                "Lower: the losses are added. The layers multiply.": (
                    lambda c, L: max(0.0, 1 - c * L)
                ),
                "Lower: 0 would hold without a skip. The identity keeps more.": lambda c, L: 0.0,
                "Lower: c to the power of L is the bound of plain layers, from above.": (
                    lambda c, L: c**L
                ),
            },
            {
                "": lambda c, L: (1 + c) ** L,
                "Upper: the skip is missing. What the branch gives is added to 1.": (
                    lambda c, L: c**L
                ),
                "Upper: one layer is counted. There are L.": lambda c, L: 1 + c,
                "Upper: the gains are added. Layers multiply.": lambda c, L: 1 + c * L,
            },
        ),
        names=("lower", "upper"),
        atol=1e-9,
    ),
)


def _normed(x: Tensor, eps: float, dim: int | tuple[int, ...], *, unbiased: bool = False) -> Tensor:
    variance = x.var(dim, keepdim=True, correction=int(unbiased))
    return (x - x.mean(dim, keepdim=True)) / (variance + eps).sqrt()


def _norm_cases() -> list[Case]:
    return [
        case(f"B={B}, T={T}, D={D}, eps={eps}", scale * normal(B, T, D, seed=seed) + 2, eps)
        for B, T, D, eps, scale, seed in (
            (3, 4, 5, 1e-5, 1.0, 460),
            (2, 6, 3, 0.1, 2.0, 470),
            (4, 2, 7, 1e-3, 0.5, 480),
        )
    ]


def _torch_norms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    batch = F.batch_norm(x.double().reshape(B * T, D), None, None, training=True, eps=eps)
    return batch.reshape(B, T, D), F.layer_norm(x.double(), (D,), eps=eps)


TWO_NORMS = Exercise(
    name="two_norms",
    title="Batch norm and layer norm",
    level=2,
    minutes=7,
    task=r"""
Both norms compute $(x - \mu) / \sqrt{\sigma^2 + \varepsilon}$, with the variance divided by the
number of entries. They differ in **which entries share** $\mu$ and $\sigma^2$. In training, batch
norm takes one pair for each **feature**, over all examples and positions; layer norm takes one for
each **token**, over its features. Return both, without gain and bias.
""",
    stub='''
def two_norms(
    x: Float[Tensor, "B T D"], eps: float
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Batch norm, then layer norm, of the same states."""
    raise NotImplementedError
''',
    hints=(
        "Count the pairs of statistics: how many features, and how many tokens, are there? The "
        "axes that are not counted are the ones that the mean runs over.",
        "Batch norm has D pairs: the mean runs over the first two axes together. Layer norm has B "
        "times T pairs: the mean runs over the last. Keep the axes, and divide by the number of "
        "entries.",
    ),
    solution='''
def two_norms(
    x: Float[Tensor, "B T D"], eps: float
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Batch norm, then layer norm, of the same states."""
    both = []
    for axes in ((0, 1), (2,)):
        centred = x - x.mean(dim=axes, keepdim=True)
        variance = centred.square().mean(dim=axes, keepdim=True)
        both.append(centred / torch.sqrt(variance + eps))
    return both[0], both[1]
''',
    why="One word differs, the axes, and with it everything else. Batch norm ties a token to the "
    "other sentences of its batch and, worse for a decoder, to later positions; it needs running "
    "statistics at inference. Layer norm needs nothing but the token.",
    point="The axes of the mean decide who is tied to whom: batch norm ties examples, layer norm "
    "does not.",
    check=same_function(
        _torch_norms,
        _norm_cases,
        [
            Mistake(
                "The two are right, and have changed places: batch norm comes first.",
                lambda x, eps: (_normed(x, eps, 2), _normed(x, eps, (0, 1))),
            ),
            *mixed(
                {
                    "": lambda x, eps: _normed(x, eps, (0, 1)),
                    "Batch norm: the mean runs over the examples alone, so each position has its "
                    "own.": lambda x, eps: _normed(x, eps, 0),
                    "Batch norm: the mean runs over the positions alone, which is instance norm.": (
                        lambda x, eps: _normed(x, eps, 1)
                    ),
                    "Batch norm: one mean for the whole tensor. Each feature has its own.": (
                        lambda x, eps: _normed(x, eps, (0, 1, 2))
                    ),
                    "Batch norm: the variance is divided by one less than the number of "
                    "entries.": lambda x, eps: _normed(x, eps, (0, 1), unbiased=True),
                },
                {
                    "": lambda x, eps: _normed(x, eps, 2),
                    "Layer norm: the mean runs over positions as well. Each token has its own.": (
                        lambda x, eps: _normed(x, eps, (1, 2))
                    ),
                    "Layer norm: one mean for the whole tensor. Each token has its own.": (
                        lambda x, eps: _normed(x, eps, (0, 1, 2))
                    ),
                    "Layer norm: the variance is divided by D - 1, torch's default.": (
                        lambda x, eps: _normed(x, eps, 2, unbiased=True)
                    ),
                    "Layer norm: divided by the root mean square, without a mean: RMS norm.": (
                        lambda x, eps: x * (x.square().mean(2, keepdim=True) + eps).rsqrt()
                    ),
                },
            ),
        ],
        names=("batch norm", "layer norm"),
    ),
)


# --- Clipping ------------------------------------------------------------------------------------


def _pair_cases() -> list[Case]:
    return [
        case(
            f"{name}, I={i}, O={o}",
            size * normal(i, o, seed=seed),
            skew * size * normal(o, seed=seed + 1),
            limit,
        )
        for name, i, o, size, skew, limit, seed in (
            ("a long gradient", 3, 4, 5.0, 1.0, 1.0, 500),
            ("a short gradient", 2, 5, 0.01, 2.0, 1.0, 510),
            ("a long bias gradient", 4, 3, 0.1, 40.0, 2.0, 520),
        )
    ]


def _torch_clip(a: Tensor, b: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    parameters = [nn.Parameter(torch.zeros_like(t, dtype=torch.float64)) for t in (a, b)]
    for p, g in zip(parameters, (a, b), strict=True):
        p.grad = g.double().clone()
    nn.utils.clip_grad_norm_(parameters, limit)
    return parameters[0].grad, parameters[1].grad


def _length(*parts: Tensor) -> Tensor:
    return torch.cat([p.flatten() for p in parts]).norm()


def _scaled(a: Tensor, b: Tensor, factor: Any) -> tuple[Tensor, Tensor]:
    return a * factor, b * factor


def _at_most(limit: float, length: Any) -> float:
    return min(1.0, float(limit / length))


CLIP_BY_NORM = Exercise(
    name="clip_by_norm",
    title="Clip the gradient by its norm",
    level=1,
    minutes=7,
    task=r"""
The gradient of a layer has two parts, one for the weight and one for the bias. Clip them
**together**, without `nn.utils`: if the norm of all their entries as **one** vector is above
`max_norm`, multiply both by the one factor that brings it down to `max_norm`. A shorter gradient
stays as it is.
""",
    stub='''
def clip_by_norm(
    weight_grad: Float[Tensor, "I O"], bias_grad: Float[Tensor, "O"], max_norm: float
) -> tuple[Float[Tensor, "I O"], Float[Tensor, "O"]]:
    """The same gradient, at most max_norm long."""
    raise NotImplementedError
''',
    hints=(
        "How do you get the length of one long vector from the lengths of its two parts? And which "
        "factor brings a length down to max_norm, without ever making it longer?",
        "Squares add: the total length is the root of the sum of the two squared lengths. The "
        "factor is max_norm over this length, but at most 1, and both parts get the same one.",
    ),
    solution='''
def clip_by_norm(
    weight_grad: Float[Tensor, "I O"], bias_grad: Float[Tensor, "O"], max_norm: float
) -> tuple[Float[Tensor, "I O"], Float[Tensor, "O"]]:
    """The same gradient, at most max_norm long."""
    total = torch.sqrt(weight_grad.square().sum() + bias_grad.square().sum())
    factor = min(1.0, max_norm / total.item())
    return weight_grad * factor, bias_grad * factor
''',
    why="One factor for all entries keeps the direction, so the step still goes downhill along the "
    "gradient. Clipping each tensor by itself changes the proportions between them, and clipping "
    "each entry changes them all. PyTorch adds 1e-6 to the norm in the quotient, so that a "
    "gradient of zero gives no 0/0.",
    point="Clipping by norm changes how far a step goes, not where it goes.",
    check=same_function(
        _torch_clip,
        _pair_cases,
        [
            Mistake(
                "Each part is clipped by its own norm, which turns the direction. They are one "
                "vector.",
                lambda a, b, c: (a * _at_most(c, a.norm()), b * _at_most(c, b.norm())),
            ),
            Mistake(
                "The gradient always ends at max_norm: a short one is made longer. Clipping only "
                "shortens.",
                lambda a, b, c: _scaled(a, b, c / _length(a, b)),
            ),
            Mistake(
                "Each entry is cut to ±max_norm: that is clipping by value.",
                lambda a, b, c: (a.clamp(-c, c), b.clamp(-c, c)),
            ),
            Mistake(
                "The root is missing: the factor uses the squared norm.",
                lambda a, b, c: _scaled(a, b, _at_most(c, _length(a, b) ** 2)),
            ),
            Mistake(
                "The two norms are added. Their squares add.",
                lambda a, b, c: _scaled(a, b, _at_most(c, a.norm() + b.norm())),
            ),
            Mistake(
                "The norm is that of the weight's part alone. The bias belongs to the vector.",
                lambda a, b, c: _scaled(a, b, _at_most(c, a.norm())),
            ),
            Mistake(
                "The norm is right, but the bias is not scaled.",
                lambda a, b, c: (a * _at_most(c, _length(a, b)), b),
            ),
            Mistake(
                "The norm is that of the largest entry. The length of the whole vector is meant.",
                lambda a, b, c: _scaled(a, b, _at_most(c, max(a.abs().max(), b.abs().max()))),
            ),
            Mistake(
                "Nothing is clipped: the gradient comes back as it was.",
                lambda a, b, c: (a, b),
            ),
        ],
        names=("weight", "bias"),
        rtol=1e-4,
    ),
)


def _parts_cases() -> list[Case]:
    return [
        case(
            f"{name}, K={k}, N={n}",
            torch.tensor(sizes)[:, None] * (normal(k, n, seed=seed) + drift),
            limit,
        )
        for name, k, n, sizes, drift, limit, seed in (
            ("one part far longer", 3, 5, (1.0, 30.0, 0.5), 0.0, 1.0, 530),
            ("short parts", 4, 6, (0.01, 0.02, 0.01, 0.03), 1.0, 1.0, 540),
            ("long parts alike", 2, 7, (4.0, 6.0), 2.0, 1.5, 550),
        )
    ]


def _clip_one(g: Tensor, limit: float) -> Tensor:
    return g * _at_most(limit, g.norm())


FIX_CLIPPING = Exercise(
    name="fix_clipping",
    title="Clipping in the wrong place",
    level=2,
    minutes=8,
    task=r"""
A batch does not fit into memory, so its $K$ parts of equal size run one after the other, and the
gradients of their mean losses are averaged. The step should be the one that the whole batch would
give: its gradient, **clipped** to `max_norm`. The function below holds **two** mistakes. Repair it.
""",
    stub='''
def fix_clipping(parts: Float[Tensor, "K N"], max_norm: float) -> Float[Tensor, "N"]:
    """The clipped gradient of the whole batch, from the gradients of its K parts."""
    total = torch.zeros_like(parts[0])
    for gradient in parts:
        total = total + gradient * (max_norm / gradient.norm())
    return total / len(parts)
''',
    hints=(
        "Take a case that you can do by hand: two parts with opposite, long gradients. What is the "
        "gradient of the whole batch? And what should become of parts that are all very short?",
        "Only the average is the gradient of the batch, so the clipping comes after the loop. And "
        "its factor must never be above one.",
    ),
    solution='''
def fix_clipping(parts: Float[Tensor, "K N"], max_norm: float) -> Float[Tensor, "N"]:
    """The clipped gradient of the whole batch, from the gradients of its K parts."""
    gradient = parts.mean(dim=0)
    factor = min(1.0, max_norm / gradient.norm().item())
    return gradient * factor
''',
    why="Clipping is not linear, so it does not commute with the average. Clipped one by one, a "
    "part with a huge gradient counts as much as a calm one and the sum points elsewhere. And "
    "dividing by the norm whatever it is blows up the short gradients at the end of training, "
    "where the steps should become small.",
    point="Average first, clip last: only the whole gradient has the direction to be kept.",
    check=same_function(
        lambda parts, limit: _torch_clip(parts.double().mean(0)[None], parts[0] * 0, limit)[0][0],
        _parts_cases,
        [
            Mistake(
                "untouched",
                lambda p, c: (p * c / p.norm(dim=1, keepdim=True)).mean(0),
                untouched=True,
            ),
            Mistake(
                "One mistake is left: each part is still clipped by itself, before the average.",
                lambda p, c: torch.stack([_clip_one(g, c) for g in p]).mean(0),
            ),
            Mistake(
                "One mistake is left: the average is always scaled to max_norm, so short gradients "
                "are made longer.",
                lambda p, c: p.mean(0) * c / p.mean(0).norm(),
            ),
            Mistake(
                "The parts are added, not averaged, before they are clipped. The norm is then K "
                "times too long.",
                lambda p, c: _clip_one(p.sum(0), c),
            ),
            Mistake(
                "The sum is clipped, and divided by K afterwards. Average first.",
                lambda p, c: _clip_one(p.sum(0), c) / len(p),
            ),
            Mistake(
                "Nothing is clipped any more: this is the average.",
                lambda p, c: p.mean(0),
            ),
            Mistake(
                "The entries are cut to ±max_norm one by one, which turns the direction.",
                lambda p, c: p.mean(0).clamp(-c, c),
            ),
            Mistake(
                "The average is clipped by the longest part's norm, not by its own.",
                lambda p, c: p.mean(0) * _at_most(c, p.norm(dim=1).max()),
            ),
        ],
    ),
)


# --- The step ------------------------------------------------------------------------------------


def _hessian_cases() -> list[Case]:
    rows = []
    for n, seed in ((3, 560), (2, 570), (5, 580)):
        root = normal(n, n + 2, seed=seed, dtype=torch.float64)
        rows.append(case(f"{n} weights", (root @ root.T / 3).float()))
    return rows


def _rate_by_power_iteration(hessian: Tensor) -> float:
    v = torch.ones(len(hessian), dtype=torch.float64)
    for _ in range(2000):
        v = hessian.double() @ v
        v = v / v.norm()
    return 2 / (v @ hessian.double() @ v).item()


def _curvatures(hessian: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(hessian.double())


LARGEST_RATE = Exercise(
    name="largest_rate",
    title="The edge of stability",
    level=2,
    minutes=8,
    task=r"""
Gradient descent on the bowl $\tfrac{1}{2} w^\top A\, w$ with a symmetric, positive definite $A$
repeats $w \leftarrow w - \eta A w$. Derive the learning rate $\eta$ **below** which it converges
from every start, and **above** which it diverges from almost every one.
""",
    stub='''
def largest_rate(hessian: Float[Tensor, "N N"]) -> float:
    """The learning rate between convergence and divergence."""
    raise NotImplementedError
''',
    hints=(
        "Look at one direction in which the bowl has the curvature a. What does a step multiply "
        "the weight by, and when is the size of that below one? Which direction breaks first?",
        "A step multiplies by 1 - eta a. That is below -1 as soon as eta is above two over a, and "
        "the steepest direction has the largest eigenvalue of A.",
    ),
    solution='''
def largest_rate(hessian: Float[Tensor, "N N"]) -> float:
    """The learning rate between convergence and divergence."""
    steepest = torch.linalg.eigvalsh(hessian.double())[-1]
    return 2 / steepest.item()
''',
    why="In the basis of the eigenvectors the directions do not mix, and each is multiplied by 1 - "
    "eta a a step. The steepest one sets the limit, 2 / largest eigenvalue, and the flattest one "
    "then sets how slowly everything converges. At half the limit the steepest direction is done "
    "in a single step; above the limit it jumps from side to side, farther each time.",
    point="The steepest direction alone decides how large a learning rate may be: two over its "
    "curvature.",
    check=same_function(
        _rate_by_power_iteration,
        _hessian_cases,
        [
            Mistake(
                "1 over the curvature reaches the bottom in one step. Descent still converges up "
                "to twice that.",
                lambda A: (1 / _curvatures(A)[-1]).item(),
            ),
            Mistake(
                "This is the limit of the flattest direction. The steepest one breaks first.",
                lambda A: (2 / _curvatures(A)[0]).item(),
            ),
            Mistake(
                "The trace is the sum of all curvatures. Only the largest one counts.",
                lambda A: (2 / A.trace()).item(),
            ),
            Mistake(
                "The mean curvature does not decide. The largest one does.",
                lambda A: (2 / _curvatures(A).mean()).item(),
            ),
            Mistake(
                "The Frobenius norm mixes all eigenvalues. Take the largest one.",
                lambda A: (2 / A.norm()).item(),
            ),
            Mistake(
                "The largest entry is not the largest eigenvalue: the weights are coupled.",
                lambda A: (2 / A.abs().max()).item(),
            ),
            Mistake(
                "This is turned over: a steeper bowl needs a smaller rate.",
                lambda A: (_curvatures(A)[-1] / 2).item(),
            ),
            Mistake(
                "This is the largest curvature itself. The rate is 2 over it.",
                lambda A: _curvatures(A)[-1].item(),
            ),
            Mistake(
                "2 over the sum of the smallest and the largest curvature is the fastest rate, not "
                "the largest.",
                lambda A: (2 / (_curvatures(A)[0] + _curvatures(A)[-1])).item(),
            ),
        ],
        rtol=1e-4,
        atol=0.0,
    ),
)


def _smallest_power(weight: float, sign: int) -> int:
    """The smallest k for which weight + sign * 2**k is another float32 number than weight."""
    start = torch.tensor(weight, dtype=torch.float32)
    return min(
        k
        for k in range(-60, 0)
        if start + torch.tensor(sign * 2.0**k, dtype=torch.float32) != start
    )


FLOAT32_STEP = Exercise(
    name="float32_step",
    title="The smallest step that moves a weight",
    level=3,
    minutes=10,
    task=r"""
A float32 number has 24 significant bits, and a sum is rounded to the nearest number, a tie to the
one whose last bit is 0. An update of $2^{k}$ is far from zero, yet `weight + update == weight` when
$k$ is small enough.

Predict the smallest integer $k$ for which the weight **does** change, bit for bit: for
$1 + 2^k$, for $1 - 2^k$, and for $1000 + 2^k$.
""",
    stub="""
float32_step = (
    ...,  # smallest k with 1 + 2**k != 1
    ...,  # smallest k with 1 - 2**k != 1
    ...,  # smallest k with 1000 + 2**k != 1000
)
""",
    hints=(
        "How far is the next float32 number above 1, and how far the next one below? Between two "
        "powers of two the numbers are evenly spaced: which spacing belongs to 1000?",
        "From 1 to 2 the spacing is two to the -23, and half of that is a tie, which goes back to "
        "1. Below 1 the numbers lie twice as dense. 1000 lies between 512 and 1024, where the "
        "spacing is 512 times that above 1.",
    ),
    solution="""
def moves(weight: float, step: float) -> bool:
    before = torch.tensor(weight)
    return bool(before + torch.tensor(step) != before)


float32_step = (
    min(k for k in range(-60, 0) if moves(1.0, 2.0**k)),
    min(k for k in range(-60, 0) if moves(1.0, -(2.0**k))),
    min(k for k in range(-60, 0) if moves(1000.0, 2.0**k)),
)
""",
    why="Above 1 the spacing is 2^-23; adding 2^-24 is a tie, and ties go to the number whose last "
    "bit is 0, which is 1 itself. Below 1 the spacing is 2^-24, so this step down lands on a "
    "number, and 2^-25 is a tie again. At 1000 the spacing is 512 · 2^-23 = 2^-14. So a gradient "
    "has vanished for a weight long before it is zero: when the step is below half the spacing.",
    point="A step is lost once it is below half the spacing of numbers around the weight.",
    check=same_value(
        lambda: (_smallest_power(1.0, 1), _smallest_power(1.0, -1), _smallest_power(1000.0, 1)),
        [
            Mistake(
                "2^-24 above 1 is exactly half way to the next number. The tie goes back to 1.",
                when=lambda got, _: got[0] == -24,
            ),
            Mistake(
                "These are the bits of float64. A float32 number has 24.",
                when=lambda got, _: got[0] in (-52, -53),
            ),
            Mistake(
                "This is the smallest positive float32 number. What counts is the spacing "
                "around the weight.",
                when=lambda got, _: got[0] in (-126, -127, -149),
            ),
            Mistake(
                "The exponents are negative: the updates are small fractions.",
                when=lambda got, _: got[0] == 23,
            ),
            Mistake(
                "Below 1 the numbers lie twice as dense as above: look at the spacing there.",
                when=lambda got, _: got[1] == -23,
            ),
            Mistake(
                "2^-25 below 1 is exactly half way to the next number. This tie goes to 1 too.",
                when=lambda got, _: got[1] == -25,
            ),
            Mistake(
                "The spacing grows with the weight. At 1000 it is not that at 1.",
                when=lambda got, _: got[2] in (-23, -24),
            ),
            Mistake(
                "1000 lies below 1024, so its spacing is that of the numbers from 512 on.",
                when=lambda got, _: got[2] == -13,
            ),
            Mistake(
                "2^-15 at 1000 is half the spacing: a tie, and 1000 ends in a 0 bit.",
                when=lambda got, _: got[2] == -15,
            ),
        ],
    ),
)


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER = Chapter(
    __name__,
    [
        SIGMOID_CHAIN,
        DEAD_UNITS,
        INIT_STDS,
        STACK_SIGNAL,
        ACTIVATION_GAIN,
        RESIDUAL_BOUNDS,
        TWO_NORMS,
        CLIP_BY_NORM,
        FIX_CLIPPING,
        LARGEST_RATE,
        FLOAT32_STEP,
        LAYER_GRADIENTS,
    ],
)
check, grade, hint, solution, exercises = (
    CHAPTER.check,
    CHAPTER.grade,
    CHAPTER.hint,
    CHAPTER.solution,
    CHAPTER.exercises,
)
