"""Qwen (Bai et al., 2023, arXiv:2309.16609), Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388).

Qwen2: LLaMA with biases for queries, keys and values. The first Qwen has the same layers; its
files, under names of their own, are read by code that came with them. Qwen3: LLaMA again, without
the biases, and each head normalises its queries and keys before they turn.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llm_anatomy.attention import MultiHeadAttention, Rotate
from llm_anatomy.models.llama import Llama, LlamaBlock, LlamaConfig
from llm_anatomy.norms import RMSNorm

QWEN_1_8B = LlamaConfig(
    vocab_size=151_936,
    n_layers=24,
    n_heads=16,
    n_kv_heads=16,
    d_model=2048,
    d_ff=5504,
    n_positions=8192,
)
QWEN2_0_5B = LlamaConfig(
    vocab_size=151_936,
    n_layers=24,
    n_heads=14,
    n_kv_heads=2,
    d_model=896,
    d_head=64,
    d_ff=4864,
    n_positions=131_072,
    rope_base=1e6,
    tied=True,
)
QWEN2_7B = LlamaConfig(
    vocab_size=152_064,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    d_model=3584,
    d_ff=18_944,
    n_positions=131_072,
    rope_base=1e6,
)
QWEN3_0_6B = LlamaConfig(
    vocab_size=151_936,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    d_model=1024,
    d_ff=3072,
    n_positions=40_960,
    rope_base=1e6,
    tied=True,
)
QWEN3_8B = LlamaConfig(
    vocab_size=151_936,
    n_layers=36,
    n_heads=32,
    n_kv_heads=8,
    d_model=4096,
    d_ff=12_288,
    n_positions=40_960,
    rope_base=1e6,
)


class Qwen2Block(LlamaBlock):
    """LLaMA's block with biases where its attention reads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for part in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            part.bias = nn.Parameter(part.weight.new_zeros(part.out_features))


class Qwen2(Llama):
    """LLaMA with the blocks of Qwen2."""

    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    hf_options: Mapping[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
    }
    block = Qwen2Block
    names = Llama.names | {f"self_attn.{p}_proj.bias": f"attention.{p}_proj.bias" for p in "qkv"}


class NormedAttention(MultiHeadAttention):
    """Each head's queries and keys get a norm, so that no score can grow without limit."""

    def __init__(self, d_model: int, n_heads: int, eps: float, **sizes: int | float | bool) -> None:
        super().__init__(d_model, n_heads, **sizes)
        self.q_norm = RMSNorm(self.d_head, eps)
        self.k_norm = RMSNorm(self.d_head, eps)

    def _project(
        self, x: Tensor, context: Tensor | None, rotate: Rotate | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x, context, rotate=None)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rotate is None else (rotate(q), rotate(k), v)


class Qwen3Block(LlamaBlock):
    """LLaMA's block with norms on queries and keys."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.attention = NormedAttention(
            config.d_model,
            config.n_heads,
            config.eps,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            bias=False,
            dropout=config.attention_dropout,
        )


class Qwen3(Llama):
    """LLaMA with the blocks of Qwen3."""

    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    hf_options = Qwen2.hf_options | {"attention_bias": (False,)}
    block = Qwen3Block
    names = Llama.names | {f"self_attn.{p}_norm.weight": f"attention.{p}_norm.weight" for p in "qk"}
