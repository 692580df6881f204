"""LLaMA (Touvron et al., 2023, arXiv:2302.13971) and Llama 2 (arXiv:2307.09288).

GPT-2 with the root mean square for a norm (RMSNorm), rotary positions in every layer in place of
position vectors at the bottom, a gated feed-forward layer (SwiGLU), no bias anywhere, and an output
layer of its own. Llama 2 at 70B lets eight query heads share keys and values. OpenLLaMA is LLaMA,
trained again on open data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention, Rotate
from llm_anatomy.cache import KVCache
from llm_anatomy.feedforward import GatedFeedForward
from llm_anatomy.models.checks import check_context, check_keep, check_options, check_tokens
from llm_anatomy.norms import RMSNorm
from llm_anatomy.positions import rope_angles, rope_rotate
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """LLaMA 7B unless told otherwise.

    `rope_base` is the ratio between the fastest and, nearly, the slowest rotation. `n_positions` is
    the context of training: nothing is computed from it, but longer texts are refused. A `tied`
    model scores the vocabulary with its embedding.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 32_000
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    d_model: int = 4096
    d_head: int = 128
    d_ff: int = 11_008
    n_positions: int = 2048
    rope_base: float = 10_000.0
    attention_dropout: float = 0.0
    tied: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)


LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(n_layers=40, n_heads=40, n_kv_heads=40, d_model=5120, d_ff=13_824)
LLAMA_30B = LlamaConfig(n_layers=60, n_heads=52, n_kv_heads=52, d_model=6656, d_ff=17_920)
LLAMA_65B = LlamaConfig(n_layers=80, n_heads=64, n_kv_heads=64, d_model=8192, d_ff=22_016)

LLAMA2_7B = LlamaConfig(n_positions=4096, eps=1e-5)
LLAMA2_13B = LlamaConfig(
    n_layers=40, n_heads=40, n_kv_heads=40, d_model=5120, d_ff=13_824, n_positions=4096, eps=1e-5
)
LLAMA2_70B = LlamaConfig(
    n_layers=80, n_heads=64, n_kv_heads=8, d_model=8192, d_ff=28_672, n_positions=4096, eps=1e-5
)


class LlamaBlock(nn.Module):
    """Normalise, attend, add; normalise, feed forward, add."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.eps)
        self.attention = MultiHeadAttention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            bias=False,
            dropout=config.attention_dropout,
        )
        self.ffn_norm = RMSNorm(config.d_model, config.eps)
        self.ffn = GatedFeedForward(config.d_model, config.d_ff, F.silu)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B 1 #T _"] | None,
        rotate: Rotate,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mask=mask, rotate=rotate, cache=cache)
        return x + self.ffn(self.ffn_norm(x))


class Llama(Pretrained):
    """A causal decoder from token ids to logits: `forward` composes `embed`, `hidden`, `logits`."""

    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    hf_options: Mapping[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1, 2),  # how the training was spread; it computes the same
    }
    hf_ignored = (".rotary_emb.inv_freq",)  # old files store the frequencies of the rotation
    tied = False  # unless config.json says so
    block: type[nn.Module] = LlamaBlock
    names: Mapping[str, str] = {  # of the parameters of a block, theirs and ours
        "input_layernorm.weight": "attention_norm.weight",
        **{f"self_attn.{part}_proj.weight": f"attention.{part}_proj.weight" for part in "qkvo"},
        "post_attention_layernorm.weight": "ffn_norm.weight",
        **{f"mlp.{p}_proj.weight": f"ffn.{p}_proj.weight" for p in ("gate", "up", "down")},
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Token vectors; where they stand enters in each attention.

        Raises:
            ValueError: there is no token, or an id lies outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.token_embedding(tokens)

    def hidden(
        self,
        x: Float[Tensor, "B T D"],
        keep: Bool[Tensor, "B S"] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks and the last norm over `x`, which follows whatever the caches hold.

        Args:
            x: token vectors.
            keep: True at real tokens, from position 0 on. Positions then count real tokens alone.
            caches: one a layer, from `new_caches`.

        Raises:
            ValueError: a position lies beyond the context, or `keep` has another shape.
        """
        past = len(caches[0]) if caches else 0
        B, T, _ = x.shape
        positions = torch.arange(past, past + T, device=x.device)  # (T,)
        mask = masks.causal(T, past + T, device=x.device) if T > 1 else None  # one sees all
        if keep is not None:
            check_keep(keep, B, past + T)
            positions = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, None, past:]  # (B, 1, T)
            padding = masks.padding(keep)
            mask = padding if mask is None else mask & padding  # (B, 1, T, S)
        needed = past + T if keep is None else int(positions.max()) + 1
        check_context(needed, self.config.n_positions)
        cos, sin = rope_angles(positions, self.config.d_head, self.config.rope_base)
        rotate = partial(rope_rotate, cos=cos.to(x.dtype), sin=sin.to(x.dtype))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask, rotate, cache)
        return self.norm(x)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Score every token of the vocabulary against `x`."""
        return x @ self.token_embedding.weight.T if self.config.tied else self.lm_head(x)

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

    @classmethod
    def config_from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        check_options(hf, cls.hf_options)
        n_heads = hf["num_attention_heads"]
        return LlamaConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=hf.get("num_key_value_heads") or n_heads,
            d_model=hf["hidden_size"],
            d_head=hf.get("head_dim") or hf["hidden_size"] // n_heads,
            d_ff=hf["intermediate_size"],
            n_positions=hf.get("max_position_embeddings", 2048),
            rope_base=rope_base_from_hf(hf),
            attention_dropout=hf.get("attention_dropout", 0.0),
            tied=hf.get("tie_word_embeddings", cls.tied),
            eps=hf.get("rms_norm_eps", 1e-6),
        )

    @classmethod
    def config_to_hf(cls, config: LlamaConfig) -> dict[str, Any]:
        return {
            "architectures": [cls.hf_class],
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "hidden_size": config.d_model,
            "head_dim": config.d_head,
            "intermediate_size": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "attention_dropout": config.attention_dropout,
            "tie_word_embeddings": config.tied,
            "rms_norm_eps": config.eps,
        }

    @classmethod
    def hf_rules(cls, config: LlamaConfig) -> list[Rule]:
        rules: list[Rule] = [
            Rename("model.embed_tokens.weight", "token_embedding.weight"),
            Rename("model.norm.weight", "norm.weight"),
        ]
        if not config.tied:
            rules.append(Rename("lm_head.weight", "lm_head.weight"))
        for i in range(config.n_layers):
            theirs, ours = f"model.layers.{i}", f"blocks.{i}"
            rules += [Rename(f"{theirs}.{a}", f"{ours}.{b}") for a, b in cls.names.items()]
        return rules

    @staticmethod
    def hf_tied(config: LlamaConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}


def rope_base_from_hf(hf: Mapping[str, Any]) -> float:
    """The base of the rotation: new files keep it in `rope_parameters`, old ones beside the rest.

    Raises:
        ValueError: the rotation is scaled for a longer context.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json scales the rotation ({kind!r}); this model supports 'default'"
        )
    return float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
