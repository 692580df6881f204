"""Mamba (Gu and Dao, 2023, arXiv:2312.00752): a language model without attention.

Each feature carries a small state from token to token. What a token writes into it, how fast it
fades and what is read from it depend on the token (the *selective* scan); how a state moves is
linear in it, so that a whole text can be read at once, in a number of steps that grows with the
logarithm of its length, or token by token with a state of constant size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy.models.checks import check_keep, check_options, check_tokens
from llm_anatomy.norms import RMSNorm
from llm_anatomy.weights import Fused, Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba 130M unless told otherwise.

    Inside a block there are `expand` times as many features as outside, with `d_state` numbers of
    state each. The step of every feature comes from `step_rank` numbers. The convolution before
    the scan sees `kernel` tokens.

    Raises:
        ValueError: a field has another type than it states or is negative.
    """

    vocab_size: int = 50_280
    n_layers: int = 24
    d_model: int = 768
    expand: int = 2
    d_state: int = 16
    step_rank: int = 48
    kernel: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model


MAMBA_130M = MambaConfig()
MAMBA_370M = MambaConfig(n_layers=48, d_model=1024, step_rank=64)
MAMBA_790M = MambaConfig(n_layers=48, d_model=1536, step_rank=96)
MAMBA_1_4B = MambaConfig(n_layers=48, d_model=2048, step_rank=128)
MAMBA_2_8B = MambaConfig(n_layers=64, d_model=2560, step_rank=160)


class MambaState:
    """What one layer remembers: the last inputs of its convolution, and the state of its scan.

    Its size does not depend on how much has been read.
    """

    def __init__(self) -> None:
        self.recent: Tensor | None = None  # (B, kernel - 1, I)
        self.state: Tensor | None = None  # (B, I, N)

    def reorder(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken twice."""
        if self.state is not None:
            self.recent, self.state = self.recent[rows], self.state[rows]


def scan(
    fade: Float[Tensor, "B T *F"], write: Float[Tensor, "B T *F"]
) -> tuple[Float[Tensor, "B T *F"], Float[Tensor, "B T *F"]]:
    """All states of h[t] = fade[t] h[t - 1] + write[t] from h[-1] = 0, in log2(T) steps.

    Two neighbouring moves are one move: fade and write of the later after those of the earlier.
    Joining moves over distances 1, 2, 4, … gives every position all moves up to it (Hillis and
    Steele, 1986, "Data Parallel Algorithms").

    Returns:
        The states, and how much of a state before the first position is left at each: the running
        product of `fade`.
    """
    distance = 1
    while distance < fade.shape[1]:
        late, early = slice(distance, None), slice(None, -distance)
        joined = write[:, late] + fade[:, late] * write[:, early]
        write = torch.cat((write[:, :distance], joined), dim=1)
        fade = torch.cat((fade[:, :distance], fade[:, late] * fade[:, early]), dim=1)
        distance *= 2
    return write, fade


class SelectiveScan(nn.Module):
    """Section 3.2 and algorithm 2 of the paper: steps, writing and reading depend on the token."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        I, N, R = config.d_inner, config.d_state, config.step_rank  # noqa: E741
        self.sizes = (R, N, N)
        self.from_token = nn.Linear(I, R + 2 * N, bias=False)
        self.step = nn.Linear(R, I)
        self.log_decay = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(I, 1))
        self.skip = nn.Parameter(torch.ones(I))
        # Steps start between 0.001 and 0.1, evenly in their logarithm; softplus gives them.
        nn.init.uniform_(self.step.weight, -(R**-0.5), R**-0.5)
        step = torch.empty(I).uniform_(math.log(1e-3), math.log(0.1)).exp()
        with torch.no_grad():
            self.step.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, x: Float[Tensor, "B T I"], memory: MambaState | None = None
    ) -> Float[Tensor, "B T I"]:
        low, write, read = self.from_token(x).split(self.sizes, dim=-1)  # R, N and N wide
        step = F.softplus(self.step(low))[..., None]  # (B, T, I, 1)
        decay = -self.log_decay.exp()  # (I, N)
        fade, written = (step * decay).exp(), step * write[:, :, None] * x[..., None]
        states, left = scan(fade, written)  # (B, T, I, N)
        if memory is not None:
            if memory.state is not None:
                states = states + left * memory.state[:, None]
            memory.state = states[:, -1]
        return (states @ read[..., None])[..., 0] + self.skip * x


class MambaBlock(nn.Module):
    """Normalise, mix over time, add: one gated branch in place of attention and feed-forward."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        I = config.d_inner  # noqa: E741
        self.norm = RMSNorm(config.d_model, config.eps)
        self.up_proj = nn.Linear(config.d_model, I, bias=False)
        self.gate_proj = nn.Linear(config.d_model, I, bias=False)
        self.conv = nn.Conv1d(I, I, config.kernel, groups=I)
        self.scan = SelectiveScan(config)
        self.down_proj = nn.Linear(I, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        real: Float[Tensor, "B T 1"] | None = None,
        memory: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        read = self.norm(x) if real is None else self.norm(x) * real
        gate, wide = self.gate_proj(read), self.up_proj(read)  # (B, T, I)
        wide = F.silu(self.convolve(wide, memory))
        wide = wide if real is None else wide * real
        return x + self.down_proj(self.scan(wide, memory) * F.silu(gate))

    def convolve(
        self, wide: Float[Tensor, "B T I"], memory: MambaState | None
    ) -> Float[Tensor, "B T I"]:
        """Mix each feature with its own last few values, of earlier calls as well."""
        B, T, I = wide.shape  # noqa: E741
        before = wide.new_zeros(B, self.conv.kernel_size[0] - 1, I)
        if memory is not None and memory.recent is not None:
            before = memory.recent
        wide = torch.cat((before, wide), dim=1)
        if memory is not None:
            memory.recent = wide[:, T:]
        return self.conv(wide.mT).mT


class Mamba(Pretrained):
    """A causal decoder from token ids to logits: `forward` composes `embed`, `hidden`, `logits`."""

    model_type = "mamba"

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Token vectors; their order needs none, since a state is handed on from left to right.

        Raises:
            ValueError: there is no token, or an id lies outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.token_embedding(tokens)

    def hidden(
        self,
        x: Float[Tensor, "B T D"],
        keep: Bool[Tensor, "B T"] | None = None,
        caches: list[MambaState] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks and the last norm over `x`, which follows whatever the caches have read.

        Args:
            x: token vectors.
            keep: True at real tokens. Padding writes nothing into a state, and must stand on the
                left: a state would fade over padding on the right.
            caches: one a layer, from `new_caches`.

        Raises:
            ValueError: `keep` has another shape, or padding follows a real token.
        """
        real = None
        if keep is not None:
            check_keep(keep, *x.shape[:2])
            if (keep[:, :-1] & ~keep[:, 1:]).any():
                raise ValueError("padding follows real tokens; this model needs it on the left")
            real = keep[..., None].to(x)
        for block, memory in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, real, memory)
        return self.norm(x)

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Score every token of the vocabulary against `x`, with the embedding."""
        return x @ self.token_embedding.weight.T

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        keep: Bool[Tensor, "B T"] | None = None,
        caches: list[MambaState] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each position.

        Args:
            tokens: those that follow what the caches have read.
            keep: True at real tokens, False at padding on the left; a column for each of `tokens`.
            caches: one a layer, from `new_caches`.
        """
        return self.logits(self.hidden(self.embed(tokens), keep, caches))

    def new_caches(self) -> list[MambaState]:
        """One empty state a layer."""
        return [MambaState() for _ in self.blocks]

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> MambaConfig:
        check_options(
            hf,
            {
                "hidden_act": ("silu",),
                "use_bias": (False,),
                "use_conv_bias": (True,),
                "tie_word_embeddings": (True,),
            },
        )
        D = hf["hidden_size"]
        rank = hf.get("time_step_rank", "auto")
        return MambaConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["num_hidden_layers"] if "num_hidden_layers" in hf else hf["n_layer"],
            d_model=D,
            expand=hf.get("expand", 2),
            d_state=hf.get("state_size", 16),
            step_rank=math.ceil(D / 16) if rank == "auto" else rank,
            kernel=hf.get("conv_kernel", 4),
            eps=hf.get("layer_norm_epsilon", 1e-5),
        )

    @staticmethod
    def config_to_hf(config: MambaConfig) -> dict[str, Any]:
        return {
            "architectures": ["MambaForCausalLM"],
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.n_layers,
            "hidden_size": config.d_model,
            "expand": config.expand,
            "state_size": config.d_state,
            "time_step_rank": config.step_rank,
            "conv_kernel": config.kernel,
            "layer_norm_epsilon": config.eps,
        }

    @staticmethod
    def hf_rules(config: MambaConfig) -> list[Rule]:
        """The file fuses the two projections that widen: the branch first, then its gate."""
        rules: list[Rule] = [
            Rename("backbone.embeddings.weight", "token_embedding.weight"),
            Rename("backbone.norm_f.weight", "norm.weight"),
        ]
        names = {
            "norm.weight": "norm.weight",
            "mixer.conv1d.weight": "conv.weight",
            "mixer.conv1d.bias": "conv.bias",
            "mixer.x_proj.weight": "scan.from_token.weight",
            "mixer.dt_proj.weight": "scan.step.weight",
            "mixer.dt_proj.bias": "scan.step.bias",
            "mixer.A_log": "scan.log_decay",
            "mixer.D": "scan.skip",
            "mixer.out_proj.weight": "down_proj.weight",
        }
        for i in range(config.n_layers):
            theirs, ours = f"backbone.layers.{i}", f"blocks.{i}"
            rules += [Rename(f"{theirs}.{a}", f"{ours}.{b}") for a, b in names.items()]
            rules.append(
                Fused(
                    f"{theirs}.mixer.in_proj.weight",
                    (f"{ours}.up_proj.weight", f"{ours}.gate_proj.weight"),
                    split="(r o) i -> r o i",
                    merge="r o i -> (r o) i",
                    sizes=(1, 1),
                )
            )
        return rules

    @staticmethod
    def hf_tied(config: MambaConfig) -> dict[str, str]:
        return {"lm_head.weight": "backbone.embeddings.weight"}
