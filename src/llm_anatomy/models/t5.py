"""T5 (Raffel et al., 2020, arXiv:1910.10683): every task as text to text.

The Transformer with its positions moved into the scores: a learned bias for the distance between
query and key, one table a stack. Norms come first (pre-norm) and neither subtract the mean nor
shift; no linear layer has a bias, and the scores are not divided by the square root of their width.
Version 1.1, which Flan-T5 keeps, gates the feed-forward layer with GELU and gives the output a
matrix of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import FeedForward, GatedFeedForward, gelu_tanh
from llm_anatomy.models.checks import check_options, check_tokens, padding_mask
from llm_anatomy.norms import RMSNorm
from llm_anatomy.positions import RelativePositionBias
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """T5-base, version 1.0, unless told otherwise.

    `gated` is the feed-forward layer of version 1.1. `tied` outputs score with the embedding, after
    a division by the square root of d_model; otherwise the output is a matrix of its own. The token
    `pad_id` also starts the decoder.

    Raises:
        ValueError: a field has another type than it states or is negative, or `pad_id` lies outside
            the vocabulary.
    """

    vocab_size: int = 32_128
    n_encoder_layers: int = 12
    n_decoder_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_head: int = 64
    d_ff: int = 3072
    gated: bool = False
    tied: bool = True
    n_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6
    pad_id: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pad_id >= self.vocab_size:
            raise ValueError(f"pad_id ({self.pad_id}) must be below vocab_size ({self.vocab_size})")

    def attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(
            self.d_model,
            self.n_heads,
            d_head=self.d_head,
            bias=False,
            scale=1.0,
            dropout=self.dropout,
        )

    def feed_forward(self) -> FeedForward | GatedFeedForward:
        if self.gated:
            return GatedFeedForward(self.d_model, self.d_ff, gelu_tanh, dropout=self.dropout)
        return FeedForward(self.d_model, self.d_ff, F.relu, bias=False, dropout=self.dropout)

    def position_bias(self, *, bidirectional: bool) -> RelativePositionBias:
        return RelativePositionBias(
            self.n_heads,
            bidirectional=bidirectional,
            n_buckets=self.n_buckets,
            max_distance=self.max_distance,
        )


def _size(layers: int, heads: int, width: int, head: int, ff: int, *, v1_1: bool) -> T5Config:
    return T5Config(
        n_encoder_layers=layers,
        n_decoder_layers=layers,
        n_heads=heads,
        d_model=width,
        d_head=head,
        d_ff=ff,
        gated=v1_1,
        tied=not v1_1,
    )


T5_SMALL = _size(6, 8, 512, 64, 2048, v1_1=False)
T5_BASE = _size(12, 12, 768, 64, 3072, v1_1=False)
T5_LARGE = _size(24, 16, 1024, 64, 4096, v1_1=False)
T5_3B = _size(24, 32, 1024, 128, 16_384, v1_1=False)
T5_11B = _size(24, 128, 1024, 128, 65_536, v1_1=False)
FLAN_T5_SMALL = _size(8, 6, 512, 64, 1024, v1_1=True)
FLAN_T5_BASE = _size(12, 12, 768, 64, 2048, v1_1=True)
FLAN_T5_LARGE = _size(24, 16, 1024, 64, 2816, v1_1=True)
FLAN_T5_XL = _size(24, 32, 2048, 64, 5120, v1_1=True)
FLAN_T5_XXL = _size(24, 64, 4096, 64, 10_240, v1_1=True)

DecoderCache = list[tuple[KVCache, KVCache]]


class T5EncoderBlock(nn.Module):
    """Normalise, attend both ways, add; normalise, feed forward, add."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.eps)
        self.attention = config.attention()
        self.ffn_norm = RMSNorm(config.d_model, config.eps)
        self.ffn = config.feed_forward()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        bias: Float[Tensor, "1 H S _"],
        mask: Bool[Tensor, "#B 1 #S S"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, bias=bias))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class T5DecoderBlock(nn.Module):
    """Attend backwards, attend to the encoder's output, feed forward; each normalised and added."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.eps)
        self.attention = config.attention()
        self.cross_norm = RMSNorm(config.d_model, config.eps)
        self.cross_attention = config.attention()
        self.ffn_norm = RMSNorm(config.d_model, config.eps)
        self.ffn = config.feed_forward()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B C D"],
        bias: Float[Tensor, "1 H T _"],
        mask: Bool[Tensor, "1 1 T _"] | None,
        memory_mask: Bool[Tensor, "B 1 1 S"] | None = None,
        caches: tuple[KVCache | None, KVCache | None] = (None, None),
    ) -> Float[Tensor, "B T D"]:
        own, cross = caches
        attended = self.attention(self.attention_norm(x), mask=mask, bias=bias, cache=own)
        x = x + self.dropout(attended)
        seen = self.cross_attention(self.cross_norm(x), memory, mask=memory_mask, cache=cross)
        x = x + self.dropout(seen)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class T5(Pretrained):
    """Encoder-decoder from token ids to logits; `forward` composes `encode` and `decode`.

    Both sides read vectors as well, such as those that `embed` makes of tokens: `encode` composes
    `embed` and `encoder_hidden`, `hidden` composes `embed` and `decoder_hidden`.
    """

    model_type = "t5"
    # The files of 2019 hold a table for cross-attention that the model never used.
    hf_ignored = ("EncDecAttention.relative_attention_bias.weight",)

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        D, F_ = config.d_model, config.d_ff
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.encoder_bias = config.position_bias(bidirectional=True)
        self.encoder = nn.ModuleList(T5EncoderBlock(config) for _ in range(config.n_encoder_layers))
        self.encoder_norm = RMSNorm(D, config.eps)
        self.decoder_bias = config.position_bias(bidirectional=False)
        self.decoder = nn.ModuleList(T5DecoderBlock(config) for _ in range(config.n_decoder_layers))
        self.decoder_norm = RMSNorm(D, config.eps)
        self.output = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        # The queries start small by the root of d_head, which the scores are not divided by.
        spread = {
            "q_proj": (D * config.d_head) ** -0.5,
            "o_proj": (config.n_heads * config.d_head) ** -0.5,
            "down_proj": F_**-0.5,
            "token_embedding": 1.0,
            "output": 1.0,
        }
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=spread.get(name.split(".")[-2], D**-0.5))

    def embed(self, tokens: Int[Tensor, "B T"], name: str = "the source") -> Float[Tensor, "B T D"]:
        """Token vectors, neither scaled nor placed: positions come with the scores.

        Raises:
            ValueError: there is no token, or an id lies outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size, name)
        return self.token_embedding(tokens)

    def encoder_hidden(
        self, x: Float[Tensor, "B S D"], keep: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Run the encoder over vectors; `keep` is True at real ones."""
        S = x.shape[1]
        mask = padding_mask(keep, *x.shape[:2])
        bias = self.encoder_bias(S, S)
        x = self.dropout(x)
        for block in self.encoder:
            x = block(x, bias, mask)
        return self.dropout(self.encoder_norm(x))

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
        bias = self.decoder_bias(T, past + T)
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        memory_mask = padding_mask(keep, *memory.shape[:2])
        new = memory if past == 0 else memory[:, :0]  # the caches hold its keys and values by now
        no_caches = [(None, None)] * len(self.decoder)
        x = self.dropout(x)
        for block, pair in zip(self.decoder, caches or no_caches, strict=True):
            x = block(x, new, bias, mask, memory_mask, pair)
        return self.dropout(self.decoder_norm(x))

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
        """Score every token of the vocabulary."""
        if self.output is not None:
            return self.output(x)
        return x * self.config.d_model**-0.5 @ self.token_embedding.weight.T

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
        shifted[:, 0] = self.config.pad_id
        return shifted.masked_fill(shifted == -100, self.config.pad_id)

    def new_caches(self, capacity: int | None = None) -> DecoderCache:
        """One empty pair a decoder layer: own keys and values, and those of the memory."""
        return [(KVCache(capacity), KVCache()) for _ in self.decoder]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> T5Config:
        check_options(hf, {"feed_forward_proj": ("relu", "gated-gelu")})
        return T5Config(
            vocab_size=hf["vocab_size"],
            n_encoder_layers=hf["num_layers"],
            n_decoder_layers=hf.get("num_decoder_layers") or hf["num_layers"],
            n_heads=hf["num_heads"],
            d_model=hf["d_model"],
            d_head=hf["d_kv"],
            d_ff=hf["d_ff"],
            gated=hf.get("feed_forward_proj", "relu") == "gated-gelu",
            # transformers 5 writes that every T5 is tied, and beside it which one really is
            tied=hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)),
            n_buckets=hf["relative_attention_num_buckets"],
            max_distance=hf.get("relative_attention_max_distance", 128),
            dropout=hf["dropout_rate"],
            eps=hf["layer_norm_epsilon"],
            pad_id=hf.get("pad_token_id", 0),
        )

    @staticmethod
    def config_to_hf(config: T5Config) -> dict[str, Any]:
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": config.vocab_size,
            "num_layers": config.n_encoder_layers,
            "num_decoder_layers": config.n_decoder_layers,
            "num_heads": config.n_heads,
            "d_model": config.d_model,
            "d_kv": config.d_head,
            "d_ff": config.d_ff,
            "feed_forward_proj": "gated-gelu" if config.gated else "relu",
            "tie_word_embeddings": config.tied,
            "relative_attention_num_buckets": config.n_buckets,
            "relative_attention_max_distance": config.max_distance,
            "dropout_rate": config.dropout,
            "layer_norm_epsilon": config.eps,
            "pad_token_id": config.pad_id,
            "decoder_start_token_id": config.pad_id,
            "is_encoder_decoder": True,
        }

    @staticmethod
    def hf_rules(config: T5Config) -> list[Rule]:
        up = {"wi_0": "gate_proj", "wi_1": "up_proj"} if config.gated else {"wi": "up_proj"}
        inner = {**up, "wo": "down_proj"}

        def attention(theirs: str, ours: str) -> list[Rule]:
            return [Rename(f"{theirs}.{n}.weight", f"{ours}.{n}_proj.weight") for n in "qkvo"]

        rules: list[Rule] = [Rename("shared.weight", "token_embedding.weight")]
        for side, n_layers in (
            ("encoder", config.n_encoder_layers),
            ("decoder", config.n_decoder_layers),
        ):
            rules += [
                Rename(f"{side}.final_layer_norm.weight", f"{side}_norm.weight"),
                Rename(
                    f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    f"{side}_bias.embedding.weight",
                ),
            ]
            norms = ["attention_norm", "cross_norm", "ffn_norm"]
            if side == "encoder":
                norms.remove("cross_norm")
            for i in range(n_layers):
                theirs, ours = f"{side}.block.{i}.layer", f"{side}.{i}"
                rules += attention(f"{theirs}.0.SelfAttention", f"{ours}.attention")
                if side == "decoder":
                    rules += attention(f"{theirs}.1.EncDecAttention", f"{ours}.cross_attention")
                ffn = f"{theirs}.{len(norms) - 1}.DenseReluDense"
                rules += [
                    *(
                        Rename(f"{ffn}.{t}.weight", f"{ours}.ffn.{o}.weight")
                        for t, o in inner.items()
                    ),
                    *(
                        Rename(f"{theirs}.{j}.layer_norm.weight", f"{ours}.{norm}.weight")
                        for j, norm in enumerate(norms)
                    ),
                ]
        return rules if config.tied else [*rules, Rename("lm_head.weight", "output.weight")]

    @staticmethod
    def hf_tied(config: T5Config) -> dict[str, str]:
        copies = ["encoder.embed_tokens", "decoder.embed_tokens"]
        copies += ["lm_head"] if config.tied else []
        return {f"{name}.weight": "shared.weight" for name in copies}
