"""The Transformer (Vaswani et al., 2017, arXiv:1706.03762): an encoder and a decoder of attention.

The wiring is the paper's: sinusoidal positions, a norm after each residual sum (post-norm), ReLU,
one embedding shared by both sides and the output. Checkpoints are those of Marian, the translation
models of the OPUS-MT project, which have this architecture. Below the paper's blocks stand their
pre-norm twins, the placement that later models settled on (Xiong et al., 2020, arXiv:2002.04745).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import Activation, FeedForward
from llm_anatomy.models.checks import check_context, check_options, check_tokens, padding_mask
from llm_anatomy.positions import sinusoidal
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields

ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The paper's base model unless told otherwise (table 3; shared vocabulary of section 5.1).

    `scaled_embedding` multiplies embeddings by the square root of d_model (section 3.4).
    `interleaved` is the layout of the sinusoids; `activation` is "relu", or "silu" as in most
    OPUS-MT checkpoints. Reading the token `pad_id` does not train its vector, as in Marian, which
    also starts its decoder with this token.

    Raises:
        ValueError: a field has another type than it states or is negative, the activation is
            unknown, or `pad_id` lies outside the vocabulary.
    """

    vocab_size: int = 37_000
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    n_heads: int = 8
    d_model: int = 512
    d_ff: int = 2048
    n_positions: int = 512
    dropout: float = 0.1
    activation: str = "relu"
    scaled_embedding: bool = True
    interleaved: bool = True
    pad_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}"
            )
        if self.pad_id is not None and self.pad_id >= self.vocab_size:
            raise ValueError(f"pad_id ({self.pad_id}) must be below vocab_size ({self.vocab_size})")

    def attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(self.d_model, self.n_heads)

    def feed_forward(self) -> FeedForward:
        return FeedForward(self.d_model, self.d_ff, ACTIVATIONS[self.activation])


TRANSFORMER_BASE = TransformerConfig()
TRANSFORMER_BIG = TransformerConfig(n_heads=16, d_model=1024, d_ff=4096, dropout=0.3)

DecoderCache = list[tuple[KVCache, KVCache]]


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward; each is added to its input and the sum is normalised."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = config.attention()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.ffn = config.feed_forward()
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "#B 1 #S S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DecoderBlock(nn.Module):
    """Masked self-attention, cross-attention to the encoder's output, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = config.attention()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = config.attention()
        self.cross_norm = nn.LayerNorm(config.d_model)
        self.ffn = config.feed_forward()
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B C D"],
        mask: Bool[Tensor, "1 1 T _"] | None,
        memory_mask: Bool[Tensor, "B 1 1 S"] | None = None,
        caches: tuple[KVCache | None, KVCache | None] = (None, None),
    ) -> Float[Tensor, "B T D"]:
        own, cross = caches
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask, cache=own)))
        seen = self.cross_attention(x, memory, mask=memory_mask, cache=cross)
        x = self.cross_norm(x + self.dropout(seen))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class PreNormEncoderBlock(EncoderBlock):
    """The same parts, wired so that nothing but sums lies on the residual path."""

    def forward(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "#B 1 #S S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class PreNormDecoderBlock(DecoderBlock):
    """The same parts, wired so that nothing but sums lies on the residual path."""

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B C D"],
        mask: Bool[Tensor, "1 1 T _"] | None,
        memory_mask: Bool[Tensor, "B 1 1 S"] | None = None,
        caches: tuple[KVCache | None, KVCache | None] = (None, None),
    ) -> Float[Tensor, "B T D"]:
        own, cross = caches
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, cache=own))
        seen = self.cross_attention(self.cross_norm(x), memory, mask=memory_mask, cache=cross)
        x = x + self.dropout(seen)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(Pretrained):
    """Encoder-decoder from token ids to logits; `forward` composes `encode` and `decode`.

    Both sides read vectors as well, such as those that `embed` makes of tokens: `encode` composes
    `embed` and `encoder_hidden`, `hidden` composes `embed` and `decoder_hidden`. `place` gives
    other vectors their positions.
    """

    model_type = "marian"
    hf_ignored = ("embed_positions.weight",)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, config.pad_id)
        table = sinusoidal(config.n_positions, config.d_model, interleaved=config.interleaved)
        self.register_buffer("positions", table, persistent=False)
        self.encoder = nn.ModuleList(self.encoder_block() for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(self.decoder_block() for _ in range(config.n_decoder_layers))
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size))  # 0 in the paper
        self.dropout = nn.Dropout(config.dropout)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        nn.init.normal_(self.token_embedding.weight, std=config.d_model**-0.5)

    def encoder_block(self) -> nn.Module:
        return EncoderBlock(self.config)

    def decoder_block(self) -> nn.Module:
        return DecoderBlock(self.config)

    def embed(
        self, tokens: Int[Tensor, "B T"], offset: int = 0, name: str = "the source"
    ) -> Float[Tensor, "B T D"]:
        """Token vectors plus the sinusoids of positions `offset` to `offset + T - 1`.

        Raises:
            ValueError: there is no token, an id lies outside the vocabulary, or a position beyond
                the table.
        """
        check_tokens(tokens, self.config.vocab_size, name)
        x = self.token_embedding(tokens)
        if self.config.scaled_embedding:
            x = x * self.config.d_model**0.5
        return self.place(x, offset)

    def place(self, x: Float[Tensor, "B T D"], offset: int = 0) -> Float[Tensor, "B T D"]:
        """Add the sinusoids of positions `offset` to `offset + T - 1`.

        Raises:
            ValueError: a position lies beyond the table.
        """
        end = offset + x.shape[1]
        check_context(end, self.config.n_positions)
        return self.dropout(x + self.positions[offset:end])

    def encoder_hidden(
        self, x: Float[Tensor, "B S D"], keep: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Run the encoder over vectors; `keep` is True at real ones."""
        mask = padding_mask(keep, *x.shape[:2])
        for block in self.encoder:
            x = block(x, mask)
        return x

    def encode(
        self, source: Int[Tensor, "B S"], keep: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Read the source; `keep` is True at its real tokens."""
        return self.encoder_hidden(self.embed(source), keep)

    def decoder_hidden(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B S D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: DecoderCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the decoder over vectors, which follow whatever the caches already hold."""
        past = len(caches[0][0]) if caches else 0
        T = x.shape[1]
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        memory_mask = padding_mask(keep, *memory.shape[:2])
        new = memory if past == 0 else memory[:, :0]  # the caches hold its keys and values by now
        for block, pair in zip(self.decoder, caches or self._no_caches(), strict=True):
            x = block(x, new, mask, memory_mask, pair)
        return x

    def hidden(
        self,
        target: Int[Tensor, "B T"],
        memory: Float[Tensor, "B S D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: DecoderCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the decoder over `target`, which follows whatever the caches already hold."""
        past = len(caches[0][0]) if caches else 0
        return self.decoder_hidden(self.embed(target, past, "the target"), memory, keep, caches)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Score every token of the vocabulary against `x`, with the shared embedding."""
        return x @ self.token_embedding.weight.T + self.logits_bias

    def decode(
        self,
        target: Int[Tensor, "B T"],
        memory: Float[Tensor, "B S D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: DecoderCache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position of `target`."""
        return self.logits(self.hidden(target, memory, keep, caches))

    def forward(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        keep: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        return self.decode(target, self.encode(source, keep), keep)

    def new_caches(self, capacity: int | None = None) -> DecoderCache:
        """One empty pair a decoder layer: own keys and values, and those of the memory."""
        return [(KVCache(capacity), KVCache()) for _ in self.decoder]

    def _no_caches(self) -> list[tuple[None, None]]:
        return [(None, None) for _ in self.decoder]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> TransformerConfig:
        check_options(
            hf,
            {
                "attention_dropout": (0.0,),
                "activation_dropout": (0.0,),
                "encoder_layerdrop": (0.0,),
                "decoder_layerdrop": (0.0,),
                "normalize_before": (False,),
                "normalize_embedding": (False,),
                "add_final_layer_norm": (False,),
                "static_position_embeddings": (True,),
                "share_encoder_decoder_embeddings": (True,),
                "tie_word_embeddings": (True,),
            },
        )
        for ours, theirs in (("attention_heads", "n_heads"), ("ffn_dim", "d_ff")):
            if hf[f"encoder_{ours}"] != hf[f"decoder_{ours}"]:
                raise ValueError(f"encoder and decoder must have the same {theirs}")
        if hf.get("decoder_vocab_size", hf["vocab_size"]) != hf["vocab_size"]:
            raise ValueError("source and target must share one vocabulary")
        activation = hf["activation_function"]
        return TransformerConfig(
            vocab_size=hf["vocab_size"],
            n_encoder_layers=hf["encoder_layers"],
            n_decoder_layers=hf["decoder_layers"],
            n_heads=hf["encoder_attention_heads"],
            d_model=hf["d_model"],
            d_ff=hf["encoder_ffn_dim"],
            n_positions=hf["max_position_embeddings"],
            dropout=hf["dropout"],
            activation="silu" if activation == "swish" else activation,
            scaled_embedding=hf["scale_embedding"],
            interleaved=False,
            pad_id=hf["pad_token_id"],
        )

    @staticmethod
    def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
        if config.interleaved:
            raise ValueError("Marian's checkpoints need sinusoids with interleaved=False")
        if config.pad_id is None:
            raise ValueError("Marian's checkpoints need a pad_id, by custom the last token id")
        return {
            "architectures": ["MarianMTModel"],
            "vocab_size": config.vocab_size,
            "decoder_vocab_size": config.vocab_size,
            "encoder_layers": config.n_encoder_layers,
            "decoder_layers": config.n_decoder_layers,
            "encoder_attention_heads": config.n_heads,
            "decoder_attention_heads": config.n_heads,
            "d_model": config.d_model,
            "encoder_ffn_dim": config.d_ff,
            "decoder_ffn_dim": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "dropout": config.dropout,
            "activation_function": config.activation,
            "scale_embedding": config.scaled_embedding,
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
            "pad_token_id": config.pad_id,
            "decoder_start_token_id": config.pad_id,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
        }

    @staticmethod
    def hf_rules(config: TransformerConfig) -> list[Rule]:
        def both(theirs: str, ours: str) -> list[Rule]:
            return [Rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]

        def attention(theirs: str, ours: str) -> list[Rule]:
            names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj"}
            names["out_proj"] = "o_proj"
            return [r for t, o in names.items() for r in both(f"{theirs}.{t}", f"{ours}.{o}")]

        def layer(theirs: str, ours: str) -> list[Rule]:
            return [
                *attention(f"{theirs}.self_attn", f"{ours}.attention"),
                *both(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm"),
                *both(f"{theirs}.fc1", f"{ours}.ffn.up_proj"),
                *both(f"{theirs}.fc2", f"{ours}.ffn.down_proj"),
                *both(f"{theirs}.final_layer_norm", f"{ours}.ffn_norm"),
            ]

        rules: list[Rule] = [
            Rename("model.shared.weight", "token_embedding.weight"),
            Rename("final_logits_bias", "logits_bias", "1 v -> v"),
        ]
        for i in range(config.n_encoder_layers):
            rules += layer(f"model.encoder.layers.{i}", f"encoder.{i}")
        for i in range(config.n_decoder_layers):
            theirs, ours = f"model.decoder.layers.{i}", f"decoder.{i}"
            rules += layer(theirs, ours)
            rules += attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention")
            rules += both(f"{theirs}.encoder_attn_layer_norm", f"{ours}.cross_norm")
        return rules

    @staticmethod
    def hf_tied(config: TransformerConfig) -> dict[str, str]:
        copies = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
        return {f"{name}.weight": "model.shared.weight" for name in copies}


class PreNormTransformer(Transformer):
    """The Transformer with pre-norm blocks and one more norm at the end of each stack.

    No checkpoint of this exact model exists in the Hugging Face formats, so it cannot be loaded or
    saved; the parts are those of `Transformer`, and PyTorch's `nn.Transformer(norm_first=True)` is
    the reference.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.encoder_norm = nn.LayerNorm(config.d_model)
        self.decoder_norm = nn.LayerNorm(config.d_model)

    def encoder_block(self) -> nn.Module:
        return PreNormEncoderBlock(self.config)

    def decoder_block(self) -> nn.Module:
        return PreNormDecoderBlock(self.config)

    def encoder_hidden(
        self, x: Float[Tensor, "B S D"], keep: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        return self.encoder_norm(super().encoder_hidden(x, keep))

    def decoder_hidden(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B S D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: DecoderCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        return self.decoder_norm(super().decoder_hidden(x, memory, keep, caches))

    @staticmethod
    def hf_rules(config: TransformerConfig) -> list[Rule]:
        raise ValueError("a pre-norm Transformer has no Hugging Face checkpoint format")
