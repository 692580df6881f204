"""Falcon (Almazrouei et al., 2023, arXiv:2311.16867).

LLaMA's rotary positions with GPT-2's norms and GELU, no bias in any matrix, and each block's two
halves side by side: attention and feed-forward read the same input, and one sum adds both. At 7B
all heads share one key and one value (multi-query attention, Shazeer, 2019, arXiv:1911.02150); at
40B and 180B eight groups of heads have one each, and each half has a norm of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_anatomy.attention import MultiHeadAttention, Rotate
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import FeedForward
from llm_anatomy.models.checks import check_options
from llm_anatomy.models.llama import Llama, LlamaConfig, rope_base_from_hf
from llm_anatomy.weights import Fused, Rename, Rule


@dataclass(frozen=True, kw_only=True)
class FalconConfig(LlamaConfig):
    """Falcon 7B unless told otherwise.

    `two_norms` gives each half of a block its own norm; otherwise they share one. `dropout` acts on
    what a block adds to the residual stream. A `tied` model scores the vocabulary with its
    embedding.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 65_024
    n_heads: int = 71
    n_kv_heads: int = 1
    d_model: int = 4544
    d_head: int = 64
    d_ff: int = 18_176
    two_norms: bool = False
    dropout: float = 0.0
    tied: bool = True
    eps: float = 1e-5


FALCON_7B = FalconConfig()
FALCON_40B = FalconConfig(
    n_layers=60, n_heads=128, n_kv_heads=8, d_model=8192, d_ff=32_768, two_norms=True
)
FALCON_180B = FalconConfig(
    n_layers=80, n_heads=232, n_kv_heads=8, d_model=14_848, d_ff=59_392, two_norms=True
)


class FalconBlock(nn.Module):
    """Normalise; attend and feed forward side by side; add both."""

    def __init__(self, config: FalconConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        if config.two_norms:
            self.ffn_norm = nn.LayerNorm(config.d_model, config.eps)
        self.attention = MultiHeadAttention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            bias=False,
        )
        self.ffn = FeedForward(config.d_model, config.d_ff, F.gelu, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.two_norms = config.two_norms

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B 1 #T _"] | None,
        rotate: Rotate,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        read = self.attention_norm(x)
        attended = self.attention(read, mask=mask, rotate=rotate, cache=cache)
        return x + self.dropout(attended + self.ffn(self.ffn_norm(x) if self.two_norms else read))


class Falcon(Llama):
    """LLaMA with the blocks of Falcon and a LayerNorm at the end."""

    model_type = "falcon"
    block = FalconBlock

    def __init__(self, config: FalconConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.d_model, config.eps)

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> FalconConfig:
        check_options(
            hf,
            {
                "activation": ("gelu",),
                "alibi": (False,),
                "bias": (False,),
                "parallel_attn": (True,),
            },
        )
        grouped, n_heads = hf.get("new_decoder_architecture", False), hf["num_attention_heads"]
        if not grouped:
            check_options(hf, {"multi_query": (True,)})
        n_norms = hf.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
        return FalconConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=(hf.get("num_kv_heads") or n_heads) if grouped else 1,
            d_model=hf["hidden_size"],
            d_head=hf["hidden_size"] // n_heads,
            d_ff=hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
            two_norms=grouped and n_norms == 2,
            n_positions=hf.get("max_position_embeddings", 2048),
            rope_base=rope_base_from_hf(hf),
            dropout=hf.get("hidden_dropout", 0.0),
            tied=hf.get("tie_word_embeddings", True),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    @staticmethod
    def config_to_hf(config: FalconConfig) -> dict[str, Any]:
        grouped = config.two_norms or config.n_kv_heads > 1
        return {
            "architectures": ["FalconForCausalLM"],
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "new_decoder_architecture": grouped,
            "multi_query": True,
            "parallel_attn": True,
            "num_kv_heads": config.n_kv_heads,
            "num_ln_in_parallel_attn": (2 if config.two_norms else 1) if grouped else None,
            "hidden_size": config.d_model,
            "ffn_hidden_size": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "hidden_dropout": config.dropout,
            "tie_word_embeddings": config.tied,
            "layer_norm_epsilon": config.eps,
        }

    @staticmethod
    def hf_rules(config: FalconConfig) -> list[Rule]:
        """The file lays a group's queries, its key and its value side by side."""
        rules: list[Rule] = [
            Rename("transformer.word_embeddings.weight", "token_embedding.weight"),
            Rename("transformer.ln_f.weight", "norm.weight"),
            Rename("transformer.ln_f.bias", "norm.bias"),
        ]
        if not config.tied:
            rules.append(Rename("lm_head.weight", "lm_head.weight"))
        norms = {"input_layernorm": "attention_norm"}
        if config.two_norms:
            norms = {"ln_attn": "attention_norm", "ln_mlp": "ffn_norm"}
        parts = {
            "self_attention.dense.weight": "attention.o_proj.weight",
            "mlp.dense_h_to_4h.weight": "ffn.up_proj.weight",
            "mlp.dense_4h_to_h.weight": "ffn.down_proj.weight",
            **{f"{a}.{p}": f"{b}.{p}" for a, b in norms.items() for p in ("weight", "bias")},
        }
        for i in range(config.n_layers):
            theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
            rules += [Rename(f"{theirs}.{a}", f"{ours}.{b}") for a, b in parts.items()]
            rules.append(
                Fused(
                    f"{theirs}.self_attention.query_key_value.weight",
                    tuple(f"{ours}.attention.{part}_proj.weight" for part in "qkv"),
                    split="(g r e) i -> r g e i",
                    merge="r g e i -> (g r e) i",
                    sizes=(config.n_heads // config.n_kv_heads, 1, 1),
                    axes={"g": config.n_kv_heads},
                )
            )
        return rules

    @staticmethod
    def hf_tied(config: FalconConfig) -> dict[str, str]:
        embedding = "transformer.word_embeddings.weight"
        return {"lm_head.weight": embedding} if config.tied else {}
