"""Mamba against transformers' MambaForCausalLM, and the scan against its recurrence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, MambaForCausalLM
from transformers import MambaConfig as HFMambaConfig

from llm_anatomy.models import mamba
from llm_anatomy.models.mamba import Mamba, MambaConfig
from tests import parity

B, T, V = 3, 7, 29
EOS, PAD = 0, 28
SMALL = MambaConfig(vocab_size=V, n_layers=2, d_model=9, d_state=5, step_rank=2, kernel=3)


@st.composite
def sizes(draw) -> dict[str, object]:
    D = draw(st.sampled_from([8, 12]))
    expand = draw(st.sampled_from([1, 2]))
    return {
        "hidden_size": D,
        "expand": expand,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "state_size": draw(st.sampled_from([3, 5])),
        "time_step_rank": draw(st.sampled_from(["auto", 4])),
        "conv_kernel": draw(st.sampled_from([2, 4])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
    }


def build(sizes: dict[str, object]) -> MambaForCausalLM:
    config = HFMambaConfig(
        vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **sizes
    )
    return parity.randomise(MambaForCausalLM(config))


def some_tokens(T: int = T) -> Tensor:
    return torch.randint(1, PAD, (B, T))


def left_padded(padded: bool, T: int = T) -> Tensor | None:
    """True at real tokens: the rows have lengths T, T - 3 and 2."""
    return (torch.arange(T) < torch.tensor([[T], [T - 3], [2]])).flip(1) if padded else None


# --- Parity: float32 alone, since theirs computes decay and scan in float32 -----------------------


@parity.examples(12)
@given(sizes(), st.booleans())
def test_logits(sizes, padded):
    theirs, keep = build(sizes), left_padded(padded)
    ours, tokens = parity.twin(theirs, Mamba), some_tokens()
    want = theirs(tokens, attention_mask=None if keep is None else keep.long()).logits
    real = slice(None) if keep is None else keep
    torch.testing.assert_close(ours(tokens, keep)[real], want[real])


@parity.examples(12)
@given(sizes())
def test_loss_and_gradients(sizes):
    theirs = build(sizes)
    ours, tokens = parity.twin(theirs, Mamba), some_tokens()
    want = theirs(tokens, labels=tokens).loss
    loss = parity.mean_loss(ours(tokens)[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    parity.check_gradients(ours, theirs)


@torch.no_grad()
@parity.examples(10)
@given(sizes(), st.booleans())
def test_greedy_generation(sizes, cached):
    """No token twice in a row of the batch: a random model would repeat its first one for ever."""
    theirs, tokens = build(sizes), some_tokens(4)
    ours = parity.twin(theirs, Mamba)
    expected = theirs.generate(
        tokens,
        generation_config=GenerationConfig(
            max_new_tokens=11,
            do_sample=False,
            no_repeat_ngram_size=1,
            use_cache=cached,
            pad_token_id=PAD,
            eos_token_id=EOS,
        ),
    )
    caches = ours.new_caches() if cached else None
    got = parity.greedy(
        lambda new, _: ours(new, caches=caches), tokens, 11, eos=EOS, pad=PAD, cached=cached
    )
    assert torch.equal(got, expected)


@parity.examples(4)
@given(sizes())
def test_round_trips(sizes):
    parity.check_round_trips(build(sizes), Mamba)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (mamba.MAMBA_130M, 129_135_360),
        (mamba.MAMBA_370M, 371_516_416),
        (mamba.MAMBA_790M, 793_204_224),
        (mamba.MAMBA_1_4B, 1_372_178_432),
        (mamba.MAMBA_2_8B, 2_768_345_600),
    ],
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: Mamba(config)) == parameters
    theirs = HFMambaConfig(**Mamba.config_to_hf(config))
    assert parity.count(lambda: MambaForCausalLM(theirs)) == parameters


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture
def model() -> Mamba:
    return parity.randomise(Mamba(SMALL))


@given(st.integers(1, 17))
def test_the_scan_is_the_recurrence(T):
    fade, write = torch.rand(2, T, 3, 2, dtype=torch.float64), torch.randn(2, T, 3, 2).double()
    states, left = mamba.scan(fade, write)
    h, product = torch.zeros(2, 3, 2).double(), torch.ones(2, 3, 2).double()
    for t in range(T):
        h, product = fade[:, t] * h + write[:, t], product * fade[:, t]
        torch.testing.assert_close(states[:, t], h)
        torch.testing.assert_close(left[:, t], product)


@torch.no_grad()
def test_the_selective_scan_is_the_formula_of_the_paper(model):
    """Equations 2 and 3, with the zero-order hold for A and Euler's rule for B, written out."""
    layer, x = model.double().blocks[0].scan, torch.randn(1, T, 18).double()
    y = layer(x)
    R, N = layer.sizes[:2]
    A, h = -layer.log_decay.exp(), torch.zeros(18, N).double()
    for t in range(T):
        low, write, read = layer.from_token(x[0, t]).split((R, N, N))
        step = (1 + (layer.step.weight @ low + layer.step.bias).exp()).log()
        for i in range(18):
            h[i] = (step[i] * A[i]).exp() * h[i] + step[i] * write * x[0, t, i]
            torch.testing.assert_close(y[0, t, i], h[i] @ read + layer.skip[i] * x[0, t, i])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * T, [2, 5], [6, 1], [T]])
def test_in_parts_equals_at_once(model, sizes):
    tokens, caches = some_tokens(), model.new_caches()
    parts = [model(part, caches=caches) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))


@torch.no_grad()
def test_its_memory_does_not_grow(model):
    caches, sizes = model.new_caches(), set()
    for token in some_tokens().split(1, dim=1):
        model(token, caches=caches)
        sizes.add(sum(c.recent.numel() + c.state.numel() for c in caches))
    assert sizes == {B * 2 * (2 * 18 + 18 * 5)}


@torch.no_grad()
def test_rows_can_be_reordered(model):
    tokens, rows = some_tokens(), torch.tensor([2, 0, 0])
    caches = model.new_caches()
    model(tokens[:, :4], caches=caches)
    for cache in caches:
        cache.reorder(rows)
    got = model(tokens[rows, 4:], caches=caches)
    torch.testing.assert_close(got, model(tokens)[rows, 4:])


@torch.no_grad()
def test_no_position_sees_a_later_token(model):
    tokens = some_tokens()
    before = model(tokens)
    for t in range(1, T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % (PAD - 1) + 1
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t], before[:, t])


@torch.no_grad()
def test_padding_on_the_left_reaches_nothing(model):
    tokens = some_tokens()
    keep = torch.arange(T + 4).expand(B, -1) >= 4
    padded = model(torch.cat((torch.full((B, 4), PAD), tokens), dim=1), keep)
    torch.testing.assert_close(padded[:, 4:], model(tokens))


def test_every_parameter_gets_a_gradient(model):
    model.double()(some_tokens()).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-6, name


def test_steps_start_between_a_thousandth_and_a_tenth():
    bias = Mamba(MambaConfig(vocab_size=V, n_layers=1, d_model=64, expand=8)).blocks[0].scan.step
    step = torch.nn.functional.softplus(bias.bias)
    assert 0.001 <= step.min() < 0.002 and 0.05 < step.max() <= 0.1
    assert 0.008 < step.log().mean().exp() < 0.0125  # evenly in the logarithm


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V])
def test_tokens_outside_the_vocabulary(model, bad):
    tokens = some_tokens()
    tokens[1, 2] = bad
    with pytest.raises(ValueError, match=f"token ids must lie between 0 and 28; got .*{bad}"):
        model(tokens)


def test_an_empty_prompt(model):
    with pytest.raises(ValueError, match="the prompt is empty: it has shape"):
        model(torch.zeros(B, 0, dtype=torch.long))


def test_padding_on_the_right(model):
    with pytest.raises(ValueError, match="padding follows real tokens"):
        model(some_tokens(), left_padded(True).flip(1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"use_bias": True}, "use_bias to True"),
        ({"use_conv_bias": False}, "use_conv_bias to False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ({"state_size": "16"}, "d_state must be of type int, got '16'"),
    ],
)
def test_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba.config_from_hf(Mamba.config_to_hf(SMALL) | change)
