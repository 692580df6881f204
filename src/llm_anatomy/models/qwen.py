"""Qwen (Bai et al., 2023, arXiv:2309.16609), Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388).

Qwen2: LLaMA with biases for queries, keys and values. The first Qwen has the same layers; its
files, under names of their own, are read by code that came with them. Qwen3: LLaMA again, without
the biases, and each head normalises its queries and keys before they turn.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

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


class NormedHeads(nn.Module):
    """A projection to heads, each of which gets a norm, so that no score can grow without limit."""

    def __init__(self, linear: nn.Linear, d_head: int, eps: float) -> None:
        super().__init__()
        self.linear = linear
        self.norm = RMSNorm(d_head, eps)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HE"]:
        heads = self.linear(x).unflatten(-1, (-1, len(self.norm.weight)))  # (B, T, H, E)
        return self.norm(heads).flatten(2)


class Qwen3Block(LlamaBlock):
    """LLaMA's block with norms on queries and keys."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for part in ("q_proj", "k_proj"):
            linear = getattr(self.attention, part)
            setattr(self.attention, part, NormedHeads(linear, config.d_head, config.eps))


class Qwen3(Llama):
    """LLaMA with the blocks of Qwen3."""

    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    hf_options = Qwen2.hf_options | {"attention_bias": (False,)}
    block = Qwen3Block
    names = Llama.names | {
        f"self_attn.{part}_{theirs}.weight": f"attention.{part}_proj.{ours}.weight"
        for part in "qk"
        for theirs, ours in (("proj", "linear"), ("norm", "norm"))
    }
