"""Feed-forward layers: the formulas, and each position on its own."""

import pytest
import torch
import torch.nn.functional as F

from llm_anatomy.feedforward import FeedForward, GatedFeedForward, gelu_tanh

ACTIVATIONS = {
    "relu": (F.relu, lambda x: x.clamp(min=0)),
    "gelu": (F.gelu, lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    "gelu_tanh": (
        gelu_tanh,
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ),
    "silu": (F.silu, lambda x: x / (1 + torch.exp(-x))),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_formula(name, bias):
    activation, formula = ACTIVATIONS[name]
    ffn = FeedForward(5, 11, activation, bias=bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    w1, w2 = ffn.up_proj, ffn.down_proj
    b1, b2 = (w1.bias, w2.bias) if bias else (0, 0)
    torch.testing.assert_close(ffn(x), formula(x @ w1.weight.T + b1) @ w2.weight.T + b2)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_formula(name, bias):
    activation, formula = ACTIVATIONS[name]
    ffn = GatedFeedForward(5, 11, activation, bias=bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    b = [m.bias if bias else 0 for m in (gate, up, down)]
    inner = formula(x @ gate.weight.T + b[0]) * (x @ up.weight.T + b[1])
    torch.testing.assert_close(ffn(x), inner @ down.weight.T + b[2])


def test_the_two_gelus_differ_but_little():
    x = torch.linspace(-6, 6, 1001)
    gap = (F.gelu(x) - gelu_tanh(x)).abs().max()
    assert 1e-4 < gap < 1e-3


@pytest.mark.parametrize("layer", [FeedForward, GatedFeedForward])
def test_positions_do_not_mix(layer):
    ffn = layer(5, 11, F.gelu)
    x = torch.randn(2, 6, 5)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = ffn(x), ffn(changed)
    assert not torch.equal(before[:, 4], after[:, 4])
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(before[:, others], after[:, others], rtol=0, atol=0)


@pytest.mark.parametrize("layer", [FeedForward, GatedFeedForward])
def test_dropout_acts_on_the_wide_features_in_training_alone(layer):
    ffn = layer(5, 11, F.gelu, bias=True, dropout=1.0)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(ffn(x), ffn.down_proj.bias.expand(2, 3, 5))
    kept = layer(5, 11, F.gelu, bias=True)
    kept.load_state_dict(ffn.state_dict())
    torch.testing.assert_close(ffn.eval()(x), kept(x))
