"""(IA)3 against the peft library, and what must hold without it."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llm_anatomy.peft import ia3, targets
from llm_anatomy.peft.ia3 import IA3Config
from tests import parity
from tests.peft import twins

# In transformers' names: what is rescaled as it comes out, and as it goes in.
CHOICES = {
    "gpt2": [(("c_attn",), ("mlp.c_proj",)), (("c_fc",), ("attn.c_proj",))],
    "bert": [(("key", "value"), ("layer.0.output.dense",)), (("query",), ("pooler.dense",))],
    "t5": [(("k", "v"), ("wo",)), (("wi",), ("o",))],
}
OUR_CHOICES = {
    "bert": ((("key", "value"), ("intermediate.dense",)), (("k_proj", "v_proj"), ("up_proj",))),
    "t5": ((("k", "v"), ("wo",)), (("k_proj", "v_proj"), ("down_proj",))),
    "gpt2": ((("c_fc",), ("mlp.c_proj",)), (("up_proj",), ("down_proj",))),
}
cases = st.sampled_from([(kind, *names) for kind in CHOICES for names in CHOICES[kind]])


def theirs_of(outputs, inputs) -> peft.IA3Config:
    return peft.IA3Config(
        target_modules=[*outputs, *inputs], feedforward_modules=[*inputs], task_type=None
    )


def pair(kind, outputs, inputs, dtype=torch.float32):
    """Two copies of one model of transformers, one under peft and one under ours, equal factors."""
    got = twins.theirs(kind, dtype)
    want = twins.with_peft(got, theirs_of(outputs, inputs))
    ia3.add(got, IA3Config(targets=outputs, inputs=inputs))
    twins.draw(got)
    parameters = dict(want.named_parameters())
    with torch.no_grad():
        for name, layer in ia3.layers.wrapped(got).items():
            p = parameters[f"base_model.model.{name}.ia3_l.default"]
            p.copy_(layer.gain.view_as(p))
    return got, want


@parity.examples(8)
@given(cases, parity.dtypes)
def test_outputs_gradients_and_merged_weights_are_peft_s(case, dtype):
    kind = case[0]
    got, want = pair(*case, dtype)
    tolerance = parity.TOLERANCE[dtype]
    torch.testing.assert_close(twins.run(got, kind), twins.run(want, kind), **tolerance)
    ours, theirs = twins.gradients(got, kind), twins.gradients(want, kind)
    assert len(ours) == len(theirs)
    for name, gradient in ours.items():
        there = theirs[f"base_model.model.{name.removesuffix('gain')}ia3_l.default"]
        torch.testing.assert_close(gradient, there.flatten(), **tolerance)
    assert sum(targets.trainable(got).values()) == want.get_nb_trainable_parameters()[0]
    ia3.merge_and_remove(got)
    plain = want.merge_and_unload().state_dict()
    assert got.state_dict().keys() == plain.keys()
    for name, tensor in got.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], **tolerance)


@pytest.mark.parametrize("kind", sorted(CHOICES))
def test_peft_reads_what_we_write_and_we_what_peft_writes(kind, tmp_path):
    model = twins.theirs(kind)
    outputs, inputs = CHOICES[kind][0]
    ia3.add(model, IA3Config(targets=outputs, inputs=inputs))
    twins.draw(model)
    want = twins.run(model, kind)
    ia3.save(model, tmp_path / "ours")
    theirs = twins.loaded_by_peft(twins.theirs(kind), tmp_path / "ours")
    torch.testing.assert_close(twins.run(theirs, kind), want)
    theirs.save_pretrained(tmp_path / "theirs")
    again = twins.theirs(kind)
    ia3.load(again, tmp_path / "theirs")
    assert torch.equal(twins.run(again, kind), want)


@pytest.mark.parametrize("kind", sorted(OUR_CHOICES))
def test_files_carry_what_was_learned_between_our_model_and_theirs(kind, tmp_path):
    theirs, ours = OUR_CHOICES[kind]
    mine = twins.ours(kind)
    ia3.add(mine, IA3Config(targets=ours[0], inputs=ours[1]))
    twins.draw(mine)
    ia3.save(mine, tmp_path / "ours")
    under_peft = twins.loaded_by_peft(twins.theirs(kind), tmp_path / "ours")
    torch.testing.assert_close(twins.run(under_peft, kind), twins.run(mine, kind))
    other = twins.with_peft(twins.theirs(kind), theirs_of(*theirs))
    twins.draw(other, seed=2)
    other.save_pretrained(tmp_path / "theirs")
    loaded = twins.ours(kind)
    ia3.load(loaded, tmp_path / "theirs")
    torch.testing.assert_close(twins.run(loaded, kind), twins.run(other, kind))


def test_a_head_that_trains_in_full_goes_along(tmp_path):
    model = twins.ours("bert")
    ia3.add(model, IA3Config(also_train=("classifier",)))
    twins.draw(model)
    ia3.save(model, tmp_path)
    theirs = twins.loaded_by_peft(twins.theirs("bert"), tmp_path)
    torch.testing.assert_close(twins.run(theirs, "bert"), twins.run(model, "bert"))
    again = twins.ours("bert")
    ia3.load(again, tmp_path)
    torch.testing.assert_close(twins.run(again, "bert"), twins.run(model, "bert"))


def test_an_adapter_for_another_base_is_refused(tmp_path):
    model = twins.ours("bert")
    ia3.add(model, IA3Config())
    ia3.save(model, tmp_path)

    def load(model):
        return ia3.load(model, tmp_path)

    assert "which this t5 model lacks" in twins.refused(twins.ours("t5"), load)
    assert "has other weights" in twins.refused(parity.randomise(twins.ours("bert"), 9), load)
    settings = tmp_path / "adapter_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("IA3", "LORA"))
    assert "expected 'IA3'" in twins.refused(twins.ours("bert"), load)
    settings.write_text(text)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "key" in name)
    save_file({**tensors, name: torch.ones(7, 1)}, path)
    assert "expected (12, 1)" in twins.refused(twins.ours("bert"), load)


@pytest.mark.parametrize("kind", sorted(twins.OURS))
def test_merged_it_computes_the_same_and_unmerged_it_is_the_base(kind):
    """Even where a factor is zero, which no division can take out again."""
    model = twins.ours(kind, torch.float64)
    before, base = twins.picture(model), twins.run(model, kind)
    ia3.add(model, IA3Config())
    torch.testing.assert_close(twins.run(model, kind), base)
    twins.draw(model)
    with torch.no_grad():
        for layer in ia3.layers.wrapped(model).values():
            layer.gain[0] = 0.0
    inside, want = twins.picture(model), twins.run(model, kind)
    ia3.merge(model)
    torch.testing.assert_close(twins.run(model, kind), want, **parity.TOLERANCE[torch.float64])
    ia3.unmerge(model)
    assert twins.same(twins.picture(model), inside)
    ia3.merge(model)
    ia3.remove(model)
    assert twins.same(twins.picture(model), before)


def test_the_paper_s_places():
    """Keys, values, and the features inside the feed-forward layer: l_ff * f(W_1 x)."""
    model = twins.ours("bert")
    ia3.add(model, IA3Config())
    twins.draw(model)
    block = model.bert.blocks[0]
    x = torch.randn(2, 3, twins.D)
    up, down = block.ffn.up_proj, block.ffn.down_proj.base
    want = down(down_gain(block) * block.ffn.activation(up(x)))
    torch.testing.assert_close(block.ffn(x), want)
    for layer in (block.attention.k_proj, block.attention.v_proj):
        torch.testing.assert_close(layer(x), layer.gain * layer.base(x))
    assert sorted(targets.trainable(model).values()) == [twins.D] * 4 + [twins.F] * 2


def down_gain(block):
    return block.ffn.down_proj.gain


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(targets=("key",)), "no module is called key"),
        (IA3Config(targets=("token_embedding",)), "token_embedding is an Embedding"),
        (IA3Config(inputs=("attention_norm",)), "attention_norm is a LayerNorm"),
        (IA3Config(inputs=("0.attention.k_proj",)), "found by targets and by inputs"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    assert message in twins.refused(twins.ours("bert"), lambda model: ia3.add(model, config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": (), "inputs": ()}, "must not both be empty"),
        ({"targets": "k_proj"}, "targets must hold names"),
        ({"inputs": ("k_proj",)}, "k_proj is in targets and in inputs"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        IA3Config(**fields)


def test_a_shared_bias_is_not_merged():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].bias = model["a"].bias
    ia3.add(model, IA3Config(targets=("a",), inputs=()))
    assert "a shares its bias with b" in twins.refused(model, ia3.merge)
    ia3.remove(model)
    ia3.add(model, IA3Config(targets=(), inputs=("a",)))  # which leaves the bias as it is
    ia3.merge(model)


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("widths", [(8, 1), (1, 8), (1, 1)])
def test_a_layer_of_one_feature_is_read_as_it_was_written(widths, of_input, tmp_path):
    """The shape of its factor does not tell whether that is of the input or of the output."""
    model = nn.ModuleDict({"a": nn.Linear(*widths)})
    places = {"targets": (), "inputs": ("a",)} if of_input else {"targets": ("a",), "inputs": ()}
    ia3.add(model, IA3Config(**places))
    twins.draw(model)
    ia3.save(model, tmp_path)
    gain = model["a"].gain
    ia3.remove(model)
    assert ia3.load(model, tmp_path) == IA3Config(**places)
    assert torch.equal(model["a"].gain, gain)
