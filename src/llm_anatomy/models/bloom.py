"""BLOOM (BigScience, 2022, arXiv:2211.05100).

GPT-2 without position vectors: each head takes a fixed amount off the score for each position of
distance (ALiBi, Press et al., 2022, arXiv:2108.12409), so that no text is too long to be read. One
more norm follows the embedding, for a more stable training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import FeedForward, gelu_tanh
from llm_anatomy.models.checks import check_keep, check_options, check_tokens
from llm_anatomy.positions import alibi_bias
from llm_anatomy.weights import Fused, Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """The BLOOM of 560 million parameters unless told otherwise.

    The two dropouts act on the attention weights, and on what each sub-block adds to the residual
    stream. The feed-forward layers are four times as wide as the model.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 250_880
    n_layers: int = 24
    n_heads: int = 16
    d_model: int = 1024
    attention_dropout: float = 0.0
    dropout: float = 0.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)


BLOOM_560M = BloomConfig()
BLOOM_1B1 = BloomConfig(d_model=1536)
BLOOM_1B7 = BloomConfig(d_model=2048)
BLOOM_3B = BloomConfig(n_layers=30, n_heads=32, d_model=2560)
BLOOM_7B1 = BloomConfig(n_layers=30, n_heads=32, d_model=4096)
BLOOM_176B = BloomConfig(n_layers=70, n_heads=112, d_model=14_336)


class BloomBlock(nn.Module):
    """Normalise, attend, add; normalise, feed forward, add."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, dropout=config.attention_dropout
        )
        self.ffn_norm = nn.LayerNorm(config.d_model, config.eps)
        self.ffn = FeedForward(config.d_model, 4 * config.d_model, gelu_tanh)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B 1 #T _"] | None,
        bias: Float[Tensor, "1 H T _"],
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        y = self.attention(self.attention_norm(x), mask=mask, bias=bias, cache=cache)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Bloom(Pretrained):
    """A causal decoder from token ids to logits: `forward` composes `embed`, `hidden`, `logits`."""

    model_type = "bloom"

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model, config.eps)
        self.blocks = nn.ModuleList(BloomBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, config.eps)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Token vectors, normalised; where they stand enters in each attention.

        Raises:
            ValueError: there is no token, or an id lies outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.embedding_norm(self.token_embedding(tokens))

    def hidden(
        self,
        x: Float[Tensor, "B T D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks and the last norm over `x`, which follows whatever the caches hold.

        Padding on the left shifts a text but no distance within it.

        Args:
            x: token vectors.
            keep: True at real tokens, from position 0 on.
            caches: one a layer, from `new_caches`.

        Raises:
            ValueError: `keep` has another shape.
        """
        past = len(caches[0]) if caches else 0
        B, T, _ = x.shape
        bias = alibi_bias(self.config.n_heads, T, past + T).to(x)  # (1, H, T, S)
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        if keep is not None:
            check_keep(keep, B, past + T)
            padding = masks.padding(keep)
            mask = padding if mask is None else mask & padding  # (B, 1, T, S)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask, bias, cache)
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
        return self.logits(self.hidden(self.embed(tokens), keep, caches))

    def new_caches(self, capacity: int | None = None) -> list[KVCache]:
        """One empty cache a layer."""
        return [KVCache(capacity) for _ in self.blocks]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> BloomConfig:
        check_options(hf, {"apply_residual_connection_post_layernorm": (False,)})
        return BloomConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["n_layer"] if "n_layer" in hf else hf["num_hidden_layers"],
            n_heads=hf["n_head"] if "n_head" in hf else hf["num_attention_heads"],
            d_model=hf["hidden_size"] if "hidden_size" in hf else hf["n_embed"],
            attention_dropout=hf.get("attention_dropout", 0.0),
            dropout=hf.get("hidden_dropout", 0.0),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    @staticmethod
    def config_to_hf(config: BloomConfig) -> dict[str, Any]:
        return {
            "architectures": ["BloomForCausalLM"],
            "vocab_size": config.vocab_size,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "hidden_size": config.d_model,
            "attention_dropout": config.attention_dropout,
            "hidden_dropout": config.dropout,
            "layer_norm_epsilon": config.eps,
        }

    @staticmethod
    def hf_rules(config: BloomConfig) -> list[Rule]:
        """The file lays a head's query, key and value side by side, head after head."""
        names = {
            "word_embeddings.weight": "token_embedding.weight",
            **{f"word_embeddings_layernorm.{p}": f"embedding_norm.{p}" for p in ("weight", "bias")},
            **{f"ln_f.{p}": f"norm.{p}" for p in ("weight", "bias")},
        }
        rules: list[Rule] = [Rename(f"transformer.{old}", new) for old, new in names.items()]
        parts = {
            "input_layernorm": "attention_norm",
            "self_attention.dense": "attention.o_proj",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn.up_proj",
            "mlp.dense_4h_to_h": "ffn.down_proj",
        }
        for i in range(config.n_layers):
            theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
            for p, rest in (("weight", " i"), ("bias", "")):
                rules += [Rename(f"{theirs}.{a}.{p}", f"{ours}.{b}.{p}") for a, b in parts.items()]
                rules.append(
                    Fused(
                        f"{theirs}.self_attention.query_key_value.{p}",
                        tuple(f"{ours}.attention.{part}_proj.{p}" for part in "qkv"),
                        split=f"(h r e){rest} -> r h e{rest}",
                        merge=f"r h e{rest} -> (r h e){rest}",
                        sizes=(1, 1, 1),
                        axes={"h": config.n_heads},
                    )
                )
        return rules

    @staticmethod
    def hf_tied(config: BloomConfig) -> dict[str, str]:
        return {"lm_head.weight": "transformer.word_embeddings.weight"}
