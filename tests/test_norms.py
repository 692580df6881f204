"""Norms equal PyTorch's, with every parameter away from its neutral value."""

import pytest
import torch
from torch import nn

from llm_anatomy.norms import LayerNorm, RMSNorm


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])  # 0.3 shows where eps stands
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_pytorch(ours, theirs, eps, dtype):
    mine, reference = ours(7, eps=eps).to(dtype), theirs(7, eps=eps).to(dtype)
    for p in mine.parameters():
        nn.init.normal_(p)
    reference.load_state_dict(mine.state_dict())
    x = torch.randn(2, 5, 7, dtype=dtype) * 3 + 1
    torch.testing.assert_close(mine(x), reference(x))


def test_layer_norm_centres_and_scales():
    y = LayerNorm(64)(torch.randn(3, 64) * 5 + 2)
    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dim=-1, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_rms_norm_keeps_the_mean_and_ignores_the_scale():
    x = torch.randn(3, 64) + 2
    norm = RMSNorm(64, eps=0.0)
    assert norm(x).mean() > 0.5
    torch.testing.assert_close(norm(10 * x), norm(x))


def test_rms_norm_squares_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300 squared overflows float16
    y = RMSNorm(4).half()(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones(1, 4, dtype=torch.float16))
