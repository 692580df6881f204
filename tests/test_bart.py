"""BART against transformers' BartForConditionalGeneration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig as HFBartConfig
from transformers import BartForConditionalGeneration

from llm_anatomy.models import bart
from llm_anatomy.models.bart import Bart, BartConfig
from tests import parity

B, S, T, V = 3, 9, 7, 29
BOS, PAD, EOS = 0, 1, 2
SMALL = BartConfig(
    vocab_size=V,
    n_encoder_layers=2,
    n_decoder_layers=3,
    n_heads=4,
    d_model=24,
    d_ff=20,
    n_positions=20,
)


@st.composite
def bart_configs(draw) -> HFBartConfig:
    n_heads = draw(st.sampled_from([1, 2, 3]))
    d_ff = draw(st.sampled_from([11, 20]))
    return HFBartConfig(
        vocab_size=V,
        d_model=n_heads * draw(st.sampled_from([4, 6])),
        encoder_layers=draw(st.integers(1, 3)),
        decoder_layers=draw(st.integers(1, 3)),
        encoder_attention_heads=n_heads,
        decoder_attention_heads=n_heads,
        encoder_ffn_dim=d_ff,
        decoder_ffn_dim=d_ff,
        max_position_embeddings=draw(st.integers(14, 20)),
        dropout=0.3,
        attention_dropout=0.2,
        activation_dropout=0.4,
        pad_token_id=draw(st.sampled_from([PAD, 3])),
        forced_eos_token_id=None,
    )


def build(config: HFBartConfig) -> BartForConditionalGeneration:
    theirs = parity.randomise(BartForConditionalGeneration(config))
    nn.init.normal_(theirs.final_logits_bias, std=0.3)
    return theirs


def twins(config: HFBartConfig, dtype: torch.dtype = torch.float32):
    theirs = build(config)
    return theirs.to(dtype), parity.twin(theirs, Bart).to(dtype)


def some_input(padded: bool = True, pad: int = PAD) -> tuple[Tensor, Tensor, Tensor | None]:
    """Source, target, and True at real source tokens: its rows have lengths S, S - 3 and 2."""
    source, target = torch.randint(4, V, (B, S)), torch.randint(4, V, (B, T))
    target[:, 0] = EOS
    keep = torch.arange(S) < torch.tensor([[S], [S - 3], [2]])
    return source.masked_fill(~keep, pad) if padded else source, target, keep if padded else None


# --- Parity ---------------------------------------------------------------------------------------


@torch.no_grad()
@parity.examples(14)
@given(bart_configs(), st.booleans(), parity.dtypes)
def test_logits(config, padded, dtype):
    theirs, ours = twins(config, dtype)
    source, target, keep = some_input(padded, config.pad_token_id)
    want = parity.read(theirs, source, target, keep)
    torch.testing.assert_close(ours(source, target, keep), want, **parity.TOLERANCE[dtype])


@parity.examples(10)
@given(bart_configs(), st.booleans(), parity.dtypes)
def test_loss_and_gradients(config, padded, dtype):
    theirs, ours = twins(config, dtype)
    source, labels, keep = some_input(padded, config.pad_token_id)
    tolerance = parity.TOLERANCE[dtype]
    parity.check_loss_and_gradients(theirs, ours, source, labels, keep, **tolerance)


@parity.examples(5)
@given(bart_configs())
def test_drops_what_theirs_drops(config):
    parity.check_dropout(*twins(config), *some_input())


@parity.examples(5)
@given(bart_configs())
def test_vectors_in_place_of_tokens(config):
    parity.check_vectors(*twins(config), *some_input())


@parity.examples(14)
@given(bart_configs(), st.booleans(), st.sampled_from(["no", "grown", "fixed"]))
def test_greedy_generation(config, padded, cache):
    source, _, keep = some_input(padded, config.pad_token_id)
    ids = {"start": EOS, "eos": EOS, "pad": config.pad_token_id}
    parity.check_generation(*twins(config), source, keep, cache, **ids)


@parity.examples(4)
@given(bart_configs())
def test_round_trips(config):
    parity.check_round_trips(build(config), Bart)


def test_a_file_of_the_model_without_its_head(tmp_path):
    """As those of the pre-trained BART are: no prefix, no bias of the logits, three embeddings."""
    config = HFBartConfig(
        vocab_size=V,
        d_model=12,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=10,
        decoder_ffn_dim=10,
    )
    theirs = parity.randomise(BartForConditionalGeneration(config))
    theirs.model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert not any(name.startswith("model.") for name in tensors)
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, path)
    source, target, keep = some_input()
    want = theirs(source, attention_mask=keep.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(Bart.from_pretrained(tmp_path)(source, target, keep), want)


@pytest.mark.parametrize(
    ("config", "parameters"), [(bart.BART_BASE, 139_420_416), (bart.BART_LARGE, 406_291_456)]
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: Bart(config)) == parameters


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture
def model() -> Bart:
    return parity.randomise(Bart(SMALL)).double()


def test_no_position_sees_a_later_target(model):
    parity.check_causality(model, *some_input())


@torch.no_grad()
def test_padding_reaches_nothing(model):
    source, target, _ = some_input(padded=False)
    wider = torch.cat((source, torch.randint(V, (B, 4))), dim=1)
    keep = torch.arange(S + 4).expand(B, -1) < S
    torch.testing.assert_close(model(wider, target, keep), model(source, target))


@pytest.mark.parametrize("sizes", [[1] * T, [2, 5], [6, 1], [T]])
@pytest.mark.parametrize("capacity", [None, T, 20])
def test_cached_decoding_equals_uncached(model, sizes, capacity):
    parity.check_cached(model, *some_input(), sizes, capacity)


def test_every_parameter_gets_a_gradient(model):
    source, target, keep = some_input()
    model(source, target, keep).square().sum().backward()
    for name, p in model.named_parameters():
        moved = p.grad.abs().max()
        # the bias of the keys adds one number to a whole row of scores: no softmax can see it
        assert moved < 1e-6 if name.endswith("k_proj.bias") else moved > 1e-4, name
        if "position_embedding" in name:
            assert not p.grad[: bart.OFFSET].any(), "two vectors are never read"


def test_reading_the_padding_token_does_not_train_its_vector(model):
    source, _, _ = some_input()
    model.encode(source).square().sum().backward()
    gradient = model.token_embedding.weight.grad
    assert not gradient[PAD].any() and gradient[source[0, 0]].any()
    assert not Bart(SMALL).token_embedding.weight[PAD].any()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V])
def test_tokens_outside_the_vocabulary(model, bad):
    source, target, keep = some_input()
    source[1, 2] = bad
    with pytest.raises(ValueError, match=f"between 0 and 28; got .*{bad}.* in the source"):
        model(source, target, keep)
    source[1, 2], target[1, 2] = 5, bad
    with pytest.raises(ValueError, match=f"between 0 and 28; got .*{bad}.* in the target"):
        model(source, target, keep)


@pytest.mark.usefixtures("unchecked")
def test_a_keep_of_another_shape(model):
    source, target, keep = some_input()
    message = r"keep must be boolean and of shape \(3, 9\).* it is torch"
    for wrong in (keep[:, :6], keep[:2], keep.long()):
        with pytest.raises(ValueError, match=message):
            model(source, target, wrong)
        with pytest.raises(ValueError, match=message):
            model.decode(target, model.encode(source), wrong)


def test_an_empty_source_or_target(model):
    source, target, _ = some_input()
    with pytest.raises(ValueError, match=r"the source is empty: it has shape \(3, 0\)"):
        model(source[:, :0], target)
    with pytest.raises(ValueError, match=r"the target is empty: it has shape \(3, 0\)"):
        model(source, target[:, :0])


def test_a_full_cache(model):
    source, target, keep = some_input()
    with pytest.raises(ValueError, match="the cache is full"):
        model.decode(target, model.encode(source, keep), keep, model.new_caches(T - 1))


def test_more_positions_than_the_model_has(model):
    source, target, _ = some_input()
    with pytest.raises(ValueError, match="27 positions are needed, but the model has 20"):
        model(source.repeat(1, 3), target)
    caches, memory = model.new_caches(), model.encode(source)
    model.decode(target.repeat(1, 2), memory, caches=caches)
    with pytest.raises(ValueError, match="21 positions are needed, but the model has 20"):
        model.decode(target, memory, caches=caches)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function to 'relu'; .* supports 'gelu'"),
        ({"scale_embedding": True}, "scale_embedding to True"),
        ({"normalize_before": True}, "normalize_before to True"),
        ({"normalize_embedding": False}, "normalize_embedding to False"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm to True"),
        ({"static_position_embeddings": True}, "static_position_embeddings to True"),
        ({"encoder_layerdrop": 0.1}, r"encoder_layerdrop to 0\.1"),
        ({"decoder_layerdrop": 0.1}, r"decoder_layerdrop to 0\.1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ({"decoder_ffn_dim": 7}, "encoder and decoder must have the same d_ff"),
        ({"decoder_attention_heads": 2}, "encoder and decoder must have the same n_heads"),
        ({"pad_token_id": V}, r"pad_id \(29\) must be below vocab_size \(29\)"),
        ({"decoder_start_token_id": V}, r"start_id \(29\) must be below vocab_size \(29\)"),
    ],
)
def test_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        Bart.config_from_hf(Bart.config_to_hf(SMALL) | change)
