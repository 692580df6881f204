"""Finding modules by name, freezing a base, and the way back."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config as HFGPT2Config
from transformers import GPT2LMHeadModel

from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.peft import targets


class Layer(nn.Module):
    """A method in its smallest form: one number a module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * self.base(x)


def gpt2() -> GPT2:
    return GPT2(GPT2Config(vocab_size=11, n_layers=2, n_heads=2, d_model=6, d_ff=10, n_positions=9))


def put_on(model: nn.Module, names=("q_proj",), also=()) -> None:
    found = targets.find(model, names)
    targets.freeze(model, "gains", targets.parameters_of(model, also))
    for name, module in found.items():
        targets.replace(model, name, Layer(module))


def take_off(model: nn.Module, **options: bool) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, Layer):
            targets.replace(model, name, module.base)
    targets.thaw(model, "gains", **options)


def picture(model: nn.Module):
    """All that a method must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [(name, type(module)) for name, module in model.named_modules()],
        targets.method_on(model),
    )


def same(got, want) -> bool:
    equal = all(torch.equal(tensor, want[0][name]) for name, tensor in got[0].items())
    return equal and got[0].keys() == want[0].keys() and got[1:] == want[1:]


# --- Finding --------------------------------------------------------------------------------------


def test_a_name_finds_every_module_that_ends_with_it():
    found = targets.find(gpt2(), ("q_proj", "1.ffn.up_proj"))
    assert list(found) == [
        "blocks.0.attention.q_proj",
        "blocks.1.attention.q_proj",
        "blocks.1.ffn.up_proj",
    ]


def test_a_name_is_whole_words():
    """`proj` is no ending of `q_proj`, as `dense` is none of `condense`."""
    with pytest.raises(ValueError, match="no module is called proj"):
        targets.find(gpt2(), ("proj",))


def test_a_name_that_finds_nothing_says_which_there_are():
    with pytest.raises(ValueError, match=r"no module is called query.*k_proj.*q_proj"):
        targets.find(gpt2(), ("q_proj", "query"))


@pytest.mark.parametrize("names", ["q_proj", (), ("",), (1,), None])
def test_targets_are_names(names, unchecked):
    with pytest.raises(ValueError, match="must hold"):
        targets.check_targets("targets", names)


def test_one_module_under_two_names_is_refused():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4)})
    model["output"] = model["embedding"]
    with pytest.raises(ValueError, match="embedding and output are one module"):
        targets.find(model, ("output",))


def test_widths_of_every_kind_of_layer():
    conv1d = (
        GPT2LMHeadModel(
            HFGPT2Config(
                n_layer=1, n_head=2, n_embd=6, vocab_size=9, bos_token_id=0, eos_token_id=0
            )
        )
        .transformer.h[0]
        .attn.c_attn
    )
    assert targets.widths("x", conv1d) == (6, 18)
    assert targets.widths("x", nn.Linear(3, 5)) == (3, 5)
    assert targets.widths("x", nn.Embedding(7, 4)) == (7, 4)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        targets.widths("norm", nn.LayerNorm(4))


# --- Freezing and the way back --------------------------------------------------------------------


def test_only_the_method_and_what_is_named_trains():
    model = gpt2()
    put_on(model, also=("norm",))
    assert targets.trainable(model) == {
        "blocks.0.attention.q_proj.gain": 1,
        "blocks.1.attention.q_proj.gain": 1,
        "norm.weight": 6,
        "norm.bias": 6,
    }


def test_removed_the_base_is_as_before_bit_for_bit():
    """What was frozen before stays frozen, and a head that was trained has its old values."""
    model = gpt2()
    model.blocks[0].ffn_norm.weight.requires_grad_(False)
    before = picture(model)
    put_on(model, also=("norm",))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    take_off(model)
    assert same(picture(model), before)


def test_a_trained_head_may_stay():
    model = gpt2()
    put_on(model, also=("norm",))
    with torch.no_grad():
        model.norm.bias.fill_(2.0)
    take_off(model, restore=False)
    assert (model.norm.bias == 2.0).all()
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_of_a_model_has_a_way_back_of_its_own():
    model = gpt2()
    before = picture(model)
    put_on(model, also=("norm",))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.bias.fill_(2.0)
    take_off(twin)
    assert same(picture(twin), before)
    assert targets.method_on(model) == "gains"
    assert not model.blocks[0].attention.k_proj.weight.requires_grad


def test_a_second_method_is_refused_wherever_the_first_one_is():
    model = gpt2()
    put_on(model.blocks[0])
    before = picture(model)
    for part in (model, model.blocks[0]):
        with pytest.raises(ValueError, match="carries gains already; remove it before adding LoRA"):
            targets.freeze(part, "LoRA")
    assert same(picture(model), before)


def test_a_second_method_is_refused_on_a_part_of_what_carries_the_first():
    """Removed in any order, the two would leave the base frozen."""
    model = gpt2()
    before = picture(model)
    put_on(model)
    for part in (model.blocks[0], model.norm):
        with pytest.raises(ValueError, match="carries gains already; remove it before adding LoRA"):
            targets.freeze(part, "LoRA")
    take_off(model)
    targets.freeze(model.norm, "LoRA")
    targets.thaw(model.norm, "LoRA")
    assert same(picture(model), before)


def test_only_what_is_there_can_be_taken_off():
    with pytest.raises(ValueError, match="does not carry gains, but nothing"):
        targets.thaw(gpt2(), "gains")


def test_merging_is_noted_and_checked():
    model = gpt2()
    put_on(model)
    with pytest.raises(ValueError, match="gains is not merged"):
        targets.set_merged(model, "gains", False)
    targets.set_merged(model, "gains", True)
    assert targets.is_merged(model)
    with pytest.raises(ValueError, match="gains is merged already"):
        targets.set_merged(model, "gains", True)
    for action in (targets.state, lambda model: targets.load_state(model, {})):
        with pytest.raises(ValueError, match="gains is merged; unmerge it first"):
            action(model)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.ReLU(), "head is a ReLU, which has nothing to train"),
        (nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int8), False)]), "whole numbers"),
    ],
)
def test_what_cannot_train_in_full_is_refused(head, message):
    model = nn.ModuleDict({"head": head, "body": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=message):
        targets.parameters_of(model, ("head",))


# --- The state of one task ------------------------------------------------------------------------


def test_tasks_take_turns_on_one_base():
    model, tokens = gpt2().eval(), torch.randint(0, 11, (2, 5))
    put_on(model, also=("norm",))
    outputs, states = [], []
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_()
        outputs.append(model(tokens))
        states.append(targets.state(model))
    for task in (0, 1, 0):
        targets.load_state(model, states[task])
        assert torch.equal(model(tokens), outputs[task])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.bias"), "the state lacks norm.bias"),
        (lambda s: s.update(other=torch.ones(1)), "the state holds other"),
        (lambda s: s.update({"norm.bias": torch.ones(7)}), r"shape \(7,\), expected \(6,\)"),
    ],
)
def test_a_state_of_another_base_changes_nothing(change, message):
    model = gpt2()
    put_on(model, also=("norm",))
    state = {name: tensor + 1 for name, tensor in targets.state(model).items()}
    change(state)
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        targets.load_state(model, state)
    assert same(picture(model), before)


def test_there_is_no_state_without_a_method():
    with pytest.raises(ValueError, match="carries no method"):
        targets.state(gpt2())


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (targets.check_count, [1, 8], [0, -1, 1.5, True, "8"]),
        (targets.check_positive, [0.5, 8], [0, -1.0, float("inf"), float("nan"), True, "8"]),
        (targets.check_share, [0, 0.0, 0.5], [1, 1.0, -0.1, float("nan"), False, None]),
    ],
)
def test_numbers_of_a_config(check, good, bad):
    for value in good:
        check("field", value)
    for value in bad:
        with pytest.raises(ValueError, match="field must be"):
            check("field", value)
