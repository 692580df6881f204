"""Distillation: the losses against their formulas and limits, and students cut out of teachers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_anatomy import objectives
from llm_anatomy.models.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from llm_anatomy.models.distilbert import (
    DISTILBERT_BASE,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
)
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.objectives import IGNORED
from llm_anatomy.peft.distillation import alternate_layers, hidden_states, initialise
from llm_anatomy.training import train
from tests import parity

B, T, V, D = 3, 5, 7, 4
CONFIG = BertConfig(
    vocab_size=19, n_layers=4, n_heads=3, d_model=12, d_ff=20, n_positions=9, pad_id=None
)


def some_logits(scale: float = 3.0):
    student = (scale * torch.randn(B, T, V)).double().requires_grad_()
    return student, (scale * torch.randn(B, T, V)).double().requires_grad_()


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_targets_by_loops(temperature):
    student, teacher = some_logits()
    total = 0.0
    for b in range(B):
        for t in range(T):
            p = [(z / temperature).exp() for z in teacher[b, t]]
            q = [(z / temperature).exp() for z in student[b, t]]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            total += sum(x * (x / y).log() for x, y in zip(p, q, strict=True))
    got = objectives.soft_targets(student, teacher, temperature)
    torch.testing.assert_close(got, temperature**2 * total / (B * T))


def test_at_temperature_1_it_is_cross_entropy_less_the_teachers_entropy():
    student, teacher = some_logits()
    p = teacher.softmax(dim=-1)
    soft = F.cross_entropy(student.flatten(0, 1), p.flatten(0, 1))
    entropy = torch.distributions.Categorical(probs=p).entropy().mean()
    torch.testing.assert_close(objectives.soft_targets(student, teacher), soft - entropy)


def test_it_is_distilberts_loss():
    """As in the published code: KLDivLoss of two softened distributions, times T squared."""
    student, teacher = some_logits()
    published = nn.KLDivLoss(reduction="batchmean")(
        (student.flatten(0, 1) / 2).log_softmax(dim=-1), (teacher.flatten(0, 1) / 2).softmax(dim=-1)
    )
    torch.testing.assert_close(objectives.soft_targets(student, teacher, 2.0), 4 * published)


def test_its_gradient_is_the_difference_of_the_softened_distributions():
    student, teacher = some_logits()
    objectives.soft_targets(student, teacher, 3.0).backward()
    difference = (student / 3).softmax(dim=-1) - (teacher / 3).softmax(dim=-1)
    torch.testing.assert_close(student.grad, 3 * difference / (B * T))


def test_a_high_temperature_matches_centred_logits():
    """Hinton et al., equation 4: the gradient nears (z - v)/V, whatever the temperature."""
    student, teacher = some_logits()
    for temperature in (1e3, 1e4):
        loss = objectives.soft_targets(student, teacher, temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        z, v = (x - x.mean(dim=-1, keepdim=True) for x in (student, teacher))
        torch.testing.assert_close(gradient, (z - v) / V / (B * T), rtol=0.05, atol=1e-4)
        half = 0.5 * (z - v).square().mean()
        torch.testing.assert_close(loss, half, rtol=0.02, atol=0)


def test_the_gradient_keeps_its_size_when_the_temperature_changes():
    student, teacher = some_logits(scale=1.0)
    norms = []
    for temperature in (10.0, 20.0, 40.0):
        loss = objectives.soft_targets(student, teacher, temperature)
        norms.append(torch.autograd.grad(loss, student)[0].norm().item())
    assert max(norms) < 1.1 * min(norms)


def test_no_gradient_reaches_the_teacher():
    student, teacher = some_logits()
    loss = objectives.soft_targets(student, teacher, 2.0)
    loss = loss + objectives.hidden_cosine(student, teacher)
    (loss + objectives.hidden_mse(student, teacher)).backward()
    assert teacher.grad is None and student.grad.any()


def test_only_what_counts_counts():
    student, teacher = some_logits()
    counted = torch.rand(B, T) < 0.5
    for loss in (objectives.soft_targets, objectives.hidden_cosine, objectives.hidden_mse):
        got = loss(student, teacher, counted=counted)
        torch.testing.assert_close(got, loss(student[counted], teacher[counted]))
        assert not torch.isclose(got, loss(student, teacher))


def test_soft_and_hard_targets_are_mixed():
    student, teacher = some_logits()
    targets = torch.randint(V, (B, T))
    targets[0, 1] = targets[2, :3] = IGNORED
    soft = objectives.soft_targets(student, teacher, 4.0, targets != IGNORED)
    hard = objectives.cross_entropy(student, targets)
    for share in (0.0, 0.3, 1.0):
        got = objectives.distillation(student, teacher, targets, temperature=4.0, soft=share)
        torch.testing.assert_close(got, share * soft + (1 - share) * hard)


def test_hidden_cosine_is_torchs_cosine_embedding_loss():
    student, teacher = some_logits()
    a, b = student.flatten(0, 1), teacher.flatten(0, 1)
    want = nn.CosineEmbeddingLoss()(a, b, torch.ones(B * T))
    torch.testing.assert_close(objectives.hidden_cosine(student, teacher), want)
    assert objectives.hidden_cosine(teacher * 5, teacher).abs() < 1e-12


def test_a_narrow_student_is_compared_through_a_projection():
    student, teacher = torch.randn(B, T, D), torch.randn(B, T, V)
    projection = nn.Linear(D, V, bias=False)
    want = (student @ projection.weight.T - teacher).square().sum() / (B * T * V)
    got = objectives.hidden_mse(student, teacher, projection=projection)
    torch.testing.assert_close(got, want)
    got.backward()
    assert projection.weight.grad.any()


def test_what_the_losses_refuse():
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="the temperature must be a number above 0, got"):
            objectives.soft_targets(student, teacher, bad)
    with pytest.raises(ValueError, match="no position counts"):
        objectives.hidden_mse(student, teacher, torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"student \(3, 5, 7\) and teacher \(3, 5, 4\) must agree"):
        objectives.hidden_mse(student, torch.randn(B, T, D))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        targets = torch.zeros(B, T, dtype=torch.long)
        objectives.distillation(student, teacher, targets, soft=1.5)


def test_shapes_that_differ_are_refused_outside_tests_too(unchecked):
    with pytest.raises(ValueError, match="must agree in shape"):
        objectives.soft_targets(torch.randn(B, T, V), torch.randn(B, 1, V))
    with pytest.raises(ValueError, match=r"boolean and of shape \(3, 5\)"):
        x = torch.randn(B, T, V)
        objectives.soft_targets(x, x, counted=torch.ones(B, T))


# --- first weights --------------------------------------------------------------------------------


def test_alternate_layers_are_those_of_distilbert():
    assert alternate_layers(12, 6) == (0, 2, 4, 7, 9, 11)
    assert alternate_layers(4, 2) == (0, 3)
    assert alternate_layers(5, 1) == (0,)
    assert alternate_layers(3, 3) == (0, 1, 2)
    assert DISTILBERT_BASE.n_layers == 6
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"between 1 and 4 layers, as its teacher; got {bad}"):
            alternate_layers(4, bad)


def student_config(n_layers: int) -> BertConfig:
    return dataclasses.replace(CONFIG, n_layers=n_layers, n_segments=1)


def test_distilbert_starts_from_berts_layers():
    teacher = parity.randomise(BertForPreTraining(CONFIG))
    student = DistilBertForMaskedLM(student_config(2))
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    assert initialise(student, teacher) == (0, 3)
    parity.check_same(teacher.state_dict(), before)
    for i, layer in enumerate((0, 3)):
        parity.check_same(
            student.bert.blocks[i].state_dict(), teacher.bert.blocks[layer].state_dict()
        )
    parity.check_same(student.mlm.state_dict(), teacher.mlm.state_dict())
    weight = teacher.bert.token_embedding.weight
    assert torch.equal(student.bert.token_embedding.weight, weight)
    assert student.bert.token_embedding.weight.data_ptr() != weight.data_ptr()


def test_with_all_layers_the_student_is_the_teacher():
    """The vector of segment 0 lives on in the student's positions."""
    teacher = parity.randomise(BertForMaskedLM(CONFIG))
    student = DistilBertForMaskedLM(student_config(4)).eval()
    initialise(student, teacher)
    tokens = torch.randint(19, (B, T))
    torch.testing.assert_close(student(tokens), teacher(tokens))


def test_layers_can_be_chosen_and_other_models_started():
    config = GPT2Config(vocab_size=19, n_layers=3, n_heads=2, d_model=8, d_ff=10, n_positions=6)
    teacher = parity.randomise(GPT2(config))
    student = GPT2(dataclasses.replace(config, n_layers=2))
    assert initialise(student, teacher, [2, 1]) == (2, 1)
    parity.check_same(student.blocks[0].state_dict(), teacher.blocks[2].state_dict())
    parity.check_same(student.blocks[1].state_dict(), teacher.blocks[1].state_dict())
    assert torch.equal(student.norm.bias, teacher.norm.bias)


@pytest.mark.parametrize(
    ("build", "layers", "message"),
    [
        (lambda: DistilBertForMaskedLM(student_config(5)), None, "between 1 and 4 layers"),
        (
            lambda: DistilBertForMaskedLM(dataclasses.replace(student_config(2), d_ff=24)),
            None,
            r"up_proj.weight has shape \(24, 12\), the teacher's .*\(20, 12\): only depth",
        ),
        (
            lambda: DistilBertForSequenceClassification(student_config(2)),
            None,
            "the teacher has no dense.weight",
        ),
        (
            lambda: DistilBertForMaskedLM(student_config(2)),
            [0],
            "expected 2 layers between 0 and 3",
        ),
        (lambda: DistilBertForMaskedLM(student_config(2)), [0, 4], r"got \[0, 4\]"),
        (lambda: DistilBertForMaskedLM(student_config(2)), [-1, 0], r"got \[-1, 0\]"),
        (lambda: nn.Linear(2, 2), None, "one list of blocks called 'blocks', found none"),
    ],
)
def test_a_start_that_is_refused_changes_nothing(build, layers, message):
    student = build()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise(student, BertForMaskedLM(CONFIG), layers)
    parity.check_same(student.state_dict(), before)


# --- hidden states --------------------------------------------------------------------------------


def test_hidden_states_are_what_the_blocks_give():
    model = parity.randomise(BertForMaskedLM(CONFIG))
    tokens = torch.randint(19, (B, T))
    with hidden_states(model) as states:
        last = model.bert(tokens)
    x, want = model.bert.embed(tokens), []
    for block in model.bert.blocks:
        x = block(x)
        want.append(x)
    assert len(states) == 4
    for got, expected in zip(states, want, strict=True):
        torch.testing.assert_close(got, expected)
    assert states[-1] is last and last.requires_grad


def test_nothing_is_left_in_the_model():
    model = parity.randomise(BertForMaskedLM(CONFIG))
    with pytest.raises(ValueError, match="token ids"), hidden_states(model) as states:
        model(torch.full((1, 2), 99))
    model(torch.full((1, 2), 3))
    assert states == []


def test_a_student_learns_from_its_teacher_alone():
    """No label anywhere: with half of the layers it comes near its teacher's distributions."""
    teacher = parity.randomise(BertForMaskedLM(CONFIG))
    student = DistilBertForMaskedLM(
        dataclasses.replace(student_config(2), dropout=0.0, attention_dropout=0.0)
    )
    initialise(student, teacher)
    tokens = torch.randint(19, (64, T))

    def loss_of(model, batch):
        with torch.no_grad(), hidden_states(teacher) as theirs:
            logits = teacher(batch)
        with hidden_states(model) as ours:
            mine = model(batch)
        soft = objectives.soft_targets(mine, logits, 2.0)
        return soft + objectives.hidden_cosine(ours[-1], theirs[-1])

    losses = train(student, loss_of, lambda _: tokens, 60, lambda _: 1e-2)
    assert losses[-1] < 0.3 * losses[0]
