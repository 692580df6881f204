"""Recorded answers to the exercises of `attention`: right ones written differently, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from llm_anatomy.positions import rope_angles, rope_rotate

# --- Right answers, written differently --------------------------------------------------------


class SoftmaxLayer(nn.Module):
    def forward(self, scores):
        return F.softmax(scores, dim=-1)


def scores_by_loops(q, k):
    B, H, T, E = q.shape
    S = k.shape[2]
    out = torch.zeros(B, H, T, S)
    for t in range(T):
        for s in range(S):
            out[:, :, t, s] = (q[:, :, t] * k[:, :, s]).sum(-1) * E**-0.5
    return out


def effective_keys_skipping_zeros(weights):
    logs = torch.where(weights > 0, weights, torch.ones_like(weights)).log()
    return torch.exp(-torch.einsum("bhts,bhts->bht", weights, logs))


def causal_by_tril(T, S):
    return torch.tril(torch.ones((1, 1, T, S), dtype=torch.bool), diagonal=S - T)


def causal_by_list(T, S):
    return torch.tensor([[[[s - (S - T) <= t for s in range(S)] for t in range(T)]]])


def padding_by_filling(lengths, n_keys):
    mask = torch.zeros(len(lengths), 1, 1, n_keys, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, ..., :length] = True
    return mask


def prefix_by_filling(n_prefix, T):
    mask = torch.ones(len(n_prefix), 1, T, T).tril().bool()
    for b, n in enumerate(n_prefix.tolist()):
        mask[b, :, :, :n] = True
    return mask


def masked_softmax_by_hand(scores, mask):
    top = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    weights = torch.where(mask, (scores - top.clamp(min=-1e30)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def masked_softmax_nan_to_num(scores, mask):
    return torch.nan_to_num(torch.softmax(torch.where(mask, scores, -torch.inf), -1))


def attend_row_by_row(q, k, v, mask):
    B, H, T, E = q.shape
    S = k.shape[2]
    mask = mask.expand(B, H, T, S)
    weights = torch.zeros(B, H, T, S)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = mask[b, h, t].nonzero()[:, 0]
                weights[b, h, t, seen] = torch.softmax(k[b, h, seen] @ q[b, h, t] / E**0.5, 0)
    return [torch.einsum("bhts,bhsm->bhtm", weights, v), weights]


def merge_by_loop(x):
    return torch.cat(list(x.unbind(1)), -1)


def cross_by_torch(x, memory, w_q, w_k, w_v):
    return F.scaled_dot_product_attention(x @ w_q, memory @ w_k, memory @ w_v)


def heads_by_einops(x, w_q, w_k, w_v, w_o, n_heads):
    q, k, v = (rearrange(x @ w, "b t (h e) -> b h t e", h=n_heads) for w in (w_q, w_k, w_v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h t e -> b t (h e)") @ w_o


def heads_by_slices(x, w_q, w_k, w_v, w_o, n_heads):
    E = x.shape[-1] // n_heads
    total = 0
    for h in range(n_heads):
        part = slice(h * E, (h + 1) * E)
        q, k, v = x @ w_q[:, part], x @ w_k[:, part], x @ w_v[:, part]
        total = total + (q @ k.mT / E**0.5).softmax(-1) @ v @ w_o[part]
    return total


def cached_one_by_one(q, k, v, past_k, past_v):
    outputs = []
    for t in range(q.shape[2]):
        past_k = torch.cat((past_k, k[:, :, t : t + 1]), 2)
        past_v = torch.cat((past_v, v[:, :, t : t + 1]), 2)
        outputs.append(F.scaled_dot_product_attention(q[:, :, t : t + 1], past_k, past_v))
    return torch.cat(outputs, 2), past_k, past_v


def count_by_building(d_model, n_heads, n_kv_heads, bias):
    E = d_model // n_heads
    layers = (n_heads, n_kv_heads, n_kv_heads, n_heads)
    return torch.tensor(sum((d_model + bias) * E * n for n in layers))


def sinusoidal_by_exp(n_positions, d_model):
    speed = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000) / d_model))
    angle = torch.outer(torch.arange(n_positions).float(), speed)
    return torch.stack((torch.sin(angle), torch.cos(angle)), 2).view(n_positions, d_model)


def shift_by_blocks(shift, d_model):
    blocks = []
    for i in range(d_model // 2):
        a = torch.tensor(shift * 10_000 ** (-2 * i / d_model), dtype=torch.float64)
        blocks.append(torch.stack((a.cos(), a.sin(), -a.sin(), a.cos())).view(2, 2))
    return torch.block_diag(*blocks)


def rope_by_package(x, positions, base):
    return rope_rotate(x, *rope_angles(positions, x.shape[-1], base))


def rope_by_complex(x, positions, base):
    E = x.shape[-1]
    z = torch.complex(x[..., : E // 2], x[..., E // 2 :])
    angle = positions[:, None] / base ** (torch.arange(E // 2) * 2 / E)
    z = z * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), -1)


def rope_cache_by_relative_position(q, k, cached_k):
    """Turning everything by the same angle changes no score: the new token may stand at 0."""
    S, E = cached_k.shape[-2:]
    back = rope_rotate(cached_k, *rope_angles(torch.full((S,), -S), E))
    return q @ torch.cat((back, k), 2).mT / math.sqrt(E)


def alibi_by_loop(slopes, T, S):
    out = torch.zeros(len(slopes), T, S)
    for t in range(T):
        for s in range(S):
            out[:, t, s] = -slopes * max(0, t + S - T - s)
    return out


def t5_by_loop(offset):
    out = torch.zeros_like(offset)
    for t, row in enumerate(offset.tolist()):
        for s, o in enumerate(row):
            d = abs(o)
            b = d if d < 8 else min(15, 8 + int(math.log2(d / 8) * 2))
            out[t, s] = b + 16 * (o > 0)
    return out


ALTERNATIVES = {
    "variance_of_scores": [[64, 8], (torch.tensor(64.0), 64**0.5)],
    "scaled_scores": [
        scores_by_loops,
        lambda q, k: torch.einsum("bhte,bhse->bhts", q / q.size(-1) ** 0.5, k),
    ],
    "softmax_rows": [SoftmaxLayer(), lambda a: (a - a.logsumexp(-1, keepdim=True)).exp()],
    "entropy_limits": [(math.log(16), 0), (2.7726, 0.0)],
    "effective_keys": [
        effective_keys_skipping_zeros,
        lambda w: torch.special.entr(w).sum(-1).exp(),
        lambda w: torch.exp(-(w * (w + 1e-12).log()).sum(-1)),
        lambda w: 2 ** (-torch.xlogy(w, w).sum(-1) / math.log(2)),
    ],
    "causal_mask": [causal_by_tril, causal_by_list],
    "padding_mask": [padding_by_filling],
    "prefix_mask": [prefix_by_filling],
    "masked_softmax": [masked_softmax_by_hand, masked_softmax_nan_to_num],
    "attend": [attend_row_by_row],
    "split_heads": [
        lambda x, H: rearrange(x, "b t (h e) -> b h t e", h=H),
        lambda x, H: torch.stack(x.chunk(H, dim=-1), dim=1),
    ],
    "merge_heads": [merge_by_loop, lambda x: rearrange(x, "b h t e -> b t (h e)")],
    "cross_attention": [cross_by_torch],
    "fix_multi_head": [heads_by_einops, heads_by_slices],
    "repeat_kv": [
        lambda k, H: repeat(k, "b g s e -> b (g n) s e", n=H // k.shape[1]),
        lambda k, H: k[:, torch.arange(H) * k.shape[1] // H],
    ],
    "cached_step": [cached_one_by_one],
    "count_parameters": [count_by_building],
    "score_memory": [(201_326_592, 768, 4), [201326592.0, 768.0, 4.0]],
    "path_length": [(1023, 512, 1), [1023.0, 512.0, 1.0]],
    "shuffled_tokens": ["B", " b) "],
    "sinusoidal_table": [sinusoidal_by_exp],
    "shift_matrix": [shift_by_blocks],
    "rope": [rope_by_package, rope_by_complex],
    "rope_score": [(-0.654, -0.654)],
    "slowest_pair": [54410, 2 * math.pi / 10_000 ** (-126 / 128)],
    "fix_rope_cache": [rope_cache_by_relative_position],
    "alibi_slopes": [
        lambda H: torch.tensor([(2 ** (-8 / H)) ** (h + 1) for h in range(H)]),
        lambda H: torch.logspace(-8 / H, -8, H, base=2),
    ],
    "alibi_bias": [alibi_by_loop],
    "t5_bucket": [t5_by_loop],
    "beyond_training": ["(b)", "B"],
}


# --- Wrong answers -----------------------------------------------------------------------------


def softmax_naive(scores):
    e = torch.exp(scores)
    return e / e.sum(dim=-1, keepdim=True)


def softmax_global_max(scores):
    e = (scores - scores.max()).exp()
    return e / e.sum(-1).unsqueeze(-1)


def softmax_no_keepdim(scores):
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return e / e.sum(dim=-1)


def softmax_mean(scores):
    return softmax_naive(scores - scores.mean(dim=-1, keepdim=True))


def additive_mask(T, S):
    mask = torch.full((1, 1, T, S), float("-inf"))
    return torch.triu(mask, diagonal=S - T + 1)


def padding_on_the_left(lengths, n_keys):
    rows = [[0] * (n_keys - n) + [1] * n for n in lengths.tolist()]
    return torch.tensor(rows).bool()[:, None, None, :]


def prefix_rows(n_prefix, T):
    mask = torch.ones(len(n_prefix), 1, T, T).tril().bool()
    for b, n in enumerate(n_prefix.tolist()):
        mask[b, :, :n, :] = True
    return mask


def prefix_and(n_prefix, T):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return causal & (torch.arange(T) < n_prefix[:, None])[:, None, None, :]


def prefix_block_only(n_prefix, T):
    return (torch.arange(T) < n_prefix[:, None])[:, None, None, :].repeat(1, 1, T, 1)


def prefix_off_by_one(n_prefix, T):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return causal | (torch.arange(T) <= n_prefix[:, None])[:, None, None, :]


def prefix_no_head_axis(n_prefix, T):
    return prefix_by_filling(n_prefix, T).squeeze(1)


def masked_fill_zero(scores, mask):
    return F.softmax(scores.masked_fill(~mask, 0.0), dim=-1)


def masked_after(scores, mask):
    return F.softmax(scores, dim=-1).masked_fill(~mask, 0.0)


def masked_nan(scores, mask):
    return F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1)


def masked_large_negative(scores, mask):
    return F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1)


def masked_added(scores, mask):
    return F.softmax(scores + (1.0 - mask.float()) * -10000.0, dim=-1)


def masked_inverted(scores, mask):
    return F.softmax(scores.masked_fill(mask, float("-inf")), dim=-1)


def masked_over_queries(scores, mask):
    return scores.masked_fill(~mask, -torch.inf).softmax(2).masked_fill(~mask, 0)


def attend_template(scale=None, dim=-1, before=True, use_mask=True):
    def attend(q, k, v, mask):
        scores = torch.matmul(q, k.transpose(-2, -1))
        scores = scores / math.sqrt(q.size(-1)) if scale is None else scores * scale(q, v)
        if use_mask and before:
            scores = torch.where(mask, scores, float("-inf"))
        weights = F.softmax(scores, dim=dim)
        if use_mask and not before:
            weights = weights * mask
        return torch.matmul(weights, v), weights

    return attend


def attend_only_output(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_swapped(q, k, v, mask):
    output, weights = attend_template()(q, k, v, mask)
    return weights, output


def cross_wrong_side(x, memory, w_q, w_k, w_v):
    return cross_by_torch(memory, x, w_q, w_k, w_v)


def cross_values_from_x(x, memory, w_q, w_k, w_v):
    q, k, v = x @ w_q, memory @ w_k, x @ w_v
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def cross_keys_from_x(x, memory, w_q, w_k, w_v):
    q, k, v = x @ w_q, x @ w_k, memory @ w_v
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def cross_self(x, memory, w_q, w_k, w_v):
    return cross_by_torch(x, x, w_q, w_k, w_v)


def cross_unscaled(x, memory, w_q, w_k, w_v):
    return ((x @ w_q) @ (memory @ w_k).mT).softmax(-1) @ (memory @ w_v)


def half_repaired(split, scale, axis, merge):
    """The given code with some of the four mistakes repaired."""

    def attention(x, w_q, w_k, w_v, w_o, n_heads):
        B, T, D = x.shape
        E = D // n_heads
        q, k, v = (x @ w_q, x @ w_k, x @ w_v)
        if split:
            q, k, v = (t.reshape(B, T, n_heads, E).permute(0, 2, 1, 3) for t in (q, k, v))
        else:
            q, k, v = (t.reshape(B, n_heads, T, E) for t in (q, k, v))
        scores = torch.einsum("bhte,bhse->bhts", q, k) / (E if scale else D) ** 0.5
        y = scores.softmax(3 if axis else 2) @ v
        return (y.permute(0, 2, 1, 3) if merge else y).reshape(B, T, D) @ w_o

    return attention


def cached_without_mask(q, k, v, past_k, past_v):
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def cached_is_causal(q, k, v, past_k, past_v):
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v


def cached_float_mask(q, k, v, past_k, past_v):
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    mask = torch.ones(q.shape[2], k.shape[2]).tril(past_k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, v


def cached_shifted(shift):
    def step(q, k, v, past_k, past_v):
        k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        key, query = torch.arange(k.shape[2]), torch.arange(q.shape[2])[:, None]
        mask = key <= query + past_k.shape[2] + shift
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, v

    return step


def cached_strict_by_hand(q, k, v, past_k, past_v):
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    mask = causal_by_tril(q.shape[2], k.shape[2]).roll(-1, dims=-1)
    mask[..., -1] = False
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v, k, v


def cached_new_first(q, k, v, past_k, past_v):
    k, v = torch.cat((k, past_k), 2), torch.cat((v, past_v), 2)
    mask = causal_by_tril(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k, v


def cached_ignores_past(q, k, v, past_k, past_v):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y, torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)


def cached_returns_new(q, k, v, past_k, past_v):
    return cached_one_by_one(q, k, v, past_k, past_v)[0], k, v


def cached_returns_old(q, k, v, past_k, past_v):
    return cached_one_by_one(q, k, v, past_k, past_v)[0], past_k, past_v


def sinusoidal_template(power=lambda i, d: 2 * i / d, start=0, swap=False, halves=False):
    def table(n_positions, d_model):
        out = torch.zeros(n_positions, d_model)
        for row in range(n_positions):
            for i in range(d_model // 2):
                angle = (row + start) / 10_000 ** power(i, d_model)
                pair = (math.sin(angle), math.cos(angle))
                a, b = (i, d_model // 2 + i) if halves else (2 * i, 2 * i + 1)
                out[row, a], out[row, b] = pair[::-1] if swap else pair
        return out

    return table


def sinusoidal_by_column(n_positions, d_model):
    j = torch.arange(d_model)
    angle = torch.arange(n_positions)[:, None] / 10_000 ** (j / d_model)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos())


def shift_template(block):
    def matrix(shift, d_model):
        out = torch.zeros(d_model, d_model)
        for i in range(0, d_model, 2):
            angle = shift / 10_000 ** (i / d_model)
            out[i : i + 2, i : i + 2] = torch.tensor(block(math.sin(angle), math.cos(angle)))
        return out

    return matrix


def shift_one_speed(shift, d_model):
    s, c = math.sin(shift), math.cos(shift)
    return torch.block_diag(*[torch.tensor([[c, s], [-s, c]])] * (d_model // 2))


def shift_halves(shift, d_model):
    angle = shift / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
    top = torch.cat((angle.cos().diag(), angle.sin().diag()), dim=1)
    return torch.cat((top, torch.cat((-angle.sin().diag(), angle.cos().diag()), dim=1)))


def rope_interleaved(x, positions, base):
    E = x.shape[-1]
    angle = positions[:, None] * base ** (-torch.arange(0, E, 2) / E)
    cos, sin = angle.cos(), angle.sin()
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def rope_template(sign=1, speed=lambda i, E: 2 * i / E, positions_used=True, swap=False):
    def rotate(x, positions, base):
        E = x.shape[-1]
        if not positions_used:
            positions = torch.arange(x.shape[-2])
        speeds = torch.tensor([float(base) ** -speed(i, E) for i in range(E // 2)])
        angle = torch.outer(positions.float(), speeds).repeat(1, 2)
        first, second = x[..., : E // 2], x[..., E // 2 :]
        rotated = torch.cat((-second, first), -1)
        out = x * angle.cos() + sign * rotated * angle.sin()
        return torch.cat((out[..., E // 2 :], out[..., : E // 2]), -1) if swap else out

    return rotate


def rope_cache_template(query_at, key_at, cached_again=False):
    def scores(q, k, cached_k):
        S, E = cached_k.shape[-2:]
        q = rope_rotate(q, *rope_angles(torch.tensor([query_at(S)]), E))
        k = rope_rotate(k, *rope_angles(torch.tensor([key_at(S)]), E))
        if cached_again:
            cached_k = rope_rotate(cached_k, *rope_angles(torch.arange(S), E))
        return q @ torch.cat((cached_k, k), -2).transpose(-1, -2) / E**0.5

    return scores


def rope_cache_new_first(q, k, cached_k):
    S, E = cached_k.shape[-2:]
    q, k = (rope_rotate(t, *rope_angles(torch.tensor([S]), E)) for t in (q, k))
    return q @ torch.cat((k, cached_k), -2).mT / math.sqrt(E)


def alibi_template(distance, sign=-1):
    def bias(slopes, T, S):
        table = torch.tensor([[float(distance(t, s, T, S)) for s in range(S)] for t in range(T)])
        return sign * torch.einsum("h,ts->hts", slopes, table)

    return bias


def t5_template(
    after=lambda o: o > 0, exact=8, top=15, log=lambda d: math.log(d / 8) / math.log(16), add=8
):
    def buckets(offset):
        out = torch.zeros_like(offset)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in offset.shape)).tolist():
            o = int(offset[tuple(index)])
            d = abs(o)
            b = d if d < exact else min(top, int(add + 8 * log(d)))
            out[tuple(index)] = b + 16 * after(o)
        return out

    return buckets


def t5_float(offset):
    d = offset.abs()
    large = (8 + 8 * torch.log(d.clamp(min=1) / 8) / math.log(16)).clamp(max=15)
    return torch.where(d < 8, d, large) + 16 * (offset > 0)


WRONG = {
    "variance_of_scores": [
        ((8, 64), "other way round"),
        ((1.0, 1.0), "64 independent products are added"),
        ((4096, 64), "if all 64 products were the same number"),
        ((128, 128**0.5), "not 1 + 1"),
        ((64, 64), "The variance is right"),
    ],
    "scaled_scores": [
        (lambda q, k: torch.matmul(q, k.transpose(-1, -2)), "not scaled"),
        (lambda q, k: q @ k.transpose(2, 3) / q.size(-1), "divided by E"),
        (lambda q, k: q @ k.transpose(2, 3) * q.size(-1) ** 0.5, "multiplied by sqrt(E)"),
        (lambda q, k: q @ k.mT / q.size(-2) ** 0.5, "number of queries"),
        (lambda q, k: q @ k.mT / k.size(-2) ** 0.5, "number of keys"),
        (lambda q, k: q @ k.mT / (q.size(1) * q.size(3)) ** 0.5, "whole model's width"),
        (lambda q, k: (k @ q.mT) / q.size(-1) ** 0.5, "Queries and keys have changed places"),
        (lambda q, k: torch.matmul(q, k) / math.sqrt(q.size(-1)), "keys are not transposed"),
        (lambda q, k: q @ k.permute(3, 2, 1, 0) / q.size(-1) ** 0.5, "turns all four axes"),
    ],
    "softmax_rows": [
        (softmax_naive, "exp overflows"),
        (softmax_global_max, "maximum of the whole tensor"),
        (softmax_mean, "The mean is taken off"),
        (lambda a: F.softmax(a, dim=0), "first axis"),
        (lambda a: F.softmax(a, dim=-2 if a.ndim > 1 else -1), "over the wrong axis"),
        (lambda a: F.log_softmax(a, dim=-1), "logarithms of the weights"),
        (lambda a: (a - a.amax(-1, True)).exp(), "not divided by their sum"),
        (softmax_no_keepdim, "has lost its axis"),
    ],
    "entropy_limits": [
        ((0.0, math.log(16)), "changed places"),
        ((4.0, 0.0), "entropy in bits"),
        ((math.log10(16), 0), "base 10"),
        ((1 / 16, 1.0), "weight of each key"),
        ((16, 1), "the entropy is its logarithm"),
        ((math.log(16), 1.0), "what is 1 · ln 1"),
    ],
    "effective_keys": [
        (lambda w: torch.exp(-(w * torch.log(w)).sum(-1)), "came out as nan"),
        (lambda w: -torch.xlogy(w, w).sum(-1), "This is the entropy"),
        (lambda w: torch.exp(torch.xlogy(w, w).sum(-1)), "The sign is missing"),
        (lambda w: 2 ** -torch.xlogy(w, w).sum(-1), "2 to the power of an entropy in nats"),
        (
            lambda w: torch.exp(torch.special.entr(w).sum(-1) / math.log(2)),
            "An entropy in bits goes with 2**",
        ),
        (lambda w: torch.special.entr(w).sum(-2).exp(), "runs over the queries"),
        (lambda w: torch.special.entr(w).mean(-1).exp(), "This is the mean over the keys"),
        (lambda w: (w > 0).float().sum(-1), "counts the weights above 0"),
    ],
    "causal_mask": [
        (lambda T, S: causal_by_tril(T, S).tril(S - T - 1), "cannot see itself"),
        (
            lambda T, S: torch.ones(1, 1, T, S, dtype=torch.bool).tril(S - T + 1),
            "can see the token after it",
        ),
        (lambda T, S: torch.ones(1, 1, T, S, dtype=torch.bool).tril(), "at the start of the keys"),
        (lambda T, S: causal_by_tril(T, S).logical_not(), "other way round"),
        (
            lambda T, S: torch.triu(torch.ones(1, 1, T, S), diagonal=1).bool(),
            "and the queries are placed at the start",
        ),
        (lambda T, S: torch.triu(torch.ones(1, 1, T, S), S - T).bool(), "upper triangle"),
        (lambda T, S: causal_by_tril(T, S).transpose(-1, -2), "Keys and queries"),
        (lambda T, S: causal_by_tril(T, S)[0, 0], "leading axes"),
        (lambda T, S: causal_by_tril(T, S).squeeze(), "Only the axes of size 1 differ"),
        (additive_mask, "additive mask"),
        (lambda T, S: causal_by_tril(T, T), "n_keys is not used"),
        (lambda T, S: causal_by_tril(T, S).float(), "only the type is not"),
    ],
    "padding_mask": [
        (lambda n, S: ~padding_by_filling(n, S), "other way round"),
        (lambda n, S: padding_by_filling(n + 1, S), "One token of padding stays visible"),
        (lambda n, S: padding_by_filling(n - 1, S), "last real token is hidden"),
        (padding_on_the_left, "on the left"),
        (lambda n, S: padding_by_filling(n, S).mT, "axis of the queries"),
        (lambda n, S: torch.arange(S) < n[:, None], "shape is (B, S)"),
        (lambda n, S: torch.arange(S) < n[:, None, None], "One axis is missing"),
        (lambda n, S: padding_by_filling(n, S).long(), "only the type is not"),
    ],
    "prefix_mask": [
        (prefix_and, "joined by `&`"),
        (prefix_rows, "queries of the prefix see everything"),
        (prefix_block_only, "the causal rule is missing"),
        (prefix_off_by_one, "one position too long"),
        (lambda n, T: prefix_by_filling((n - 1).clamp(min=0), T), "one position too short"),
        (lambda n, T: causal_by_tril(T, T).repeat(len(n), 1, 1, 1), "The prefix is causal too"),
        (prefix_no_head_axis, "axis of size 1 for the heads is missing"),
    ],
    "masked_softmax": [
        (masked_nan, "is nan"),
        (masked_fill_zero, "exp(0) = 1"),
        (masked_after, "after the softmax"),
        (masked_large_negative, "not minus infinity"),
        (masked_added, "is added instead of minus infinity"),
        (masked_inverted, "True means that a query may look), and"),
        (lambda a, m: torch.nan_to_num(masked_inverted(a, m)), "True means that a query may look."),
        (masked_over_queries, "runs over the queries"),
        (lambda a, m: F.softmax(a, -1), "The mask is not used"),
    ],
    "attend": [
        (attend_template(scale=lambda q, v: 1.0), "not divided by sqrt(E)"),
        (attend_template(scale=lambda q, v: 1 / q.size(-1)), "divided by E"),
        (attend_template(scale=lambda q, v: v.size(-1) ** -0.5), "values' width"),
        (attend_template(dim=-2), "runs over the queries"),
        (attend_template(use_mask=False), "The mask is not used"),
        (lambda q, k, v, m: attend_template()(q, k, v, ~m), "other way round"),
        (attend_template(before=False), "after the softmax"),
        (attend_only_output, "Only the output comes back"),
        (attend_swapped, "Weights and output have changed places"),
    ],
    "split_heads": [
        (lambda x, H: x.view(x.size(0), H, x.size(1), -1), "regroups the numbers"),
        (lambda x, H: x.view(x.size(0), x.size(1), H, -1), "still have to change places"),
        (lambda x, H: rearrange(x, "b t (e h) -> b h t e", h=H), "dealt out like cards"),
        (lambda x, H: rearrange(x, "b t (h e) -> b h e t", h=H), "this is (B, H, E, T)"),
        (lambda x, H: rearrange(x, "b t (h e) -> b e t h", h=H), "this is (B, E, T, H)"),
        (lambda x, H: rearrange(x, "b t (h e) -> h b t e", h=H), "this is (H, B, T, E)"),
    ],
    "merge_heads": [
        (lambda x: x.reshape(x.size(0), x.size(2), -1), "joined before they change places"),
        (
            lambda x: x.transpose(1, 2).view(x.shape[0], x.shape[2], -1),
            "`view` cannot join axes",
        ),
        (lambda x: rearrange(x, "b h t e -> b t (e h)"), "interleaved"),
        (lambda x: rearrange(x, "b h t e -> b (h t) e"), "joined along the positions"),
        (lambda x: x.sum(dim=1), "The heads are added up"),
        (lambda x: x.mean(dim=1), "The heads are averaged"),
    ],
    "cross_attention": [
        (cross_wrong_side, "The sides are swapped"),
        (cross_self, "This is self-attention"),
        (cross_values_from_x, "The values come from x"),
        (cross_keys_from_x, "The keys come from x"),
        (cross_unscaled, "not divided by sqrt(E)"),
        (lambda x, m, q, k, v: cross_by_torch(m, m, q, k, v), "the memory's self-attention"),
        (lambda x, m, q, k, v: cross_by_torch(x, m, k, q, v), "w_q and w_k have changed places"),
    ],
    "fix_multi_head": [
        (
            half_repaired(split=False, scale=True, axis=True, merge=True),
            "One mistake is left: `view` alone splits",
        ),
        (
            half_repaired(split=True, scale=False, axis=True, merge=True),
            "One mistake is left: the scores are divided by the square root of the whole width",
        ),
        (
            half_repaired(split=True, scale=True, axis=False, merge=True),
            "One mistake is left: the softmax runs over the queries",
        ),
        (
            half_repaired(split=True, scale=True, axis=True, merge=False),
            "One mistake is left: the heads are joined without",
        ),
        (half_repaired(split=False, scale=True, axis=True, merge=False), "Two mistakes are left"),
        (
            half_repaired(split=False, scale=True, axis=False, merge=False),
            "Three mistakes are left",
        ),
    ],
    "repeat_kv": [
        (lambda k, H: k.repeat(1, H // k.size(1), 1, 1), "tiled, 0 1 0 1"),
        (lambda k, H: torch.repeat_interleave(k, H, dim=1), "repeated H times"),
        (lambda k, H: k.repeat_interleave(H // k.size(1), dim=2), "positions are repeated"),
        (lambda k, H: k[:, :1].repeat(1, H, 1, 1), "the first key head"),
        (lambda k, H: torch.stack([k.mean(1)] * H, 1), "average of the key heads"),
        (lambda k, H: k, "not repeated"),
        (lambda k, H: torch.cat([k] * H, dim=1), "tiled H times"),
    ],
    "cached_step": [
        (cached_without_mask, "no mask among the new positions: a new query sees"),
        (cached_is_causal, "starts at the upper left"),
        (cached_float_mask, "numbers 0 and 1"),
        (cached_shifted(-1), "one place too strict"),
        (cached_strict_by_hand, "sees nothing, hence the nan"),
        (cached_shifted(1), "one place too wide"),
        (cached_new_first, "Positions stay in order"),
        (cached_ignores_past, "look at themselves only"),
        (cached_returns_new, "holds the new positions only"),
        (cached_returns_old, "comes back as it was"),
    ],
    "count_parameters": [
        (lambda D, H, G, bias: 4 * (D * D + bias * D), "All four projections are counted"),
        (
            lambda D, H, G, bias: (D + bias) * D + 2 * (D + bias) * G * (D // H),
            "The output projection is missing",
        ),
        (lambda D, H, G, bias: 2 * D * D + 2 * D * G * (D // H), "the bias terms are missing"),
        (
            lambda D, H, G, bias: 2 * D * D + 2 * D * G * (D // H) + 4 * D * bias,
            "only G · E long",
        ),
        (
            lambda D, H, G, bias: H * int(count_by_building(D, H, G, bias)),
            "multiplied by the number",
        ),
        (lambda D, H, G, bias: H * 4 * D**2, "Each head is counted with matrices of D by D. The"),
        (
            lambda D, H, G, bias: 4 * H * D * (D + bias),
            "Each head is counted with matrices of D by D, and with biases",
        ),
        (lambda D, H, G, bias: count_by_building(D, H, G, True), "even where `bias` is false"),
        (lambda D, H, G, bias: count_by_building(D, H, 1, bias), "as for one head"),
    ],
    "score_memory": [
        ((12 * 4096, 0.1875, 2), "not 4096"),
        ((4096**2, 64, 4), "The heads are missing"),
        ((6 * 4096**2, 384, 4), "after a causal mask"),
        ((201326592, 384, 4), "2 bytes a score"),
        ((201326592, 805.3, 4), "MB of 10^6 bytes"),
        ((201326592, 805306368, 4), "number of bytes"),
        ((201326592, 192, 4), "each takes 4 bytes"),
        ((201326592, 768, 2), "would be linear"),
        ((201326592, 768, 8), "would be cubic"),
    ],
    "path_length": [
        ((1024, 512, 1), "there are 1023 steps"),
        ((1023, 1023, 1), "moved information by one position"),
        ((1023, 341, 1), "by three positions"),
        ((1023, 511, 1), "Half a layer does not exist"),
        ((1023, 10, 1), "dilated"),
        ((1023, 512, 1023), "Attention does not move along"),
        ((1023, 512, 0), "Something has to happen"),
    ],
    "shuffled_tokens": [
        ("a", "ignored which row is which"),
        ("c", "the columns move with them"),
        ("d", "a sum over them"),
        ("e", "would need equal scores"),
    ],
    "sinusoidal_table": [
        (sinusoidal_template(power=lambda i, d: i / d), "The power is i/D instead of 2i/D"),
        (sinusoidal_template(power=lambda i, d: 4 * i / d), "The power is 4i/D"),
        (sinusoidal_template(halves=True), "All sines come first"),
        (sinusoidal_template(swap=True), "Sine and cosine have changed places"),
        (sinusoidal_template(start=1), "The first row is position 1"),
        (sinusoidal_template(power=lambda i, d: 0), "same speed"),
        (sinusoidal_by_column, "Each column j has a power of its own"),
        (sinusoidal_template(power=lambda i, d: -2 * i / d), "multiplied by 10000^(2i/D)"),
    ],
    "shift_matrix": [
        (shift_template(lambda s, c: [[c, -s], [s, c]]), "This matrix moves by -s"),
        (shift_template(lambda s, c: [[c, s], [s, c]]), "One of the two sines needs a minus"),
        (shift_template(lambda s, c: [[c, 0.0], [0.0, c]]), "Only the cosines are there"),
        (shift_one_speed, "All pairs turn by the same angle"),
        (shift_halves, "all sines first"),
        (lambda s, D: torch.eye(D), "The identity moves nothing"),
    ],
    "rope": [
        (rope_interleaved, "Neighbouring features (2i, 2i + 1) are paired"),
        (rope_template(sign=-1), "It turns the other way"),
        (rope_template(speed=lambda i, E: 0), "same speed"),
        (rope_template(speed=lambda i, E: i / E), "The power is -i/E"),
        (rope_template(speed=lambda i, E: -2 * i / E), "The power has the wrong sign"),
        (lambda x, p, base: rope_by_complex(x, p, 10_000.0), "The base is 10000 whatever"),
        (rope_template(positions_used=False), "The positions are not used"),
        (rope_template(swap=True), "The two halves have changed places"),
        (lambda x, p, base: rope_interleaved(x, -p, base), "are paired, and they turn the other"),
    ],
    "rope_score": [
        ((math.cos(10), math.cos(210)), "the sum of the positions"),
        ((math.cos(7) * math.cos(3), 0.5), "product of the first coordinates"),
        ((0.9976, 0.9976), "in degrees"),
        ((4.0, 4.0), "the dot product is its cosine"),
        ((math.sin(4), math.sin(4)), "the dot product is the cosine"),
        ((1.0, 1.0), "the score without positions"),
        ((math.cos(4), math.cos(104)), "what can have changed"),
    ],
    "slowest_pair": [
        (62831.85, "its power is 126/128, not 1"),
        (8659.6, "turn it by 1 radian"),
        (10_000, "10000 would be 1 radian"),
        (6.2832, "the fastest pair"),
        (2 * math.pi * 10_000 ** (63 / 128), "With i/E it would be 63/128"),
        (2 * math.pi * 10_000 ** (127 / 128), "belongs to no pair"),
        (360 * 10_000 ** (126 / 128), "not 360"),
    ],
    "fix_rope_cache": [
        (
            lambda q, k, c: rope_cache_template(lambda S: S, lambda S: S, True)(q, k, c),
            "the cached keys are rotated a second time",
        ),
        (rope_cache_template(lambda S: 0, lambda S: S), "the query is rotated as if"),
        (rope_cache_template(lambda S: 0, lambda S: 0), "both placed at position 0"),
        (rope_cache_template(lambda S: S, lambda S: 0), "the rotation of position 0"),
        (rope_cache_template(lambda S: S + 1, lambda S: S + 1), "one position too far"),
        (rope_cache_template(lambda S: S - 1, lambda S: S - 1), "where the last cached one stands"),
        (rope_cache_new_first, "comes before the cached ones"),
    ],
    "alibi_slopes": [
        (lambda H: torch.tensor([2 ** (-8 * h / H) for h in range(H)]), "exponents start at 0"),
        (lambda H: torch.tensor([0.5 ** (h + 1) for h in range(H)]), "that of 8 heads"),
        (lambda H: torch.linspace(2 ** (-8 / H), 1 / 256, H), "geometric"),
        (lambda H: torch.logspace(-8, -8 / H, H, base=2), "opposite order"),
        (lambda H: torch.logspace(8 / H, 8, H, base=2), "lack their minus sign"),
        (lambda H: -torch.logspace(-8 / H, -8, H, base=2), "They are negative"),
        (lambda H: torch.exp(torch.arange(1, H + 1) * -8 / H), "base e"),
    ],
    "alibi_bias": [
        (alibi_template(lambda t, s, T, S: max(0, t + S - T - s), 1), "The sign is positive"),
        (alibi_template(lambda t, s, T, S: abs(t + S - T - s)), "get a bias too"),
        (alibi_template(lambda t, s, T, S: t + S - T - s), "get a positive bias"),
        (alibi_template(lambda t, s, T, S: max(0, t - s)), "at the start of the keys"),
        (alibi_template(lambda t, s, T, S: max(0, s - t - S + T)), "counted the wrong way"),
        (alibi_template(lambda t, s, T, S: max(0, t + S - T - s + 1)), "one too large"),
        (alibi_template(lambda t, s, T, S: s, 1), "it would work"),
        (alibi_template(lambda t, s, T, S: s), "(with a minus)"),
    ],
    "t5_bucket": [
        (t5_template(after=lambda o: o < 0), "The halves are swapped"),
        (t5_template(after=lambda o: o >= 0), "An offset of 0"),
        (t5_template(after=lambda o: 0), "not told apart"),
        (t5_template(top=10**6), "run out of their half"),
        (t5_template(log=lambda d: math.log(d / 8)), "not divided by ln(128/8)"),
        (t5_template(log=lambda d: math.log(d / 8) / math.log(128)), "not by ln(128/8)"),
        (t5_template(add=0), "The 8 in front"),
        (t5_float, "not whole numbers"),
    ],
    "beyond_training": [
        ("a", "A sine can be evaluated"),
        ("c", "A rotation by the angle"),
        ("d", "what ALiBi was made for"),
        ("e", "shares the last bucket"),
    ],
}
