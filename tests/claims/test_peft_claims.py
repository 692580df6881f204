"""The sources' claims on parameter-efficient fine-tuning, executed. The ledger is claims.yml."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm_anatomy.models.bert import BERT_LARGE, BertConfig, BertForSequenceClassification, BertModel
from llm_anatomy.models.gpt2 import GPT2, GPT3
from llm_anatomy.models.t5 import FLAN_T5_XXL
from llm_anatomy.peft import adapter, lora, soft_prompt, targets

SMALL = BertConfig(
    vocab_size=31,
    n_layers=4,
    n_heads=4,
    d_model=32,
    d_ff=128,
    n_positions=64,
    attention_dropout=0.0,
    dropout=0.0,
    head_dropout=0.0,
)


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(SMALL).eval()


def trained(model: nn.Module) -> int:
    return sum(targets.trainable(model).values())


def with_lora(model: nn.Module) -> None:
    lora.add(model, lora.LoRAConfig(r=2))


def with_adapters(model: nn.Module) -> None:
    adapter.add(model, adapter.AdapterConfig(width=2))


def with_prompt(model: nn.Module) -> None:
    soft_prompt.add(model.bert, soft_prompt.SoftPromptConfig(n_tokens=2))
    for p in (*model.pooler.parameters(), *model.classifier.parameters()):
        p.requires_grad_(False)


def step(put: Callable[[nn.Module], None]) -> tuple[int, int]:
    """Operations of forward and backward, and numbers that the optimiser keeps averages of."""
    m = model()
    put(m)
    tokens = torch.randint(1, 31, (4, 40))
    with FlopCounterMode(display=False) as counter:
        m(tokens).sum().backward()
    return counter.get_total_flops(), trained(m)


def test_lora_trains_one_parameter_of_gpt_3_in_nine_thousand() -> None:
    """C166: rank 4 on queries and values; the merged weight computes the same."""
    with torch.device("meta"):
        giant = GPT2(GPT3)
    total = sum(p.numel() for p in giant.parameters())
    lora.add(giant, lora.LoRAConfig(r=4, targets=("q_proj", "v_proj")))
    assert trained(giant) == 18_874_368
    assert 9_200 < total / trained(giant) < 9_300


@pytest.mark.parametrize("put", [with_lora, with_adapters, with_prompt])
def test_few_parameters_train_and_most_of_the_work_of_a_step_remains(put) -> None:
    """C308, C314, C319: a twentieth of the optimiser's memory, and most of a full step's work."""
    work, kept = step(lambda m: None)
    less_work, less_kept = step(put)
    assert less_kept < 0.05 * kept
    assert 0.6 * work < less_work < 0.85 * work


def test_of_the_three_only_adapters_leave_the_base_as_it_was() -> None:
    """C309: a student or a sub-network is a smaller model, all of which is trained."""
    student = BertModel(BertConfig(vocab_size=31, n_layers=2, n_heads=4, d_model=32, d_ff=128))
    assert trained(student) == sum(p.numel() for p in student.parameters())
    m = model()
    base = {id(p): p.detach().clone() for p in m.parameters()}
    with_adapters(m)
    new = [p for p in m.parameters() if id(p) not in base]
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    m(torch.randint(1, 31, (4, 9))).sum().backward()
    optimizer.step()
    assert sum(p.numel() for p in new) == trained(m) < 0.05 * sum(p.numel() for p in m.parameters())
    assert all(torch.equal(p, base[id(p)]) for p in m.parameters() if id(p) in base)


def test_an_adapter_is_a_small_network_inside_a_frozen_model() -> None:
    """C312: it starts near the identity, and it alone receives gradients."""
    m = model()
    tokens = torch.randint(1, 31, (4, 9))
    want = m(tokens)
    with_adapters(m)
    torch.testing.assert_close(m(tokens), want, atol=0.01, rtol=0.01)
    m(tokens).sum().backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == set(targets.trainable(m))


def test_adapters_of_width_64_are_two_per_cent_of_bert_large() -> None:
    """C313: 6,343,680 of its parameters, two adapters in each of 24 blocks."""
    with torch.device("meta"):
        m = BertModel(BERT_LARGE)
    total = sum(p.numel() for p in m.parameters())
    adapter.add(m, adapter.AdapterConfig(width=64))
    assert trained(m) == 6_343_680
    assert round(trained(m) / total, 3) == 0.019


def test_adapters_of_two_tasks_are_swapped_on_one_backbone() -> None:
    """C315: each gives its own outputs again, and without them the model is what it was."""
    m = model()
    tokens = torch.randint(1, 31, (4, 9))
    base = m(tokens)
    with_adapters(m)
    states, outputs = [], []
    for _ in range(2):
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p.normal_(0, 0.3)
        states.append(targets.state(m))
        outputs.append(m(tokens))
    assert not torch.allclose(*outputs)
    for task in (0, 1, 0):
        targets.load_state(m, states[task])
        assert torch.equal(m(tokens), outputs[task])
    adapter.remove(m)
    assert torch.equal(m(tokens), base)


def test_a_soft_prompt_changes_the_input_alone_and_is_a_few_vectors() -> None:
    """C319: 100 vectors of the width of T5-XXL are 409,600 numbers."""
    m = model()
    weights = {name: p.detach().clone() for name, p in m.named_parameters()}
    with_prompt(m)
    assert trained(m) == 2 * SMALL.d_model
    m(torch.randint(1, 31, (4, 9))).sum().backward()
    soft_prompt.remove(m.bert)
    assert all(torch.equal(p, weights[name]) for name, p in m.named_parameters())
    assert 100 * FLAN_T5_XXL.d_model == 409_600
