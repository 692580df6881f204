"""GPT (Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training").

The decoder of the Transformer without an encoder to attend to: learned positions, GELU in its tanh
form, and still a norm after each residual sum. Pre-trained as a language model, then fine-tuned to
each task.
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
from llm_anatomy.weights import Fused, Pretrained, Rename, Rule, State, check_fields


@dataclass(frozen=True, kw_only=True)
class GPT1Config:
    """The published model unless told otherwise; its feed-forward layers are 4 d_model wide.

    The three dropouts act on the sum of the embeddings, on the attention weights, and on what each
    sub-block adds to the residual stream.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 40_478
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    n_positions: int = 512
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    dropout: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)


GPT1_BASE = GPT1Config()


class GPT1Block(nn.Module):
    """Attend, add, normalise; feed forward, add, normalise."""

    def __init__(self, config: GPT1Config) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, dropout=config.attention_dropout
        )
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        self.ffn = FeedForward(config.d_model, 4 * config.d_model, gelu_tanh)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B 1 T _"],
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        attended = self.attention(x, mask=mask, cache=cache)
        x = self.attention_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class GPT1(Pretrained):
    """A causal decoder from token ids to logits: `forward` composes `embed`, `hidden`, `logits`."""

    model_type = "openai-gpt"
    hf_ignored = (".attn.bias", "position_ids")  # old files store the causal mask as `bias`

    def __init__(self, config: GPT1Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.n_positions, config.d_model)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(GPT1Block(config) for _ in range(config.n_layers))
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
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
        """Run the blocks over `x`, which follows whatever the caches hold."""
        past = len(caches[0]) if caches else 0
        T = x.shape[1]
        mask = masks.causal(T, past + T, device=x.device)
        if keep is not None:
            mask = mask & masks.padding(keep)  # (B, 1, T, S)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask, cache)
        return x

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
    def config_from_hf(hf: Mapping[str, Any]) -> GPT1Config:
        check_options(hf, {"afn": ("gelu",), "tie_word_embeddings": (True,)})
        return GPT1Config(
            vocab_size=hf["vocab_size"],
            n_layers=hf["n_layer"],
            n_heads=hf["n_head"],
            d_model=hf["n_embd"],
            n_positions=hf["n_positions"],
            embedding_dropout=hf.get("embd_pdrop", 0.1),
            attention_dropout=hf.get("attn_pdrop", 0.1),
            dropout=hf.get("resid_pdrop", 0.1),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    @staticmethod
    def config_to_hf(config: GPT1Config) -> dict[str, Any]:
        return {
            "architectures": ["OpenAIGPTLMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_embd": config.d_model,
            "n_positions": config.n_positions,
            "afn": "gelu",  # their name for the tanh form
            "embd_pdrop": config.embedding_dropout,
            "attn_pdrop": config.attention_dropout,
            "resid_pdrop": config.dropout,
            "layer_norm_epsilon": config.eps,
        }

    @staticmethod
    def hf_rules(config: GPT1Config) -> list[Rule]:
        rules: list[Rule] = [
            Rename("transformer.tokens_embed.weight", "token_embedding.weight"),
            Rename("transformer.positions_embed.weight", "position_embedding.weight"),
        ]
        for i in range(config.n_layers):
            rules += block_rules(f"transformer.h.{i}", f"blocks.{i}")
        return rules

    @staticmethod
    def hf_tied(config: GPT1Config) -> dict[str, str]:
        return {"lm_head.weight": "transformer.tokens_embed.weight"}

    def load_hf(self, state: Mapping[str, Tensor]) -> "GPT1":
        return super().load_hf(with_prefix(state))


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """One block: OpenAI stores its linear layers as (in, out), queries, keys and values in one."""
    qkv = [f"{ours}.attention.{name}_proj" for name in "qkv"]
    rules: list[Rule] = [
        Fused(
            f"{theirs}.attn.c_attn.weight",
            tuple(f"{name}.weight" for name in qkv),
            "i (r o) -> r o i",
            "r o i -> (r o) i",
            (1, 1, 1),
        ),
        Fused(
            f"{theirs}.attn.c_attn.bias",
            tuple(f"{name}.bias" for name in qkv),
            "(r o) -> r o",
            "r o -> (r o)",
            (1, 1, 1),
        ),
    ]
    for their_name, our_name in (("ln_1", "attention_norm"), ("ln_2", "ffn_norm")):
        rules += [
            Rename(f"{theirs}.{their_name}.{kind}", f"{ours}.{our_name}.{kind}")
            for kind in ("weight", "bias")
        ]
    for their_name, our_name in (
        ("attn.c_proj", "attention.o_proj"),
        ("mlp.c_fc", "ffn.up_proj"),
        ("mlp.c_proj", "ffn.down_proj"),
    ):
        rules += [
            Rename(f"{theirs}.{their_name}.weight", f"{ours}.{our_name}.weight", "i o -> o i"),
            Rename(f"{theirs}.{their_name}.bias", f"{ours}.{our_name}.bias"),
        ]
    return rules


def with_prefix(state: Mapping[str, Tensor]) -> State:
    """Name every tensor as the language model does: OpenAI's files lack the `transformer.`."""
    if any(name.startswith("transformer.") for name in state):
        return dict(state)
    return {name if "lm_head" in name else f"transformer.{name}": t for name, t in state.items()}
