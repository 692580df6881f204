"""Shrinking: order leaves the function unchanged, and a sub-network is a slice that can be run."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from llm_anatomy import objectives
from llm_anatomy.models.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from llm_anatomy.models.distilbert import DistilBertForMaskedLM
from llm_anatomy.models.gpt1 import GPT1, GPT1Config
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.models.t5 import T5, T5Config
from llm_anatomy.peft.shrinking import (
    Importance,
    Size,
    Space,
    extract,
    full_size,
    magnitude,
    reorder,
    run,
    sensitivity,
)
from llm_anatomy.training import train
from tests import parity

B, T, V = 3, 6, 17
BERT = BertConfig(
    vocab_size=V,
    n_layers=3,
    n_heads=4,
    d_model=20,
    d_ff=14,
    n_positions=9,
    n_segments=1,
    attention_dropout=0.0,
    dropout=0.0,
    head_dropout=0.0,
)
GPT = GPT2Config(
    vocab_size=V,
    n_layers=3,
    n_heads=4,
    d_model=20,
    d_ff=14,
    n_positions=9,
    embedding_dropout=0.0,
    attention_dropout=0.0,
    dropout=0.0,
)
MODELS = {
    "bert": lambda: BertForMaskedLM(BERT),
    "classifier": lambda: BertForSequenceClassification(BERT),
    "distilbert": lambda: DistilBertForMaskedLM(BERT),
    "gpt2": lambda: GPT2(GPT),
    "gpt1": lambda: GPT1(
        GPT1Config(vocab_size=V, n_layers=3, n_heads=4, d_model=20, n_positions=9)
    ),
}
SIZES = [(3, 4, 14), (2, 4, 14), (3, 1, 14), (3, 4, 5), (1, 3, 9)]
sizes = pytest.mark.parametrize(
    "size", [Size(n_layers=layers, n_heads=heads, d_ff=width) for layers, heads, width in SIZES]
)


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> nn.Module:
    return parity.randomise(request.param())


def gpt2() -> GPT2:
    return parity.randomise(GPT2(GPT))


def tokens_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return (model.bert if hasattr(model, "bert") else model).blocks


def lm_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    inputs, targets = objectives.causal_lm(tokens)
    return objectives.cross_entropy(model(inputs), targets)


def with_zeros(model: nn.Module, size: Size) -> nn.Module:
    """The same network another way: nothing is cut, but what is outside the size says nothing."""
    zeroed = copy.deepcopy(model)
    blocks = blocks_of(zeroed)
    for block in blocks:
        rows = size.n_heads * block.attention.d_head
        block.attention.o_proj.weight.data[:, rows:] = 0
        block.ffn.down_proj.weight.data[:, size.d_ff :] = 0
    while len(blocks) > size.n_layers:
        del blocks[-1]
    return zeroed


# --- order ----------------------------------------------------------------------------------------


def test_order_changes_weights_and_not_the_function(model):
    tokens = tokens_of()
    want, before = model(tokens), copy.deepcopy(model.state_dict())
    full = full_size(model)
    importance = [Importance(torch.rand(4), torch.rand(full.d_ff)) for _ in range(3)]
    reorder(model, importance)
    torch.testing.assert_close(model(tokens), want)
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    kinds = {n.split("blocks.")[-1].split(".", 1)[-1] for n in moved}
    layers = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "ffn.up_proj")
    want_kinds = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert kinds == want_kinds | {"attention.o_proj.weight", "ffn.down_proj.weight"}


def test_the_most_important_come_first():
    model = gpt2()
    before = copy.deepcopy(model)
    heads, units = torch.tensor([0.2, 0.9, 0.1, 0.5]), torch.arange(14.0)
    reorder(model, [Importance(heads, units)] * 3)
    for block, old in zip(model.blocks, before.blocks, strict=True):
        k, old_k = block.attention.k_proj.weight, old.attention.k_proj.weight
        for now, then in enumerate((1, 3, 0, 2)):
            assert torch.equal(k[5 * now : 5 * now + 5], old_k[5 * then : 5 * then + 5])
        assert torch.equal(block.ffn.up_proj.bias, old.ffn.up_proj.bias.flip(0))


def test_magnitude_is_the_l1_norm_of_the_way_out():
    model = gpt2()
    found = magnitude(model)
    reorder(model, found)
    for block, importance in zip(model.blocks, magnitude(model), strict=True):
        weight = block.attention.o_proj.weight
        by_hand = [weight[:, 5 * h : 5 * h + 5].abs().sum() for h in range(4)]
        torch.testing.assert_close(importance.heads, torch.stack(by_hand))
        torch.testing.assert_close(importance.units, block.ffn.down_proj.weight.abs().sum(dim=0))
        assert (importance.heads.diff() <= 0).all() and (importance.units.diff() <= 0).all()


def test_sensitivity_is_the_derivative_by_a_gate():
    """Gates of 1 on every head and unit, put in by hooks, and torch's own gradient by them."""
    model = gpt2()
    batches = [tokens_of(1), tokens_of(2)]
    found = sensitivity(model, lm_loss, batches)
    assert all(p.grad is None for p in model.parameters())
    heads, units = torch.ones(3, 4, requires_grad=True), torch.ones(3, 14, requires_grad=True)
    for i, block in enumerate(model.blocks):
        block.attention.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: (args[0] * heads[i].repeat_interleave(5),)
        )
        block.ffn.down_proj.register_forward_pre_hook(lambda _, args, i=i: (args[0] * units[i],))
    want = [torch.autograd.grad(lm_loss(model, b), (heads, units)) for b in batches]
    for i, importance in enumerate(found):
        for got, gates in ((importance.heads, 0), (importance.units, 1)):
            expected = torch.stack([w[gates][i].abs() for w in want]).mean(dim=0)
            torch.testing.assert_close(got, expected)


def test_a_silent_unit_comes_last():
    model = gpt2()
    for block in model.blocks:
        block.ffn.down_proj.weight.data[:, 3] = 0
        block.attention.o_proj.weight.data[:, :5] = 0
    for found in (magnitude(model), sensitivity(model, lm_loss, [tokens_of()])):
        for importance in found:
            assert importance.units.argmin() == 3 and importance.heads.argmin() == 0


# --- sub-networks ---------------------------------------------------------------------------------


@sizes
def test_a_sub_network_is_the_whole_with_the_rest_silent(model, size):
    size = dataclasses.replace(size, d_ff=min(size.d_ff, full_size(model).d_ff))
    tokens = tokens_of()
    got = run(model, size, tokens)
    torch.testing.assert_close(got, with_zeros(model, size)(tokens))
    assert len(blocks_of(model)) == 3


@sizes
def test_what_is_extracted_computes_what_was_run(model, size):
    before = copy.deepcopy(model.state_dict())
    small = extract(model, size)
    tokens = tokens_of()
    torch.testing.assert_close(small(tokens), run(model, size, tokens))
    assert full_size(small) == size
    parity.check_same(model.state_dict(), before)
    ours = {p.data_ptr() for p in small.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}


def test_the_whole_is_a_size_too(model):
    tokens = tokens_of()
    assert torch.equal(run(model, full_size(model), tokens), model(tokens))
    parity.check_same(extract(model, full_size(model)).state_dict(), model.state_dict())


def test_gradients_reach_the_slices_and_nothing_else():
    model = gpt2()
    run(model, Size(n_layers=2, n_heads=3, d_ff=5), tokens_of()).square().mean().backward()
    for block in model.blocks[:2]:
        assert block.attention.q_proj.weight.grad[:15].any(dim=1).all()
        assert not block.attention.q_proj.weight.grad[15:].any()
        assert not block.attention.o_proj.weight.grad[:, 15:].any()
        assert block.ffn.down_proj.weight.grad[:, :5].any(dim=0).all()
        assert not block.ffn.down_proj.weight.grad[:, 5:].any()
    assert all(p.grad is None for p in model.blocks[2].parameters())


def test_a_failed_run_leaves_the_model_whole():
    model = gpt2()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="token ids must lie between"):
        run(model, Size(n_layers=1, n_heads=1, d_ff=1), torch.full((1, 2), V))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_shallow_narrow_model_can_be_saved_and_one_with_fewer_heads_says_no(tmp_path):
    model = gpt2()
    small = extract(model, Size(n_layers=2, n_heads=4, d_ff=5))
    assert small.config == dataclasses.replace(GPT, n_layers=2, d_ff=5)
    small.save_pretrained(tmp_path)
    parity.check_same(GPT2.from_pretrained(tmp_path).state_dict(), small.state_dict())
    fewer = extract(model, Size(n_layers=2, n_heads=2, d_ff=5))
    assert fewer.config.n_heads == 2 and fewer.blocks[0].attention.d_head == 5
    fewer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fit"):
        GPT2.from_pretrained(tmp_path)


def test_the_extracted_generates_with_a_cache():
    small = extract(gpt2(), Size(n_layers=2, n_heads=3, d_ff=5))
    tokens, caches = tokens_of(), small.new_caches()
    steps = [small(tokens[:, t : t + 1], caches=caches) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, dim=1), small(tokens))


# --- the space of sizes ---------------------------------------------------------------------------


def test_stages_grow_from_the_whole_to_depth_to_width():
    space = Space((2, 4), (1, 3), (8, 16))
    whole, deep, wide = space.stages()
    assert list(whole) == [Size(n_layers=4, n_heads=3, d_ff=16)]
    assert [s.n_layers for s in deep] == [2, 4]
    assert {(s.n_heads, s.d_ff) for s in deep} == {(3, 16)}
    assert len(list(wide)) == 8 and set(whole) < set(deep) < set(wide)
    draws = torch.Generator().manual_seed(0)
    assert {space.sample(draws) for _ in range(100)} == set(space)


@pytest.mark.parametrize("bad", [(), (2, 2), (0, 1)])
def test_a_space_that_makes_no_sense(bad):
    with pytest.raises(ValueError, match="n_heads must hold different numbers of at least 1"):
        Space((1,), bad, (2,))


def test_sub_networks_learn_from_the_whole():
    """One step of each stage in small: sizes that were never trained alone come to predict well."""
    model = gpt2()
    tokens = torch.arange(T + 1).repeat(B, 1) + torch.arange(B)[:, None]
    inputs, _ = objectives.causal_lm(tokens)
    full = full_size(model)
    space = Space((2, 3), (2, 4), (7, 14))
    train(model, lm_loss, lambda _: tokens, 60, lambda _: 1e-2)
    teacher = copy.deepcopy(model)
    small = Size(n_layers=2, n_heads=2, d_ff=7)

    def gap() -> float:
        with torch.no_grad():
            return objectives.soft_targets(run(model, small, inputs), teacher(inputs)).item()

    before = gap()
    for number, stage in enumerate(space.stages()[1:]):
        draws = torch.Generator().manual_seed(number)

        def loss_of(model, size):
            with torch.no_grad():
                logits = teacher(inputs)
            whole = objectives.soft_targets(run(model, full, inputs), logits)
            return whole + objectives.soft_targets(run(model, size, inputs), logits)

        picked = [stage.sample(draws) for _ in range(60)]
        train(model, loss_of, lambda step, p=picked: p[step - 1], 60, lambda _: 3e-3)
    assert gap() < 0.2 * before


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 4}, "n_layers must lie between 1 and 3, got 4"),
        ({"n_layers": 0}, "n_layers must lie between 1 and 3, got 0"),
        ({"n_heads": 5}, "n_heads must lie between 1 and 4, got 5"),
        ({"d_ff": 15}, "d_ff must lie between 1 and 14, got 15"),
    ],
)
def test_a_size_that_the_model_has_not(change, message):
    model = gpt2()
    size = dataclasses.replace(full_size(model), **change)
    for act in (lambda: run(model, size, tokens_of()), lambda: extract(model, size)):
        with pytest.raises(ValueError, match=message):
            act()


def test_models_that_cannot_be_cut():
    with pytest.raises(ValueError, match="one list of blocks called 'blocks', found 0"):
        full_size(nn.Linear(2, 2))
    t5 = T5(T5Config(vocab_size=V, n_encoder_layers=1, n_decoder_layers=1, n_heads=2, d_model=8))
    with pytest.raises(ValueError, match="block"):
        full_size(t5)
    model = gpt2()
    model.blocks[1] = nn.Linear(20, 20)
    with pytest.raises(ValueError, match="block 1 needs a MultiHeadAttention called 'attention'"):
        full_size(model)
    model = gpt2()
    model.blocks[1].ffn.up_proj = nn.Sequential(model.blocks[1].ffn.up_proj)
    with pytest.raises(ValueError, match="block 1 has Sequential where a plain Linear"):
        full_size(model)
    model = gpt2()
    model.blocks[2].attention.n_groups = 2
    with pytest.raises(ValueError, match="block 2 shares keys among heads"):
        full_size(model)
    model = gpt2()
    model.blocks[0] = extract(model, Size(n_layers=1, n_heads=2, d_ff=3)).blocks[0]
    with pytest.raises(ValueError, match=r"differ in heads and width: \[\(2, 3\), \(4, 14\)\]"):
        full_size(model)


def test_importance_that_does_not_fit_and_batches_that_are_none():
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected heads and units of the shapes"):
        reorder(model, [Importance(torch.rand(4), torch.rand(14))] * 2)
    with pytest.raises(ValueError, match="expected heads and units of the shapes"):
        reorder(model, [Importance(torch.rand(3), torch.rand(14))] * 3)
    parity.check_same(model.state_dict(), before)
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(model, lm_loss, [])
    with pytest.raises(ValueError, match="the model is frozen"):
        sensitivity(model.requires_grad_(False), lm_loss, [tokens_of()])
