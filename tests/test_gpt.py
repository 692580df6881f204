"""GPT and GPT-2 against transformers' OpenAIGPTLMHeadModel and GPT2LMHeadModel."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers import GPT2Config as HFGPT2Config

from llm_anatomy.models import gpt1, gpt2
from llm_anatomy.models.gpt1 import GPT1, GPT1Config
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.weights import Pretrained
from tests import parity

B, T, V = 3, 7, 29
EOS, PAD = 0, 28
SIZES = {"vocab_size": V, "n_layers": 2, "n_heads": 4, "d_model": 24, "n_positions": 24}
SMALL = {GPT1: GPT1Config(**SIZES), GPT2: GPT2Config(**SIZES, d_ff=20)}
THEIRS = {
    GPT1: (OpenAIGPTLMHeadModel, OpenAIGPTConfig),
    GPT2: (GPT2LMHeadModel, HFGPT2Config),
}
each_model = pytest.mark.parametrize("ours_class", [GPT1, GPT2])


@st.composite
def sizes(draw) -> dict[str, object]:
    """Of their configs, which have these names in common; `n_inner` is GPT-2's alone."""
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "n_positions": draw(st.integers(16, 24)),
        "n_embd": n_heads * draw(st.sampled_from([4, 6])),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_heads,
        "n_inner": draw(st.sampled_from([None, 10])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
    }


def build(ours_class: type[Pretrained], sizes: dict[str, object]):
    theirs_class, config_class = THEIRS[ours_class]
    if ours_class is GPT1:
        sizes = {name: value for name, value in sizes.items() if name != "n_inner"}
    config = config_class(
        vocab_size=V,
        resid_pdrop=0.3,
        embd_pdrop=0.2,
        attn_pdrop=0.4,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **sizes,
    )
    return parity.randomise(theirs_class(config))


def twins(ours_class: type[Pretrained], sizes, dtype: torch.dtype = torch.float32):
    theirs = build(ours_class, sizes)
    return theirs.to(dtype), parity.twin(theirs, ours_class).to(dtype)


def some_tokens(T: int = T) -> Tensor:
    return torch.randint(1, PAD, (B, T))


def keep_of(padding: str, T: int = T) -> Tensor | None:
    """True at real tokens: the rows have lengths T, T - 3 and 2."""
    if padding == "none":
        return None
    short = torch.arange(T) < torch.tensor([[T], [T - 3], [2]])
    return short if padding == "right" else short.flip(1)


def their_arguments(keep: Tensor | None) -> dict[str, Tensor]:
    """Padding as generate() gives it to the model: positions count what is real."""
    if keep is None:
        return {}
    return {
        "attention_mask": keep.long(),
        "position_ids": (keep.cumsum(dim=1) - 1).clamp(min=0),
    }


paddings = st.sampled_from(["none", "right", "left"])

# --- Parity ---------------------------------------------------------------------------------------


@each_model
@parity.examples(12)
@given(sizes(), paddings, parity.dtypes)
def test_logits(ours_class, sizes, padding, dtype):
    theirs, ours = twins(ours_class, sizes, dtype)
    tokens, keep = some_tokens(), keep_of(padding)
    got, want = ours(tokens, keep), theirs(tokens, **their_arguments(keep)).logits
    real = slice(None) if keep is None else keep
    torch.testing.assert_close(got[real], want[real], **parity.TOLERANCE[dtype])


@each_model
@parity.examples(12)
@given(sizes(), paddings, parity.dtypes)
def test_loss_and_gradients(ours_class, sizes, padding, dtype):
    theirs, ours = twins(ours_class, sizes, dtype)
    tokens, keep = some_tokens(), keep_of(padding)
    labels = tokens
    if keep is not None:  # what follows padding has nothing to be predicted from
        follows = F.pad(keep, (1, -1), value=True)
        labels = tokens.masked_fill(~(keep & follows), -100)
    output = theirs(tokens, labels=labels, **their_arguments(keep))
    loss = parity.mean_loss(ours(tokens, keep)[:, :-1], labels[:, 1:])
    torch.testing.assert_close(loss.float(), output.loss)  # theirs is computed in float32
    loss.backward()
    parity.mean_loss(output.logits[:, :-1], labels[:, 1:]).backward()
    parity.check_gradients(ours, theirs, **parity.TOLERANCE[dtype])


@each_model
@parity.examples(4)
@given(sizes())
def test_drops_what_theirs_drops(ours_class, sizes):
    """With the same seed the same features are dropped, in the same order."""
    theirs, ours = (model.train() for model in twins(ours_class, sizes))
    tokens = some_tokens()
    torch.manual_seed(1)
    want = theirs(tokens).logits
    torch.manual_seed(1)
    torch.testing.assert_close(ours(tokens), want)


@each_model
@parity.examples(4)
@given(sizes(), paddings)
def test_vectors_in_place_of_tokens(ours_class, sizes, padding):
    """The first two stand for no token; in training, so that what is dropped agrees as well."""
    theirs, ours = (model.train() for model in twins(ours_class, sizes))
    tokens, keep = some_tokens(), keep_of(padding, T + 2)
    prompt = torch.randn(B, 2, ours.config.d_model, requires_grad=True)
    x = torch.cat((prompt, ours.token_embedding(tokens)), dim=1)
    torch.manual_seed(1)
    got = ours.logits(ours.hidden(ours.place(x, keep), keep))
    torch.manual_seed(1)
    want = theirs(inputs_embeds=x, **their_arguments(keep)).logits
    real = slice(None) if keep is None else keep
    torch.testing.assert_close(got[real], want[real])
    gradients = [
        torch.autograd.grad(logits[real].square().mean(), prompt, retain_graph=True)[0]
        for logits in (got, want)
    ]
    assert gradients[0].any(dim=(0, 2)).all()
    torch.testing.assert_close(*gradients)


@each_model
@torch.no_grad()
@parity.examples(12)
@given(sizes(), st.sampled_from(["none", "left"]), st.sampled_from(["no", "grown", "fixed"]))
def test_greedy_generation(ours_class, sizes, padding, cache):
    """No token twice in a row of the batch: a random model would repeat its first one for ever."""
    if ours_class is GPT1:  # their generate() ignores the padding of this model
        padding = "none"
    theirs, ours = twins(ours_class, sizes)
    tokens, keep = some_tokens(4), keep_of(padding, 4)
    if keep is not None:
        tokens = tokens.masked_fill(~keep, PAD)
    expected = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens) if keep is None else keep.long(),
        generation_config=GenerationConfig(
            max_new_tokens=11,
            do_sample=False,
            no_repeat_ngram_size=1,
            use_cache=cache != "no",
            pad_token_id=PAD,
            eos_token_id=EOS,
        ),
    )
    caches = None if cache == "no" else ours.new_caches(None if cache == "grown" else 15)

    def step(new: Tensor, past: int) -> Tensor:
        seen = None if keep is None else F.pad(keep, (0, past + new.shape[1] - 4), value=True)
        return ours(new, seen, caches)

    got = parity.greedy(step, tokens, 11, eos=EOS, pad=PAD, cached=cache != "no")
    assert torch.equal(got, expected)


@each_model
@parity.examples(3)
@given(sizes())
def test_round_trips(ours_class, sizes):
    parity.check_round_trips(build(ours_class, sizes), ours_class)


@each_model
def test_matrices_stay_as_they_lie_in_the_file(ours_class):
    """Loading into a model of another layout, type and mode changes its layout alone."""
    theirs, ours = twins(ours_class, {"n_positions": 24, "n_embd": 12, "n_layer": 2, "n_head": 3})
    again = ours_class(ours.config).double().requires_grad_(False)
    held = dict(again.named_parameters())
    again.load_hf(theirs.state_dict())
    for model, dtype in ((ours, torch.float32), (again, torch.float64)):
        for name, p in model.named_parameters():
            turned = name.endswith("_proj.weight")  # all of these are Conv1D
            assert p.stride() == ((1, p.shape[0]) if turned else p.contiguous().stride()), name
            assert p.dtype == dtype and p.untyped_storage().nbytes() == p.numel() * p.itemsize
    assert all(held[name] is p and not p.requires_grad for name, p in again.named_parameters())


@each_model
def test_a_file_as_openai_s_holds_the_model_without_its_prefix_and_the_masks(ours_class, tmp_path):
    sizes = {"n_positions": 24, "n_embd": 12, "n_layer": 2, "n_head": 3}
    theirs = build(ours_class, sizes)
    theirs.transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert not any(name.startswith("transformer.") for name in tensors)
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    if ours_class is GPT1:
        tensors["position_ids"] = torch.arange(24)
    else:
        tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors, path)
    tokens = some_tokens()
    torch.testing.assert_close(ours_class.from_pretrained(tmp_path)(tokens), theirs(tokens).logits)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (gpt1.GPT1_BASE, 116_534_784),
        (gpt2.GPT2_SMALL, 124_439_808),
        (gpt2.GPT2_MEDIUM, 354_823_168),
        (gpt2.GPT2_LARGE, 774_030_080),
        (gpt2.GPT2_XL, 1_557_611_200),
    ],
)
def test_parameter_counts_of_the_published_models(config, parameters):
    ours_class = GPT1 if isinstance(config, GPT1Config) else GPT2
    assert parity.count(lambda: ours_class(config)) == parameters


def test_gpt3_has_175_billion_parameters():
    parameters = parity.count(lambda: GPT2(gpt2.GPT3))
    D, L = gpt2.GPT3.d_model, gpt2.GPT3.n_layers
    assert parameters == L * (12 * D**2 + 13 * D) + (50_257 + 2048 + 2) * D
    assert round(parameters / 1e9) == 175
    assert gpt2.GPT3.d_model // gpt2.GPT3.n_heads == 128


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture(params=[GPT1, GPT2])
def model(request) -> GPT1 | GPT2:
    return parity.randomise(request.param(SMALL[request.param]))


@torch.no_grad()
def test_no_position_sees_a_later_token(model):
    tokens = some_tokens()
    before = model(tokens)
    for t in range(1, T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % (PAD - 1) + 1
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nothing(model, side):
    tokens = some_tokens()
    alone = model(tokens)
    pads, none = torch.full((B, 4), PAD), torch.zeros(B, 4, dtype=torch.bool)
    parts, keeps = (pads, tokens), (none, ~torch.zeros_like(tokens, dtype=torch.bool))
    if side == "right":
        parts, keeps = parts[::-1], keeps[::-1]
    keep = torch.cat(keeps, dim=1)
    padded = model(torch.cat(parts, dim=1), keep)
    torch.testing.assert_close(padded[keep].view(alone.shape), alone)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("sizes", [[1] * T, [2, 5], [6, 1], [T]])
@pytest.mark.parametrize("capacity", [None, T, 20])
def test_cached_equals_uncached(model, padding, sizes, capacity):
    tokens, keep = some_tokens(), keep_of(padding)
    caches, parts = model.new_caches(capacity), []
    for part in tokens.split(sizes, dim=1):
        end = len(caches[0]) + part.shape[1]
        parts.append(model(part, None if keep is None else keep[:, :end], caches))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, keep))
    assert [len(cache) for cache in caches] == [T] * 2


def test_every_parameter_gets_a_gradient(model):
    model.double()(some_tokens()).square().sum().backward()
    for name, p in model.named_parameters():
        moved = p.grad.abs().max()
        # the bias of the keys adds one number to a whole row of scores: no softmax can see it
        assert moved < 1e-6 if name.endswith("k_proj.bias") else moved > 1e-3, name


def test_gpt2_starts_as_openai_s_code_does():
    """Section 2.3: what ends in the residual stream is scaled by 1/sqrt(N), N such summands."""
    state = GPT2(dataclasses.replace(SMALL[GPT2], d_model=96, d_ff=384, n_layers=8)).state_dict()
    assert state["blocks.3.ffn.up_proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    for name in ("attention.o_proj", "ffn.down_proj"):
        std = state[f"blocks.3.{name}.weight"].std()
        assert std == pytest.approx(0.02 / 16**0.5, rel=0.05)
        assert not state[f"blocks.3.{name}.bias"].any()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V])
def test_tokens_outside_the_vocabulary(model, bad):
    tokens = some_tokens()
    tokens[1, 2] = bad
    with pytest.raises(ValueError, match=f"token ids must lie between 0 and 28; got .*{bad}"):
        model(tokens)


@pytest.mark.parametrize("shape", [(B, 0), (0, T)])
def test_an_empty_prompt(model, shape):
    with pytest.raises(ValueError, match="the prompt is empty: it has shape"):
        model(torch.zeros(shape, dtype=torch.long))


def test_more_than_its_context(model):
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(25))
    caches = model.new_caches()
    model(some_tokens(20), caches=caches)
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(5), caches=caches)


@pytest.mark.usefixtures("unchecked")
def test_a_keep_of_another_shape(model):
    tokens, keep = some_tokens(), keep_of("right")
    message = r"keep must be boolean and of shape \(3, 7\).* it is torch"
    for wrong in (keep[:, :6], keep[:2], keep.long()):
        with pytest.raises(ValueError, match=message):
            model(tokens, wrong)


def test_a_full_cache(model):
    with pytest.raises(ValueError, match="the cache is full"):
        model(some_tokens(), caches=model.new_caches(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function to 'relu'.* supports 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx to True"),
        ({"scale_attn_weights": False}, "scale_attn_weights to False"),
        ({"add_cross_attention": True}, "add_cross_attention to True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ({"n_head": "4"}, "n_heads must be of type int, got '4'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_gpt2_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        GPT2.config_from_hf(GPT2.config_to_hf(SMALL[GPT2]) | change)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"afn": "relu"}, "afn to 'relu'; this model supports 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ({"n_layer": -1}, "n_layers must not be negative, got -1"),
    ],
)
def test_gpt1_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        GPT1.config_from_hf(GPT1.config_to_hf(SMALL[GPT1]) | change)
