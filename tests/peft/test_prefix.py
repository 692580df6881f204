"""A prefix is a cache that is never empty: equal to that of the peft library, here and there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration
from transformers import T5Config as TheirT5Config

from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.models.bart import Bart, BartConfig
from llm_anatomy.models.bert import BertForSequenceClassification
from llm_anatomy.models.bloom import Bloom, BloomConfig
from llm_anatomy.models.falcon import Falcon, FalconConfig
from llm_anatomy.models.gemma import Gemma
from llm_anatomy.models.gpt2 import GPT2
from llm_anatomy.models.llama import Llama, LlamaConfig
from llm_anatomy.models.mixtral import Mixtral, MixtralConfig
from llm_anatomy.models.qwen import Qwen2, Qwen3
from llm_anatomy.models.t5 import T5
from llm_anatomy.models.transformer import Transformer, TransformerConfig
from llm_anatomy.peft import prefix
from llm_anatomy.peft.prefix import Prefix, PrefixConfig, PrefixedCache
from llm_anatomy.peft.targets import trainable
from tests.parity import randomise, twin
from tests.peft.test_soft_prompt import (
    THEIRS,
    B,
    D,
    P,
    T,
    V,
    batch,
    bert,
    call_ours,
    call_theirs,
    gpt2,
)
from tests.peft.twins import refused


def t5(n_layers: int = 2) -> nn.Module:
    config = TheirT5Config(
        vocab_size=V,
        d_model=D,
        d_kv=4,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=n_layers,
        d_ff=17,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return randomise(T5ForConditionalGeneration(config))


def cache_of_two() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


BUILD = {"CAUSAL_LM": gpt2, "SEQ_CLS": bert, "SEQ_2_SEQ_LM": t5}
NEW_CACHE = {"CAUSAL_LM": DynamicCache, "SEQ_CLS": DynamicCache, "SEQ_2_SEQ_LM": cache_of_two}


def decoder_alone(n_layers: int = 2) -> dict:
    """As peft: in an encoder-decoder, only the decoder's attention to itself has a prefix."""
    names = tuple(f"decoder.{i}.attention" for i in range(n_layers))
    return {"targets": names, "positions": ("decoder_bias",)}


def peft_of(task: str, d_hidden: int | None, **kwargs: int) -> PeftModel:
    config = PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=P,
        prefix_projection=d_hidden is not None,
        encoder_hidden_size=d_hidden or D,
    )
    model = get_peft_model(BUILD[task](**kwargs), config)
    for p in model.prompt_encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def put_on(task: str, on: str, d_hidden: int | None = None) -> tuple[nn.Module, Prefix]:
    places = decoder_alone() if (task, on) == ("SEQ_2_SEQ_LM", "ours") else {}
    config = PrefixConfig(n_tokens=P, d_hidden=d_hidden, **places)
    model = BUILD[task]()
    if on == "ours":
        model = twin(model, THEIRS[task][1])
        return model, prefix.add(model, config)
    return model, prefix.add(model, config, new_cache=NEW_CACHE[task])


def dealt(task: str, flat: Tensor, n_layers: int = 2) -> Tensor:
    """The keys and values that peft gives to the layers, from those that it stores."""
    if task != "SEQ_2_SEQ_LM":
        return flat
    rows = flat.unflatten(1, (2 * n_layers, -1))
    twice = torch.cat((rows, rows), dim=1)
    return torch.cat([twice[:, 4 * i : 4 * i + 2] for i in range(n_layers)], dim=1).flatten(1)


@pytest.mark.parametrize("d_hidden", [None, 9])
@pytest.mark.parametrize("task", THEIRS)
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_outputs_and_gradients_equal_those_of_peft(task, on, d_hidden):
    theirs = peft_of(task, d_hidden)
    ours, own = put_on(task, on, d_hidden)
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        if d_hidden is None:
            own.embedding.copy_(dealt(task, encoder.embedding.weight))
        else:
            own.embedding.copy_(encoder.embedding.weight)
            own.network.load_state_dict(encoder.transform.state_dict())
            for t in (own.network[2].weight, own.network[2].bias):
                t.copy_(dealt(task, t.reshape(1, len(t), -1).flatten(2)[0].T).T.reshape(t.shape))
    tokens, keep = batch()
    call = call_ours if on == "ours" else call_theirs
    got, loss = call(task, ours)(tokens, keep)
    want, their_loss = call_theirs(task, theirs)(tokens, keep)
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    torch.testing.assert_close(got[read], want[read])
    torch.testing.assert_close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    if d_hidden is not None:
        torch.testing.assert_close(own.embedding.grad, encoder.embedding.weight.grad)
        first, theirs_first = own.network[0], encoder.transform[0]
        torch.testing.assert_close(first.weight.grad, theirs_first.weight.grad)
    elif task != "SEQ_2_SEQ_LM":  # there peft's layers share what ours have apart
        torch.testing.assert_close(own.embedding.grad, encoder.embedding.weight.grad)
    assert {n.partition(".")[0] for n in trainable(ours)} == {"prefix"}
    assert all(p.grad is None for n, p in ours.named_parameters() if not n.startswith("prefix"))


def test_prefix_is_a_cache_that_is_never_empty():
    """With the keys and values of real tokens it computes what those tokens would."""
    model = twin(gpt2(), GPT2)
    before, tokens = torch.randint(V, (1, P)), torch.randint(V, (B, T))
    caches = model.new_caches()
    with torch.no_grad():
        model(before, caches=caches)
        want = model(torch.cat((before.expand(B, -1), tokens), dim=1))[:, P:]
        kv = torch.stack([torch.stack((c.k[0], c.v[0])) for c in caches])  # (L, 2, G, P, E)
        own = prefix.add(model, PrefixConfig(n_tokens=P))
        own.embedding.copy_(kv.permute(3, 0, 1, 2, 4).flatten(1))
        torch.testing.assert_close(own(), kv)
        torch.testing.assert_close(model(tokens), want)


def test_encoder_looks_at_the_prefix_from_every_position():
    model = twin(bert(), BertForSequenceClassification)
    own = prefix.add(model, PrefixConfig(n_tokens=P))
    tokens, keep = batch()
    x = model.bert.embed(tokens)
    base = model.bert.hidden(x, keep)
    with torch.no_grad():
        own.embedding.add_(1.0)
    assert ((model.bert.hidden(x, keep) - base).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("positions", [None, ()])
def test_text_is_counted_after_the_prefix_unless_told_otherwise(positions):
    model = twin(gpt2(), GPT2)
    tokens = torch.randint(V, (B, T))
    table = model.position_embedding.weight
    plain = model.token_embedding(tokens)
    prefix.add(model, PrefixConfig(n_tokens=P, positions=positions))
    first = P if positions is None else 0
    torch.testing.assert_close(model.embed(tokens), plain + table[first : first + T])


@pytest.mark.parametrize("pieces", [(7,), (1, 1, 5), (3, 4)])
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("d_hidden", [None, 5])
def test_with_caches_of_the_text_it_is_the_same(pieces, capacity, d_hidden):
    model = twin(gpt2(), GPT2)
    prefix.add(model, PrefixConfig(n_tokens=P, d_hidden=d_hidden))
    tokens, keep = batch()
    with torch.no_grad():
        want = model(tokens, keep)
        caches, at, got = model.new_caches(capacity), 0, []
        for n in pieces:
            got.append(model(tokens[:, at : at + n], keep[:, : at + n], caches=caches))
            at += n
    torch.testing.assert_close(torch.cat(got, dim=1)[keep], want[keep])
    assert len(caches[0]) == T


def test_both_sides_of_an_encoder_decoder_and_its_caches():
    model = twin(t5(), T5)
    own = prefix.add(model, PrefixConfig(n_tokens=P))
    assert own.n_layers == 4
    tokens, keep = batch()
    target = torch.randint(V, (B, 5))
    with torch.no_grad():
        want = model(tokens, target, keep)
        memory, caches = model.encode(tokens, keep), model.new_caches()
        steps = [model.decode(target[:, [i]], memory, keep, caches) for i in range(5)]
        torch.testing.assert_close(torch.cat(steps, dim=1), want)
        for layer in range(4):
            kept = own.embedding.clone()
            own.embedding.view(P, 4, -1)[:, layer] += 1.0
            assert not torch.allclose(model(tokens, target, keep), want)
            own.embedding.copy_(kept)


def test_cross_attention_can_have_one_too():
    model = randomise(
        Bart(
            BartConfig(
                vocab_size=V,
                n_encoder_layers=1,
                n_decoder_layers=2,
                n_heads=3,
                d_model=D,
                d_ff=17,
                n_positions=20,
                pad_id=1,
            )
        )
    )
    tokens, keep = batch()
    target = torch.randint(2, V, (B, 5))
    plain = model(tokens, target, keep)
    prefix.add(model, PrefixConfig(n_tokens=P, targets=("cross_attention",), positions=()))
    with torch.no_grad():
        want = model(tokens, target, keep)
        memory, caches = model.encode(tokens, keep), model.new_caches()
        steps = [model.decode(target[:, [i]], memory, keep, caches) for i in range(5)]
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(torch.cat(steps, dim=1), want)


def test_a_mask_widens_and_a_bias_with_it():
    attention = MultiHeadAttention(D, 3).eval()
    holder = nn.ModuleDict({"attention": attention})
    own = prefix.add(holder, PrefixConfig(n_tokens=P, positions=()))
    x, mask = torch.randn(B, T, D), torch.rand(B, 1, T, T) > 0.4
    bias = torch.randn(1, 3, T, T)
    got = attention(x, mask=mask, bias=bias)
    k, v = own()[0]
    plain = MultiHeadAttention(D, 3).eval()
    plain.load_state_dict(attention.state_dict())
    cache = KVCache()
    cache.append(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1))
    wide = F.pad(mask, (P, 0), value=True), F.pad(bias, (P, 0))
    torch.testing.assert_close(got, plain(x, mask=wide[0], bias=wide[1], cache=cache))


def test_prefixed_cache_returns_the_prefix_first_and_holds_the_text_alone():
    k, v = torch.randn(B, 3, P, 4), torch.randn(B, 3, P, 4)
    text, rest = torch.randn(B, 3, T, 4), KVCache(T)
    cache = PrefixedCache(k, v, rest)
    all_k, all_v = cache.append(text, -text)
    assert torch.equal(all_k, torch.cat((k, text), dim=2))
    assert torch.equal(all_v, torch.cat((v, -text), dim=2))
    assert all(map(torch.equal, cache.held(), (all_k, all_v)))
    assert all(map(torch.equal, PrefixedCache(k, v, KVCache()).held(), (k, v)))
    assert len(rest) == T


def test_generation_in_transformers_equals_that_of_ours():
    theirs, own = put_on("CAUSAL_LM", "theirs")
    ours, other = put_on("CAUSAL_LM", "ours")
    with torch.no_grad():
        other.embedding.copy_(own.embedding)
    tokens = torch.randint(1, V, (2, 5))
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **asked)
    for _ in range(6):
        best = ours(tokens)[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize("task", THEIRS)
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_removed_it_leaves_no_trace(task, on):
    build, ours_class, _ = THEIRS[task]
    model = twin(build(), ours_class) if on == "ours" else build()
    frozen = next(model.parameters()).requires_grad_(False)
    tokens, keep = batch()
    call = call_ours(task, model) if on == "ours" else call_theirs(task, model)
    before, tree = call(tokens, keep)[0], str(model)
    state = copy.deepcopy(model.state_dict())
    new_cache = None if on == "ours" else NEW_CACHE[task]
    prefix.add(model, PrefixConfig(n_tokens=P), new_cache=new_cache)
    with_it = call(tokens, keep)[0]
    assert with_it.shape == before.shape and not torch.allclose(with_it, before)
    prefix.remove(model)
    assert torch.equal(call(tokens, keep)[0], before)
    assert str(model) == tree
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    with pytest.raises(ValueError, match="does not carry a prefix"):
        prefix.remove(model)


def test_a_copy_has_a_prefix_of_its_own():
    model = twin(gpt2(), GPT2)
    prefix.add(model, PrefixConfig(n_tokens=P))
    tokens = torch.randint(V, (B, T))
    other, before = copy.deepcopy(model), model(tokens)
    with torch.no_grad():
        other.prefix.embedding.add_(1.0)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(other(tokens), before)


def test_the_network_can_be_dropped():
    model = twin(gpt2(), GPT2)
    own = prefix.add(model, PrefixConfig(n_tokens=P, d_hidden=5))
    tokens = torch.randint(V, (B, T))
    before, made = model(tokens), own()
    assert sum(trainable(model).values()) == P * D + D * 5 + 5 + 5 * 4 * D + 4 * D
    prefix.drop_network(model)
    assert torch.equal(own(), made)
    assert torch.equal(model(tokens), before)
    assert trainable(model) == {"prefix.embedding": P * 4 * D}
    with pytest.raises(ValueError, match="no network to drop"):
        prefix.drop_network(model)


@pytest.mark.parametrize("d_hidden", [None, 9])
@pytest.mark.parametrize("task", THEIRS)
def test_files_of_peft_load_here(task, d_hidden, tmp_path):
    theirs = peft_of(task, d_hidden)
    if task == "SEQ_CLS":
        nn.init.normal_(theirs.base_model.classifier.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    tokens, keep = batch()
    want = call_theirs(task, theirs)(tokens, keep)[0]
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    model = BUILD[task]()
    prefix.load(model, tmp_path, new_cache=NEW_CACHE[task])
    torch.testing.assert_close(call_theirs(task, model)(tokens, keep)[0][read], want[read])
    model = twin(BUILD[task](), THEIRS[task][1])
    prefix.load(model, tmp_path, **(decoder_alone() if task == "SEQ_2_SEQ_LM" else {}))
    torch.testing.assert_close(call_ours(task, model)(tokens, keep)[0][read], want[read])


@pytest.mark.parametrize("d_hidden", [None, 9])
@pytest.mark.parametrize("task", THEIRS)
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_files_of_ours_load_in_peft(task, on, d_hidden, tmp_path):
    def build() -> nn.Module:
        return t5(3) if task == "SEQ_2_SEQ_LM" else BUILD[task]()

    places = decoder_alone(3) if (task, on) == ("SEQ_2_SEQ_LM", "ours") else {}
    head = ("classifier",) if task == "SEQ_CLS" else ()
    config = PrefixConfig(n_tokens=P, d_hidden=d_hidden, also_train=head, **places)
    model = twin(build(), THEIRS[task][1]) if on == "ours" else build()
    prefix.add(model, config, new_cache=None if on == "ours" else NEW_CACHE[task])
    if head:
        nn.init.normal_(model.classifier.weight)
    tokens, keep = batch()
    call = call_ours if on == "ours" else call_theirs
    want = call(task, model)(tokens, keep)[0]
    prefix.save(model, tmp_path, task)
    theirs = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    got = call_theirs(task, theirs)(tokens, keep)[0]
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    torch.testing.assert_close(got[read], want[read])


def test_what_peft_cannot_hold_is_not_written(tmp_path):
    for places in ({}, decoder_alone()):
        model = twin(t5(), T5)
        prefix.add(model, PrefixConfig(n_tokens=P, **places))
        with pytest.raises(ValueError, match="only if that has an odd number of layers"):
            prefix.save(model, tmp_path, "SEQ_2_SEQ_LM")
    assert not list(tmp_path.iterdir())


def test_a_prefix_for_another_base_is_refused(tmp_path):
    model = twin(gpt2(), GPT2)
    prefix.add(model, PrefixConfig(n_tokens=P))
    prefix.save(model, tmp_path, "CAUSAL_LM")
    other = twin(gpt2(), GPT2)
    nn.init.normal_(other.token_embedding.weight)
    with pytest.raises(ValueError, match="made for another base"):
        prefix.load(other, tmp_path)
    deeper = twin(gpt2(), GPT2)
    deeper.blocks.append(copy.deepcopy(deeper.blocks[0]))
    with pytest.raises(ValueError, match=r"shape \(4, 72\) in 3 heads, .* \(4, 48\) in 3"):
        prefix.load(deeper, tmp_path)
    for base in (other, deeper):
        assert all(p.requires_grad for p in base.parameters())
        assert not hasattr(base, "prefix")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: prefix.add(m, PrefixConfig(targets=("attn",))), "no module is called attn"),
        (lambda m: prefix.add(m, PrefixConfig(targets=("ffn",))), "not an attention layer"),
        (lambda m: prefix.add(m, PrefixConfig(positions=("norm",))), "counts no positions"),
        (lambda m: prefix.add(m, PrefixConfig(also_train=("head",))), "no module is called head"),
        (lambda m: prefix.add(m, PrefixConfig(), new_cache=DynamicCache), "no past_key_values"),
        (lambda m: prefix.save(m, "/nowhere"), "does not carry a prefix"),
        (lambda m: prefix.drop_network(m), "does not carry a prefix"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_base_unharmed(spoil, message):
    model = twin(gpt2(), GPT2)
    tree = str(model)
    with pytest.raises(ValueError, match=message):
        spoil(model)
    assert str(model) == tree
    assert all(p.requires_grad for p in model.parameters())


def test_twice_and_beside_another_method_is_refused():
    model = twin(gpt2(), GPT2)
    prefix.add(model, PrefixConfig(n_tokens=P))
    with pytest.raises(ValueError, match="carries a prefix already"):
        prefix.add(model, PrefixConfig(n_tokens=P))


SIZES = {"vocab_size": V, "n_layers": 2, "n_heads": 3, "d_model": D, "n_positions": 24}
LLAMA = LlamaConfig(**SIZES, n_kv_heads=3, d_head=4, d_ff=17, tied=True)
NO_PLACE = {
    "LLaMA": (Llama, LLAMA, "rotary"),
    "Gemma": (Gemma, LLAMA, "rotary"),
    "Qwen2": (Qwen2, LLAMA, "rotary"),
    "Qwen3": (Qwen3, LLAMA, "rotary"),
    "Mixtral": (Mixtral, MixtralConfig(**vars(LLAMA)), "rotary"),
    "Falcon": (Falcon, FalconConfig(**SIZES, n_kv_heads=1, d_ff=17), "rotary"),
    "BLOOM": (
        Bloom,
        BloomConfig(**{n: v for n, v in SIZES.items() if n != "n_positions"}),
        "no module counts positions",
    ),
    "Transformer": (
        Transformer,
        TransformerConfig(
            vocab_size=V,
            n_encoder_layers=1,
            n_decoder_layers=1,
            n_heads=3,
            d_model=D,
            d_ff=17,
            n_positions=24,
        ),
        "no module counts positions",
    ),
}


@pytest.mark.parametrize(("kind", "config", "message"), NO_PLACE.values(), ids=NO_PLACE)
def test_models_whose_positions_are_computed_are_refused(kind, config, message, tmp_path):
    """They count the text from 0, and nothing tells them that a prefix stands before it."""
    model = kind(config)
    written = twin(gpt2(), GPT2)
    prefix.add(written, PrefixConfig(n_tokens=P))
    prefix.save(written, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as by peft, without a word on the base
    assert message in refused(model, lambda m: prefix.add(m, PrefixConfig(n_tokens=P)))
    assert message in refused(model, lambda m: prefix.load(m, tmp_path))


def test_attention_that_turns_is_refused_when_it_is_called():
    holder = nn.ModuleDict({"attention": MultiHeadAttention(D, 3)})
    prefix.add(holder, PrefixConfig(n_tokens=P, positions=()))
    with pytest.raises(ValueError, match="rotary positions is not supported"):
        holder["attention"](torch.randn(B, T, D), rotate=lambda x: x)


def test_nothing_of_the_base_is_overwritten():
    model = twin(gpt2(), GPT2)
    model.prefix = nn.Linear(2, 2)
    assert "prefix of its own" in refused(model, lambda m: prefix.add(m, PrefixConfig()))


def test_with_a_trained_table_it_is_saved_and_loaded(tmp_path):
    """The base is told by a matrix that does not train."""
    model = twin(bert(), BertForSequenceClassification)
    prefix.add(model, PrefixConfig(n_tokens=P, also_train=("token_embedding",)))
    nn.init.normal_(model.bert.token_embedding.weight)
    tokens, keep = batch()
    prefix.save(model, tmp_path)
    other = twin(bert(), BertForSequenceClassification)
    prefix.load(other, tmp_path)
    torch.testing.assert_close(other(tokens, keep=keep), model(tokens, keep=keep))
    third = twin(bert(), BertForSequenceClassification)
    nn.init.normal_(third.bert.segment_embedding.weight)
    nn.init.normal_(third.bert.position_embedding.weight)
    assert "another base" in refused(third, lambda m: prefix.load(m, tmp_path))


def test_a_text_that_is_too_long_with_the_prefix_is_refused():
    model = twin(gpt2(), GPT2)
    prefix.add(model, PrefixConfig(n_tokens=P))
    tokens = torch.randint(V, (1, 21))
    with pytest.raises(ValueError, match="take 25 positions, but the model has 24"):
        model(tokens)
    assert model(tokens[:, :20]).shape == (1, 20, V)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixConfig(n_tokens=0), "n_tokens must be a whole number"),
        (lambda: PrefixConfig(d_hidden=0), "d_hidden must be a whole number"),
        (lambda: PrefixConfig(targets=()), "at least one name"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
