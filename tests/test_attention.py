"""Attention against loops, against PyTorch's kernels, and against the properties it must have."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention, scaled_dot_product_attention
from llm_anatomy.cache import KVCache
from llm_anatomy.positions import alibi_bias, rope_angles, rope_rotate

B, H, T, S, E, M = 2, 3, 5, 7, 4, 6


def qkv(dtype=torch.float32):
    return (
        torch.randn(B, H, T, E, dtype=dtype),
        torch.randn(B, H, S, E, dtype=dtype),
        torch.randn(B, H, S, M, dtype=dtype),
    )


def by_loops(q, k, v, mask=None, bias=None, scale=None):
    """Equation 1 of the paper, one number at a time."""
    scale = 1 / math.sqrt(E) if scale is None else scale
    out, weights = torch.zeros(B, H, T, M), torch.zeros(B, H, T, S)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (B, H, T))).tolist():
        scores = {}
        for s in range(S):
            if mask is None or mask.expand(B, H, T, S)[b, h, t, s]:
                scores[s] = scale * sum(
                    q[b, h, t, e].item() * k[b, h, s, e].item() for e in range(E)
                )
                scores[s] += 0.0 if bias is None else bias.expand(B, H, T, S)[b, h, t, s].item()
        total = sum(math.exp(x) for x in scores.values())
        for s, x in scores.items():
            weights[b, h, t, s] = math.exp(x) / total
            out[b, h, t] += weights[b, h, t, s] * v[b, h, s]
    return out, weights


MASKS = {
    "none": None,
    "causal": masks.causal(T, S),
    "padding": masks.padding(torch.tensor([[True] * 4 + [False] * 3, [True] * S])),
    "empty row": masks.causal(T, S) & (torch.arange(T) != 2)[:, None],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("bias", [None, torch.randn(1, H, T, S)], ids=["", "bias"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_taught_attention_is_equation_1(mask, bias, scale):
    q, k, v = qkv()
    expected = by_loops(q, k, v, mask, bias, scale)
    for ours, theirs in zip(
        scaled_dot_product_attention(q, k, v, mask, bias, scale), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_taught_attention_equals_the_fused_kernel(mask, dtype):
    q, k, v = qkv(dtype)
    ours, _ = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_gradients_equal_those_of_the_fused_kernel():
    q, k, v = (t.requires_grad_() for t in qkv(torch.float64))
    mask, g = MASKS["empty row"], torch.randn(B, H, T, M, dtype=torch.float64)
    ours = torch.autograd.grad(scaled_dot_product_attention(q, k, v, mask)[0], (q, k, v), g)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    theirs = torch.autograd.grad(fused, (q, k, v), g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@given(seed=st.integers(0, 999), spread=st.floats(0.0, 100.0))
def test_rows_sum_to_one_or_to_zero(seed, spread):
    torch.manual_seed(seed)
    q, k, v = qkv(torch.float64)
    mask = torch.rand(B, 1, T, S) < 0.5
    _, weights = scaled_dot_product_attention(q * spread, k, v, mask)
    assert (weights >= 0).all()
    seen = mask.any(dim=-1, keepdim=True).expand(B, H, T, 1).squeeze(-1).double()
    torch.testing.assert_close(weights.sum(dim=-1), seen)
    assert (weights[~mask.expand_as(weights)] == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = qkv()
    attend = getattr(scaled_dot_product_attention, "__wrapped__", scaled_dot_product_attention)
    with pytest.raises(ValueError, match="queries have width 4, keys 3"):
        attend(q, k[..., :3], v)
    with pytest.raises(ValueError, match="7 keys but 6 values"):
        attend(q, k, v[:, :, :6])
    with pytest.raises(ValueError, match="must be boolean"):
        attend(q, k, v, torch.zeros(T, S)[None, None])


# --- multi-head attention --------------------------------------------------------------------

D = 12


def randomised(*args, **kwargs) -> MultiHeadAttention:
    layer = MultiHeadAttention(*args, **kwargs).eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def by_heads(layer, x, context=None, mask=None, bias=None, rotate=None):
    """One head after the other, each with its own slice of the projections."""
    context = x if context is None else context
    outs = []
    for h in range(layer.q_proj.out_features // layer.d_head):
        rows = slice(h * layer.d_head, (h + 1) * layer.d_head)
        g = h // layer.n_groups
        shared = slice(g * layer.d_head, (g + 1) * layer.d_head)
        q, k, v = (
            F.linear(t, p.weight[r], None if p.bias is None else p.bias[r])[:, None]
            for t, p, r in (
                (x, layer.q_proj, rows),
                (context, layer.k_proj, shared),
                (context, layer.v_proj, shared),
            )
        )
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        one = None if bias is None else bias[:, h : h + 1]
        outs.append(scaled_dot_product_attention(q, k, v, mask, one, layer.scale)[0][:, 0])
    return layer.o_proj(torch.cat(outs, dim=-1))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_head", [None, 5])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_all_heads_at_once_equal_one_head_at_a_time(n_kv_heads, bias, d_head, scale):
    layer = randomised(D, 4, n_kv_heads=n_kv_heads, bias=bias, d_head=d_head, scale=scale)
    x, context = torch.randn(B, T, D), torch.randn(B, S, D)
    torch.testing.assert_close(layer(x), by_heads(layer, x))
    torch.testing.assert_close(layer(x, context), by_heads(layer, x, context))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_mask_bias_and_rotation_together(n_kv_heads):
    layer = randomised(24, 4, n_kv_heads=n_kv_heads)
    x = torch.randn(B, T, 24)
    angles = rope_angles(torch.arange(T), 6)
    parts = dict(
        mask=masks.causal(T) & (torch.arange(T) != 0)[:, None],  # the first row sees nothing
        bias=alibi_bias(4, T),
        rotate=lambda t: rope_rotate(t, *angles),
    )
    torch.testing.assert_close(layer(x, **parts), by_heads(layer, x, **parts))


def test_equals_pytorch_s_layer():
    layer = randomised(D, 3)
    theirs = nn.MultiheadAttention(D, 3, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
        )
        theirs.in_proj_bias.copy_(
            torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias])
        )
        theirs.out_proj.load_state_dict(layer.o_proj.state_dict())
    x, context = torch.randn(B, T, D), torch.randn(B, S, D)
    out, weights = theirs(x, context, context, average_attn_weights=False)
    torch.testing.assert_close(layer(x, context), out)
    torch.testing.assert_close(layer.weights(x, context), weights)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_weights_are_the_ones_that_forward_uses(n_kv_heads):
    layer = randomised(D, 4, n_kv_heads=n_kv_heads)
    x, mask = torch.randn(B, T, D), masks.causal(T)
    weights = layer.weights(x, mask=mask)
    v = layer.v_proj(x).view(B, T, n_kv_heads, 3).transpose(1, 2)
    v = repeat(v, "B G S E -> B (G n) S E", n=4 // n_kv_heads)
    out = layer.o_proj((weights @ v).transpose(1, 2).reshape(B, T, D))
    torch.testing.assert_close(layer(x, mask=mask), out)


def test_groups_are_neighbouring_heads():
    """With G = H every head alone, with G = 1 all share, in between neighbours do."""
    grouped, full = randomised(D, 4, n_kv_heads=2), randomised(D, 4)
    full.load_state_dict(
        grouped.state_dict()
        | {
            f"{p}_proj.{n}": t.view(2, 1, 3, *t.shape[1:])
            .expand(2, 2, 3, *t.shape[1:])
            .reshape(12, *t.shape[1:])
            for p in "kv"
            for n, t in getattr(grouped, f"{p}_proj").state_dict().items()
        }
    )
    x = torch.randn(B, T, D)
    torch.testing.assert_close(grouped(x), full(x))


def test_causality_by_perturbation():
    layer, x = randomised(D, 3), torch.randn(B, S, D)
    before = layer(x, mask=masks.causal(S))
    for t in range(S):
        changed = x.clone()
        changed[:, t] += torch.randn(D)
        after = layer(changed, mask=masks.causal(S))
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=0)
        assert (after[:, t:] != before[:, t:]).any(dim=-1).all()


def test_content_of_padding_does_not_matter():
    layer, x = randomised(D, 3), torch.randn(B, S, D)
    keep = torch.arange(S) < torch.tensor([[4], [7]])
    before = layer(x, mask=masks.padding(keep))
    x[0, 4:] = 99.0
    after = layer(x, mask=masks.padding(keep))
    torch.testing.assert_close(after[0, :4], before[0, :4], rtol=0, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


def test_self_attention_is_permutation_equivariant():
    layer, x = randomised(D, 3), torch.randn(B, S, D)
    order = torch.randperm(S)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    assert not torch.allclose(
        layer(x[:, order], mask=masks.causal(S)), layer(x, mask=masks.causal(S))[:, order]
    )


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("n_kv_heads", [4, 1])
@pytest.mark.parametrize("pieces", [(1,) * 7, (3, 4), (2, 1, 4)])
@torch.inference_mode()
def test_cached_equals_uncached(capacity, n_kv_heads, pieces):
    layer, x = randomised(D, 4, n_kv_heads=n_kv_heads, d_head=6), torch.randn(B, S, D)

    def rotate_from(start, n):
        angles = rope_angles(torch.arange(start, start + n), 6)
        return lambda t: rope_rotate(t, *angles)

    whole = layer(x, mask=masks.causal(S), bias=alibi_bias(4, S), rotate=rotate_from(0, S))
    cache, outs, at = KVCache(capacity), [], 0
    for n in pieces:
        parts = dict(mask=masks.causal(n, at + n), bias=alibi_bias(4, n, at + n))
        outs.append(layer(x[:, at : at + n], rotate=rotate_from(at, n), cache=cache, **parts))
        at += n
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)


@torch.inference_mode()
def test_cross_attention_reads_its_memory_once():
    layer, x, memory = randomised(D, 3), torch.randn(B, T, D), torch.randn(B, S, D)
    cache, calls = KVCache(), []
    for projection in (layer.k_proj, layer.v_proj):
        projection.register_forward_hook(lambda *_: calls.append(1))
    first = layer(x[:, :2], memory, cache=cache)
    rest = layer(x[:, 2:], memory[:, :0], cache=cache)
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat((first, rest), dim=1), layer(x, memory))


def test_dropout_acts_in_training_only():
    layer, x = randomised(D, 3, dropout=0.5), torch.randn(B, T, D)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_every_parameter_gets_a_gradient():
    layer = randomised(D, 4, n_kv_heads=2)
    layer(torch.randn(B, T, D), torch.randn(B, S, D)).square().sum().backward()
    # the bias of the keys adds one number to a whole row of scores: the softmax cannot see it
    for name, p in layer.named_parameters():
        moved = p.grad.abs().max()
        assert moved < 1e-4 if name == "k_proj.bias" else moved > 1e-3, name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(d_model=10, n_heads=3), r"d_model \(10\) must be a multiple of n_heads \(3\)"),
        (dict(d_model=12, n_heads=4, n_kv_heads=3), r"n_heads \(4\) .* n_kv_heads \(3\)"),
        (dict(d_model=12, n_heads=4, n_kv_heads=0), r"n_kv_heads \(0\)"),
    ],
)
def test_impossible_head_counts_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**kwargs)


def test_inputs_that_do_not_fit_are_refused():
    layer = MultiHeadAttention(D, 3)
    forward = getattr(MultiHeadAttention.forward, "__wrapped__", MultiHeadAttention.forward)
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, positions, 12\), got \(2, 12\)"
    ):
        forward(layer, torch.randn(2, D))
    with pytest.raises(ValueError, match=r"context must have .* got \(2, 5, 11\)"):
        forward(layer, torch.randn(2, T, D), torch.randn(2, T, D - 1))
    with pytest.raises(ValueError, match="x has batch 2, context 1"):
        forward(layer, torch.randn(2, T, D), torch.randn(1, T, D))
