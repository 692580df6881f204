"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): LLaMA with a mixture of experts.

In place of one feed-forward layer a block has several, the experts. A router scores them for each
token, the best few run, and their outputs are mixed by the softmax of their scores. The model has
the parameters of all experts, but a token costs only those that it meets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm_anatomy.feedforward import GatedFeedForward
from llm_anatomy.models.llama import Llama, LlamaBlock, LlamaConfig
from llm_anatomy.weights import Rename, Rule


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(LlamaConfig):
    """Mixtral 8x7B unless told otherwise: of `n_experts`, each token meets `n_active`.

    Raises:
        ValueError: a field has another type than it states or is negative, or more experts are
            active than there are.
    """

    n_kv_heads: int = 8
    d_ff: int = 14_336
    n_positions: int = 32_768
    rope_base: float = 1e6
    eps: float = 1e-5
    n_experts: int = 8
    n_active: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"{self.n_active} of {self.n_experts} experts cannot be active")


MIXTRAL_8X7B = MixtralConfig()
MIXTRAL_8X22B = MixtralConfig(
    n_layers=56, n_heads=48, d_model=6144, d_ff=16_384, n_positions=65_536
)


class MixtureOfExperts(nn.Module):
    """The best `n_active` of several feed-forward layers, chosen anew for every token.

    Shazeer et al., 2017 (arXiv:1701.06538), without noise: the softmax runs over the scores of
    those chosen. `last_scores` keeps the router's scores (N, X) of the last call, for a loss.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.n_active = config.n_active
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedFeedForward(config.d_model, config.d_ff, F.silu) for _ in range(config.n_experts)
        )
        self.last_scores: Tensor | None = None

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        rows = x.flatten(0, -2)  # (N, D)
        self.last_scores = scores = self.router(rows)  # (N, X)
        best, chosen = scores.topk(self.n_active, dim=-1)  # (N, k)
        share = best.float().softmax(dim=-1).to(x.dtype)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)  # the tokens that meet it
            y = y.index_add(0, row, expert(rows[row]) * share[row, place, None])
        return y.view_as(x)


def balance_loss(scores: Float[Tensor, "N X"], n_active: int) -> Float[Tensor, ""]:
    """How unevenly a router spreads tokens over experts; `n_active` when it is even.

    The number of experts times the sum over experts of the share of tokens that meet it and its
    mean probability (Fedus et al., 2022, arXiv:2101.03961, equations 4 to 6). The shares are counts
    and have no gradient; the probabilities have.
    """
    probabilities = scores.softmax(dim=-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(n_active, dim=-1).indices, 1.0)
    return scores.shape[-1] * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()


class MixtralBlock(LlamaBlock):
    """LLaMA's block with experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.ffn = MixtureOfExperts(config)


class Mixtral(Llama):
    """LLaMA with the blocks of Mixtral."""

    model_type = "mixtral"
    hf_class = "MixtralForCausalLM"
    hf_options: Mapping[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "router_jitter_noise": (0.0, 0),
    }
    block = MixtralBlock
    names = {theirs: ours for theirs, ours in Llama.names.items() if "mlp" not in theirs} | {
        "block_sparse_moe.gate.weight": "ffn.router.weight"
    }

    @classmethod
    def config_from_hf(cls, hf: Mapping[str, Any]) -> MixtralConfig:
        return MixtralConfig(
            **vars(super().config_from_hf(hf)),
            n_experts=hf["num_local_experts"],
            n_active=hf["num_experts_per_tok"],
        )

    @classmethod
    def config_to_hf(cls, config: MixtralConfig) -> dict[str, Any]:
        return super().config_to_hf(config) | {
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.n_active,
        }

    @classmethod
    def hf_rules(cls, config: MixtralConfig) -> list[Rule]:
        parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        return super().hf_rules(config) + [
            Rename(
                f"model.layers.{i}.block_sparse_moe.experts.{x}.{theirs}.weight",
                f"blocks.{i}.ffn.experts.{x}.{ours}.weight",
            )
            for i in range(config.n_layers)
            for x in range(config.n_experts)
            for theirs, ours in parts.items()
        ]
