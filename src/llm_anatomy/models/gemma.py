"""Gemma (Gemma Team, 2024, arXiv:2403.08295), the open kin of Gemini.

LLaMA with embeddings that are scaled by the root of the width and shared with the output layer,
GELU for the gate, and norms whose stored gain is the distance from 1. Heads are 256 wide, whatever
the width of the model. At 2B all heads share one key and one value (multi-query attention).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_anatomy.feedforward import GatedFeedForward, gelu_tanh
from llm_anatomy.models.llama import Llama, LlamaBlock, LlamaConfig
from llm_anatomy.norms import RMSNorm

GEMMA_2B = LlamaConfig(
    vocab_size=256_000,
    n_layers=18,
    n_heads=8,
    n_kv_heads=1,
    d_model=2048,
    d_head=256,
    d_ff=16_384,
    n_positions=8192,
    tied=True,
)
GEMMA_7B = LlamaConfig(
    vocab_size=256_000,
    n_layers=28,
    n_heads=16,
    n_kv_heads=16,
    d_model=3072,
    d_head=256,
    d_ff=24_576,
    n_positions=8192,
    tied=True,
)


class OneCentredRMSNorm(RMSNorm):
    """RMSNorm with the gain `1 + weight`: weight decay then pulls the gain to 1, not to 0."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__(d_model, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*_ D"]) -> Float[Tensor, "*_ D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return (wide * scale * (1 + self.weight.to(wide.dtype))).to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Token vectors times the root of their width."""

    @property
    def embed_scale(self) -> float:
        return self.embedding_dim**0.5

    def forward(self, tokens: Int[Tensor, "*_"]) -> Float[Tensor, "*_ D"]:
        return super().forward(tokens) * self.embed_scale


class GemmaBlock(LlamaBlock):
    """LLaMA's block with GEGLU and Gemma's norms."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.attention_norm = OneCentredRMSNorm(config.d_model, config.eps)
        self.ffn_norm = OneCentredRMSNorm(config.d_model, config.eps)
        self.ffn = GatedFeedForward(config.d_model, config.d_ff, gelu_tanh)


class Gemma(Llama):
    """LLaMA with the blocks of Gemma and a scaled embedding."""

    model_type = "gemma"
    hf_class = "GemmaForCausalLM"
    hf_options: Mapping[str, tuple[Any, ...]] = {
        "hidden_act": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    }
    tied = True
    block = GemmaBlock

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        table = self.token_embedding.weight.detach()
        self.token_embedding = ScaledEmbedding.from_pretrained(table, freeze=False)
        self.norm = OneCentredRMSNorm(config.d_model, config.eps)

    @classmethod
    def config_to_hf(cls, config: LlamaConfig) -> dict[str, Any]:
        return super().config_to_hf(config) | {"hidden_act": "gelu_pytorch_tanh"}
