"""Hugging Face checkpoints in and out.

Each model states once how the tensors of a checkpoint relate to its own; reading the rules one way
loads a checkpoint, reading them the other way writes one. Files are safetensors, never pickles.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rename:
    """One tensor under two names; `layout` is an einops pattern, theirs -> ours."""

    theirs: str
    ours: str
    layout: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.ours,)

    def read(self, tensor: Tensor) -> list[Tensor]:
        return [rearrange(tensor, self.layout) if self.layout else tensor]

    def write(self, parts: Sequence[Tensor]) -> Tensor:
        return rearrange(parts[0], _flip(self.layout)) if self.layout else parts[0]


@dataclass(frozen=True)
class Fused:
    """One tensor of theirs that holds several of ours, interleaved along the axis r.

    `split` brings r to the front; part j is then `sizes[j]` long along r, and `merge` gives it our
    layout. GPT-2 lays queries, keys and values side by side: split "i (r o) -> r o i", merge
    "r o i -> (r o) i", sizes (1, 1, 1).
    """

    theirs: str
    ours: tuple[str, ...]
    split: str
    merge: str
    sizes: tuple[int, ...]
    axes: Mapping[str, int] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        return self.ours

    def read(self, tensor: Tensor) -> list[Tensor]:
        parts = rearrange(tensor, self.split, r=sum(self.sizes), **self.axes).split(self.sizes)
        return [rearrange(part, self.merge) for part in parts]

    def write(self, parts: Sequence[Tensor]) -> Tensor:
        stacked = [
            rearrange(part, _flip(self.merge), r=size, **self.axes)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return rearrange(torch.cat(stacked), _flip(self.split))


Rule = Rename | Fused


def _flip(layout: str) -> str:
    return " -> ".join(reversed(layout.split(" -> ")))


def _list(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def from_hf(
    theirs: Mapping[str, Tensor],
    rules: Sequence[Rule],
    *,
    tied: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> State:
    """Translate a Hugging Face state dict into ours.

    Args:
        theirs: every tensor of the checkpoint.
        rules: one for each tensor that is wanted.
        tied: names that only repeat another tensor, such as an output layer that shares the
            embedding: {name: name of the original}. They may be absent.
        ignored: endings of names that hold no weights, such as tables that can be recomputed.

    Raises:
        ValueError: a tensor that a rule names is missing, a tensor is left over, a tied tensor
            differs from its original, or a tensor does not have the shape that a layout says.
    """
    rest = {name: t for name, t in theirs.items() if not name.endswith(tuple(ignored))}
    for copy, original in (tied or {}).items():
        if copy in rest and original in rest and not torch.equal(rest.pop(copy), rest[original]):
            raise ValueError(f"{copy} should repeat {original}, but the checkpoint's values differ")
    missing = [rule.theirs for rule in rules if rule.theirs not in rest]
    if missing:
        raise ValueError(f"the checkpoint lacks {_list(missing)}")
    left = sorted(set(rest) - {rule.theirs for rule in rules})
    if left:
        raise ValueError(f"the checkpoint holds tensors that no rule knows: {_list(left)}")
    ours: State = {}
    for rule in rules:
        try:
            ours.update(zip(rule.targets, rule.read(rest[rule.theirs]), strict=True))
        except RuntimeError as error:  # einops and split, on a shape that does not fit
            shape = tuple(rest[rule.theirs].shape)
            raise ValueError(
                f"{rule.theirs} has shape {shape}, which does not fit {rule}"
            ) from error
    return ours


def to_hf(ours: Mapping[str, Tensor], rules: Sequence[Rule]) -> State:
    """The inverse of `from_hf`, without the tied and the ignored names."""
    return {rule.theirs: rule.write([ours[name] for name in rule.targets]) for rule in rules}


def read_config(folder: str | Path, model_type: str) -> dict[str, Any]:
    """Read `config.json` of a checkpoint and check that it is of the architecture expected.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or the config of another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a checkpoint folder has a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ValueError(f"{path} describes a {found!r} model; expected {model_type!r}")
    return config


def read_weights(folder: str | Path) -> State:
    """Read `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        FileNotFoundError: there is neither, or a shard is missing.
        ValueError: a file is corrupt or truncated, or a shard lacks a tensor the index promises.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _load(single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({folder / shard for shard in shard_of.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    state: State = {}
    for shard in shards:
        state.update(_load(shard))
    absent = sorted(set(shard_of) - set(state))
    if absent:
        raise ValueError(f"the shards lack tensors that {index.name} lists: {_list(absent)}")
    return state


def _load(path: Path) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error


def check_fields(config: Any) -> None:
    """Check that the fields of a config, a dataclass, hold what their annotations say.

    Raises:
        ValueError: a value has another type (an integer is a float, but a bool is no integer), or
            is a negative number.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = f.type | int if f.type is float else f.type
        if not isinstance(value, kinds) or (isinstance(value, bool) and f.type is not bool):
            name = getattr(f.type, "__name__", f.type)
            raise ValueError(f"{f.name} must be of type {name}, got {value!r}")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{f.name} must not be negative, got {value}")


class Pretrained(nn.Module):
    """A model that reads and writes Hugging Face checkpoints on the local disk.

    A subclass sets `model_type` and `hf_ignored`, and says in `config_from_hf`, `config_to_hf`,
    `hf_rules` and `hf_tied` how its config and its weights translate.
    """

    model_type: str
    hf_ignored: tuple[str, ...] = ()
    config: Any

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> Any:
        """Our config, from the contents of config.json."""
        raise NotImplementedError

    @staticmethod
    def config_to_hf(config: Any) -> dict[str, Any]:
        """The contents of config.json, from ours."""
        raise NotImplementedError

    @staticmethod
    def hf_rules(config: Any) -> list[Rule]:
        """One rule for each tensor of a checkpoint."""
        raise NotImplementedError

    @staticmethod
    def hf_tied(config: Any) -> dict[str, str]:
        """Names in a checkpoint that repeat another tensor."""
        return {}

    def load_hf(self, state: Mapping[str, Tensor]) -> "Pretrained":
        """Copy a Hugging Face state dict into this model: every tensor, and no other.

        Matrices keep the order in memory that they come in. GPT-2's are stored along the output
        side, where a product with one vector, as in decoding, takes less time.

        Raises:
            ValueError: names or shapes do not fit. The model is unchanged then.
        """
        config = self.config
        ours = from_hf(
            state, self.hf_rules(config), tied=self.hf_tied(config), ignored=self.hf_ignored
        )
        wanted = self.state_dict()
        wrong = [
            f"{name} has shape {tuple(t.shape)}, expected {tuple(wanted[name].shape)}"
            for name, t in ours.items()
            if t.shape != wanted[name].shape
        ]
        if wrong:
            raise ValueError(f"the checkpoint does not fit its config: {_list(wrong, 3)}")
        for name, p in self.named_parameters():
            p.data = torch.empty_like(ours[name], dtype=p.dtype, device=p.device)
        self.load_state_dict(ours)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Pretrained":
        """Read a checkpoint folder, such as `save_pretrained` or `snapshot_download` leaves.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: the config or the weights are not there.
            ValueError: a file is corrupt, or names, shapes or the architecture do not fit.
        """
        path = Path(folder) / "config.json"
        try:
            config = cls.config_from_hf(read_config(folder, cls.model_type))
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from error
        return cls(config).load_hf(read_weights(folder)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` that transformers can load."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = to_hf(self.state_dict(), self.hf_rules(self.config))
        config = {"model_type": self.model_type, **self.config_to_hf(self.config)}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tensors = {name: t.detach().contiguous() for name, t in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
