"""Vectors before the text that are learned, and stand for no token.

Prompt tuning (Lester et al., 2021, arXiv:2104.08691) trains P vectors in front of the embedded
text and nothing else. P-tuning (Liu et al., 2021, arXiv:2103.10385) trains them through a small
network, the prompt encoder, which is thrown away afterwards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_anatomy.peft import files
from llm_anatomy.peft.calls import (
    IGNORED,
    OUTPUTS,
    TOKENS,
    bind,
    finds_spans,
    has,
    is_per_token,
    is_two_sided,
    n_cached,
    widen,
    widen_all,
)
from llm_anatomy.peft.targets import (
    State,
    check_carries,
    check_count,
    check_free,
    check_names,
    check_share,
    freeze,
    parameters_of,
    thaw,
)

STARTS = ("random", "vocabulary", "text")
ENCODERS = ("mlp", "lstm")
METHOD = "a soft prompt"
NAME = "soft_prompt"


@dataclass(frozen=True, kw_only=True)
class SoftPromptConfig:
    """Twenty vectors, drawn at random.

    Args:
        n_tokens: the number P of virtual tokens.
        init: "random" draws uniformly from -0.5 to 0.5, as Lester et al. did; "vocabulary" copies
            the vectors of tokens drawn at random; "text" copies those of `text`.
        text: token ids, repeated or cut to the length P.
        embedding: name of the table of token vectors: the last part of the module's name, or more.
        also_train: modules that train in full beside the prompt, such as a new head, by name.

    Raises:
        ValueError: there is no virtual token, `init` is unknown or does not go with `text`, or the
            text holds no token ids.
    """

    n_tokens: int = 20
    init: str = "random"
    text: tuple[int, ...] = ()
    embedding: str = "token_embedding"
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("n_tokens", self.n_tokens)
        if self.init not in STARTS:
            raise ValueError(f"init must be one of {', '.join(STARTS)}; got {self.init!r}")
        if not all(hasattr(token, "__index__") for token in self.text):
            raise ValueError(f"text must hold token ids, got {self.text}")
        if (self.init == "text") != bool(self.text):
            raise ValueError(f'init="text" goes with a text; got {self.init!r} and {self.text}')


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig:
    """P-tuning's prompt, made by a network from P vectors of its own.

    Args:
        n_tokens: the number P of virtual tokens.
        kind: "mlp", three layers that see one virtual token at a time, or "lstm", which reads them
            in both directions before two layers.
        d_hidden: width inside the network.
        n_layers: layers of the LSTM.
        dropout: between the layers of the LSTM.
        embedding: name of the table of token vectors.
        also_train: modules that train in full beside the prompt.

    Raises:
        ValueError: a size is not positive, the dropout no share, or `kind` is unknown.
    """

    n_tokens: int = 20
    kind: str = "mlp"
    d_hidden: int = 128
    n_layers: int = 2
    dropout: float = 0.0
    embedding: str = "token_embedding"
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n_tokens", "d_hidden", "n_layers"):
            check_count(name, getattr(self, name))
        check_share("dropout", self.dropout)
        if self.kind not in ENCODERS:
            raise ValueError(f"kind must be one of {', '.join(ENCODERS)}; got {self.kind!r}")


class SoftPrompt(nn.Module):
    """P vectors as wide as a token's; called, it returns them."""

    def __init__(self, vectors: Float[Tensor, "P D"]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(vectors.detach().clone())

    @property
    def n_tokens(self) -> int:
        return self.embedding.shape[0]

    def forward(self) -> Float[Tensor, "P D"]:
        return self.embedding


class PromptEncoder(nn.Module):
    """P vectors, and the network that turns them into the prompt.

    The network ties the virtual tokens together while they are learned. What it returns is all that
    the model ever sees, so that `SoftPrompt(encoder())` may take its place after training.
    """

    def __init__(self, config: PromptEncoderConfig, d_model: int) -> None:
        super().__init__()
        D, hidden = d_model, config.d_hidden
        self.embedding = nn.Parameter(torch.randn(config.n_tokens, D))
        self.lstm = None
        if config.kind == "lstm":
            self.lstm = nn.LSTM(
                D, hidden, config.n_layers, dropout=config.dropout, bidirectional=True
            )
            sizes = (2 * hidden, 2 * hidden, D)
        else:
            sizes = (D, hidden, hidden, D)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    @property
    def n_tokens(self) -> int:
        return self.embedding.shape[0]

    def forward(self) -> Float[Tensor, "P D"]:
        x = self.embedding
        if self.lstm is not None:
            x = self.lstm(x)[0]  # (P, 2 * hidden)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def prepend(prompt: Float[Tensor, "P D"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B N D"]:
    """Put the prompt before each text of a batch."""
    return torch.cat((prompt.expand(len(x), -1, -1), x), dim=1)


def nearest_tokens(
    vectors: Float[Tensor, "P D"],
    table: Float[Tensor, "V D"],
    k: int = 1,
    *,
    cosine: bool = True,
) -> tuple[Int[Tensor, "P k"], Float[Tensor, "P k"]]:
    """Read a soft prompt: the k tokens whose vectors are most like each of its own.

    Args:
        vectors: the prompt.
        table: the vectors of all tokens.
        k: how many, best first.
        cosine: compare directions; otherwise distances.

    Returns:
        Their ids, and the cosine of each, or its distance.

    Raises:
        ValueError: the widths differ, or there are no k tokens.
    """
    if vectors.shape[1] != table.shape[1]:
        raise ValueError(f"the prompt has width {vectors.shape[1]}, the tokens {table.shape[1]}")
    if not 1 <= k <= len(table):
        raise ValueError(f"k must lie between 1 and the {len(table)} tokens, got {k}")
    if cosine:
        likeness = F.normalize(vectors, dim=1) @ F.normalize(table, dim=1).T  # (P, V)
        values, ids = likeness.topk(k, dim=1)
    else:
        values, ids = torch.cdist(vectors, table).topk(k, dim=1, largest=False)
    return ids, values


class InFront(nn.Module):
    """A prompt at its place before a model: `source` makes it, the hooks put it there.

    The model reads P tokens more, and their vectors are replaced by those of the prompt. Positions,
    norms and masks then come out as for any other token, whatever model it is.
    """

    def __init__(
        self, source: SoftPrompt | PromptEncoder, also_train: tuple[str, ...], stand_in: int = 0
    ) -> None:
        super().__init__()
        self.source = source
        self.also_train = also_train
        self.stand_in = stand_in  # the token read at the places of the prompt
        self.handles: list[RemovableHandle] = []
        self._due = False  # P tokens stand in front, and still have their own vectors
        self._n_read = 0  # tokens read in this call, if their outputs are to be cut

    def forward(self) -> Float[Tensor, "P D"]:
        return self.source()

    def made(self) -> Float[Tensor, "P D"]:
        """The prompt as it stays after training: a network makes it without dropout."""
        training = self.source.training
        vectors = self.source.eval()()
        self.source.train(training)
        return vectors.detach()

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Put P tokens before the text, unless a cache says that they were read before."""
        P = self.source.n_tokens
        bound = bind(model, args, kwargs)
        given = bound.arguments
        name = next((n for n in TOKENS if has(given, n)), None)
        if name is None or has(given, "encoder_outputs"):
            raise ValueError("a model with a soft prompt must be given token ids, and nothing read")
        self._due = n_cached(given) == 0
        self._n_read = 0
        if self._due:
            shape = given[name].shape
            given[name] = widen(given[name], P, self.stand_in)
            widen_all(given, ("segments", "token_type_ids"), P, 0)
            if not is_two_sided(model):
                self._n_read = given[name].shape[1]
                if has(given, "labels") and is_per_token(given["labels"], shape):
                    given["labels"] = widen(given["labels"], P, IGNORED)
                for end in ("start_positions", "end_positions"):
                    if has(given, end):
                        given[end] = given[end].clamp(min=0) + P
        widen_all(given, ("keep", "attention_mask"), P, 1)
        if has(given, "position_ids"):
            ids = given["position_ids"] + P
            front = torch.arange(P, device=ids.device).expand(len(ids), -1)
            given["position_ids"] = torch.cat((front, ids), dim=1) if self._due else ids
        return bound.args, bound.kwargs

    def replace(self, table: nn.Embedding, args: tuple, x: Tensor) -> Tensor | None:
        """Give the first P tokens the vectors of the prompt."""
        if not self._due:
            return None
        self._due = False
        return prepend(self.source().to(x.dtype), x[:, self.source.n_tokens :])

    def after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Keep of the outputs those at the tokens of the text, one vector each."""
        missed = self._due and output is not None  # None: the model has failed, and says why
        n, self._n_read, self._due = self._n_read, 0, False
        if missed:
            raise ValueError("the model did not look tokens up in the table that has the prompt")
        P = self.source.n_tokens

        def cut(part: Any, *ndims: int) -> Any:
            at_each = isinstance(part, Tensor) and part.ndim in ndims and part.shape[1] == n
            return part[:, P:] if at_each else part

        if not n:
            return None
        if isinstance(output, tuple):
            ndims = (2, 3) if finds_spans(model, output) else (3,)
            return tuple(cut(part, *ndims) for part in output)
        if isinstance(output, Mapping):  # transformers
            for name, ndim in OUTPUTS.items():
                if output.get(name) is not None:
                    output[name] = cut(output[name], ndim)
            return None
        return cut(output, 3)


def add(model: nn.Module, config: SoftPromptConfig | PromptEncoderConfig) -> InFront:
    """Freeze a model and put a soft prompt before every text that it reads, in place.

    What goes into `model(...)` and what comes out of it stays as it was: tokens, masks and labels
    are widened on the way in, and outputs at the prompt are cut off on the way out. A head that
    pools the first position, such as BERT's, pools the first virtual token, as in the peft library.
    In an encoder-decoder the prompt stands before the source, and only where the whole model is
    called; for the encoder alone, put it there yourself with `prepend` and `calls.widen`.

    Args:
        model: any model that finds its token vectors in one table, ours or of transformers.
        config: what the prompt is, where the table is, and what trains in full beside it.

    Returns:
        The prompt; it is also `model.soft_prompt`.

    Raises:
        ValueError: the model carries a method already or has a module `soft_prompt` of its own, the
            names fit no table or several, or a token id of the initial text lies outside the
            vocabulary. The model is unchanged then.
    """
    check_free(model, METHOD)
    check_place(model, NAME)
    table = _table(model, config.embedding)
    if isinstance(config, PromptEncoderConfig):
        source = PromptEncoder(config, table.embedding_dim)
    else:
        source = SoftPrompt(_start(config, table))
    return _put(model, table, source, config.also_train)


def remove(model: nn.Module) -> None:
    """Give the base back as it was before `add`.

    Raises:
        ValueError: it carries no soft prompt.
    """
    check_carries(model, METHOD)
    for handle in model.soft_prompt.handles:
        handle.remove()
    del model.soft_prompt
    thaw(model, METHOD)


def drop_encoder(model: nn.Module) -> None:
    """Put the prompt that P-tuning's network makes in the place of the network.

    Raises:
        ValueError: the model carries no soft prompt, or one without a network.
    """
    check_carries(model, METHOD)
    place = model.soft_prompt
    if not isinstance(place.source, PromptEncoder):
        raise ValueError("the soft prompt has no network to drop")
    place.source = SoftPrompt(place.made())


def save(model: nn.Module, folder: str | Path, task: str | None = None) -> None:
    """Write the prompt in the file format of the peft library; of a network, what it makes.

    Args:
        model: carries the prompt.
        folder: created if it is not there.
        task: peft's name of the task, such as "CAUSAL_LM", "SEQ_2_SEQ_LM" or "SEQ_CLS".

    Raises:
        ValueError: the model carries no soft prompt.
    """
    check_carries(model, METHOD)
    place = model.soft_prompt
    vectors = place.made()
    P, D = vectors.shape
    modules, tensors = heads_out(model, place.also_train)
    trained = [*parameters_of(model, place.also_train), *place.parameters()]
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": task,
        "num_virtual_tokens": P,
        "token_dim": D,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
        "modules_to_save": modules or None,
    }
    tensors["prompt_embeddings"] = vectors
    files.write(folder, settings, tensors, first_table(model, trained))


def load(model: nn.Module, folder: str | Path, embedding: str = "token_embedding") -> InFront:
    """Put a prompt on a model that `save` or the peft library wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is corrupt or of another method, or the prompt belongs to another base:
            one of another width, with other token vectors, or without a head that the file holds.
            And see `add`.
            The model is unchanged then.
    """
    check_free(model, METHOD)
    check_place(model, NAME)
    table = _table(model, embedding)
    try:
        settings = files.read_settings(folder, "P_TUNING")
    except ValueError:
        settings = files.read_settings(folder, "PROMPT_TUNING")
    tensors = files.read_tensors(folder)
    P, D = files.need(settings, "num_virtual_tokens"), table.embedding_dim
    vectors = tensors.pop("prompt_embeddings", None)
    # For an encoder-decoder peft stores a second prompt, for the decoder, and never uses it.
    n = (settings.get("num_transformer_submodules") or 1) * P
    if vectors is None or vectors.shape != (n, D):
        shape = None if vectors is None else tuple(vectors.shape)
        raise ValueError(f"the model needs a prompt of shape {(n, D)}, but the file holds {shape}")
    heads = heads_in(model, tensors)
    files.check_base(folder, first_table(model, parameters_of(model, tuple(heads))))
    place = _put(model, table, SoftPrompt(vectors[:P]), tuple(heads))
    load_heads(model, heads)
    return place


# --- What prefixes need as well -------------------------------------------------------------------

_FRONT = "base_model."
"""What peft puts before a module's name, when it puts something before the text."""

Heads = dict[str, State]


def heads_out(model: nn.Module, names: tuple[str, ...]) -> tuple[list[str], State]:
    """Modules that train in full, as peft writes them: their names, and their tensors."""
    modules, tensors = files.in_full(model, names)
    return modules, {_FRONT + n.removeprefix(files.PREFIX): t for n, t in tensors.items()}


def heads_in(model: nn.Module, tensors: State) -> Heads:
    """What a file holds of modules that train in full, by our names of them.

    Raises:
        ValueError: the model has no such module, or one of another shape.
    """
    heads: Heads = {}
    for name, tensor in tensors.items():
        module, _, last = name.removeprefix(_FRONT).rpartition(".")
        ours = files.our_name(model, module)
        heads.setdefault(ours, {})[last] = tensor
    for name, state in heads.items():
        if name not in dict(model.named_modules()):
            raise ValueError(f"the file holds a module {name}, which the model lacks")
        whole = model.get_submodule(name).state_dict()  # of the modules in it as well
        own = {n: t.shape for n, t in whole.items() if "." not in n}
        check_names(f"the file's {name}", state, own)
    return heads


def load_heads(model: nn.Module, heads: Heads) -> None:
    """Give modules what `heads_in` has read."""
    for name, state in heads.items():
        model.get_submodule(name).load_state_dict(state, strict=False)  # not the modules in it


def check_place(model: nn.Module, name: str) -> None:
    """Check that the base has nothing of its own where the method goes.

    Raises:
        ValueError: it has.
    """
    if hasattr(model, name):
        raise ValueError(f"the model has a {name} of its own, where the method would go")


def first_table(model: nn.Module, trained: Iterable[nn.Parameter]) -> State:
    """The first matrix that stays as it was, by which a base is told: the vectors of its tokens."""
    left_out = {id(p) for p in trained}
    matrices = (p for p in model.parameters() if p.ndim > 1 and id(p) not in left_out)
    first = next(matrices, None)
    return {} if first is None else {"first": first}


# --- Where the prompt goes ------------------------------------------------------------------------


def _table(model: nn.Module, name: str) -> nn.Embedding:
    """The one embedding whose dotted name is `name` or ends with it."""
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = [m for n, m in tables.items() if n == name or n.endswith(f".{name}")]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} tables of vectors are called {name!r}, where one is needed; "
            f"the model has {', '.join(tables) or 'none'}"
        )
    return found[0]


def _start(config: SoftPromptConfig, table: nn.Embedding) -> Tensor:
    """The vectors that a prompt begins with."""
    P, (V, D) = config.n_tokens, table.weight.shape
    if config.init == "random":
        return torch.empty(P, D).uniform_(-0.5, 0.5)
    if config.init == "vocabulary":
        return _look_up(table, torch.randint(V, (P,)))
    if min(config.text) < 0 or max(config.text) >= V:
        raise ValueError(f"token ids must lie between 0 and {V - 1}, got {config.text}")
    text = config.text * -(-P // len(config.text))  # repeated until it is long enough
    return _look_up(table, torch.tensor(text[:P]))


def _look_up(table: nn.Embedding, tokens: Int[Tensor, " P"]) -> Float[Tensor, "P D"]:
    """As the model does: some tables scale what they hold."""
    return table(tokens.to(table.weight.device))


def _stand_in(model: nn.Module, table: nn.Embedding) -> int:
    """The first token id that is no padding: RoBERTa gives padding no positions of its own."""
    pads = {table.padding_idx}
    for module in model.modules():
        config = getattr(module, "config", None)
        pads |= {getattr(config, name, None) for name in ("pad_id", "pad_token_id")}
    return next((i for i in range(table.num_embeddings) if i not in pads), 0)


def _put(
    model: nn.Module, table: nn.Embedding, source: SoftPrompt | PromptEncoder, heads: tuple
) -> InFront:
    """Freeze the model and place a prompt before it."""
    stand_in = _stand_in(model, table)
    freeze(model, METHOD, parameters_of(model, heads))
    place = InFront(source, tuple(heads), stand_in).to(table.weight)
    model.soft_prompt = place.train(model.training)
    place.handles = [
        model.register_forward_pre_hook(place.before, with_kwargs=True),
        table.register_forward_hook(place.replace),
        model.register_forward_hook(place.after, always_call=True),
    ]
    return place
