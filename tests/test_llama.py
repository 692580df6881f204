"""LLaMA against transformers' LlamaForCausalLM."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM
from transformers import LlamaConfig as HFLlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_anatomy.models import llama
from llm_anatomy.models.llama import Llama, LlamaConfig
from tests import parity

B, T, V = 3, 7, 29
EOS, PAD = 0, 28
SMALL = LlamaConfig(
    vocab_size=V,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=18,
    d_head=6,
    d_ff=20,
    n_positions=24,
)


@pytest.fixture(autouse=True, scope="module")
def norms_in_full_precision():
    """LlamaRMSNorm computes in float32 even what is float64, which would hide 1e-9."""
    original = LlamaRMSNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return original(self, x)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@st.composite
def sizes(draw) -> dict[str, object]:
    n_groups, n_kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    n_heads = n_groups * n_kv_heads
    d_head = draw(st.sampled_from([4, 6]))
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": d_head,
        "hidden_size": n_heads * draw(st.sampled_from([d_head, 3])),
        "intermediate_size": draw(st.sampled_from([9, 20])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": draw(st.integers(16, 24)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([10_000.0, 50.0])),
        },
        "tie_word_embeddings": draw(st.booleans()),
    }


def build(sizes: dict[str, object]) -> LlamaForCausalLM:
    config = HFLlamaConfig(
        vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **sizes
    )
    return parity.randomise(LlamaForCausalLM(config))


def twins(sizes, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, Llama]:
    theirs = build(sizes)
    return theirs.to(dtype), parity.twin(theirs, Llama).to(dtype)


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


@parity.examples(15)
@given(sizes(), paddings, parity.dtypes)
def test_logits(sizes, padding, dtype):
    theirs, ours = twins(sizes, dtype)
    tokens, keep = some_tokens(), keep_of(padding)
    got, want = ours(tokens, keep), theirs(tokens, **their_arguments(keep)).logits
    real = slice(None) if keep is None else keep
    torch.testing.assert_close(got[real], want[real], **parity.TOLERANCE[dtype])


@parity.examples(15)
@given(sizes(), paddings, parity.dtypes)
def test_loss_and_gradients(sizes, padding, dtype):
    theirs, ours = twins(sizes, dtype)
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


@torch.no_grad()
@parity.examples(12)
@given(sizes(), st.sampled_from(["none", "left"]), st.sampled_from(["no", "grown", "fixed"]))
def test_greedy_generation(sizes, padding, cache):
    """No token twice in a row of the batch: a random model would repeat its first one for ever."""
    theirs, ours = twins(sizes)
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


@parity.examples(4)
@given(sizes())
def test_round_trips(sizes):
    parity.check_round_trips(build(sizes), Llama)


def test_an_old_file_with_shards_frequencies_and_the_base_beside_the_rest(tmp_path):
    """As Llama 2 was published: `rope_theta` at the top, frequencies stored, several files."""
    sizes = {"num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 20}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}}
    theirs = build({**sizes, **rope, "num_hidden_layers": 2, "max_position_embeddings": 24})
    state = theirs.state_dict() | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)
    }
    theirs.save_pretrained(tmp_path, max_shard_size="5KB", state_dict=state)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["head_dim"], config["num_key_value_heads"]
    path.write_text(json.dumps(config | {"rope_theta": 70.0, "rope_scaling": None}))
    tokens = some_tokens()
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), theirs(tokens).logits)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (llama.LLAMA_7B, 6_738_415_616),
        (llama.LLAMA_13B, 13_015_864_320),
        (llama.LLAMA_30B, 32_528_943_616),
        (llama.LLAMA_65B, 65_285_660_672),
        (llama.LLAMA2_7B, 6_738_415_616),
        (llama.LLAMA2_13B, 13_015_864_320),
        (llama.LLAMA2_70B, 68_976_648_192),
    ],
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: Llama(config)) == parameters
    theirs = HFLlamaConfig(**Llama.config_to_hf(config))
    assert parity.count(lambda: LlamaForCausalLM(theirs)) == parameters


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture
def model() -> Llama:
    return parity.randomise(Llama(SMALL))


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


@torch.no_grad()
def test_only_distances_matter(model, monkeypatch):
    """Rotations know where two tokens stand relative to each other, not where the text begins."""
    tokens = some_tokens()
    before = model.double()(tokens)
    original = llama.rope_angles
    monkeypatch.setattr(
        llama, "rope_angles", lambda positions, *sizes: original(positions + 9, *sizes)
    )
    torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=0)  # angles are float32
    monkeypatch.setattr(
        llama, "rope_angles", lambda positions, *sizes: original(positions * 2, *sizes)
    )
    assert not torch.allclose(model(tokens), before, atol=0.1)


def test_every_parameter_gets_a_gradient(model):
    model.double()(some_tokens()).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-3, name


@torch.no_grad()
def test_with_as_many_key_heads_as_heads_it_is_plain_attention(model):
    """A model that shares keys and values among heads equals one with the copies written out."""
    plain = Llama(dataclasses.replace(SMALL, n_kv_heads=4))
    state = model.state_dict()
    for name in [name for name in state if ".k_proj." in name or ".v_proj." in name]:
        heads = state[name].view(2, 1, 6, 18).expand(2, 2, 6, 18)
        state[name] = heads.reshape(24, 18)
    plain.load_state_dict(state)
    tokens = some_tokens()
    torch.testing.assert_close(plain(tokens), model(tokens))


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


def test_more_than_its_context(model):
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(25))
    caches = model.new_caches()
    model(some_tokens(20), caches=caches)
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(5), caches=caches)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'; this model supports 'silu'"),
        ({"attention_bias": True}, "attention_bias to True"),
        ({"mlp_bias": True}, "mlp_bias to True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scales the rotation .'yarn'.*'default'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "scales the rotation .'linear'.",
        ),
        ({"num_key_value_heads": "2"}, "n_kv_heads must be of type int, got '2'"),
        ({"num_key_value_heads": 3}, r"n_heads .4. must be a multiple of n_kv_heads .3."),
    ],
)
def test_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        Llama(Llama.config_from_hf(Llama.config_to_hf(SMALL) | change))
