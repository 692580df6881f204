"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners").

GPT-1 with the norm moved to the input of each sub-block and one more norm at the end, so that
nothing but sums lies on the residual path; twice the context, and more of everything. GPT-3 (Brown
et al., 2020, arXiv:2005.14165) is this model again, larger, with twice the context.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import FeedForward, gelu_tanh
from llm_anatomy.models.checks import check_context, check_keep, check_options, check_tokens
from llm_anatomy.models.gpt1 import block_rules, with_prefix
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The smallest GPT-2 unless told otherwise.

    The three dropouts act on the sum of the embeddings, on the attention weights, and on what each
    sub-block adds to the residual stream.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 50_257
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int = 3072
    n_positions: int = 1024
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    dropout: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)


GPT2_SMALL = GPT2Config()
GPT2_MEDIUM = GPT2Config(n_layers=24, n_heads=16, d_model=1024, d_ff=4096)
GPT2_LARGE = GPT2Config(n_layers=36, n_heads=20, d_model=1280, d_ff=5120)
GPT2_XL = GPT2Config(n_layers=48, n_heads=25, d_model=1600, d_ff=6400)

GPT3 = GPT2Config(n_layers=96, n_heads=96, d_model=12_288, d_ff=49_152, n_positions=2048)
"""The largest GPT-3 (its table 2.1). Its one change of architecture is not made here: every other
layer of GPT-3 looks at a band of positions only, as in the Sparse Transformer."""


class GPT2Block(nn.Module):
    """Normalise, attend, add; normalise, feed forward, add."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, dropout=config.attention_dropout
        )
        self.ffn_norm = nn.LayerNorm(config.d_model, config.eps)
        self.ffn = FeedForward(config.d_model, config.d_ff, gelu_tanh)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B 1 T _"] | None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, cache=cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class GPT2(Pretrained):
    """A causal decoder from token ids to logits: `forward` composes `embed`, `hidden`, `logits`."""

    model_type = "gpt2"
    hf_ignored = (".attn.bias", ".attn.masked_bias")  # old files store the causal mask as `bias`

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.n_positions, config.d_model)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, config.eps)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # what ends in the residual stream starts smaller, by its 2L summands
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(
        self, tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B S"] | None = None, offset: int = 0
    ) -> Float[Tensor, "B T D"]:
        """Token vectors plus position vectors.

        Args:
            tokens: they stand at the positions `offset` to `offset + T - 1`.
            keep: True at real tokens, from position 0 on. Positions then count real tokens alone,
                so that padding on the left does not shift a text.
            offset: positions before these tokens, which a cache holds.

        Raises:
            ValueError: there is no token, an id lies outside the vocabulary or a position beyond
                the context, or `keep` has another shape.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.place(self.token_embedding(tokens), keep, offset)

    def place(
        self,
        x: Float[Tensor, "B T D"],
        keep: Bool[Tensor, "B S"] | None = None,
        offset: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Add position vectors to token vectors, or to others that stand in their place.

        Raises:
            ValueError: a position lies beyond the context, or `keep` has another shape.
        """
        end = offset + x.shape[1]
        positions = torch.arange(offset, end, device=x.device)  # (T,)
        if keep is not None:
            check_keep(keep, x.shape[0], end)
            positions = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, offset:]  # (B, T)
            end = int(positions.max()) + 1
        check_context(end, self.config.n_positions)
        return self.dropout(x + self.position_embedding(positions))

    def hidden(
        self,
        x: Float[Tensor, "B T D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks and the last norm over `x`, which follows whatever the caches hold."""
        past = len(caches[0]) if caches else 0
        T = x.shape[1]
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        if keep is not None:
            padding = masks.padding(keep)
            mask = padding if mask is None else mask & padding  # (B, 1, T, S)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask, cache)
        return self.norm(x)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Score every token of the vocabulary against `x`, with the embedding."""
        return x @ self.token_embedding.weight.T

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position.

        Args:
            tokens: those that follow what the caches hold.
            keep: True at real tokens, False at padding; one column for each position, those in the
                caches included.
            caches: one a layer, from `new_caches`.
        """
        past = len(caches[0]) if caches else 0
        return self.logits(self.hidden(self.embed(tokens, keep, past), keep, caches))

    def new_caches(self, capacity: int | None = None) -> list[KVCache]:
        """One empty cache a layer."""
        return [KVCache(capacity) for _ in self.blocks]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> GPT2Config:
        check_options(
            hf,
            {
                "activation_function": ("gelu_new",),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
                "tie_word_embeddings": (True,),
            },
        )
        return GPT2Config(
            vocab_size=hf["vocab_size"],
            n_layers=hf["n_layer"],
            n_heads=hf["n_head"],
            d_model=hf["n_embd"],
            d_ff=4 * hf["n_embd"] if hf.get("n_inner") is None else hf["n_inner"],
            n_positions=hf["n_positions"],
            embedding_dropout=hf.get("embd_pdrop", 0.1),
            attention_dropout=hf.get("attn_pdrop", 0.1),
            dropout=hf.get("resid_pdrop", 0.1),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    @staticmethod
    def config_to_hf(config: GPT2Config) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_embd": config.d_model,
            "n_inner": config.d_ff,
            "n_positions": config.n_positions,
            "embd_pdrop": config.embedding_dropout,
            "attn_pdrop": config.attention_dropout,
            "resid_pdrop": config.dropout,
            "layer_norm_epsilon": config.eps,
        }

    @staticmethod
    def hf_rules(config: GPT2Config) -> list[Rule]:
        rules: list[Rule] = [
            Rename("transformer.wte.weight", "token_embedding.weight"),
            Rename("transformer.wpe.weight", "position_embedding.weight"),
            Rename("transformer.ln_f.weight", "norm.weight"),
            Rename("transformer.ln_f.bias", "norm.bias"),
        ]
        for i in range(config.n_layers):
            rules += block_rules(f"transformer.h.{i}", f"blocks.{i}")
        return rules

    @staticmethod
    def hf_tied(config: GPT2Config) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"}

    def load_hf(self, state: Mapping[str, Tensor]) -> "GPT2":
        return super().load_hf(with_prefix(state))
