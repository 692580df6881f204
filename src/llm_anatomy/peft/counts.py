"""How many numbers each method trains and stores, from a model's sizes alone.

One formula a method. The tests compare each with the `peft` library's count, or with the parameters
of the model itself, on models of full size that take no memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Transformer that its counts depend on; BERT-base unless told otherwise.

    Fields:
        n_layers: blocks of self-attention and feed-forward, those of all stacks together.
        d_attention: width of all heads together, H · E; `d_model` where None.
        n_vectors: vectors of width `d_model` in tables: tokens, positions, segments, and the rows
            of an output matrix that is not the table of tokens again.
        n_cross: how many of the blocks also look at an encoder; 0 without one. They make up a
            decoder, the other blocks the encoder.
        gated: a third matrix of the feed-forward layer.
        biases: of the linear maps and of the norms.
        pooler: BERT's matrix and bias over the first position.
        n_relative: numbers in tables of relative positions (T5).
    """

    n_layers: int = 12
    d_model: int = 768
    d_ff: int = 3072
    n_vectors: int = 30_522 + 512 + 2
    d_attention: int | None = None
    n_cross: int = 0
    gated: bool = False
    biases: bool = True
    pooler: bool = False
    n_relative: int = 0

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.d_model if self.d_attention is None else self.d_attention

    @property
    def n_norms(self) -> int:
        """One a sub-layer, and one a stack: after the embeddings or at the end."""
        return 2 * self.n_layers + self.n_cross + (2 if self.n_cross else 1)


BERT = {
    "BERT-base": Shape(pooler=True),
    "BERT-large": Shape(n_layers=24, d_model=1024, d_ff=4096, pooler=True),
}
GPT = {
    name: Shape(n_layers=L, d_model=D, d_ff=4 * D, n_vectors=50_257 + n_positions)
    for name, L, D, n_positions in (
        ("GPT-2 small", 12, 768, 1024),
        ("GPT-2 medium", 24, 1024, 1024),
        ("GPT-2 large", 36, 1280, 1024),
        ("GPT-2 XL", 48, 1600, 1024),
        ("GPT-3", 96, 12_288, 2048),
    )
}
T5 = {
    name: Shape(
        n_layers=2 * L,
        d_model=D,
        d_ff=F,
        n_vectors=32_128,
        d_attention=E * H,
        n_cross=L,
        biases=False,
        n_relative=2 * 32 * H,
    )
    for name, L, D, F, H, E in (
        ("T5-small", 6, 512, 2048, 8, 64),
        ("T5-base", 12, 768, 3072, 12, 64),
        ("T5-large", 24, 1024, 4096, 16, 64),
        ("T5-3B", 24, 1024, 16_384, 32, 128),
        ("T5-11B", 24, 1024, 65_536, 128, 128),
    )
}
LLAMA = {
    "LLaMA-7B": Shape(
        n_layers=32, d_model=4096, d_ff=11_008, n_vectors=2 * 32_000, gated=True, biases=False
    )
}
SHAPES = {**BERT, **GPT, **T5, **LLAMA}


def matrices(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """Return for each linear map its width in, its width out, and how many there are of it.

    `qkv_proj` is q_proj, k_proj and v_proj in one, as the GPT-2 of transformers has it (c_attn); it
    takes their place and is no further matrix.
    """
    D, A, F = shape.d_model, shape.width, shape.d_ff
    attentions = shape.n_layers + shape.n_cross
    maps = {
        "q_proj": (D, A, attentions),
        "k_proj": (D, A, attentions),
        "v_proj": (D, A, attentions),
        "o_proj": (A, D, attentions),
        "up_proj": (D, F, shape.n_layers),
        "down_proj": (F, D, shape.n_layers),
        "qkv_proj": (D, 3 * A, attentions),
    }
    return {**maps, "gate_proj": (D, F, shape.n_layers)} if shape.gated else maps


def every_matrix(shape: Shape) -> tuple[str, ...]:
    """Name the linear maps of the blocks, each once."""
    return tuple(name for name in matrices(shape) if name != "qkv_proj")


def full(shape: Shape) -> int:
    """Count every parameter: what full fine-tuning trains."""
    D = shape.d_model
    maps = [matrices(shape)[name] for name in every_matrix(shape)]
    weights = sum(n * d_in * d_out for d_in, d_out, n in maps)
    pooler = D * D if shape.pooler else 0
    vectors = D * (shape.n_vectors + shape.n_norms)
    return weights + pooler + vectors + shape.n_relative + bitfit(shape)


def bitfit(shape: Shape) -> int:
    """Count the biases, of linear maps and norms (Ben Zaken et al., 2022, arXiv:2106.10199)."""
    if not shape.biases:
        return 0
    maps = [matrices(shape)[name] for name in every_matrix(shape)]
    pooler = shape.d_model if shape.pooler else 0
    return sum(n * d_out for _, d_out, n in maps) + shape.d_model * shape.n_norms + pooler


def lora(shape: Shape, r: int, targets: Sequence[str] = ("q_proj", "v_proj")) -> int:
    """Count two factors of rank r for each matrix (Hu et al., 2021, arXiv:2106.09685).

    Raises:
        ValueError: the shape has no map of such a name, or r is below 1 or above the narrower side
            of a map.
    """
    maps = matrices(shape)
    for target in targets:
        if target not in maps:
            raise ValueError(f"no map is named {target!r}: there are {', '.join(maps)}")
        if not 1 <= r <= min(maps[target][:2]):
            raise ValueError(f"r ({r}) must lie between 1 and {min(maps[target][:2])}: {target}")
    return sum(n * r * (d_in + d_out) for d_in, d_out, n in map(maps.get, targets))


def houlsby(shape: Shape, m: int) -> int:
    """Count two bottlenecks of width m a block (Houlsby et al., 2019, arXiv:1902.00751).

    Of an encoder-decoder, cross-attention is left without. The norms, which the paper trains too,
    are not counted.
    """
    return 2 * pfeiffer(shape, m)


def pfeiffer(shape: Shape, m: int) -> int:
    """Count one bottleneck of width m a block (Pfeiffer et al., 2021, arXiv:2005.00247)."""
    D = shape.d_model
    _check("m", m)
    return shape.n_layers * (D * m + m + m * D + D)


def ia3(shape: Shape) -> int:
    """Count factors of keys, values and inner activations (Liu et al., 2022, arXiv:2205.05638)."""
    return 2 * shape.width * (shape.n_layers + shape.n_cross) + shape.d_ff * shape.n_layers


def prompt(shape: Shape, P: int) -> int:
    """Count P virtual tokens before the input (Lester et al., 2021, arXiv:2104.08691)."""
    _check("P", P)
    return P * shape.d_model


def prefix(shape: Shape, P: int) -> int:
    """Count P keys and values in each layer (Li and Liang, 2021, arXiv:2101.00190).

    Of an encoder-decoder, in the layers of the decoder, as `peft` does it.
    """
    _check("P", P)
    return P * 2 * shape.width * (shape.n_cross or shape.n_layers)


def prefix_reparametrised(shape: Shape, P: int, hidden: int | None = None) -> int:
    """Count what trains when two linear maps make the prefix; `prefix` is what remains of it.

    Args:
        hidden: width between the maps; `d_model` unless given, as in `peft`.
    """
    D = shape.d_model
    hidden = D if hidden is None else hidden
    _check("P", P)
    _check("hidden", hidden)
    made = prefix(shape, 1)  # numbers made for each virtual token
    return P * D + (D * hidden + hidden) + (hidden * made + made)


def _check(name: str, value: int) -> None:
    """Refuse a size that no layer can have."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
