"""The sources' claims on distillation and progressive shrinking. The ledger is claims.yml."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from llm_anatomy import objectives
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.peft.shrinking import Size, Space, extract, full_size, run
from llm_anatomy.training import train

CONFIG = GPT2Config(
    vocab_size=12,
    n_layers=2,
    n_heads=2,
    d_model=16,
    d_ff=32,
    n_positions=10,
    embedding_dropout=0.0,
    attention_dropout=0.0,
    dropout=0.0,
)
T = 6


def fresh(config: GPT2Config = CONFIG) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


def counting(n: int, seed: int) -> Tensor:
    """Texts that count on from a random digit: 3 4 5 … or in steps of two: 3 5 7 …, modulo 12."""
    generator = torch.Generator().manual_seed(seed)
    start, step = torch.randint(12, (n, 1), generator=generator), torch.ones(n, 1).long()
    step[n // 2 :] = 2
    return (start + step * torch.arange(T + 1)) % 12


def lm_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    inputs, targets = objectives.causal_lm(tokens)
    return objectives.cross_entropy(model(inputs), targets)


# --- distillation -----------------------------------------------------------------------------


def test_hot_distillation_is_the_older_matching_of_logits() -> None:
    """C310: Hinton et al. contain their predecessors, who trained on logits, as a limit."""
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 7, dtype=torch.float64)
    (hot,) = torch.autograd.grad(objectives.soft_targets(z, v, 1e4), z)
    difference = (z - z.mean(dim=-1, keepdim=True)) - (v - v.mean(dim=-1, keepdim=True))
    (matching,) = torch.autograd.grad(0.5 * difference.square().mean(), z)
    torch.testing.assert_close(hot, matching, rtol=1e-2, atol=1e-6)
    (mild,) = torch.autograd.grad(objectives.soft_targets(z, v, 1.0), z)
    assert not torch.allclose(mild, matching, rtol=0.2)


def test_a_small_student_learns_from_the_outputs_of_a_large_one() -> None:
    """C310: no label is seen, and every weight of the student trains."""
    teacher = fresh()
    train(teacher, lm_loss, lambda step: counting(16, step), 120, lambda _: 1e-2)
    student = fresh(dataclasses.replace(CONFIG, n_layers=1, d_model=8, d_ff=16))
    before = copy.deepcopy(student.state_dict())

    def imitate(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(tokens)
        return objectives.soft_targets(model(tokens), wanted, 2.0)

    losses = train(student, imitate, lambda step: counting(16, step)[:, :-1], 150, lambda _: 1e-2)
    assert losses[-1] < 0.3 * losses[0]
    assert not any(torch.equal(p, before[name]) for name, p in student.named_parameters())


# --- progressive shrinking --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shrunk() -> tuple[GPT2, GPT2, list[float]]:
    """The network before and after its stages, and its loss as a whole after each of them."""
    net = fresh()
    train(net, lm_loss, lambda step: counting(16, step), 150, lambda _: 1e-2)
    before, full = copy.deepcopy(net).eval(), full_size(net)
    test, losses = counting(24, 999), []
    for number, stage in enumerate(Space((1, 2), (1, 2), (8, 32)).stages()[1:]):
        generator = torch.Generator().manual_seed(number)
        sizes = [stage.sample(generator) for _ in range(100)]

        def taught(model: nn.Module, batch: tuple[Tensor, Size]) -> Tensor:
            tokens, size = batch
            with torch.no_grad():
                wanted = before(tokens)
            return sum(objectives.soft_targets(run(model, s, tokens), wanted) for s in (full, size))

        train(
            net,
            taught,
            lambda step, sizes=sizes: (counting(16, step)[:, :-1], sizes[step - 1]),
            100,
            lambda _: 5e-3,
        )
        with torch.no_grad():
            losses.append(lm_loss(net, test).item())
    return before, net, losses


def test_a_sub_network_is_a_slice_of_one_network_s_weights(shrunk) -> None:
    """C316: the technique of Once-for-All, in small: what is cut out is what was trained inside."""
    _, net, _ = shrunk
    tokens = counting(5, 7)[:, :-1]
    for layers, heads, width in itertools.product((1, 2), (1, 2), (8, 32)):
        size = Size(n_layers=layers, n_heads=heads, d_ff=width)
        small = extract(net, size)
        torch.testing.assert_close(small(tokens), run(net, size, tokens))
        for block, whole in zip(small.blocks, net.blocks, strict=False):
            q, up = block.attention.q_proj.weight, block.ffn.up_proj.weight
            assert torch.equal(q, whole.attention.q_proj.weight[: 8 * heads])
            assert torch.equal(up, whole.ffn.up_proj.weight[:width])


@torch.no_grad()
def test_the_network_stays_whole_and_its_parts_need_no_training(shrunk) -> None:
    """C317: nothing becomes smaller while training; the sizes are cut out afterwards."""
    before, net, losses = shrunk
    assert {n: p.shape for n, p in net.named_parameters()} == {
        n: p.shape for n, p in before.named_parameters()
    }
    test = counting(24, 999)
    whole = lm_loss(before, test).item()
    assert max(losses) < whole + 0.1
    small = Size(n_layers=1, n_heads=1, d_ff=8)
    cut, trained = (lm_loss(extract(model, small), test).item() for model in (before, net))
    assert trained < 0.5 * cut


def test_every_weight_of_the_network_trains(shrunk) -> None:
    """C316, C317: so it is no method that trains few parameters."""
    before, net, _ = shrunk
    old = dict(before.named_parameters())
    assert not any(torch.equal(p, old[name]) for name, p in net.named_parameters())
