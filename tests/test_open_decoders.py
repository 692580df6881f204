"""Open causal decoders after GPT-2, each against its class in transformers."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llm_anatomy.models import bloom, falcon, gemma, llama, mixtral, qwen
from llm_anatomy.models.bloom import Bloom, BloomConfig
from llm_anatomy.models.falcon import Falcon, FalconConfig
from llm_anatomy.models.gemma import Gemma
from llm_anatomy.models.llama import Llama, LlamaConfig
from llm_anatomy.models.mixtral import Mixtral, MixtralConfig, balance_loss
from llm_anatomy.models.qwen import Qwen2, Qwen3
from llm_anatomy.weights import Pretrained
from tests import parity

B, T, V = 3, 7, 29
EOS, PAD = 0, 28


@dataclass(frozen=True)
class Family:
    """One of our models, its twin, and the configurations that are tried.

    Args:
        draw: the fields of a tiny configuration of theirs, from hypothesis' `draw`.
        small: a configuration of ours.
        dtypes: precisions in which theirs computes in full.
        published: parameters of the published models.
    """

    ours: type[Pretrained]
    theirs: type[PreTrainedModel]
    draw: Callable[[Callable], dict[str, Any]]
    small: Any
    published: dict[str, tuple[Any, int]]
    dtypes: st.SearchStrategy = parity.dtypes


def llama_sizes(draw: Callable) -> dict[str, Any]:
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


def bloom_sizes(draw: Callable) -> dict[str, Any]:
    n_heads = draw(st.sampled_from([1, 2, 3]))  # 3 is no power of 2: slopes from two series
    return {
        "n_head": n_heads,
        "hidden_size": n_heads * draw(st.sampled_from([4, 6])),
        "n_layer": draw(st.integers(1, 3)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "hidden_dropout": 0.2,
        "attention_dropout": 0.1,
    }


def qwen2_sizes(draw: Callable) -> dict[str, Any]:
    sizes = llama_sizes(draw)
    return sizes | {"hidden_size": sizes["num_attention_heads"] * sizes.pop("head_dim")}


def gemma_sizes(draw: Callable) -> dict[str, Any]:
    return llama_sizes(draw) | {"tie_word_embeddings": True}


def falcon_sizes(draw: Callable) -> dict[str, Any]:
    n_groups, n_kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    grouped = draw(st.booleans())
    return {
        "num_attention_heads": n_groups * n_kv_heads,
        "new_decoder_architecture": grouped,
        "num_kv_heads": n_kv_heads if grouped else 1,
        "num_ln_in_parallel_attn": draw(st.sampled_from([None, 1, 2])) if grouped else None,
        "hidden_size": n_groups * n_kv_heads * draw(st.sampled_from([4, 6])),
        "ffn_hidden_size": draw(st.sampled_from([9, 20])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": draw(st.integers(16, 24)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "hidden_dropout": 0.1,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([10_000.0, 50.0])),
        },
    }


def mixtral_sizes(draw: Callable) -> dict[str, Any]:
    n_experts = draw(st.sampled_from([2, 3, 5]))
    return llama_sizes(draw) | {
        "num_local_experts": n_experts,
        "num_experts_per_tok": draw(st.integers(1, n_experts)),
    }


LLAMA = LlamaConfig(
    vocab_size=V,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=20,
    d_head=6,
    d_ff=22,
    n_positions=24,
)
FAMILIES = {
    "LLaMA": Family(
        Llama,
        transformers.LlamaForCausalLM,
        llama_sizes,
        LLAMA,
        {
            "LLaMA 7B": (llama.LLAMA_7B, 6_738_415_616),
            "LLaMA 13B": (llama.LLAMA_13B, 13_015_864_320),
            "LLaMA 30B": (llama.LLAMA_30B, 32_528_943_616),
            "LLaMA 65B": (llama.LLAMA_65B, 65_285_660_672),
            "Llama 2 7B": (llama.LLAMA2_7B, 6_738_415_616),
            "Llama 2 13B": (llama.LLAMA2_13B, 13_015_864_320),
            "Llama 2 70B": (llama.LLAMA2_70B, 68_976_648_192),
        },
    ),
    "Qwen2": Family(
        Qwen2,
        transformers.Qwen2ForCausalLM,
        qwen2_sizes,
        dataclasses.replace(LLAMA, d_model=24),
        {
            "Qwen 1.8B": (qwen.QWEN_1_8B, 1_836_828_672),
            "Qwen2 0.5B": (qwen.QWEN2_0_5B, 494_032_768),
            "Qwen2 7B": (qwen.QWEN2_7B, 7_615_616_512),
        },
    ),
    "Qwen3": Family(
        Qwen3,
        transformers.Qwen3ForCausalLM,
        llama_sizes,
        LLAMA,
        {
            "Qwen3 0.6B": (qwen.QWEN3_0_6B, 596_049_920),
            "Qwen3 8B": (qwen.QWEN3_8B, 8_190_735_360),
        },
    ),
    "Gemma": Family(
        Gemma,
        transformers.GemmaForCausalLM,
        gemma_sizes,
        dataclasses.replace(LLAMA, tied=True),
        {
            "Gemma 2B": (gemma.GEMMA_2B, 2_506_172_416),
            "Gemma 7B": (gemma.GEMMA_7B, 8_537_680_896),
        },
        st.just(torch.float32),  # theirs keeps the scale of the embedding in float32
    ),
    "Mixtral": Family(
        Mixtral,
        transformers.MixtralForCausalLM,
        mixtral_sizes,
        MixtralConfig(**vars(LLAMA), n_experts=3, n_active=2),
        {
            "Mixtral 8x7B": (mixtral.MIXTRAL_8X7B, 46_702_792_704),
            "Mixtral 8x22B": (mixtral.MIXTRAL_8X22B, 140_620_634_112),
        },
        st.just(torch.float32),  # theirs mixes in float32
    ),
    "Falcon": Family(
        Falcon,
        transformers.FalconForCausalLM,
        falcon_sizes,
        FalconConfig(
            vocab_size=V,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_model=24,
            d_head=6,
            d_ff=20,
            two_norms=True,
            n_positions=24,
        ),
        {
            "Falcon 7B": (falcon.FALCON_7B, 6_921_720_704),
            "Falcon 40B": (falcon.FALCON_40B, 41_303_293_952),
            "Falcon 180B": (falcon.FALCON_180B, 178_557_088_768),
        },
    ),
    "BLOOM": Family(
        Bloom,
        transformers.BloomForCausalLM,
        bloom_sizes,
        BloomConfig(vocab_size=V, n_layers=2, n_heads=3, d_model=18),
        {
            "BLOOM 560M": (bloom.BLOOM_560M, 559_214_592),
            "BLOOM 1B1": (bloom.BLOOM_1B1, 1_065_314_304),
            "BLOOM 1B7": (bloom.BLOOM_1B7, 1_722_408_960),
            "BLOOM 3B": (bloom.BLOOM_3B, 3_002_557_440),
            "BLOOM 7B1": (bloom.BLOOM_7B1, 7_069_016_064),
            "BLOOM 176B": (bloom.BLOOM_176B, 176_247_271_424),
        },
        st.just(torch.float32),  # theirs takes the softmax in float32 even from float64
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
sizes = st.composite(lambda draw, family: family.draw(draw))


@pytest.fixture(autouse=True, scope="module")
def norms_in_full_precision() -> Iterator[None]:
    """Norms of theirs compute in float32 even what is float64, which would hide 1e-9."""

    def in_full(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable:
        def exact(norm: nn.Module, x: Tensor) -> Tensor:
            if x.dtype != torch.float64:
                return forward(norm, x)
            return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

        return exact

    with pytest.MonkeyPatch.context() as patch:
        for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            patch.setattr(norm, "forward", in_full(norm.forward))
        yield


def build(family: Family, data: st.DataObject) -> PreTrainedModel:
    config = family.theirs.config_class(
        vocab_size=V,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **data.draw(sizes(family), label="sizes"),
    )
    return their_model(family, config)


def their_model(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """One with random weights; its experts, if any, run in the form that takes every width."""
    theirs = parity.randomise(family.theirs(config))
    if family.ours is Mixtral:
        theirs.set_experts_implementation("eager")
    return theirs


def twins(
    family: Family, data: st.DataObject, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Pretrained]:
    theirs = build(family, data)
    return theirs.to(dtype), parity.twin(theirs, family.ours).to(dtype)


def some_tokens(T: int = T) -> Tensor:
    return torch.randint(1, PAD, (B, T))


def keep_of(padding: str, T: int = T) -> Tensor | None:
    """True at real tokens: the rows have lengths T, T - 3 and 2."""
    if padding == "none":
        return None
    short = torch.arange(T) < torch.tensor([[T], [T - 3], [2]])
    return short if padding == "right" else short.flip(1)


def their_arguments(family: Family, keep: Tensor | None) -> dict[str, Tensor]:
    """Padding as generate() gives it to the model: positions count what is real."""
    if keep is None:
        return {}
    if family.ours is Bloom:
        return {"attention_mask": keep.long()}
    return {
        "attention_mask": keep.long(),
        "position_ids": (keep.cumsum(dim=1) - 1).clamp(min=0),
    }


paddings = st.sampled_from(["none", "right", "left"])

# --- Parity ---------------------------------------------------------------------------------------


@each_family
@parity.examples(12)
@given(st.data(), paddings)
def test_logits(family, data, padding):
    dtype = data.draw(family.dtypes, label="dtype")
    theirs, ours = twins(family, data, dtype)
    tokens, keep = some_tokens(), keep_of(padding)
    got, want = ours(tokens, keep), theirs(tokens, **their_arguments(family, keep)).logits
    real = slice(None) if keep is None else keep
    torch.testing.assert_close(got[real], want[real], **parity.TOLERANCE[dtype])


@each_family
@parity.examples(12)
@given(st.data(), paddings)
def test_loss_and_gradients(family, data, padding):
    dtype = data.draw(family.dtypes, label="dtype")
    theirs, ours = twins(family, data, dtype)
    tokens, keep = some_tokens(), keep_of(padding)
    labels = tokens
    if keep is not None:  # what follows padding has nothing to be predicted from
        follows = F.pad(keep, (1, -1), value=True)
        labels = tokens.masked_fill(~(keep & follows), -100)
    output = theirs(tokens, labels=labels, **their_arguments(family, keep))
    loss = parity.mean_loss(ours(tokens, keep)[:, :-1], labels[:, 1:])
    torch.testing.assert_close(loss.float(), output.loss)  # theirs is computed in float32
    loss.backward()
    parity.mean_loss(output.logits[:, :-1], labels[:, 1:]).backward()
    if family.ours is not Mixtral:
        parity.check_gradients(ours, theirs, **parity.TOLERANCE[dtype])
        return
    with torch.no_grad():  # their experts are fused in memory: let a file take them apart
        for p in theirs.parameters():
            p.copy_(p.grad)
    for (name, p), want in zip(
        ours.named_parameters(), parity.twin(theirs, Mixtral).parameters(), strict=True
    ):
        got = torch.zeros_like(p) if p.grad is None else p.grad  # an expert that no token met
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@each_family
@torch.no_grad()
@parity.examples(10)
@given(st.data(), st.sampled_from(["none", "left"]), st.sampled_from(["no", "grown", "fixed"]))
def test_greedy_generation(family, data, padding, cache):
    """No token twice in a row of the batch: a random model would repeat its first one for ever."""
    theirs, ours = twins(family, data)
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


@each_family
@parity.examples(3)
@given(st.data())
def test_round_trips(family, data):
    parity.check_round_trips(build(family, data), family.ours)


@each_family
def test_parameter_counts_of_the_published_models(family):
    for name, (config, parameters) in family.published.items():
        assert parity.count(lambda config=config: family.ours(config)) == parameters, name
        theirs = family.theirs.config_class(**family.ours.config_to_hf(config))
        assert parity.count(lambda theirs=theirs: family.theirs(theirs)) == parameters, name


@each_family
def test_shards(family, tmp_path):
    """Large models are published in several files with an index."""
    config = family.theirs.config_class(**family.ours.config_to_hf(family.small))
    theirs = their_model(family, config)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = some_tokens()
    got = family.ours.from_pretrained(tmp_path)(tokens)
    torch.testing.assert_close(got, theirs(tokens).logits)


def test_old_llama_files(tmp_path):
    """As Llama 2 was published: `rope_theta` at the top, the frequencies stored."""
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            num_attention_heads=4,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            max_position_embeddings=24,
            rope_parameters={"rope_type": "default", "rope_theta": 70.0},
        )
    )
    parity.randomise(theirs)
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    theirs.save_pretrained(tmp_path, state_dict=theirs.state_dict() | stored)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["head_dim"], config["num_key_value_heads"]
    path.write_text(json.dumps(config | {"rope_theta": 70.0, "rope_scaling": None}))
    tokens = some_tokens()
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), theirs(tokens).logits)


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def model(request) -> Pretrained:
    return parity.randomise(request.param.ours(request.param.small))


@torch.no_grad()
def test_no_position_sees_a_later_token(model):
    tokens = some_tokens()
    before = model.double()(tokens)
    for t in range(1, T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % (PAD - 1) + 1
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
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
    model.double()
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
        # the bias of the keys adds one number to a whole row of scores: no softmax can see it,
        # unless a rotation turns it by another angle at each position
        blind = name.endswith("k_proj.bias") and isinstance(model, Bloom)
        assert moved < 1e-6 if blind else moved > 1e-3, name


@torch.no_grad()
def test_order_matters_without_position_vectors(model):
    """Two earlier tokens that change places change what follows them."""
    tokens = some_tokens()
    swapped = tokens[:, [1, 0, *range(2, T)]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-3)


@torch.no_grad()
def test_in_llama_only_distances_matter(monkeypatch):
    """Rotations know where two tokens stand relative to each other, not where the text begins."""
    model = parity.randomise(Llama(LLAMA)).double()
    tokens = some_tokens()
    before, original = model(tokens), llama.rope_angles

    def after(move: Callable[[Tensor], Tensor]) -> Tensor:
        changed = lambda positions, *sizes: original(move(positions), *sizes)  # noqa: E731
        monkeypatch.setattr(llama, "rope_angles", changed)
        return model(tokens)

    # angles are float32
    torch.testing.assert_close(after(lambda positions: positions + 9), before, atol=1e-5, rtol=0)
    assert not torch.allclose(after(lambda positions: positions * 2), before, atol=0.1)


@torch.no_grad()
def test_the_table_of_gemma_says_by_how_much_it_scales():
    """LoRA asks for it: what is added to the table is scaled as well."""
    table = Gemma(FAMILIES["Gemma"].small).token_embedding
    tokens = torch.randint(V, (2, 5))
    torch.testing.assert_close(table(tokens), table.weight[tokens] * table.embed_scale)
    assert table.embed_scale == table.embedding_dim**0.5


@torch.no_grad()
def test_llama_with_shared_keys_equals_one_with_copies():
    """Query heads that share keys and values equal heads that have copies of them."""
    model = parity.randomise(Llama(LLAMA))
    state = model.state_dict()
    for name in [name for name in state if ".k_proj." in name or ".v_proj." in name]:
        heads = state[name].view(2, 1, 6, 20).expand(2, 2, 6, 20)
        state[name] = heads.reshape(24, 20)
    plain = Llama(dataclasses.replace(LLAMA, n_kv_heads=4))
    plain.load_state_dict(state)
    tokens = some_tokens()
    torch.testing.assert_close(plain.eval()(tokens), model(tokens))


def test_the_balance_loss_is_that_of_transformers():
    scores = torch.randn(11, 5)
    want = load_balancing_loss_func((scores,), num_experts=5, top_k=2)
    torch.testing.assert_close(balance_loss(scores, 2), want)


def test_the_balance_loss_of_an_even_router_and_of_one_that_has_a_favourite():
    even = torch.eye(4).repeat(3, 1) * 1e-4
    favourite = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(12, 1)
    torch.testing.assert_close(balance_loss(even, 1), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert balance_loss(favourite, 1) > 3.9  # of 4 experts, one has it all


@torch.no_grad()
def test_with_all_experts_alike_a_mixture_is_one_of_them():
    """The shares of the chosen sum to 1."""
    layer = parity.randomise(Mixtral(FAMILIES["Mixtral"].small)).blocks[0].ffn
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())
    x = torch.randn(B, T, LLAMA.d_model)
    torch.testing.assert_close(layer(x), layer.experts[0](x))


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


@pytest.mark.usefixtures("unchecked")
def test_a_keep_of_another_shape(model):
    tokens, keep = some_tokens(), keep_of("right")
    message = r"keep must be boolean and of shape \(3, 7\).* it is torch"
    for wrong in (keep[:, :6], keep[:2], keep.long()):
        with pytest.raises(ValueError, match=message):
            model(tokens, wrong)


def test_more_than_its_context():
    model = Llama(LLAMA)
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(25))
    caches = model.new_caches()
    model(some_tokens(20), caches=caches)
    with pytest.raises(ValueError, match="25 positions are needed, but the model has 24"):
        model(some_tokens(5), caches=caches)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("LLaMA", {"hidden_act": "gelu"}, "hidden_act to 'gelu'; this model supports 'silu'"),
        ("LLaMA", {"attention_bias": True}, "attention_bias to True"),
        ("LLaMA", {"mlp_bias": True}, "mlp_bias to True"),
        ("LLaMA", {"rope_parameters": {"rope_type": "yarn"}}, "scales the rotation .'yarn'"),
        (
            "LLaMA",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "scales the rotation .'linear'.",
        ),
        ("LLaMA", {"num_key_value_heads": "2"}, "n_kv_heads must be of type int, got '2'"),
        ("LLaMA", {"num_key_value_heads": 3}, "n_heads .4. must be a multiple of n_kv_heads .3."),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window to True"),
        ("Qwen3", {"attention_bias": True}, "attention_bias to True"),
        ("Mixtral", {"num_experts_per_tok": 4}, "4 of 3 experts cannot be active"),
        ("Mixtral", {"sliding_window": 5}, "sliding_window to 5"),
        ("Gemma", {"hidden_act": "silu"}, "hidden_act to 'silu'"),
        ("Falcon", {"alibi": True}, "alibi to True; this model supports False"),
        ("Falcon", {"parallel_attn": False}, "parallel_attn to False"),
        ("Falcon", {"bias": True}, "bias to True"),
        (
            "Falcon",
            {"new_decoder_architecture": False, "multi_query": False},
            "multi_query to False",
        ),
        ("BLOOM", {"apply_residual_connection_post_layernorm": True}, "post_layernorm to True"),
        ("BLOOM", {"n_layer": -1}, "n_layers must not be negative, got -1"),
    ],
)
def test_configs_that_are_another_model(name, change, message):
    family = FAMILIES[name]
    config = family.ours.config_to_hf(family.small) | change
    with pytest.raises(ValueError, match=message):
        family.ours(family.ours.config_from_hf(config))
