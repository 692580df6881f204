"""BART (Lewis et al., 2020, arXiv:1910.13461): the Transformer, trained to repair spoilt text.

Positions are learned, the sum of the embeddings is normalised, and GELU replaces ReLU; the norms
still follow the residual sums. One embedding serves both sides and the output.
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
from llm_anatomy.feedforward import FeedForward
from llm_anatomy.models.checks import check_context, check_options, check_tokens, padding_mask
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields

OFFSET = 2
"""The first position has the third vector: as in RoBERTa, numbers start after the padding id, 1."""


@dataclass(frozen=True, kw_only=True)
class BartConfig:
    """BART-base unless told otherwise.

    Three dropouts act on what is added to the residual stream and on the embeddings (`dropout`), on
    the attention weights, and inside the feed-forward layers. Reading the token `pad_id` does not
    train its vector; `start_id` starts the decoder, and is the token that ends a text.

    Raises:
        ValueError: a field has another type than it states or is negative, or one of the two ids
            lies outside the vocabulary.
    """

    vocab_size: int = 50_265
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    n_heads: int = 12
    d_model: int = 768
    d_ff: int = 3072
    n_positions: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.1
    pad_id: int = 1
    start_id: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("pad_id", "start_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be below vocab_size ({self.vocab_size})"
                )

    def attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(self.d_model, self.n_heads, dropout=self.attention_dropout)

    def feed_forward(self) -> FeedForward:
        return FeedForward(self.d_model, self.d_ff, F.gelu, dropout=self.ffn_dropout)


BART_BASE = BartConfig()
BART_LARGE = BartConfig(
    n_encoder_layers=12, n_decoder_layers=12, n_heads=16, d_model=1024, d_ff=4096
)

DecoderCache = list[tuple[KVCache, KVCache]]


class BartInput(nn.Module):
    """Token vectors plus the vectors of their positions, normalised; each side has its own."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.n_positions = config.n_positions
        self.position_embedding = nn.Embedding(config.n_positions + OFFSET, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T D"], past: int = 0) -> Float[Tensor, "B T D"]:
        """Place `x` at the positions `past` to `past + T - 1`.

        Raises:
            ValueError: a position lies beyond the table.
        """
        end = past + x.shape[1]
        check_context(end, self.n_positions)
        positions = torch.arange(past, end, device=x.device) + OFFSET  # (T,)
        return self.dropout(self.norm(x + self.position_embedding(positions)))


class BartEncoderBlock(nn.Module):
    """Self-attention, then feed-forward; each is added to its input and the sum is normalised."""

    def __init__(self, config: BartConfig) -> None:
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


class BartDecoderBlock(nn.Module):
    """Masked self-attention, cross-attention to the encoder's output, then feed-forward."""

    def __init__(self, config: BartConfig) -> None:
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


class Bart(Pretrained):
    """Encoder-decoder from token ids to logits; `forward` composes `encode` and `decode`.

    Both sides read vectors as well, such as those that `embed` makes of tokens: `encode` composes
    `embed` and `encoder_hidden`, `hidden` composes `embed` and `decoder_hidden`.
    """

    model_type = "bart"

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, config.pad_id)
        self.encoder_input = BartInput(config)
        self.encoder = nn.ModuleList(
            BartEncoderBlock(config) for _ in range(config.n_encoder_layers)
        )
        self.decoder_input = BartInput(config)
        self.decoder = nn.ModuleList(
            BartDecoderBlock(config) for _ in range(config.n_decoder_layers)
        )
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size))  # not trained
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.zeros_(self.token_embedding.weight[config.pad_id])

    def embed(self, tokens: Int[Tensor, "B T"], name: str = "the source") -> Float[Tensor, "B T D"]:
        """Token vectors; each side of the model adds positions of its own.

        Raises:
            ValueError: there is no token, or an id lies outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size, name)
        return self.token_embedding(tokens)

    def encoder_hidden(
        self, x: Float[Tensor, "B S D"], keep: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Run the encoder over vectors; `keep` is True at real ones."""
        mask = padding_mask(keep, *x.shape[:2])
        x = self.encoder_input(x)
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
        x = self.decoder_input(x, past)
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        memory_mask = padding_mask(keep, *memory.shape[:2])
        new = memory if past == 0 else memory[:, :0]  # the caches hold its keys and values by now
        no_caches = [(None, None)] * len(self.decoder)
        for block, pair in zip(self.decoder, caches or no_caches, strict=True):
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
        return self.decoder_hidden(self.embed(target, "the target"), memory, keep, caches)

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

    def target_of(self, labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """What the decoder reads to predict `labels`: a start token, then all labels but the last.

        Positions without a label, -100, become padding.
        """
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = self.config.start_id
        return shifted.masked_fill(shifted == -100, self.config.pad_id)

    def new_caches(self, capacity: int | None = None) -> DecoderCache:
        """One empty pair a decoder layer: own keys and values, and those of the memory."""
        return [(KVCache(capacity), KVCache()) for _ in self.decoder]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> BartConfig:
        check_options(
            hf,
            {
                "activation_function": ("gelu",),
                "scale_embedding": (False,),
                "normalize_before": (False,),
                "normalize_embedding": (True,),
                "add_final_layer_norm": (False,),
                "static_position_embeddings": (False,),
                "encoder_layerdrop": (0.0,),
                "decoder_layerdrop": (0.0,),
                "tie_word_embeddings": (True,),
            },
        )
        for theirs, ours in (("attention_heads", "n_heads"), ("ffn_dim", "d_ff")):
            if hf[f"encoder_{theirs}"] != hf[f"decoder_{theirs}"]:
                raise ValueError(f"encoder and decoder must have the same {ours}")
        return BartConfig(
            vocab_size=hf["vocab_size"],
            n_encoder_layers=hf["encoder_layers"],
            n_decoder_layers=hf["decoder_layers"],
            n_heads=hf["encoder_attention_heads"],
            d_model=hf["d_model"],
            d_ff=hf["encoder_ffn_dim"],
            n_positions=hf["max_position_embeddings"],
            dropout=hf.get("dropout", 0.1),
            attention_dropout=hf.get("attention_dropout", 0.0),
            ffn_dropout=hf.get("activation_dropout", 0.0),
            pad_id=hf.get("pad_token_id", 1),
            start_id=hf.get("decoder_start_token_id", 2),
        )

    @staticmethod
    def config_to_hf(config: BartConfig) -> dict[str, Any]:
        return {
            "architectures": ["BartForConditionalGeneration"],
            "vocab_size": config.vocab_size,
            "encoder_layers": config.n_encoder_layers,
            "decoder_layers": config.n_decoder_layers,
            "encoder_attention_heads": config.n_heads,
            "decoder_attention_heads": config.n_heads,
            "d_model": config.d_model,
            "encoder_ffn_dim": config.d_ff,
            "decoder_ffn_dim": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "activation_function": "gelu",
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.ffn_dropout,
            "pad_token_id": config.pad_id,
            "decoder_start_token_id": config.start_id,
            "eos_token_id": config.start_id,
            "is_encoder_decoder": True,
        }

    @staticmethod
    def hf_rules(config: BartConfig) -> list[Rule]:
        def both(theirs: str, ours: str) -> list[Rule]:
            return [Rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]

        def attention(theirs: str, ours: str) -> list[Rule]:
            names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj"}
            names["out_proj"] = "o_proj"
            return [r for t, o in names.items() for r in both(f"{theirs}.{t}", f"{ours}.{o}")]

        rules: list[Rule] = [
            Rename("model.shared.weight", "token_embedding.weight"),
            Rename("final_logits_bias", "logits_bias", "1 v -> v"),
        ]
        for side, n_layers in (
            ("encoder", config.n_encoder_layers),
            ("decoder", config.n_decoder_layers),
        ):
            rules += [
                Rename(
                    f"model.{side}.embed_positions.weight",
                    f"{side}_input.position_embedding.weight",
                ),
                *both(f"model.{side}.layernorm_embedding", f"{side}_input.norm"),
            ]
            for i in range(n_layers):
                theirs, ours = f"model.{side}.layers.{i}", f"{side}.{i}"
                rules += attention(f"{theirs}.self_attn", f"{ours}.attention")
                rules += both(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm")
                if side == "decoder":
                    rules += attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention")
                    rules += both(f"{theirs}.encoder_attn_layer_norm", f"{ours}.cross_norm")
                rules += both(f"{theirs}.fc1", f"{ours}.ffn.up_proj")
                rules += both(f"{theirs}.fc2", f"{ours}.ffn.down_proj")
                rules += both(f"{theirs}.final_layer_norm", f"{ours}.ffn_norm")
        return rules

    @staticmethod
    def hf_tied(config: BartConfig) -> dict[str, str]:
        copies = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
        return {f"{name}.weight": "model.shared.weight" for name in copies}

    def load_hf(self, state: Mapping[str, Tensor]) -> "Bart":
        """Load a state dict, with or without the head, whose only tensor is the bias of logits."""
        if not any(name.startswith("model.") for name in state):
            state = {f"model.{name}": t for name, t in state.items()}
            state["final_logits_bias"] = torch.zeros(1, self.config.vocab_size)
        return super().load_hf(state)
