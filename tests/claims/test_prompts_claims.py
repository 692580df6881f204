"""The sources' claims on prompt tuning, executed. The ledger is claims.yml."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_anatomy.models.gpt2 import GPT2, GPT2_LARGE, GPT2Config
from llm_anatomy.peft import counts, soft_prompt
from llm_anatomy.peft.soft_prompt import SoftPromptConfig, prepend
from llm_anatomy.peft.targets import trainable

P, V, D = 4, 40, 32


def model() -> GPT2:
    config = GPT2Config(vocab_size=V, n_layers=4, n_heads=4, d_model=D, d_ff=4 * D, n_positions=64)
    return GPT2(config).eval()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_prompt_tuning_is_parameter_efficient_fine_tuning() -> None:
    """C306: it freezes the model and trains a small share, which is what PEFT means."""
    tuned = model()
    n_base = sum(p.numel() for p in tuned.parameters())
    assert sum(trainable(tuned).values()) == n_base  # full fine-tuning trains everything
    soft_prompt.add(tuned, SoftPromptConfig(n_tokens=P))
    assert trainable(tuned) == {"soft_prompt.source.embedding": P * D}
    frozen = sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    assert frozen == n_base
    with torch.device("meta"):
        n_large = sum(p.numel() for p in GPT2(GPT2_LARGE).parameters())
    assert counts.prompt(counts.GPT["GPT-2 large"], 100) / n_large < 0.001


def test_prompt_tuning_changes_the_input_alone() -> None:
    """C319: the model is the old one, given P vectors before those of the text."""
    base, tokens = model(), torch.randint(V, (3, 9))
    tuned = copy.deepcopy(base)
    place = soft_prompt.add(tuned, SoftPromptConfig(n_tokens=P))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(tuned, tokens).backward()
        assert place.source.embedding.grad.abs().sum() > 0
        optimizer.step()
    state = tuned.state_dict()
    assert all(torch.equal(state[name], t) for name, t in base.state_dict().items())
    assert loss_of(tuned, tokens) < loss_of(base, tokens)
    x = prepend(place(), base.token_embedding(tokens))
    x = x + base.position_embedding(torch.arange(P + 9))
    torch.testing.assert_close(base.logits(base.hidden(x))[:, P:], tuned(tokens))
    assert counts.prompt(counts.Shape(d_model=4096), 100) == 409_600  # 100 tokens, T5-XXL


def test_prompt_tuning_takes_most_of_the_computing_of_a_full_step() -> None:
    """C319: the gradient passes through every frozen layer; only the weights' own falls away."""
    tokens = torch.randint(V, (4, 41))

    def flops(network: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            loss_of(network, tokens).backward()
        return counter.get_total_flops()

    full = flops(model())
    tuned = model()
    reached = []
    soft_prompt.add(tuned, SoftPromptConfig(n_tokens=P))
    for block in tuned.blocks:
        block.register_full_backward_hook(lambda block, inward, outward: reached.append(block))
    share = flops(tuned) / full
    assert len(reached) == len(tuned.blocks)
    assert 0.6 < share < 0.85
