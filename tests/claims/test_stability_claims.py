"""The sources' claims on vanishing and exploding gradients, executed. The ledger is claims.yml.

Where a bound is asserted it is a theorem about the network built here (orthogonal weights make the
norms of the Jacobians known), not a number read off a run.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.claims import tiny

DEPTH = 40
WIDTH = 256


def orthogonal(width: int, gain: float = 1.0) -> Tensor:
    return gain * nn.init.orthogonal_(torch.empty(width, width, dtype=torch.float64))


def gradient_ratio(
    weights: list[Tensor],
    activation: Callable[[Tensor], Tensor],
    *,
    residual: bool = False,
    norm: bool = False,
) -> float:
    """‖∂loss/∂x‖ at the bottom divided by the same at the top, for one random input and loss."""
    width = weights[0].shape[0]
    x = torch.randn(width, dtype=torch.float64, requires_grad=True)
    h = x
    for weight in weights:
        y = activation(weight @ (F.layer_norm(h, (width,)) if norm else h))
        h = h + y if residual else y
    top = torch.randn(width, dtype=torch.float64)
    (bottom,) = torch.autograd.grad(h, x, top)
    return (bottom.norm() / top.norm()).item()


def identity(x: Tensor) -> Tensor:
    return x


# --- vanishing ------------------------------------------------------------------------------------


def test_gradient_vanishes_until_weights_no_longer_move() -> None:
    """C210: sigmoid' ≤ 1/4, so forty orthogonal layers pass on at most 4^-40 of the gradient.

    The step is then far below the spacing of float32 numbers: the weights stay bit for bit.
    """
    weights = [orthogonal(WIDTH) for _ in range(DEPTH)]
    assert 0 < gradient_ratio(weights, torch.sigmoid) <= 0.25**DEPTH

    layers = [nn.Parameter(w.float()) for w in weights]
    before = [layer.detach().clone() for layer in layers]
    h = torch.randn(WIDTH)
    for layer in layers:
        h = torch.sigmoid(layer @ h)
    F.mse_loss(h, torch.zeros(WIDTH), reduction="sum").backward()
    torch.optim.SGD(layers, lr=0.1).step()
    assert torch.equal(layers[0], before[0])
    assert not torch.equal(layers[-1], before[-1])


def test_sigmoid_and_tanh_saturate_on_both_sides() -> None:
    """C211: σ' = σ(1-σ) peaks at 1/4 and tanh' at 1, both at 0; far out they decay like e^-|x|."""
    # Not further out: from σ(20) on, 1 - σ rounds by more than the bound leaves room for.
    x = torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    (sigmoid,) = torch.autograd.grad(torch.sigmoid(x).sum(), x)
    (tanh,) = torch.autograd.grad(torch.tanh(x).sum(), x)
    assert sigmoid.argmax() == tanh.argmax() == 2
    torch.testing.assert_close(sigmoid[2], torch.tensor(0.25).double())
    torch.testing.assert_close(tanh[2], torch.tensor(1.0).double())
    for side in (0, 1, 3, 4):
        distance = abs(x[side].item())
        assert 0 < sigmoid[side] <= math.exp(-distance)
        assert 0 <= tanh[side] <= 4 * math.exp(-2 * distance)


@pytest.mark.parametrize(("gain", "depth"), [(0.9, 10), (0.9, 100), (1.1, 10), (1.1, 100)])
def test_chain_rule_multiplies_one_factor_per_layer(gain: float, depth: int) -> None:
    """C212, C215: with orthogonal layers the gradient is scaled by gain^depth, exactly."""
    weights = [orthogonal(16, gain) for _ in range(depth)]
    assert gradient_ratio(weights, identity) == pytest.approx(gain**depth, rel=1e-9)


def test_factors_below_one_need_a_bound_to_vanish() -> None:
    """C212: ∏ (1 - 2^-k) has every factor below 1 and ends at 0.2888; 0.9^n does go to 0."""
    k = torch.arange(1, 200, dtype=torch.float64)
    assert (1 - 2 ** -k[:50]).max() < 1
    assert torch.prod(1 - 2**-k).item() == pytest.approx(0.288788, abs=1e-6)
    assert torch.prod(torch.full((200,), 0.9).double()).item() < 1e-9


def test_matrices_above_one_need_not_explode() -> None:
    """C215: the factors are matrices. Norm 2 each, and the product of two can be 0."""
    shift = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert torch.linalg.matrix_norm(shift, 2) == 2
    assert torch.equal(shift @ shift, torch.zeros(2, 2))
    # Norms above 1 are needed (‖∏ J‖ ≤ ∏ ‖J‖), not enough: here every norm is 1.5, yet the gradient
    # shrinks, because 15 of 16 directions are scaled by 0.5 and each layer turns the rest away.
    scale = torch.full((16,), 0.5, dtype=torch.float64)
    scale[0] = 1.5
    weights = [orthogonal(16) @ torch.diag(scale) for _ in range(DEPTH)]
    norms = [torch.linalg.matrix_norm(w, 2).item() for w in weights]
    assert norms == pytest.approx([1.5] * DEPTH)
    # Volume: the geometric mean of the singular values of the product is (1.5 · 0.5^15)^(40/16).
    product = torch.linalg.multi_dot(weights)
    mean = torch.linalg.svdvals(product).log().mean().exp().item()
    assert mean == pytest.approx((1.5 * 0.5**15) ** (DEPTH / 16), rel=1e-6)
    assert mean < 1e-9
    assert gradient_ratio(weights, identity) < 1e-3


# --- exploding ------------------------------------------------------------------------------------


def test_exploding_gradient_makes_plain_descent_diverge() -> None:
    """C213: the update is as large as the gradient, and a few such updates end in infinity."""
    depth, lr = 30, 0.01
    weights = [nn.Parameter(orthogonal(16, 1.5)) for _ in range(depth)]
    x, target = torch.randn(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)

    def loss() -> Tensor:
        h = x
        for weight in weights:
            h = weight @ h
        return F.mse_loss(h, target)

    before = weights[0].detach().clone()
    optimiser = torch.optim.SGD(weights, lr=lr)
    loss().backward()
    gradient = weights[0].grad.norm().item()
    optimiser.step()
    assert (weights[0] - before).norm().item() == pytest.approx(lr * gradient)
    assert lr * gradient > 1000 * before.norm()
    for _ in range(5):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert not math.isfinite(loss().item())


def test_adams_update_does_not_grow_with_the_gradient() -> None:
    """C213: Adam divides by the gradient's size, so its first step is lr, whatever the gradient."""
    for size in (1e-3, 1.0, 1e6):
        w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        w.grad = torch.full_like(w, size)
        torch.optim.Adam([w], lr=0.1).step()
        torch.testing.assert_close(w.detach(), torch.full_like(w, -0.1), rtol=1e-4, atol=0)


def he(gain: float) -> list[Tensor]:
    std = gain / math.sqrt(WIDTH)
    return [std * torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(DEPTH)]


@pytest.mark.parametrize(
    ("gain", "predicted"),
    [(1.0, 2 ** (-DEPTH / 2)), (math.sqrt(2), 1.0), (2.0, 2 ** (DEPTH / 2))],
    ids=["too small", "He", "too large"],
)
def test_initial_size_decides_exponentially(gain: float, predicted: float) -> None:
    """C214, C216, C217: with ReLU a layer scales the gradient by gain/√2 on average.

    He's √2 keeps it; 1 loses a factor of 2^20 over forty layers and 2 gains one. The logarithm
    fluctuates with a variance of about 5·depth/width = 0.8, so a factor of 20 is over three
    standard deviations, and the predictions are a million apart.
    """
    ratio = gradient_ratio(he(gain), F.relu)
    assert predicted / 20 < ratio < predicted * 20


# --- remedies -------------------------------------------------------------------------------------


def test_relu_and_gelu_can_vanish_too() -> None:
    """C217: no saturation for positive inputs; for negative ones the slope is (nearly) zero."""
    x = torch.tensor([-6.0, 6.0], dtype=torch.float64, requires_grad=True)
    (relu,) = torch.autograd.grad(F.relu(x).sum(), x)
    (gelu,) = torch.autograd.grad(F.gelu(x).sum(), x)
    (sigmoid,) = torch.autograd.grad(torch.sigmoid(x).sum(), x)
    assert relu.tolist() == [0, 1]
    assert abs(gelu[0].item()) < 1e-7 and gelu[1].item() == pytest.approx(1, abs=1e-6)
    assert relu[1] > 100 * sigmoid[1]

    # A dead unit: no input opens it, so no gradient reaches its weights and it stays dead.
    w, b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.tensor(-100.0))
    inputs = torch.randn(64, 8)
    F.mse_loss(F.relu(inputs @ w + b), torch.ones(64)).backward()
    assert w.grad.abs().max() == 0 and b.grad == 0


def test_residual_connections_bound_the_gradient_from_below() -> None:
    """C190: the Jacobian of x + f(x) is I + J with ‖J‖ ≤ 1/4 here: never below 0.75 a layer."""
    weights = [orthogonal(WIDTH) for _ in range(DEPTH)]
    plain = gradient_ratio(weights, torch.sigmoid)
    residual = gradient_ratio(weights, torch.sigmoid, residual=True)
    assert plain <= 0.25**DEPTH
    assert 0.75**DEPTH <= residual <= 1.25**DEPTH


def test_layer_norm_stops_growth() -> None:
    """C190: weights ten times too large blow up plain layers; LayerNorm's output stays."""
    x = torch.randn(WIDTH, dtype=torch.float64)
    weights = [10 * w for w in he(math.sqrt(2))]
    plain = normed = x
    for w in weights:
        plain = F.relu(w @ plain)
        normed = F.relu(w @ F.layer_norm(normed, (WIDTH,)))
    assert plain.norm() > 1e30
    # The input of each layer has norm √WIDTH, so the last output is below ‖w‖ √WIDTH.
    assert normed.norm() <= torch.linalg.matrix_norm(weights[-1], 2) * math.sqrt(WIDTH)
    # Without the ε under the root the scale of the input is gone altogether.
    small, large = (F.layer_norm(c * x, (WIDTH,), eps=0.0) for c in (1, 1e6))
    torch.testing.assert_close(large, small, rtol=1e-12, atol=1e-12)


def test_residual_and_norm_together_train_deep_transformers() -> None:
    """C190: in a pre-norm stack the lowest block's gradient is as large as the highest's."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
    model(torch.randn(2, 6, 32)).pow(2).sum().backward()
    norms = [
        sum(p.grad.norm() ** 2 for p in block.parameters()).sqrt().item() for block in model.layers
    ]
    assert max(norms) < 30 * min(norms)


def test_batch_norm_mixes_examples_and_layer_norm_does_not() -> None:
    """C218: batch norm ties an example to its batch; over positions it lets the future leak."""
    x = torch.randn(4, 6, 8)
    other = x.clone()
    other[:, -1] += 1  # the last position of each sequence
    batch_norm, layer_norm = nn.BatchNorm1d(8), nn.LayerNorm(8)

    def over_positions(x: Tensor) -> Tensor:
        return batch_norm(x.flatten(0, 1)).view_as(x)

    earlier = slice(0, 5)
    assert not torch.equal(over_positions(x)[:, earlier], over_positions(other)[:, earlier])
    assert torch.equal(layer_norm(x)[:, earlier], layer_norm(other)[:, earlier])
    companions = torch.cat([x[:1], 5 * x[1:]])
    assert not torch.allclose(over_positions(x)[0], over_positions(companions)[0])
    assert torch.equal(layer_norm(x)[0], layer_norm(companions)[0])
    # One example in training has no spread to divide by.
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm(torch.randn(1, 8))


@pytest.mark.parametrize(
    ("build", "norm"),
    [
        (tiny.bert, "LayerNorm"),
        (tiny.gpt2, "LayerNorm"),
        (tiny.llama, "LlamaRMSNorm"),
        (tiny.t5, "T5LayerNorm"),
    ],
    ids=["bert", "gpt2", "llama", "t5"],
)
def test_language_models_use_layer_or_rms_norm(build: Callable[[], nn.Module], norm: str) -> None:
    """C218: not one batch norm in the families that the sources are about."""
    kinds = {type(m).__name__ for m in build().modules() if "norm" in type(m).__name__.lower()}
    assert kinds == {norm}


def test_batch_norm_does_help_a_plain_deep_net() -> None:
    """C218: in a multilayer perceptron the remedy works: the sigmoid stack learns again."""

    def bottom_gradient(norm: bool) -> float:
        torch.manual_seed(0)
        blocks: list[nn.Module] = []
        for _ in range(DEPTH):
            linear = nn.Linear(64, 64)
            nn.init.orthogonal_(linear.weight)
            blocks += [linear, *([nn.BatchNorm1d(64)] if norm else []), nn.Sigmoid()]
        nn.Sequential(*blocks)(torch.randn(32, 64)).pow(2).sum().backward()
        return blocks[0].weight.grad.norm().item()

    assert bottom_gradient(norm=False) < 1e-12
    assert bottom_gradient(norm=True) > 1e-3


def test_clipping_by_norm_keeps_the_direction() -> None:
    """C219: one factor for all parameters, min(1, c/‖g‖); clipping by value turns the gradient."""
    g = torch.tensor([3e6, -4e6, 1.0, 0.0], dtype=torch.float64)

    def clipped(clip: Callable[[list[Tensor]], object], g: Tensor = g) -> Tensor:
        a, b = nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.zeros(2).double())
        a.grad, b.grad = g[:2].clone(), g[2:].clone()
        clip([a, b])
        return torch.cat([a.grad, b.grad])

    by_norm = clipped(lambda ps: nn.utils.clip_grad_norm_(ps, 1.0))
    torch.testing.assert_close(by_norm, g / g.norm(), rtol=1e-5, atol=0)
    assert by_norm.norm() == pytest.approx(1, rel=1e-5)
    small = g / 1e8
    assert torch.equal(clipped(lambda ps: nn.utils.clip_grad_norm_(ps, 1.0), small), small)

    by_value = clipped(lambda ps: nn.utils.clip_grad_value_(ps, 1.0))
    assert by_value.tolist() == [1, -1, 1, 0]
    assert F.cosine_similarity(by_value, g, dim=0) < 0.9


def test_learning_rate_changes_the_next_point_not_the_gradient() -> None:
    """C220: at one point the gradient is the same for every rate; above 2/a the points diverge.

    On ½ a w² a step multiplies w, and the gradient with it, by 1 - lr·a.
    """
    a = 4.0

    def gradients(lr: float, steps: int = 50) -> list[float]:
        w = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimiser = torch.optim.SGD([w], lr=lr)
        seen = []
        for _ in range(steps):
            optimiser.zero_grad()
            (0.5 * a * w**2).backward()
            seen.append(w.grad.item())
            optimiser.step()
        return seen

    small, large = gradients(0.49), gradients(0.51)  # 2/a = 0.5
    assert small[0] == large[0] == a
    for seen, lr in ((small, 0.49), (large, 0.51)):
        assert abs(seen[-1]) == pytest.approx(a * abs(1 - lr * a) ** 49)
    assert abs(small[-1]) < a < abs(large[-1])
