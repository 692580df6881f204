"""Each position scheme against its formula, written out in loops, and against its property."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from llm_anatomy.positions import (
    LearnedPositions,
    RelativePositionBias,
    alibi_bias,
    alibi_slopes,
    relative_position_bucket,
    rope_angles,
    rope_permutation,
    rope_rotate,
    rope_rotate_interleaved,
    sinusoidal,
)


def test_sinusoidal_formula():
    T, D = 11, 6
    table = sinusoidal(T, D)
    for t in range(T):
        for i in range(D // 2):
            angle = t / 10_000 ** (2 * i / D)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_halves_are_marian_s():
    theirs = MarianSinusoidalPositionalEmbedding(13, 8).create_weight()
    assert torch.equal(sinusoidal(13, 8, interleaved=False), theirs)


def test_sinusoidal_shift_is_one_rotation_for_all_positions():
    T, D, shift = 40, 8, 7
    rotation = torch.zeros(D, D)
    for i in range(D // 2):  # each frequency turns its own pair, by the same angle everywhere
        angle = shift / 10_000 ** (2 * i / D)
        cos, sin = math.cos(angle), math.sin(angle)
        rotation[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[cos, -sin], [sin, cos]])
    table = sinusoidal(T, D)
    torch.testing.assert_close(table[:-shift] @ rotation, table[shift:], atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(D))


def test_sinusoidal_refuses_odd_widths():
    with pytest.raises(ValueError, match=r"d_model \(7\) is odd"):
        sinusoidal(3, 7)


def test_learned_positions_are_a_table():
    positions = LearnedPositions(9, 4)
    assert torch.equal(positions(5), positions.weight[:5])
    assert torch.equal(positions(2, offset=7), positions.weight[7:9])
    positions(3).sum().backward()
    assert torch.equal(positions.weight.grad.sum(dim=1), torch.tensor([4.0] * 3 + [0.0] * 6))


@pytest.mark.parametrize(("T", "offset"), [(10, 0), (3, 7), (1, -1)])
def test_learned_positions_end_with_the_table(T, offset):
    with pytest.raises(ValueError, match="the context holds 9 positions"):
        LearnedPositions(9, 4)(T, offset)


def rotate_by_loops(x: torch.Tensor, positions: torch.Tensor, pairs) -> torch.Tensor:
    """Rotate each pair of features by position / 10000^(2i/E), one number at a time."""
    out, E = x.clone(), x.shape[-1]
    for t, position in enumerate(positions.tolist()):
        for i, (a, b) in enumerate(pairs):
            angle = position / 10_000 ** (2 * i / E)
            out[..., t, a] = x[..., t, a] * math.cos(angle) - x[..., t, b] * math.sin(angle)
            out[..., t, b] = x[..., t, a] * math.sin(angle) + x[..., t, b] * math.cos(angle)
    return out


@pytest.mark.parametrize(
    ("rotate", "pairs"),
    [(rope_rotate, [(0, 3), (1, 4), (2, 5)]), (rope_rotate_interleaved, [(0, 1), (2, 3), (4, 5)])],
)
def test_rope_formula(rotate, pairs):
    x, positions = torch.randn(2, 3, 5, 6), torch.tensor([0, 1, 2, 9, 40])
    expected = rotate_by_loops(x.double(), positions, pairs)
    actual = rotate(x, *rope_angles(positions, 6))
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_rope_is_llama_s():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 3, 5, 8)
    cos, sin = rope_angles(torch.arange(5), 8)
    theirs = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    torch.testing.assert_close(rope_rotate(q, cos, sin), theirs[0])
    torch.testing.assert_close(rope_rotate(k, cos, sin), theirs[1])


def test_rope_layouts_are_permutations_of_each_other():
    x, p = torch.randn(2, 3, 5, 10), rope_permutation(10)
    cos, sin = rope_angles(torch.arange(5), 10)
    assert sorted(p.tolist()) == list(range(10))
    split = rope_rotate(x[..., p], cos, sin)
    torch.testing.assert_close(split, rope_rotate_interleaved(x, cos, sin)[..., p])


@given(shift=st.integers(-500, 500), seed=st.integers(0, 9))
@pytest.mark.parametrize("rotate", [rope_rotate, rope_rotate_interleaved])
def test_rope_scores_depend_on_distance_alone(rotate, shift, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 2, 7, 8, dtype=torch.float64)
    positions = torch.arange(600, 607)

    def scores(positions):
        cos, sin = (a.double() for a in rope_angles(positions, 8))
        return rotate(q, cos, sin) @ rotate(k, cos, sin).mT

    torch.testing.assert_close(scores(positions + shift), scores(positions), atol=2e-3, rtol=0)


def test_mixing_the_rope_layouts_breaks_shift_invariance():
    q, k = torch.randn(2, 1, 1, 4, 8)

    def scores(positions):
        angles = rope_angles(positions, 8)
        return rope_rotate(q, *angles) @ rope_rotate_interleaved(k, *angles).mT

    gap = (scores(torch.arange(4)) - scores(torch.arange(4) + 9)).abs().max()
    assert gap > 0.5


@pytest.mark.parametrize("rotate", [rope_rotate, rope_rotate_interleaved])
def test_rope_keeps_lengths_and_starts_at_the_identity(rotate):
    x = torch.randn(2, 3, 4, 6)
    turned = rotate(x, *rope_angles(torch.arange(4), 6))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize(
    "function", [lambda: rope_angles(torch.arange(3), 5), lambda: rope_permutation(5)]
)
def test_rope_refuses_odd_heads(function):
    with pytest.raises(ValueError, match=r"d_head \(5\) is odd"):
        function()


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16])
def test_alibi_is_bloom_s(n_heads):
    theirs = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), n_heads, torch.float32)
    ours = alibi_bias(n_heads, 9)[0, :, -1:]  # (H, 1, S)
    # BLOOM adds slope * position: another constant in each row, which no softmax can see.
    torch.testing.assert_close(ours - ours[..., :1], theirs)


def test_alibi_slopes_of_the_paper():
    expected = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    torch.testing.assert_close(alibi_slopes(8), expected, rtol=0, atol=0)


def test_alibi_bias_by_loops_with_cached_keys():
    H, T, S = 5, 3, 7
    bias, slopes = alibi_bias(H, T, S), alibi_slopes(H)
    assert bias.shape == (1, H, T, S)
    for h in range(H):
        for t in range(T):
            for s in range(S):
                distance = max(S - T + t - s, 0)
                assert bias[0, h, t, s] == pytest.approx(-slopes[h].item() * distance)


def test_alibi_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="at least one head"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match=r"4 queries .* 2 keys"):
        alibi_bias(2, 4, 2)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (10, 64)])
def test_buckets_are_t5_s(bidirectional, n_buckets, max_distance):
    offset = torch.arange(-300, 301)[None]
    ours = relative_position_bucket(
        offset, bidirectional=bidirectional, n_buckets=n_buckets, max_distance=max_distance
    )
    theirs = T5Attention._relative_position_bucket(offset, bidirectional, n_buckets, max_distance)
    assert torch.equal(ours, theirs)
    assert ours.min() == 0
    assert ours.max() == n_buckets - 1


def test_relative_bias_looks_up_key_minus_query():
    bias = RelativePositionBias(3, bidirectional=True, n_buckets=8, max_distance=20)
    T, S = 4, 9
    out = bias(T, S)
    assert out.shape == (1, 3, T, S)
    for t in range(T):
        for s in range(S):
            bucket = relative_position_bucket(
                torch.tensor([[s - (S - T + t)]]), bidirectional=True, n_buckets=8, max_distance=20
            )
            assert torch.equal(out[0, :, t, s], bias.embedding.weight[bucket.item()])


def test_relative_bias_of_the_last_queries_is_the_end_of_the_whole():
    bias = RelativePositionBias(2, bidirectional=False)
    assert torch.equal(bias(3, 10), bias(10, 10)[:, :, -3:])
