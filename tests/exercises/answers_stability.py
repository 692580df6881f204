"""Recorded answers to the exercises of `stability`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- Right answers, written differently --------------------------------------------------------


def gradients_by_jacobians(weights, x, top):
    """The product of Jacobians, one matrix a layer, instead of a vector that is carried down."""
    states, jacobians = [x], []
    for weight in weights:
        after = torch.tanh(states[-1] @ weight)
        jacobians.append(weight * (1 - after**2))  # entry (i, j): d after_j / d before_i
        states.append(after)
    norms = []
    for i in range(len(jacobians) + 1):
        product = torch.eye(len(x))
        for jacobian in jacobians[i:]:
            product = product @ jacobian
        norms.append(torch.linalg.vector_norm(product @ top))
    return torch.tensor(norms)


def gradients_by_autograd(weights, x, top):
    states = [x.clone().requires_grad_()]
    for weight in weights:
        states.append((states[-1] @ weight).tanh())
    return torch.stack([g.norm() for g in torch.autograd.grad(states[-1], states, top)])


def stds_by_torch(n_in, n_out):
    weight = torch.empty(n_out, n_in, device="meta")
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    return [nn.init.calculate_gain("relu") * fan_in**-0.5, (0.5 * fan_in + 0.5 * fan_out) ** -0.5][
        ::-1
    ]


def signal_by_logarithms(start, width, std, n_layers, relu):
    a_layer = math.log(width) + 2 * math.log(std) - (math.log(2) if relu else 0)
    return math.exp(math.log(start) + n_layers * a_layer)


def gain_by_drawing(activation):
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(5))
    return activation(z).square().mean().rsqrt()


def dead_by_gradient(x, weight, bias):
    """A unit is dead if no gradient reaches its bias."""
    b = bias.clone().requires_grad_()
    F.relu(x @ weight + b).sum().backward()
    return (b.grad == 0).float().mean()


def bounds_by_recursion(c, n_layers):
    if n_layers == 0:
        return [1.0, 1.0]
    low, high = bounds_by_recursion(c, n_layers - 1)
    return [low * (1 - c) if c < 1 else 0.0, high + c * high]


def norms_by_loops(x, eps):
    batch, layer = torch.zeros_like(x), torch.zeros_like(x)
    for d in range(x.shape[2]):
        column = x[:, :, d]
        batch[:, :, d] = (column - column.mean()) / (column.var(correction=0) + eps) ** 0.5
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = x[b, t]
            layer[b, t] = (token - token.mean()) / (token.var(correction=0) + eps) ** 0.5
    return batch, layer


def clip_by_branches(weight_grad, bias_grad, max_norm):
    total = torch.cat((weight_grad.reshape(-1), bias_grad)).norm()
    if total <= max_norm:
        return [weight_grad, bias_grad]
    return [weight_grad / total * max_norm, bias_grad / total * max_norm]


def fixed_by_torch(parts, max_norm):
    p = nn.Parameter(torch.zeros(parts.shape[1]))
    p.grad = torch.zeros_like(p)
    for part in parts:
        p.grad += part / len(parts)
    nn.utils.clip_grad_norm_([p], max_norm)
    return p.grad


def rate_by_bisection(hessian):
    """The largest rate for which no direction grows: the spectral radius of a step is 1 there."""
    low, high = 0.0, 1e4
    for _ in range(80):
        rate = (low + high) / 2
        step = torch.eye(len(hessian), dtype=torch.float64) - rate * hessian.double()
        grows = torch.linalg.matrix_norm(step, 2) > 1
        low, high = (low, rate) if grows else (rate, high)
    return low


ALTERNATIVES = {
    "sigmoid_chain": [[4.0**-10, 1, 4], (torch.tensor(2.0) ** -20, torch.tensor(1), 4.0)],
    "dead_units": [dead_by_gradient],
    "init_stds": [stds_by_torch],
    "stack_signal": [signal_by_logarithms],
    "activation_gain": [gain_by_drawing],
    "residual_bounds": [bounds_by_recursion],
    "two_norms": [norms_by_loops],
    "clip_by_norm": [clip_by_branches],
    "fix_clipping": [fixed_by_torch],
    "largest_rate": [rate_by_bisection],
    "float32_step": [[-23, -24, -14], tuple(torch.tensor([-23, -24, -14]))],
    "layer_gradients": [gradients_by_jacobians, gradients_by_autograd],
}


# --- Wrong answers -----------------------------------------------------------------------------


def gradient_template(slope=lambda h, y: 1 - y * y, turn=True, late=False):
    def layer_gradients(weights, x, top):
        h = [x]
        for w in weights:
            h.append((h[-1] @ w).tanh())
        g = top
        found = [g.norm()]
        for i in range(len(weights) - 1, -1, -1):
            w = weights[i].mT if turn else weights[i]
            s = slope(h[i], h[i + 1])
            g = s * (g @ w) if late else (s * g) @ w
            found = [g.norm(), *found]
        return torch.stack(found)

    return layer_gradients


def signal_template(factor, times=None):
    def stack_signal(start, width, std, n_layers, relu):
        a_layer = factor(width, std, relu)
        return start * (a_layer**n_layers if times is None else times(a_layer, n_layers, relu))

    return stack_signal


def gain_template(of):
    def activation_gain(activation):
        z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        return of(activation(z)).item()

    return activation_gain


def gain_of_slopes(activation):
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (slope,) = torch.autograd.grad(activation(z.requires_grad_()).sum(), z)
    return slope.square().mean().rsqrt().item()


def dead_template(of):
    return lambda x, w, b: of(F.relu(torch.addmm(b, x, w)) == 0).item()


def norm_template(batch=(0, 1), layer=-1, batch_correction=0, layer_correction=0):
    def one(x, eps, dim, correction):
        variance, mean = torch.var_mean(x, dim, correction=correction, keepdim=True)
        return (x - mean) * (variance + eps).rsqrt()

    return lambda x, eps: (
        one(x, eps, batch, batch_correction),
        one(x, eps, layer, layer_correction),
    )


def clip_template(norm, at_most_one=True):
    def clip(a, b, c):
        factor = c / norm(a, b)
        factor = torch.clamp(factor, max=1.0) if at_most_one else factor
        return factor * a, factor * b

    return clip


def whole(a, b):
    return (a.pow(2).sum() + b.pow(2).sum()).sqrt()


def own(a, b, c):
    return tuple(g if g.norm() <= c else g / g.norm() * c for g in (a, b))


def shorten(g, c):
    n = g.norm()
    return g if n <= c else g * c / n


def largest(hessian):
    return torch.linalg.eigvalsh(hessian.double()).max()


WRONG = {
    "sigmoid_chain": [
        ((2.5, 1, 4), "The ten factors are added"),
        ((0.25, 1, 4), "the bound of one layer"),
        ((0.5**10, 1, 4), "the sigmoid's value at 0"),
        ((0.25**9, 1, 4), "off by one"),
        ((0.25**10, 0.25**10, 4), "not that of the sigmoid"),
        ((0.25**10, 1, 0.25), "turned over"),
        ((0.25**10, 1, 1), "A weight of 1 is not the limit"),
    ],
    "dead_units": [
        (dead_template(lambda z: z.float().mean()), "share of all outputs"),
        (dead_template(lambda z: z.any(0).float().mean()), "closed for at least one example"),
        (dead_template(lambda z: z.all(1).float().mean()), "over the wrong axis"),
        (dead_template(lambda z: z.all(0).sum()), "the number of dead units"),
        (dead_template(lambda z: 1 - z.all(0).float().mean()), "units that live"),
        (lambda x, w, b: (F.relu(x @ w) == 0).all(0).float().mean(), "The bias is missing"),
        (
            lambda x, w, b: ((x.mean(0) @ w + b) <= 0).float().mean(),
            "whether the mean over the examples",
        ),
    ],
    "init_stds": [
        (lambda i, o: ((2 / i) ** 0.5, (2 / (i + o)) ** 0.5), "have changed places"),
        (lambda i, o: (2 / (i + o), 2 / i), "These are variances"),
        (lambda i, o: (i**-0.5, (2 / i) ** 0.5), "looks at the forward pass alone"),
        (lambda i, o: ((i + o) ** -0.5, (2 / i) ** 0.5), "divided by the sum of the sizes"),
        (lambda i, o: ((6 / (i + o)) ** 0.5, (2 / i) ** 0.5), "the uniform version, sqrt(6 / sum)"),
        (lambda i, o: ((2 / (i + o)) ** 0.5, (2 / o) ** 0.5), "divided by the outputs"),
        (lambda i, o: ((2 / (i + o)) ** 0.5, i**-0.5), "factor of two for ReLU is missing"),
        (lambda i, o: ((2 / (i + o)) ** 0.5, (6 / i) ** 0.5), "version, sqrt(6 / n_in)"),
        (lambda i, o: ((2 / (i + o)) ** 0.5, 2 / i**0.5), "stands outside the root"),
        (lambda i, o: (i**-0.5, i**-0.5), "Both sizes count. He: the factor"),
    ],
    "stack_signal": [
        (signal_template(lambda D, s, relu: D * s / (2 if relu else 1)), "is not squared"),
        (signal_template(lambda D, s, relu: s * s / (2 if relu else 1)), "The width is missing"),
        (signal_template(lambda D, s, relu: D * s * s), "treated like the identity"),
        (signal_template(lambda D, s, relu: D * s * s / 2), "taken in both cases"),
        (
            signal_template(
                lambda D, s, relu: D * s * s, lambda f, L, relu: f**L * (0.5 if relu else 1)
            ),
            "is taken once",
        ),
        (
            signal_template(
                lambda D, s, relu: D * s * s / (2 if relu else 1), lambda f, L, relu: L * f
            ),
            "The layers are added up",
        ),
        (lambda q, D, s, L, relu: signal_by_logarithms(q, D, s, L, relu) ** 0.5, "the root of it"),
        (
            lambda q, D, s, L, relu: signal_by_logarithms(1, D, s, L, relu),
            "at the start is missing",
        ),
        (signal_template(lambda D, s, relu: D * s * s * (2 if relu else 1)), "multiplied by two"),
    ],
    "activation_gain": [
        (gain_template(lambda y: 1 / y.pow(2).mean()), "The root is missing"),
        (gain_template(lambda y: y.pow(2).mean().sqrt()), "what the activation leaves"),
        (gain_template(lambda y: 1 / y.std()), "The mean is subtracted"),
        (gain_template(lambda y: 1 / y.abs().mean()), "mean of the absolute value"),
        (gain_template(lambda y: y.pow(2).mean()), "the mean square itself"),
        (gain_of_slopes, "uses the slope"),
    ],
    "residual_bounds": [
        (lambda c, L: ((1 - c) ** L, (1 + c) ** L), "turns positive or negative"),
        (lambda c, L: (1, (1 + c) ** L), "counted as a guarantee of 1"),
        (lambda c, L: (max(0, 1 - c), (1 + c) ** L), "Lower: one layer only"),
        (lambda c, L: (max(0, 1 - L * c), (1 + c) ** L), "the losses are added"),
        (lambda c, L: (0, (1 + c) ** L), "0 would hold without a skip"),
        (lambda c, L: (c**L, (1 + c) ** L), "the bound of plain layers"),
        (lambda c, L: (max(0, 1 - c) ** L, c**L), "Upper: the skip is missing"),
        (lambda c, L: (max(0, 1 - c) ** L, 1 + c), "Upper: one layer is counted"),
        (lambda c, L: (max(0, 1 - c) ** L, 1 + L * c), "Upper: the gains are added"),
    ],
    "two_norms": [
        (lambda x, eps: norms_by_loops(x, eps)[::-1], "have changed places"),
        (norm_template(batch=0), "over the examples alone"),
        (norm_template(batch=1), "which is instance norm"),
        (norm_template(batch=(0, 1, 2)), "Batch norm: one mean for the whole tensor"),
        (norm_template(batch_correction=1), "Batch norm: the variance is divided by one less"),
        (norm_template(layer=(1, 2)), "Layer norm: the mean runs over positions"),
        (norm_template(layer=(0, 1, 2)), "Layer norm: one mean for the whole tensor"),
        (norm_template(layer_correction=1), "Layer norm: the variance is divided by D - 1"),
        (
            lambda x, eps: (norms_by_loops(x, eps)[0], F.rms_norm(x, x.shape[2:], eps=eps)),
            "without a mean: RMS norm",
        ),
        (
            norm_template(batch_correction=1, layer_correction=1),
            "number of entries. Layer norm: the variance is divided",
        ),
    ],
    "clip_by_norm": [
        (own, "Each part is clipped by its own norm"),
        (clip_template(whole, at_most_one=False), "a short one is made longer"),
        (lambda a, b, c: (a.clip(-c, c), b.clip(-c, c)), "clipping by value"),
        (clip_template(lambda a, b: whole(a, b) ** 2), "The root is missing"),
        (clip_template(lambda a, b: a.norm() + b.norm()), "The two norms are added"),
        (clip_template(lambda a, b: a.norm()), "the weight's part alone"),
        (lambda a, b, c: (clip_by_branches(a, b, c)[0], b), "the bias is not scaled"),
        (
            clip_template(lambda a, b: torch.cat([a.flatten(), b]).abs().max()),
            "that of the largest entry",
        ),
        (lambda a, b, c: (a.clone(), b.clone()), "Nothing is clipped"),
    ],
    "fix_clipping": [
        (lambda p, c: sum(shorten(g, c) for g in p) / len(p), "each part is still clipped"),
        (lambda p, c: F.normalize(p.mean(0), dim=0) * c, "the average is always scaled"),
        (lambda p, c: shorten(p.sum(0), c), "The parts are added, not averaged"),
        (lambda p, c: shorten(p.sum(0), c) / len(p), "The sum is clipped, and divided"),
        (lambda p, c: p.sum(0) / len(p), "Nothing is clipped any more"),
        (lambda p, c: p.mean(0).clip(-c, c), "one by one, which turns"),
        (
            lambda p, c: p.mean(0) * min(1.0, c / max(g.norm().item() for g in p)),
            "the longest part's norm",
        ),
    ],
    "largest_rate": [
        (lambda A: 1 / largest(A), "in one step"),
        (lambda A: 2 / torch.linalg.eigvalsh(A.double()).min(), "limit of the flattest direction"),
        (lambda A: 2 / A.diagonal().sum(), "The trace is the sum"),
        (lambda A: 2 * len(A) / A.trace(), "The mean curvature"),
        (lambda A: 2 / A.pow(2).sum().sqrt(), "The Frobenius norm"),
        (lambda A: 2 / A.abs().amax(), "not the largest eigenvalue"),
        (lambda A: largest(A) / 2, "This is turned over"),
        (largest, "the largest curvature itself"),
        (
            lambda A: 2 / (largest(A) + torch.linalg.eigvalsh(A.double()).min()),
            "the fastest rate",
        ),
    ],
    "float32_step": [
        ((-24, -24, -14), "The tie goes back to 1"),
        ((-52, -53, -43), "the bits of float64"),
        ((-149, -149, -149), "smallest positive float32"),
        ((23, 24, 14), "The exponents are negative"),
        ((-23, -23, -14), "twice as dense"),
        ((-23, -25, -14), "This tie goes to 1 too"),
        ((-23, -24, -23), "The spacing grows with the weight"),
        ((-23, -24, -13), "from 512 on"),
        ((-23, -24, -15), "1000 ends in a 0 bit"),
    ],
    "layer_gradients": [
        (gradient_template(slope=lambda h, y: torch.ones_like(y)), "derivative of tanh is missing"),
        (gradient_template(turn=False), "The weights are not transposed"),
        (gradient_template(slope=lambda h, y: 1 - h.square()), "taken at the layer's input"),
        (gradient_template(slope=lambda h, y: y), "by tanh itself"),
        (gradient_template(slope=lambda h, y: y - y * y), "derivative of the sigmoid"),
        (gradient_template(late=True), "The two steps of a layer have changed places"),
        (lambda w, x, top: gradients_by_autograd(w, x, top).flip(0), "from the top down"),
        (lambda w, x, top: gradients_by_autograd(w, x, top).square(), "squared norms"),
        (lambda w, x, top: gradients_by_autograd(w, x, top)[:-1], "The norm of `top` is missing"),
    ],
}
