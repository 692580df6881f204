"""T5, both versions, against transformers' T5ForConditionalGeneration."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config as HFT5Config
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llm_anatomy.models import t5
from llm_anatomy.models.t5 import T5, T5Config
from tests import parity

B, S, T, V, PAD, EOS = 3, 9, 7, 29, 0, 1
SMALL = T5Config(
    vocab_size=V,
    n_encoder_layers=2,
    n_decoder_layers=3,
    n_heads=4,
    d_model=24,
    d_head=5,
    d_ff=20,
    n_buckets=8,
    max_distance=6,
)
VERSIONS = {"v1.0": SMALL, "v1.1": dataclasses.replace(SMALL, gated=True, tied=False)}


@pytest.fixture(autouse=True, scope="module")
def _exact_variance():
    """T5LayerNorm takes its variance in float32 even from float64, which would hide 1e-9."""
    patch = pytest.MonkeyPatch()
    original = T5LayerNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return original(self, x)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    patch.setattr(T5LayerNorm, "forward", forward)
    yield
    patch.undo()


@st.composite
def t5_configs(draw) -> HFT5Config:
    gated = draw(st.booleans())
    return HFT5Config(
        vocab_size=V,
        d_model=draw(st.sampled_from([8, 10])),
        d_kv=draw(st.sampled_from([3, 6])),
        d_ff=draw(st.sampled_from([11, 20])),
        num_layers=draw(st.integers(1, 3)),
        num_decoder_layers=draw(st.integers(1, 3)),
        num_heads=draw(st.integers(1, 3)),
        relative_attention_num_buckets=draw(st.sampled_from([8, 32])),
        relative_attention_max_distance=draw(st.sampled_from([5, 128])),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-3])),
        dropout_rate=0.3,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=PAD,
    )


def build(config: HFT5Config) -> T5ForConditionalGeneration:
    theirs = T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:  # transformers 5 ties a fresh v1.1, unlike the released
        theirs.lm_head.weight = nn.Parameter(torch.empty(V, config.d_model))
    return parity.randomise(theirs)


def twins(config: HFT5Config, dtype: torch.dtype = torch.float32):
    theirs = build(config)
    return theirs.to(dtype), parity.twin(theirs, T5).to(dtype)


def some_input(padded: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Source, target, and True at real source tokens: its rows have lengths S, S - 3 and 2."""
    source, target = torch.randint(2, V, (B, S)), torch.randint(2, V, (B, T))
    target[:, 0] = PAD
    keep = torch.arange(S) < torch.tensor([[S], [S - 3], [2]])
    return source.masked_fill(~keep, PAD) if padded else source, target, keep if padded else None


# --- Parity ---------------------------------------------------------------------------------------


@torch.no_grad()
@parity.examples(14)
@given(t5_configs(), st.booleans(), parity.dtypes)
def test_logits(config, padded, dtype):
    theirs, ours = twins(config, dtype)
    source, target, keep = some_input(padded)
    want = parity.read(theirs, source, target, keep)
    torch.testing.assert_close(ours(source, target, keep), want, **parity.TOLERANCE[dtype])


@parity.examples(10)
@given(t5_configs(), st.booleans())
def test_loss_and_gradients(config, padded):
    """In float64: scores that nothing divides make sharp softmaxes, whose gradients in float32
    round by more than the default tolerance.
    """
    dtype = torch.float64
    theirs, ours = twins(config, dtype)
    source, labels, keep = some_input(padded)
    tolerance = parity.TOLERANCE[dtype]
    parity.check_loss_and_gradients(theirs, ours, source, labels, keep, **tolerance)


@parity.examples(5)
@given(t5_configs())
def test_drops_what_theirs_drops(config):
    parity.check_dropout(*twins(config), *some_input())


@parity.examples(5)
@given(t5_configs())
def test_vectors_in_place_of_tokens(config):
    parity.check_vectors(*twins(config), *some_input())


@parity.examples(14)
@given(t5_configs(), st.booleans(), st.sampled_from(["no", "grown", "fixed"]))
def test_greedy_generation(config, padded, cache):
    source, _, keep = some_input(padded)
    ids = {"start": PAD, "eos": EOS, "pad": PAD}
    parity.check_generation(*twins(config), source, keep, cache, **ids)


@parity.examples(4)
@given(t5_configs())
def test_round_trips(config):
    parity.check_round_trips(build(config), T5)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_the_hub_are_read(version, tmp_path):
    """They say plainly whether the output is tied; those of v1.0 repeat the embedding thrice."""
    ours = parity.randomise(T5(VERSIONS[version]))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["shared.weight"]
    tensors["encoder.embed_tokens.weight"] = embedding.clone()
    tensors["decoder.embed_tokens.weight"] = embedding.clone()
    if version == "v1.0":
        tensors["lm_head.weight"] = embedding.clone()
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[unused] = torch.randn(8, 4)
    save_file(tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is (version == "v1.0")
    if version == "v1.0":  # what the first files leave out
        for name in (
            "feed_forward_proj",
            "tie_word_embeddings",
            "num_decoder_layers",
            "relative_attention_max_distance",
        ):
            del config[name]
    config["num_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    if version == "v1.0":  # then both stacks are equally deep
        with pytest.raises(ValueError, match=r"no rule knows: decoder\.block\.2"):
            T5.from_pretrained(tmp_path)
        kept = {name: t for name, t in tensors.items() if "decoder.block.2" not in name}
        save_file(kept, path)
    again = T5.from_pretrained(tmp_path)
    assert again.config.tied is (version == "v1.0")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (t5.T5_SMALL, 60_506_624),
        (t5.T5_BASE, 222_903_552),
        (t5.T5_LARGE, 737_668_096),
        (t5.T5_3B, 2_851_598_336),
        (t5.T5_11B, 11_307_321_344),
        (t5.FLAN_T5_SMALL, 76_961_152),
        (t5.FLAN_T5_BASE, 247_577_856),
        (t5.FLAN_T5_LARGE, 783_150_080),
        (t5.FLAN_T5_XL, 2_849_757_184),
        (t5.FLAN_T5_XXL, 11_135_332_352),
    ],
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: T5(config)) == parameters


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture(params=VERSIONS)
def model(request) -> T5:
    return parity.randomise(T5(VERSIONS[request.param])).double()


def test_no_position_sees_a_later_target(model):
    parity.check_causality(model, *some_input())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_reaches_nothing(model, side):
    """Only distances count, so a shift of the whole source changes nothing either."""
    source, target, _ = some_input(padded=False)
    alone = model(source, target)
    parts = [torch.full((B, 4), PAD), source]
    keeps = [torch.zeros(B, 4, dtype=torch.bool), torch.ones(B, S, dtype=torch.bool)]
    if side == "right":
        parts, keeps = parts[::-1], keeps[::-1]
    padded = model(torch.cat(parts, dim=1), target, torch.cat(keeps, dim=1))
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("sizes", [[1] * T, [2, 5], [6, 1], [T]])
@pytest.mark.parametrize("capacity", [None, T, 20])
def test_cached_decoding_equals_uncached(model, sizes, capacity):
    parity.check_cached(model, *some_input(), sizes, capacity)


def test_every_parameter_gets_a_gradient(model):
    source, target, keep = some_input()
    model(source, target, keep).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-4, name


def test_fresh_scores_and_outputs_have_the_size_of_one():
    """Queries start small instead of the scores being divided; the tied output is scaled down."""
    config = dataclasses.replace(SMALL, d_model=256, d_head=64, d_ff=512, vocab_size=400)
    model = T5(config).eval()
    x = torch.randn(2, 50, 256)
    attention = model.encoder[0].attention
    q, k = (
        p(x).unflatten(-1, (4, 64)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    assert (q @ k.mT).std().item() == pytest.approx(1, rel=0.2)
    assert model.logits(x).std().item() == pytest.approx(1, rel=0.2)


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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "'gated-silu'; .* supports 'relu' or 'gated-gelu'"),
        ({"d_kv": None}, "d_head must be of type int, got None"),
        ({"pad_token_id": V}, r"pad_id \(29\) must be below vocab_size \(29\)"),
    ],
)
def test_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        T5.config_from_hf(T5.config_to_hf(SMALL) | change)


def test_an_output_that_should_be_tied_and_is_not(tmp_path):
    T5(VERSIONS["v1.1"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head\.weight should repeat shared\.weight"):
        T5.from_pretrained(tmp_path)
