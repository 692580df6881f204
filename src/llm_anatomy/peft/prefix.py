"""Keys and values before the text that are learned, at every layer.

Prefix tuning (Li and Liang, 2021, arXiv:2101.00190) is a cache that is never empty: its first P
entries are parameters, and every query looks at them too. P-tuning v2 (Liu et al., 2021,
arXiv:2110.07602) is the same, for encoders and classification as well, with the network that makes
the prefix as an option.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.cache import KVCache
from llm_anatomy.peft import files
from llm_anatomy.peft.calls import bind, has, is_two_sided, n_cached, takes, widen_all
from llm_anatomy.peft.soft_prompt import check_place, first_table, heads_in, heads_out, load_heads
from llm_anatomy.peft.targets import (
    check_carries,
    check_count,
    check_free,
    check_targets,
    find,
    freeze,
    parameters_of,
    thaw,
)
from llm_anatomy.positions import RelativePositionBias

METHOD = "a prefix"
_ROTARY = "a prefix before rotary positions is not supported"


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Twenty positions before the text, at every layer.

    Args:
        n_tokens: the number P of positions in the prefix.
        d_hidden: width of the network that makes the prefix from P vectors while it is learned
            (reparametrisation), or None for a prefix that is learned as it is.
        targets: which attention layers of ours look at a prefix: the last part of a module's name,
            or more of it. All that `attention` finds in an encoder-decoder is the self-attention of
            both sides.
        positions: tables of positions, and relative biases, that count the prefix in front of the
            text, by name; None for all that the model has, which must be one or more; () to number
            the text from 0.
        also_train: modules that train in full beside the prefix, such as a new head, by name.

    Raises:
        ValueError: a size is not a whole number of at least 1, or the names are no tuple.
    """

    n_tokens: int = 20
    d_hidden: int | None = None
    targets: tuple[str, ...] = ("attention",)
    positions: tuple[str, ...] | None = None
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("n_tokens", self.n_tokens)
        if self.d_hidden is not None:
            check_count("d_hidden", self.d_hidden)
        check_targets("targets", self.targets)


class PrefixedCache(KVCache):
    """A cache that is never empty: what it returns begins with the prefix.

    Args:
        k, v: keys and values of the prefix, one for every row of the batch.
        rest: the cache of the text, if there is one. It holds the text alone.
    """

    def __init__(
        self,
        k: Float[Tensor, "B G P E"],
        v: Float[Tensor, "B G P E"],
        rest: KVCache | None = None,
    ) -> None:
        super().__init__()
        self.k, self.v, self.length, self.rest = k, v, k.shape[2], rest

    def append(
        self, k: Float[Tensor, "B G T E"], v: Float[Tensor, "B G T E"]
    ) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S E"]]:
        """Add T positions to the cache of the text, and return the prefix and all of the text."""
        if self.rest is not None:
            k, v = self.rest.append(k, v)
        return torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)

    def held(self) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S E"]]:
        """The prefix and what the cache of the text holds."""
        if not self.rest:
            return self.k, self.v
        k, v = self.rest.held()
        return torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)


class Prefix(nn.Module):
    """Keys and values of P positions for L layers, and the hooks that let a model look at them.

    Without a network the parameters are the keys and values themselves. With one, `embedding` holds
    a vector of width D for each position, and two layers make all of its keys and values from it.

    Args:
        n_tokens: P.
        n_layers: L.
        n_heads: key/value heads G of a layer.
        d_head: width E of a head.
        d_hidden: width of the network, or None for none.
        d_model: width D of the vectors that the network starts from, G * E unless given.
    """

    def __init__(
        self,
        n_tokens: int,
        n_layers: int,
        n_heads: int,
        d_head: int,
        d_hidden: int | None = None,
        d_model: int | None = None,
    ) -> None:
        super().__init__()
        self.n_tokens, self.n_layers, self.n_heads = n_tokens, n_layers, n_heads
        self.names: list[str] = []
        self.also_train: tuple[str, ...] = ()
        self.handles: list[RemovableHandle] = []
        self._current: Tensor | None = None
        D, width = d_model or n_heads * d_head, 2 * n_layers * n_heads * d_head
        self.embedding = nn.Parameter(torch.randn(n_tokens, width if d_hidden is None else D))
        self.network = None
        if d_hidden is not None:
            self.network = nn.Sequential(
                nn.Linear(D, d_hidden), nn.Tanh(), nn.Linear(d_hidden, width)
            )

    def flat(self) -> Float[Tensor, "P W"]:
        """All keys and values of a position in one row, as the peft library stores them."""
        return self.embedding if self.network is None else self.network(self.embedding)

    def forward(self) -> Float[Tensor, "L 2 G P E"]:
        """Keys (0) and values (1) of each layer."""
        return rearrange(
            self.flat(), "P (L n G E) -> L n G P E", n=2, L=self.n_layers, G=self.n_heads
        )

    def fill(self, cache: Any, batch: int) -> Any:
        """Begin a cache of transformers with the prefix, for a batch of this size.

        Args:
            cache: an empty `DynamicCache`; of an `EncoderDecoderCache` the part of self-attention.
            batch: rows.
        """
        own = getattr(cache, "self_attention_cache", cache)
        for layer, (k, v) in enumerate(self()):
            own.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), layer)
        return cache

    # --- Hooks on our models

    def compute(self, model: nn.Module, args: tuple) -> None:
        """Run the network once for all layers."""
        self._current = self()

    def forget(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._current = None

    def look(
        self, attention: MultiHeadAttention, args: tuple, kwargs: dict, layer: int
    ) -> tuple[tuple, dict]:
        """Let one attention layer look at its part of the prefix."""
        bound = bind(attention, args, kwargs)
        given = bound.arguments
        if has(given, "rotate"):
            raise ValueError(_ROTARY)
        context = given["context"] if has(given, "context") else given["x"]
        k, v = (self() if self._current is None else self._current)[layer]
        rows = (len(context), -1, -1, -1)
        cache = given.get("cache")
        S = context.shape[1] + (0 if cache is None else len(cache))
        given["cache"] = PrefixedCache(k.expand(rows), v.expand(rows), cache)
        for name, value in (("mask", True), ("bias", 0.0)):
            if has(given, name) and given[name].shape[-1] == S:
                given[name] = nn.functional.pad(given[name], (self.n_tokens, 0), value=value)
        return bound.args, bound.kwargs

    def count(self, module: nn.Module, args: tuple) -> tuple:
        """Count the prefix in front of the text: P positions more."""
        if isinstance(module, RelativePositionBias):
            T, S = args
            return T, S + self.n_tokens
        ids = args[0] + self.n_tokens
        if int(ids.max()) >= module.num_embeddings:
            raise ValueError(
                f"the prefix and the text take {int(ids.max()) + 1} positions, "
                f"but the model has {module.num_embeddings}"
            )
        return (ids,)

    # --- Hook on models of transformers

    def past(
        self, model: nn.Module, args: tuple, kwargs: dict, new_cache: Callable[[], Any]
    ) -> tuple[tuple, dict]:
        """Begin the cache with the prefix, unless it holds something already."""
        bound = bind(model, args, kwargs)
        given = bound.arguments
        if not n_cached(given):
            cache = given["past_key_values"] if has(given, "past_key_values") else new_cache()
            first = next(v for v in given.values() if isinstance(v, Tensor))
            given["past_key_values"] = self.fill(cache, len(first))
        mask = "decoder_attention_mask" if is_two_sided(model) else "attention_mask"
        widen_all(given, (mask,), self.n_tokens, 1)
        if has(given, "position_ids"):
            given["position_ids"] = given["position_ids"] + self.n_tokens
        return bound.args, bound.kwargs


def add(
    model: nn.Module, config: PrefixConfig, *, new_cache: Callable[[], Any] | None = None
) -> Prefix:
    """Freeze a model and let its attention look at a prefix of learned keys and values, in place.

    Nothing else of the model changes: what goes in and what comes out belongs to the text alone,
    with caches or without.

    Args:
        model: a model of ours, or one of transformers that takes `past_key_values`.
        config: what the prefix is. `targets` and `positions` are for our models.
        new_cache: makes an empty cache, for a model of transformers: `DynamicCache`, or for an
            encoder-decoder one that makes an `EncoderDecoderCache` of two of them.

    Returns:
        The prefix; it is also `model.prefix`.

    Raises:
        ValueError: the model carries a method already, a name finds nothing, or what it finds is no
            attention layer or no table of positions, layers differ in their heads, or the model has
            no place for a prefix: its positions are rotary or computed otherwise, or it has a
            module `prefix` of its own. The model is unchanged then.
    """
    check_free(model, METHOD)
    check_place(model, "prefix")
    heads = parameters_of(model, config.also_train)
    names, n_heads, d_head, d_model = (
        _layers(model, config) if new_cache is None else _config(_host(model).config)
    )
    places = _positions(model, config) if new_cache is None else []
    freeze(model, METHOD, heads)
    prefix = Prefix(config.n_tokens, len(names), n_heads, d_head, config.d_hidden, d_model=d_model)
    prefix.names, prefix.also_train = names, config.also_train
    like = next(p for p in model.parameters() if p.is_floating_point())
    model.prefix = prefix.to(like)
    if new_cache is not None:
        host = _host(model)
        hook = partial(prefix.past, new_cache=new_cache)
        prefix.handles = [host.register_forward_pre_hook(hook, with_kwargs=True)]
        return prefix
    prefix.handles = [
        model.register_forward_pre_hook(prefix.compute),
        model.register_forward_hook(prefix.forget, always_call=True),
        *(place.register_forward_pre_hook(prefix.count) for place in places),
    ]
    for layer, name in enumerate(names):
        hook = partial(prefix.look, layer=layer)
        attention = model.get_submodule(name)
        prefix.handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    return prefix


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`.

    Raises:
        ValueError: it carries no prefix.
    """
    check_carries(model, METHOD)
    for handle in model.prefix.handles:
        handle.remove()
    del model.prefix
    thaw(model, METHOD)


def drop_network(model: nn.Module) -> None:
    """Keep the keys and values that the network makes, and throw the network away.

    Raises:
        ValueError: the model carries no prefix, or one without a network.
    """
    check_carries(model, METHOD)
    prefix = model.prefix
    if prefix.network is None:
        raise ValueError("the prefix has no network to drop")
    prefix.embedding = nn.Parameter(prefix.flat().detach().clone())
    prefix.network = None


def save(model: nn.Module, folder: str | Path, task: str | None = None) -> None:
    """Write the prefix in the file format of the peft library; of a network, what it makes.

    Args:
        model: carries the prefix.
        folder: created if it is not there.
        task: peft's name of the task, such as "CAUSAL_LM", "SEQ_2_SEQ_LM" or "SEQ_CLS".

    Raises:
        ValueError: the model carries no prefix, or one that peft cannot hold: in an encoder-decoder
            it knows prefixes of the decoder's self-attention alone, and those of an odd number of
            layers (see `_rows`).
    """
    check_carries(model, METHOD)
    prefix = model.prefix
    L, two_sided = prefix.n_layers, is_two_sided(model)
    flat = prefix.flat().unflatten(1, (2 * L, -1))  # (P, 2L, G * E)
    if two_sided:
        if any(name.startswith("encoder") for name in prefix.names) or L % 2 == 0:
            raise ValueError(
                "peft holds a prefix of an encoder-decoder only for its decoder, and only if that "
                f"has an odd number of layers; here {L} layers have one: {', '.join(prefix.names)}"
            )
        flat = flat[:, _rows(L).argsort()]
    modules, tensors = heads_out(model, prefix.also_train)
    trained = [*parameters_of(model, prefix.also_train), *prefix.parameters()]
    width = flat.shape[-1]
    settings = {
        "peft_type": "PREFIX_TUNING",
        "task_type": task,
        "num_virtual_tokens": prefix.n_tokens,
        "token_dim": width,
        "num_attention_heads": prefix.n_heads,
        "num_layers": L,
        "num_transformer_submodules": 2 if two_sided else 1,
        "encoder_hidden_size": width,
        "prefix_projection": False,
        "inference_mode": True,
        "modules_to_save": modules or None,
    }
    tensors["prompt_embeddings"] = flat.flatten(1)
    files.write(folder, settings, tensors, first_table(model, trained))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    targets: tuple[str, ...] = ("attention",),
    positions: tuple[str, ...] | None = None,
    new_cache: Callable[[], Any] | None = None,
) -> Prefix:
    """Put a prefix on a model that `save` or the peft library wrote.

    Args:
        model, targets, positions, new_cache: see `add` and `PrefixConfig`.
        folder: where the files are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is corrupt or of another method, or the prefix belongs to another base:
            one with other layers, heads or token vectors. And see `add`. The model is
            unchanged then.
    """
    check_free(model, METHOD)
    settings = files.read_settings(folder, "PREFIX_TUNING")
    tensors = files.read_tensors(folder)
    P = files.need(settings, "num_virtual_tokens")
    flat = tensors.pop("prompt_embeddings", None)
    heads = heads_in(model, tensors)
    files.check_base(folder, first_table(model, parameters_of(model, tuple(heads))))
    config = PrefixConfig(n_tokens=P, targets=targets, positions=positions, also_train=tuple(heads))
    prefix = add(model, config, new_cache=new_cache)
    fits = settings.get("num_attention_heads") in (None, prefix.n_heads)
    if flat is None or flat.shape != prefix.embedding.shape or not fits:
        want = (tuple(prefix.embedding.shape), prefix.n_heads)
        remove(model)
        shape = None if flat is None else tuple(flat.shape)
        raise ValueError(
            f"the model needs a prefix of shape {want[0]} in {want[1]} heads, but the file holds "
            f"{shape} in {settings.get('num_attention_heads')}"
        )
    L = prefix.n_layers
    if settings.get("num_transformer_submodules") == 2:
        flat = flat.unflatten(1, (2 * L, -1))[:, _rows(L)].flatten(1)
    with torch.no_grad():
        prefix.embedding.copy_(flat)
    load_heads(model, heads)
    return prefix


def _rows(n_layers: int) -> Tensor:
    """Which of its 2L rows the peft library gives to the decoder's layers as keys and values.

    It writes all rows twice, one after the other, and deals them out in fours, two of each for the
    self-attention. Every other pair is left out, and from half of the layers on, if their number is
    even, the same pairs come again.
    """
    first = torch.arange(n_layers) * 4 % (2 * n_layers)
    return torch.stack((first, first + 1), dim=1).flatten()


def _layers(model: nn.Module, config: PrefixConfig) -> tuple[list[str], int, int, int]:
    """Names of our attention layers, their key/value heads, the width of a head, and D."""
    found = find(model, config.targets)
    for name, module in found.items():
        if not isinstance(module, MultiHeadAttention):
            raise ValueError(f"{name} is a {type(module).__name__}, not an attention layer of ours")
        if takes(model.get_submodule(name.rpartition(".")[0]), "rotate"):
            raise ValueError(_ROTARY)
    shapes = {(m.k_proj.out_features // m.d_head, m.d_head, m.d_model) for m in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"the attention layers differ in their heads and widths: {shapes}")
    return [*found], *shapes.pop()


def _positions(model: nn.Module, config: PrefixConfig) -> list[nn.Module]:
    """What counts the positions of a model."""
    if config.positions is None:
        counting = [
            module
            for name, module in model.named_modules()
            if name.endswith("position_embedding") or isinstance(module, RelativePositionBias)
        ]
        if not counting:  # sinusoids and ALiBi are computed, and cannot be told of the prefix
            raise ValueError(
                "no module counts positions, which a prefix would shift; "
                "positions=() numbers the text from 0"
            )
        return counting
    found = find(model, config.positions) if config.positions else {}
    for name, module in found.items():
        if not isinstance(module, nn.Embedding | RelativePositionBias):
            raise ValueError(f"{name} is a {type(module).__name__} and counts no positions")
    return [*found.values()]


def _host(model: nn.Module) -> nn.Module:
    """The outermost part of a model of transformers that takes a cache."""
    for module in model.modules():
        if takes(module, "past_key_values") and hasattr(module, "config"):
            return module
    raise ValueError(f"a {type(model).__name__} takes no past_key_values, and so no prefix")


def _config(config: Any) -> tuple[list[str], int, int, int]:
    """The same as `_layers`, from the config of a model of transformers."""
    L = next(
        n
        for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        if (n := getattr(config, name, None)) is not None
    )
    D, H = config.hidden_size, config.num_attention_heads
    E = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or D // H
    G = getattr(config, "num_key_value_heads", None) or H
    return [f"layer {i}" for i in range(L)], G, E, D
