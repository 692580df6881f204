"""ELMo against the equations of its paper, step by step, and against torch's own LSTM."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llm_anatomy.models.elmo import (
    BEGIN,
    ELMO_MEDIUM,
    ELMO_ORIGINAL,
    ELMO_SMALL,
    END,
    PADDING,
    Elmo,
    ElmoConfig,
    ScalarMix,
    TwoLstms,
    bilm_loss,
    spell,
)
from tests import parity

B, T, V, M, D = 3, 7, 11, 9, 6
SMALL = ElmoConfig(
    vocab_size=V,
    d_char=4,
    filters=((1, 3), (2, 5), (4, 2)),
    n_highway=2,
    n_layers=3,
    d_cell=8,
    d_model=D,
    clip=0.5,
    dropout=0.2,
)


@st.composite
def elmo_configs(draw) -> ElmoConfig:
    return ElmoConfig(
        vocab_size=V,
        d_char=draw(st.sampled_from([2, 5])),
        filters=draw(st.sampled_from([((1, 3),), ((2, 4), (3, 5)), ((1, 2), (M, 3))])),
        n_highway=draw(st.integers(0, 2)),
        n_layers=draw(st.integers(1, 3)),
        d_cell=draw(st.sampled_from([4, 9])),
        d_model=draw(st.sampled_from([3, 6])),
        clip=draw(st.sampled_from([0.2, 3.0])),
    )


def some_words(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids, and how each is spelled: all different, and of different lengths."""
    g = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (V, M), generator=g).tolist()
    words = ["".join(map(chr, row[: 1 + i % (M - 2)])) for i, row in enumerate(letters)]
    return torch.randint(V, (B, T), generator=g), spell(words, M)


def some_padding(side: str) -> Tensor:
    keep = torch.arange(T) < torch.tensor([[T], [T - 3], [2]])
    return keep if side == "right" else keep.flip(1)


def twin(config: ElmoConfig = SMALL, dtype: torch.dtype = torch.float64) -> Elmo:
    return parity.randomise(Elmo(config)).to(dtype)


# --- Step by step ---------------------------------------------------------------------------------


def word_vector(model: Elmo, chars: list[int]) -> Tensor:
    """Slide each filter over one word's characters, keep its largest value, gate, project."""
    cnn = model.words
    x = cnn.char_embedding.weight[chars]  # (M, d_char)
    found = []
    for conv in cnn.filters:
        width = conv.weight.shape[2]
        for kernel, bias in zip(conv.weight, conv.bias, strict=True):
            spans = [x[i : i + width] for i in range(len(chars) - width + 1)]
            found.append(max((kernel.T * span).sum() + bias for span in spans).clamp(min=0))
    x = torch.stack(found)
    for highway in cnn.highways:
        gate = 1 / (1 + (-(highway.gate.weight @ x + highway.gate.bias)).exp())
        new = (highway.new.weight @ x + highway.new.bias).clamp(min=0)
        x = gate * new + (1 - gate) * x
    return cnn.projection.weight @ x + cnn.projection.bias


def one_direction(layer: TwoLstms, direction: int, xs: list[Tensor]) -> list[Tensor]:
    """The equations of an LSTM with projection, a token at a time, in the order of `xs`."""
    U, W = layer.from_input[direction].T, layer.from_state[direction].T
    b, P = layer.bias[direction, 0], layer.projection[direction].T
    C = P.shape[1]
    c, h, states = torch.zeros(C).to(P), torch.zeros(P.shape[0]).to(P), []
    for x in xs:
        a = U @ x + W @ h + b
        i, f, o = (1 / (1 + (-a[k * C : (k + 1) * C]).exp()) for k in (0, 1, 3))
        c = torch.clamp(f * c + i * torch.tanh(a[2 * C : 3 * C]), -layer.clip, layer.clip)
        h = torch.clamp(P @ (o * torch.tanh(c)), -layer.clip, layer.clip)
        states.append(h)
    return states


def by_hand(model: Elmo, ids: list[int], spelling: Tensor) -> Tensor:
    """All layers (n, T, 2 D) of one text without padding."""
    words = [word_vector(model, spelling[i].tolist()) for i in ids]
    halves = []
    for direction in (0, 1):
        xs = words[::-1] if direction else words
        layers = [xs]
        for j, layer in enumerate(model.layers):
            said = one_direction(layer, direction, layers[-1])
            if j > 0:
                said = [x + y for x, y in zip(layers[-1], said, strict=True)]
            layers.append(said)
        halves.append([xs[::-1] if direction else xs for xs in layers])
    return torch.stack(
        [
            torch.stack([torch.cat(pair) for pair in zip(left, right, strict=True)])
            for left, right in zip(*halves, strict=True)
        ]
    )


@parity.examples(8)
@given(elmo_configs(), st.sampled_from(["none", "right", "left"]))
def test_layers_and_logits_step_by_step(config, padding):
    model = twin(config)
    tokens, spelling = some_words()
    keep = None if padding == "none" else some_padding(padding)
    real = torch.ones(B, T, dtype=torch.bool) if keep is None else keep
    with torch.no_grad():
        layers = model.hidden(model.embed(tokens, spelling), keep)
        logits = model(tokens, spelling, keep)
        for row in range(B):
            want = by_hand(model, tokens[row, real[row]].tolist(), spelling)
            got = layers[:, row, real[row]]
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
            for half, scores in zip(want[-1].chunk(2, dim=-1), logits, strict=True):
                scored = half @ model.output.weight.T + model.output.bias
                torch.testing.assert_close(scores[row, real[row]], scored, atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@parity.examples(6)
@given(elmo_configs(), parity.dtypes)
def test_a_layer_is_two_of_torchs_lstms(config, dtype):
    """Where nothing is clipped: outputs and all gradients, of both directions."""
    if config.d_model >= config.d_cell:
        config = dataclasses.replace(config, d_cell=config.d_model + 2)
    config = dataclasses.replace(config, clip=1e6)
    layer = parity.randomise(TwoLstms(config)).to(dtype)
    x = torch.randn(2, B, T, config.d_model, dtype=dtype)
    got = layer(x)
    got.square().sum().backward()
    for direction in (0, 1):
        theirs = nn.LSTM(
            config.d_model, config.d_cell, proj_size=config.d_model, batch_first=True
        ).to(dtype)
        with torch.no_grad():
            theirs.weight_ih_l0.copy_(layer.from_input[direction].T)
            theirs.weight_hh_l0.copy_(layer.from_state[direction].T)
            theirs.weight_hr_l0.copy_(layer.projection[direction].T)
            theirs.bias_ih_l0.copy_(layer.bias[direction, 0])
            theirs.bias_hh_l0.zero_()
        want = theirs(x[direction])[0]
        torch.testing.assert_close(got[direction], want, **parity.TOLERANCE[dtype])
        want.square().sum().backward()
        for ours, name in (
            (layer.from_input.grad[direction].T, "weight_ih_l0"),
            (layer.from_state.grad[direction].T, "weight_hh_l0"),
            (layer.projection.grad[direction].T, "weight_hr_l0"),
            (layer.bias.grad[direction, 0], "bias_ih_l0"),
        ):
            grad = getattr(theirs, name).grad
            torch.testing.assert_close(ours, grad, **parity.TOLERANCE[dtype], msg=name)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_loss_is_the_sum_of_both_log_likelihoods(padding):
    model = twin()
    tokens, spelling = some_words()
    keep = None if padding == "none" else some_padding(padding)
    with torch.no_grad():
        following, previous = model(tokens, spelling, keep)
        got = bilm_loss(following, previous, tokens, keep)
    real = torch.ones(B, T, dtype=torch.bool) if keep is None else keep
    nats, n = 0.0, 0
    for row in range(B):
        places = real[row].nonzero().flatten().tolist()
        for t, u in itertools.pairwise(places):
            nats -= following[row, t].log_softmax(-1)[tokens[row, u]]
            nats -= previous[row, u].log_softmax(-1)[tokens[row, t]]
            n += 1
    torch.testing.assert_close(got, nats / n, atol=1e-9, rtol=1e-9)


# --- What each half may know ----------------------------------------------------------------------


@torch.no_grad()
def test_each_half_sees_one_side():
    """Change one word: left halves before it and right halves after it stay, bit for bit."""
    model = twin()
    x = torch.randn(B, T, D, dtype=torch.float64)
    before = model.hidden(x)[1:]
    for position in range(T):
        y = x.clone()
        y[:, position] += 1
        moved = (model.hidden(y)[1:] != before).unflatten(-1, (2, D)).any(dim=-1)  # (L, B, T, 2)
        places = torch.arange(T)
        assert torch.equal(moved[..., 0], (places >= position).expand_as(moved[..., 0]))
        assert torch.equal(moved[..., 1], (places <= position).expand_as(moved[..., 1]))


@torch.no_grad()
def test_the_two_sides_only_add():
    """What a change on the left does to a vector is the same whatever stands on the right."""
    model = twin()
    x = torch.randn(1, T, D, dtype=torch.float64)

    def middle(left: bool, right: bool) -> Tensor:
        y = x.clone()
        y[0, 1] += float(left)
        y[0, 5] -= float(right)
        return model.hidden(y)[:, 0, 3]

    alone, both = middle(True, False) - middle(False, False), middle(True, True)
    assert alone.any()
    torch.testing.assert_close(both - middle(False, True), alone, atol=1e-12, rtol=0)


@torch.no_grad()
def test_words_are_the_same_in_any_text_and_twice_in_layer_0():
    model = twin()
    tokens, spelling = some_words()
    x = model.embed(tokens, spelling)
    layers = model.hidden(x)
    torch.testing.assert_close(layers[0], torch.cat((x, x), dim=-1))
    assert torch.equal(x[tokens == tokens[0, 0]].unique(dim=0), x[0, :1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_reaches_nothing(side):
    model = twin()
    tokens, spelling = some_words()
    keep = some_padding(side)
    noise = torch.where(keep, tokens, (tokens + 1) % V)
    layers = model.hidden(model.embed(tokens, spelling), keep)
    others = model.hidden(model.embed(noise, spelling), keep)
    assert torch.equal(layers[:, keep], others[:, keep])
    for row in range(B):
        alone = model.hidden(model.embed(tokens[row : row + 1, keep[row]], spelling))[:, 0]
        torch.testing.assert_close(layers[:, row, keep[row]], alone)


@torch.no_grad()
def test_values_are_clipped():
    model = twin()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(20)
    states = model.layers[0](torch.randn(2, B, T, D, dtype=torch.float64))
    assert states.abs().max() == SMALL.clip
    loose = twin(dataclasses.replace(SMALL, clip=100.0))
    loose.load_state_dict(model.state_dict())
    assert loose.layers[0](torch.ones(2, B, T, D, dtype=torch.float64)).abs().max() > SMALL.clip


def test_every_parameter_gets_a_gradient():
    model = twin(dataclasses.replace(SMALL, clip=50.0))
    mix = ScalarMix(SMALL.n_layers + 1).double()
    tokens, spelling = some_words()
    layers = model.hidden(model.embed(tokens, spelling), some_padding("right"))
    loss = bilm_loss(*model.logits(layers[-1]), tokens, some_padding("right"))
    (loss + mix(layers).square().sum()).backward()
    for name, p in [*model.named_parameters(), *mix.named_parameters()]:
        assert p.grad is not None and p.grad.any(), name


def test_dropout_in_training_alone():
    model = twin()
    tokens, spelling = some_words()
    x = model.embed(tokens, spelling)
    assert torch.equal(model.hidden(x), model.hidden(x))
    model.train()
    assert not torch.equal(model.hidden(x)[1], model.hidden(x)[1])


def test_it_learns_to_spell_out_a_text():
    """Few steps, one text: both directions come to know each word from its neighbours."""
    torch.manual_seed(0)
    model = Elmo(dataclasses.replace(SMALL, clip=3.0, dropout=0.0, d_cell=16, d_model=12))
    _, spelling = some_words()
    tokens = torch.tensor([[0, 4, 2, 9, 4, 7, 1]])
    adam = torch.optim.Adam(model.parameters(), lr=4e-2)
    for _ in range(60):
        loss = bilm_loss(*model(tokens, spelling), tokens)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.2


# --- The mix --------------------------------------------------------------------------------------


def test_the_mix_of_one_layer_is_that_layer():
    layers = torch.randn(1, B, T, 2 * D)
    assert torch.equal(ScalarMix(1)(layers), layers[0])
    mix, layers = ScalarMix(3), torch.randn(3, B, T, 2 * D)
    with torch.no_grad():
        mix.scores[1] = 60.0
    torch.testing.assert_close(mix(layers), layers[1])


@torch.no_grad()
def test_the_mix_by_its_formula():
    mix, layers = parity.randomise(ScalarMix(4)), torch.randn(4, B, T, 5)
    weights = mix.scores.exp() / mix.scores.exp().sum()
    want = mix.gamma * sum(weights[j] * layers[j] for j in range(4))
    torch.testing.assert_close(mix(layers), want)
    torch.testing.assert_close(ScalarMix(4)(layers), layers.mean(dim=0))


def test_a_mix_of_another_number_of_layers():
    with pytest.raises(ValueError, match="expected 3 layers to mix, got 4"):
        ScalarMix(3)(torch.zeros(4, B, T, 5))


# --- Words as characters --------------------------------------------------------------------------


def test_words_are_spelled_in_bytes_between_marks():
    rows = spell(["ab", "é", "", "abcdef"], 6).tolist()
    assert rows[0] == [BEGIN, 97, 98, END, PADDING, PADDING]
    assert rows[1] == [BEGIN, 0xC3, 0xA9, END, PADDING, PADDING]
    assert rows[2] == [BEGIN, END] + [PADDING] * 4
    assert rows[3] == [BEGIN, 97, 98, 99, 100, END]
    assert spell(["word"]).shape == (1, 50)
    assert max(BEGIN, END, PADDING) < ElmoConfig().n_chars


@torch.no_grad()
def test_a_word_outside_the_vocabulary_has_a_vector():
    """The softmax knows V words; the characters know any."""
    model = twin()
    _, spelling = some_words()
    more = torch.cat((spelling, spell(["zebra"], M)))
    x = model.embed(torch.tensor([[V, 0]]), more)
    torch.testing.assert_close(x[0, 0], word_vector(model, spell(["zebra"], M)[0].tolist()))


# --- Published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters", "millions"),
    [
        (ELMO_SMALL, 13_593_296, 13.6),
        (ELMO_MEDIUM, 28_027_728, 28.0),
        (ELMO_ORIGINAL, 93_600_848, 93.6),
    ],
)
def test_parameter_counts_of_the_published_models(config, parameters, millions):
    """Without the softmax, as the authors count them, in millions (allennlp.org/elmo)."""
    everything = parity.count(lambda: Elmo(config))
    softmax = (config.d_model + 1) * config.vocab_size
    assert everything - softmax == parameters
    assert round(parameters / 1e6, 1) == millions


# --- What is refused ------------------------------------------------------------------------------


def test_bad_configs():
    with pytest.raises(ValueError, match="n_layers must not be negative, got -1"):
        dataclasses.replace(SMALL, n_layers=-1)
    for pair in ((0, 3), (2,), (1.5, 2)):
        with pytest.raises(ValueError, match="a filter is a pair of width and number"):
            dataclasses.replace(SMALL, filters=((1, 2), pair))


@pytest.mark.usefixtures("unchecked")
def test_bad_types_and_shapes():
    with pytest.raises(ValueError, match=r"d_cell must be of type int, got 8\.0"):
        dataclasses.replace(SMALL, d_cell=8.0)
    tokens, spelling = some_words()
    with pytest.raises(ValueError, match=r"keep must be boolean and of shape \(3, 7\)"):
        twin()(tokens, spelling, torch.ones(B, T + 1, dtype=torch.bool))


def test_bad_spelling():
    with pytest.raises(ValueError, match="expected words and a length of 3 or more, got 0 and 50"):
        spell([])
    with pytest.raises(ValueError, match="got 1 and 2"):
        spell(["a"], 2)


def test_bad_input():
    model = twin()
    tokens, spelling = some_words()
    with pytest.raises(ValueError, match="the prompt is empty"):
        model(tokens[:, :0], spelling)
    with pytest.raises(ValueError, match=f"must lie between 0 and {V - 1}; got 0 to {V}"):
        model(torch.tensor([[0, V]]), spelling)
    with pytest.raises(ValueError, match="spans 4 characters, but words have 3 places"):
        model(tokens, spelling[:, :3])
    with pytest.raises(ValueError, match=r"characters must lie between 0 and 260; got .* to 261"):
        model(tokens, spelling + 1)
    with pytest.raises(ValueError, match="nothing to predict: no neighbours"):
        lonely = torch.zeros(B, T, dtype=torch.bool)
        lonely[:, ::2] = True
        bilm_loss(*model(tokens, spelling, lonely), tokens, lonely)
