"""Bottleneck adapters: peft has none, so the formula by hand, and what must hold."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_anatomy.peft import adapter, targets
from llm_anatomy.peft.adapter import HOULSBY, PFEIFFER, Adapter, AdapterConfig
from tests.peft import twins

WIDTH = 5


def with_adapters(kind: str = "bert", **fields):
    model = twins.ours(kind)
    adapter.add(model, AdapterConfig(width=WIDTH, **fields))
    twins.draw(model)
    return model


def by_hand(layer: Adapter, h: torch.Tensor) -> torch.Tensor:
    """One position after the other: down, nonlinearity, up, and the sum."""
    out = torch.empty_like(h)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            low = layer.down.weight @ h[b, t] + layer.down.bias
            out[b, t] = h[b, t] + layer.up.weight @ F.gelu(low) + layer.up.bias
    return out


@torch.no_grad()
def test_a_block_of_bert_by_hand():
    """Each adapter reads what its layer puts out, before the residual sum and the norm."""
    model = with_adapters()
    block = model.bert.blocks[0]
    o, down = block.attention.o_proj, block.ffn.down_proj
    x = torch.randn(2, 3, twins.D)
    attended = {}
    o.base.register_forward_hook(lambda _, __, y: attended.update(y=y))
    got = block(x)
    y = block.attention_norm(x + by_hand(o, attended["y"]))
    wide = F.gelu(block.ffn.up_proj(y))
    want = block.ffn_norm(y + by_hand(down, down.base(wide)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("places", "n"), [(HOULSBY, 2), (PFEIFFER, 1)])
@pytest.mark.parametrize(("kind", "blocks", "more"), [("bert", 2, 0), ("gpt2", 2, 0), ("t5", 4, 2)])
def test_how_many_parameters(kind, blocks, more, places, n):
    """Two or one a block; a decoder with cross-attention has one more after that, in Houlsby's."""
    model = with_adapters(kind, targets=places)
    each = WIDTH * twins.D + WIDTH + twins.D * WIDTH + twins.D
    n_adapters = n * blocks + (more if places == HOULSBY else 0)
    assert sum(targets.trainable(model).values()) == n_adapters * each


@pytest.mark.parametrize("kind", sorted(twins.OURS))
def test_starts_near_the_base_and_gives_it_back(kind):
    model = twins.ours(kind)
    before, base = twins.picture(model), twins.run(model, kind)
    adapter.add(model, AdapterConfig(width=WIDTH))
    start = twins.run(model, kind)
    torch.testing.assert_close(start, base, atol=0.01, rtol=0.01)
    assert not torch.equal(start, base)
    assert all(g.any() for g in twins.gradients(model, kind).values())
    twins.draw(model)
    assert (twins.run(model, kind) - base).abs().max() > 0.1
    adapter.remove(model)
    assert twins.same(twins.picture(model), before)


def test_first_weights_are_cut_at_two_standard_deviations():
    torch.manual_seed(0)
    layer = Adapter(nn.Linear(4, 300), AdapterConfig(width=200, std=0.02))
    for part in (layer.down, layer.up):
        assert part.weight.abs().max() <= 0.04
        # a normal distribution cut at two standard deviations has 0.8796 of its spread
        torch.testing.assert_close(part.weight.std().item(), 0.02 * 0.8796, rtol=0.02, atol=0.0)
        assert not part.bias.any()


def test_on_models_of_transformers():
    for kind, names in (("gpt2", ("c_proj",)), ("bert", ("output.dense",)), ("t5", ("o", "wo"))):
        model = twins.theirs(kind)
        before, base = twins.picture(model), twins.run(model, kind)
        adapter.add(model, AdapterConfig(width=WIDTH, targets=names))
        torch.testing.assert_close(twins.run(model, kind), base, atol=0.02, rtol=0.02)
        assert all(g.any() for g in twins.gradients(model, kind).values())
        adapter.remove(model)
        assert twins.same(twins.picture(model), before)


def test_norms_and_a_head_may_train_besides():
    """As Houlsby et al. have it."""
    model = with_adapters(also_train=("attention_norm", "ffn_norm", "classifier"))
    names = set(targets.trainable(model))
    assert {"bert.blocks.1.ffn_norm.bias", "classifier.weight"} <= names
    assert not any("embedding" in name or "base" in name for name in names)


def test_tasks_take_turns():
    model = with_adapters()
    first, want = targets.state(model), twins.run(model, "bert")
    twins.draw(model, seed=2)
    assert not torch.allclose(twins.run(model, "bert"), want)
    targets.load_state(model, first)
    assert torch.equal(twins.run(model, "bert"), want)


def test_in_the_precision_of_the_base():
    model = twins.ours("bert", torch.float64)
    adapter.add(model, AdapterConfig(width=WIDTH))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(width=WIDTH, targets=("dense_out",)), "no module is called dense_out"),
        (AdapterConfig(width=WIDTH, targets=("ffn",)), "ffn is a FeedForward"),
        (AdapterConfig(width=13), "a bottleneck of 13 is above the width"),
        (AdapterConfig(width=WIDTH, also_train=("head",)), "no module is called head"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    assert message in twins.refused(twins.ours("bert"), lambda model: adapter.add(model, config))


@pytest.mark.parametrize(
    "fields", [{"width": 0}, {"std": 0.0}, {"targets": "o_proj"}, {"activation": "gelu"}]
)
def test_fields_out_of_range_are_refused(fields, unchecked):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must"):
        AdapterConfig(**fields)


def test_nothing_is_done_twice():
    model = with_adapters()
    config = AdapterConfig(width=WIDTH)
    assert "carries adapters already" in twins.refused(model, lambda m: adapter.add(m, config))
    adapter.remove(model)
    assert "does not carry adapters" in twins.refused(model, adapter.remove)
