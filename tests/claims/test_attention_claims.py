"""The sources' claims on attention, executed. The ledger is claims.yml."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.claims import tiny


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 1 of Vaswani et al. 2017, letter by letter: the output and its weights."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- what is computed -----------------------------------------------------------------------------


def test_scores_are_scaled_dot_products_of_learned_projections() -> None:
    """C075, C224: not similarity of the vectors themselves, not syntax: W_q x_i · W_k x_j / √d."""
    x, w_q, w_k, w_v = draw(6, 8), draw(8, 8), draw(8, 8), draw(8, 8)
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    output, weights = attention(q, k, v)
    fused = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    torch.testing.assert_close(output, fused)

    # A similarity of the vectors themselves would be symmetric; the learned score is not, and
    # leaving out the projections gives other weights.
    scores = q @ k.mT
    assert not torch.allclose(scores, scores.mT)
    assert not torch.allclose(weights, attention(x, x, x)[1])
    # The weights are only half of the mechanism: what leaves is their average of the values.
    torch.testing.assert_close(output, weights @ v)


def test_equal_vectors_get_equal_weight_whatever_their_role() -> None:
    """C075: the score knows two vectors, nothing of grammar; a copy of a word weighs the same."""
    x, w_q, w_k = draw(7, 8), draw(8, 8), draw(8, 8)
    x[5] = x[1]
    _, weights = attention(x @ w_q, x @ w_k, x)
    torch.testing.assert_close(weights[:, 1], weights[:, 5])
    assert (weights[:, 1] - weights[:, 2]).abs().max() > 0


def test_only_the_values_are_summed() -> None:
    """C184: query and key make the weights; were they summed too, zero values could not give 0."""
    q, k, v = draw(5, 8), draw(6, 8), draw(6, 8)
    assert torch.equal(attention(q, k, torch.zeros_like(v))[0], torch.zeros(5, 8).double())
    output, weights = attention(q, k, v)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5).double())
    # A convex combination stays within the range of what it combines, and moves along with it.
    assert (output <= v.max(0).values).all() and (output >= v.min(0).values).all()
    torch.testing.assert_close(attention(q, k, v + 3)[0], output + 3)


def test_weights_differ_by_query_and_by_context() -> None:
    """C064, C074: each query weighs the words its own way, and other words change the weights."""
    x, w_q, w_k = draw(6, 8), draw(8, 8), draw(8, 8)
    _, weights = attention(x @ w_q, x @ w_k, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6).double())
    for i in range(6):
        assert weights[i].max() > weights[i].min()
        for j in range(i):
            assert not torch.allclose(weights[i], weights[j])
    x[3] = draw(8)
    _, after = attention(x @ w_q, x @ w_k, x)
    # Token 0 asks the same question and the words 1 and 2 are the same, yet their weights moved:
    # the softmax shares one unit among all words of the context.
    assert ((weights[0] - after[0]).abs() > 0).all()


def test_no_weight_is_zero_unless_masked() -> None:
    """C065: softmax turns a word down, never off; its content still reaches the output."""
    scores = torch.tensor([10.0, 0.0, -10.0, -30.0], dtype=torch.float64)
    weights = scores.softmax(-1)
    assert weights.min() > 0
    # exp(-40) of the largest: tiny, but there.
    torch.testing.assert_close(weights[3] / weights[0], torch.tensor(math.exp(-40)).double())

    q, k, v = draw(1, 8), draw(5, 8), draw(5, 8)
    output, weights = attention(q, k, v)
    least = int(weights.argmin())
    v[least] += 100
    torch.testing.assert_close(
        attention(q, k, v)[0] - output, 100 * weights[:, [least]].repeat(1, 8)
    )

    # Off is a mask (or a gap so wide that float32 rounds it to 0).
    mask = torch.arange(5) != least
    masked = attention(q, k, v, mask)[1]
    assert masked[0, least] == 0
    assert (masked[0, mask] > 0).all()
    assert torch.tensor([0.0, -200.0]).softmax(-1)[1] == 0


# --- several heads --------------------------------------------------------------------------------


def test_heads_are_independent_concatenated_and_projected() -> None:
    """C185: MultiHead = Concat(head_1, …, head_h) W_o, and h does not change the parameters."""
    d_model, n_heads = 12, 3
    layer = nn.MultiheadAttention(d_model, n_heads, batch_first=True).double()
    tiny.randomise(layer)
    x = draw(1, 5, d_model)
    w_q, w_k, w_v = layer.in_proj_weight.chunk(3)
    b_q, b_k, b_v = layer.in_proj_bias.chunk(3)
    q, k, v = x[0] @ w_q.mT + b_q, x[0] @ w_k.mT + b_k, x[0] @ w_v.mT + b_v
    size = d_model // n_heads
    slices = [slice(h * size, (h + 1) * size) for h in range(n_heads)]
    heads = [attention(q[:, s], k[:, s], v[:, s]) for s in slices]
    by_hand = torch.cat([output for output, _ in heads], -1) @ layer.out_proj.weight.mT
    output, weights = layer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(output[0], by_hand + layer.out_proj.bias)
    torch.testing.assert_close(weights[0], torch.stack([w for _, w in heads]))

    # Independent: other queries in head 0 leave the weights of heads 1 and 2 as they were.
    with torch.no_grad():
        layer.in_proj_weight[:size] += 1
    after = layer(x, x, x, average_attn_weights=False)[1]
    assert torch.equal(after[:, 1:], weights[:, 1:])
    assert not torch.allclose(after[:, 0], weights[:, 0])

    def count(heads: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in nn.MultiheadAttention(512, heads).parameters())

    assert count(1) == count(8) == 4 * 512 * 512 + 4 * 512


def test_nothing_but_the_start_makes_heads_differ() -> None:
    """C186: two heads that start alike get the same gradient and learn the same thing, for ever."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        for rows in layer.in_proj_weight.chunk(3):
            rows[4:] = rows[:4]
        layer.out_proj.weight[:, 4:] = layer.out_proj.weight[:, :4]
    x, target = draw(4, 6, 8), draw(4, 6, 8)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.mse_loss(layer(x, x, x, need_weights=False)[0], target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weights = layer(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[:, 0], weights[:, 1])


def test_no_head_must_prefer_cat_and_mat() -> None:
    """C076: the top two words for "sat" vary from head to head; a causal model cannot see "mat"."""
    the, cat, sat, on, mat = 5, 6, 7, 8, 9
    sentence = torch.tensor([[the, cat, sat, on, the, mat]])
    # No word is special to a random model: of the 15 pairs of words each is as likely to be a
    # head's top two. The line is drawn at one half.
    hits = heads = 0
    for seed in range(20):
        model = tiny.randomise(transformers.BertModel(tiny.bert().config), seed)
        for layer in model(sentence, output_attentions=True).attentions:
            top = layer[0, :, 2].topk(2).indices.sort(-1).values  # (H, 2)
            hits += int((top == torch.tensor([1, 5])).all(-1).sum())
            heads += len(top)
    assert heads == 160
    assert hits < heads / 2

    causal = tiny.gpt2()(sentence, output_attentions=True).attentions
    assert all((layer[0, :, 2, 5] == 0).all() for layer in causal)


# --- who sees whom --------------------------------------------------------------------------------


def test_encoder_sees_every_position_itself_included() -> None:
    """C183, C191, C225, C333: in an encoder no position is left out, not even its own."""
    for layer in tiny.bert()(tiny.tokens(), output_attentions=True).attentions:
        assert (layer > 0).all()
        assert (layer.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_decoder_sees_itself_and_the_past_only() -> None:
    """C183, C191, C225, C333: in a decoder "all other positions" means the earlier ones."""
    for layer in tiny.gpt2()(tiny.tokens(), output_attentions=True).attentions:
        T = layer.shape[-1]
        allowed = torch.ones(T, T, dtype=torch.bool).tril()
        assert (layer[..., allowed] > 0).all()
        assert (layer[..., ~allowed] == 0).all()


def test_attention_crosses_sentence_borders() -> None:
    """C333: the context is the window, not the sentence; [SEP] or a full stop stops nothing."""
    ids = tiny.tokens(length=9)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    layers = tiny.bert()(ids, token_type_ids=segments, output_attentions=True).attentions
    assert all((layer[..., :4, 4:] > 0).all() for layer in layers)
    assert all((layer[..., 4:, :4] > 0).all() for layer in layers)


@pytest.mark.parametrize("position", [1, 4, 7])
def test_causal_mask_hides_later_words(position: int) -> None:
    """C246: another word at t leaves every output before t bit for bit, and changes those after."""
    model, ids = tiny.gpt2(), tiny.tokens()
    before = model(ids).logits
    after = model(tiny.changed(ids, position)).logits
    expected = torch.arange(8) >= position
    assert torch.equal(tiny.moved(before, after), expected)


# --- distance -------------------------------------------------------------------------------------


def test_attention_reaches_far_as_well_as_near_and_an_rnn_does_not() -> None:
    """C063, C066: one step joins any two positions; a recurrent net needs as many as they differ.

    The recurrent matrix is 0.9 times an orthogonal one and |tanh'| ≤ 1, so the influence of the
    first input on the last state is at most 0.9^(T-1) ‖W_ih‖: a theorem, not a tuned bound.
    """
    T, D = 128, 16
    x = draw(T, D)
    w_q, w_k, w_v = draw(D, D) / 4, draw(D, D) / 4, draw(D, D)

    def last_output(x: Tensor) -> Tensor:
        return attention(x[-1:] @ w_q, x @ w_k, x @ w_v)[0][0]

    def influence(x: Tensor, position: int) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(last_output, x)  # (D, T, D)
        return jacobian[:, position]

    # The same word, once at the far end and once next to the last position.
    swapped = x.clone()
    swapped[0], swapped[T - 2] = x[T - 2], x[0]
    far, near = influence(x, 0), influence(swapped, T - 2)
    torch.testing.assert_close(far, near)
    assert far.norm() > 0

    rnn = nn.RNN(D, D, batch_first=True).double()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(0.9 * nn.init.orthogonal_(torch.empty(D, D)).double())
    jacobian = torch.autograd.functional.jacobian(lambda x: rnn(x[None])[0][0, -1], x)
    spectral = [torch.linalg.matrix_norm(jacobian[:, t], 2).item() for t in (0, T - 1)]
    input_norm = torch.linalg.matrix_norm(rnn.weight_ih_l0.detach(), 2).item()
    assert spectral[0] <= 0.9 ** (T - 1) * input_norm
    assert spectral[1] > 1000 * spectral[0]


def test_lookup_works_at_every_distance() -> None:
    """C077: a query that matches one key fetches that value, wherever the key stands.

    With orthonormal keys and query b·k_j the weight on j is e^c / (e^c + S - 1), c = b / √d.
    """
    S = d = 64
    keys = nn.init.orthogonal_(torch.empty(S, d, dtype=torch.float64))
    values = draw(S, 8)
    b = 30 * math.sqrt(d)
    output, weights = attention(b * keys, keys, values)
    expected = math.exp(30) / (math.exp(30) + S - 1)
    torch.testing.assert_close(weights.diagonal(), torch.full((S,), expected).double())
    torch.testing.assert_close(output, values, atol=1e-9, rtol=0)


def test_nothing_outside_the_window_has_influence() -> None:
    """C066: "regardless of distance" ends where the window ends."""
    config = transformers.MistralConfig(
        **{**tiny.kwargs_llama(), "num_hidden_layers": 1}, sliding_window=4
    )
    model = tiny.randomise(transformers.MistralModel(config))
    ids = tiny.tokens(length=12)
    before = model(ids).last_hidden_state
    after = model(tiny.changed(ids, 3)).last_hidden_state
    reached = [t for t, hit in enumerate(tiny.moved(before, after).tolist()) if hit]
    assert reached == [3, 4, 5, 6]

    model = tiny.gpt2()
    model(tiny.tokens(length=64))
    with pytest.raises(IndexError):
        model(tiny.tokens(length=65))


# --- order ----------------------------------------------------------------------------------------


def test_recurrence_knows_order_and_attention_does_not() -> None:
    """C192: a permutation of the words permutes attention's outputs; a recurrent net notices it."""
    x, order = draw(1, 6, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    layer = tiny.randomise(nn.MultiheadAttention(8, 2, batch_first=True).double())

    def self_attention(x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=False)[0]

    torch.testing.assert_close(self_attention(x[:, order]), self_attention(x)[:, order])
    rnn = tiny.randomise(nn.RNN(8, 8, batch_first=True).double())
    state, shuffled = rnn(x)[1], rnn(x[:, order])[1]
    assert (state - shuffled).abs().max() > 1e-3


def test_positions_break_the_symmetry() -> None:
    """C189: with a vector per position added, the same words reordered come out otherwise."""
    x, positions, order = draw(1, 6, 8), draw(6, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    layer = tiny.randomise(nn.MultiheadAttention(8, 2, batch_first=True).double())

    def self_attention(x: Tensor) -> Tensor:
        x = x + positions
        return layer(x, x, x, need_weights=False)[0]

    difference = self_attention(x[:, order]) - self_attention(x)[:, order]
    assert difference.abs().max() > 1e-3


def test_a_bigram_model_looks_at_the_word_before() -> None:
    """C073: an n-gram model conditions on n-1 words; it is blind only beyond them."""
    text = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        ".",
        "the",
        "dog",
        "sat",
        "on",
        "the",
        "rug",
        ".",
        "a",
        "cat",
        "ate",
        "the",
        "fish",
        ".",
    ]

    def probability(word: str, *context: str) -> float:
        n = len(context)
        after = [
            text[i + n] for i in range(len(text) - n) if tuple(text[i : i + n]) == tuple(context)
        ]
        return after.count(word) / len(after)

    assert probability("cat") == 2 / 20
    assert probability("cat", "the") == 1 / 5
    assert probability("on", "sat") == 1
    # What differs only before the window cannot matter: no trigram tells "cat" from "dog" here.
    assert probability("mat", "on", "the") == probability("rug", "on", "the") == 1 / 2
    assert len(re.findall("sat on the", " ".join(text))) == 2
