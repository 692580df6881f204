"""One training loop, the learning-rate schedules and the smoothed loss that the chapters use."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

Schedule = Callable[[int], float]


def inverse_sqrt_schedule(step: int, d_model: int, warmup: int = 4000, scale: float = 1.0) -> float:
    """Rise in a straight line for `warmup` steps, then fall with the square root of the step.

    Vaswani et al., 2017 (arXiv:1706.03762), equation 3. Steps count from 1; the peak, at
    `step == warmup`, is `scale / sqrt(d_model * warmup)`.

    Raises:
        ValueError: `step` or `warmup` is smaller than 1.
    """
    if step < 1 or warmup < 1:
        raise ValueError(f"step and warmup count from 1, got {step} and {warmup}")
    return scale * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def cosine_with_warmup(
    step: int, n_steps: int, peak: float, warmup: int = 0, floor: float = 0.0
) -> float:
    """Rise in a straight line to `peak`, then fall along half a cosine to `floor` at `n_steps`.

    Loshchilov and Hutter, 2017 (arXiv:1608.03983), without restarts. Steps count from 1.

    Raises:
        ValueError: `step` lies outside 1 to `n_steps`, or the warm-up takes all of it.
    """
    if not 1 <= step <= n_steps or not 0 <= warmup < n_steps:
        raise ValueError(
            f"need 1 <= step <= n_steps and 0 <= warmup < n_steps, "
            f"got step {step}, n_steps {n_steps}, warmup {warmup}"
        )
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (n_steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def smoothed_cross_entropy(
    logits: Float[Tensor, "*N V"],
    targets: Int[Tensor, "*N"],
    smoothing: float = 0.1,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Cross-entropy against targets that leave a little probability to every token, in nats.

    Szegedy et al., 2016 (arXiv:1512.00567), section 7: the target distribution is
    (1 - smoothing) on the true token plus smoothing/V on each of the V tokens. Its minimum is the
    entropy of that distribution, not 0.

    Args:
        logits: scores of the V tokens.
        targets: token ids; positions that hold `ignore_index` do not count.
        smoothing: between 0 and 1; 0 is the ordinary cross-entropy.
        ignore_index: marks the positions without a target.

    Raises:
        ValueError: `smoothing` is outside [0, 1), or no position has a target.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    counted = targets != ignore_index
    if not counted.any():
        raise ValueError("every target is ignored: there is nothing to average")
    log_p = logits[counted].log_softmax(dim=-1)  # (N, V)
    hit = log_p.gather(-1, targets[counted][:, None]).squeeze(-1)  # (N,)
    return -((1 - smoothing) * hit + smoothing * log_p.mean(dim=-1)).mean()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, not biases, norms or other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def layer_groups(
    model: nn.Module,
    layers: Sequence[Sequence[str]],
    decay: float = 1 / 2.6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Give each layer a rate of its own, smaller towards the input. Matrices alone decay.

    Discriminative fine-tuning: Howard and Ruder, 2018 (arXiv:1801.06146), section 3.2. `train`
    multiplies the rate of the schedule by the `lr_scale` of a group: 1 in the last layer, `decay`
    in the one below it, `decay` squared in the next.

    Args:
        layers: from the input to the output, each the names of its modules or parameters.
        decay: rate of a layer, as a share of that of the layer above.

    Raises:
        ValueError: `decay` is not positive, a name matches nothing, or a parameter is in no layer
            or in two.
    """
    if not decay > 0:
        raise ValueError(f"decay must be positive, got {decay}")
    groups = []
    for depth, parameters in enumerate(reversed(_layers(model, layers))):
        for matrices, wd in ((True, weight_decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            groups.append({"params": chosen, "weight_decay": wd, "lr_scale": decay**depth})
    return groups


def unfreeze(model: nn.Module, layers: Sequence[Sequence[str]], n: int) -> None:
    """Let the last `n` layers learn, and freeze those below.

    Called with a growing n this is gradual unfreezing (Howard and Ruder, 2018, section 3.3). Where
    n is a function of the step and the call stands in the `loss_of` of `train`, a run can be
    resumed. The optimizer must hold the frozen parameters from the start, as `layer_groups` does.

    Args:
        layers: from the input to the output, as for `layer_groups`.
        n: between 0 and the number of layers.

    Raises:
        ValueError: there are not so many layers, or they are not those of the model. Nothing is
            changed then.
    """
    if not 0 <= n <= len(layers):
        raise ValueError(f"there are {len(layers)} layers, so n must lie between 0 and that: {n}")
    for depth, parameters in enumerate(reversed(_layers(model, layers))):
        for p in parameters:
            p.requires_grad_(depth < n)


def _layers(model: nn.Module, layers: Sequence[Sequence[str]]) -> list[list[nn.Parameter]]:
    """The parameters of each layer, once it is known that each parameter is in one."""
    parameters = dict(model.named_parameters())
    owner: dict[str, int] = {}
    for i, names in enumerate(layers):
        for name in names:
            inside = [p for p in parameters if p == name or p.startswith(f"{name}.")]
            if not inside:
                raise ValueError(f"{name} of layer {i} is no module or parameter of the model")
            for p in inside:
                if p in owner:
                    raise ValueError(f"{p} is named twice, in layer {owner[p]} and in layer {i}")
                owner[p] = i
    if forgotten := [p for p in parameters if p not in owner]:
        raise ValueError(f"{forgotten[0]} is in no layer")
    return [[parameters[p] for p in owner if owner[p] == i] for i in range(len(layers))]


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batch_at: Callable[[int], Any],
    n_steps: int,
    schedule: Schedule,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    clip_norm: float | None = 1.0,
    autocast: torch.dtype | None = None,
    folder: str | Path | None = None,
    save_every: int | None = None,
    description: str = "training",
) -> list[float]:
    """Train `model` in place, and resume where an earlier run in the same folder stopped.

    Args:
        model: put into training mode, and left in evaluation mode, also where the run breaks off.
        loss_of: loss of a model on a batch, in nats.
        batch_at: batch of a step, counted from 1. The same step must give the same batch, which is
            what makes a resumed run equal to one that was never interrupted.
        n_steps: steps in all, those of an earlier run included.
        schedule: learning rate of a step, counted from 1.
        optimizer: AdamW with betas 0.9 and 0.98 unless given. The rate of a group that holds a
            number `lr_scale` is multiplied by it.
        clip_norm: longest gradient allowed, over all parameters together; None for no limit.
        autocast: torch.bfloat16 runs the products of `loss_of` in that type, where the device has
            it (mixed precision: Micikevicius et al., 2018, arXiv:1710.03740). The weights and the
            optimizer stay as they are.
        folder: where `checkpoint.safetensors` is read and written, if anywhere.
        save_every: steps between checkpoints; the last step is always saved when a folder is given.
        description: shown beside the progress bar.

    Returns:
        The loss of every step, those of an earlier run included.

    Raises:
        FloatingPointError: the loss or its gradient is not finite. The model keeps the state before
            that step, and so does the checkpoint.
        OSError: a checkpoint could not be written, say because the disk is full. The older one is
            whole, and the model keeps what it has learned.
        ValueError: the checkpoint is corrupt, belongs to another model, or has taken more steps, or
            `autocast` is another type.
    """
    precision = _precision(model, autocast)
    if optimizer is None:
        groups = parameter_groups(model, weight_decay=0.0)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9)
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"
    losses = []
    if path is not None and path.exists():
        losses = load_checkpoint(path, model, optimizer, n_steps)
    steps: Iterable[int] = range(len(losses) + 1, n_steps + 1)
    # tqdm reads TQDM_DISABLE for its text bar only, not for the bar of a notebook.
    bar = {"disable": os.environ.get("TQDM_DISABLE", "0") not in ("", "0"), "leave": False}
    longest = math.inf if clip_norm is None else clip_norm
    model.train()
    try:
        for step in tqdm(steps, desc=description, initial=len(losses), total=n_steps, **bar):
            with precision:
                loss = loss_of(model, batch_at(step))
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), longest)
            if not norm.isfinite():
                raise FloatingPointError(f"the gradient has norm {norm.item()} at step {step}")
            for group in optimizer.param_groups:
                group["lr"] = schedule(step) * group.get("lr_scale", 1.0)
            optimizer.step()
            losses.append(loss.item())
            if path is not None and (step == n_steps or (save_every and step % save_every == 0)):
                save_checkpoint(path, model, optimizer, losses)
    finally:
        model.eval()
    return losses


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Write all that a run needs to go on: weights, optimiser, random state and losses.

    The file is replaced in one step, so a run killed while saving leaves the older one whole.

    Raises:
        OSError: the file could not be written, say because the disk is full. The older one is whole
            then, and nothing of the new one is left to fill the disk.
    """
    path = Path(path)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    if (device := _cuda_of(model)) is not None:
        tensors["random_cuda"] = torch.cuda.get_rng_state(device)
    copies = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(copies, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        kept = "the older checkpoint is whole" if path.exists() else "there is no older one"
        raise OSError(f"{path} could not be written, {kept}: {error}") from error


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    n_steps: int | None = None,
) -> list[float]:
    """Restore what `save_checkpoint` wrote, and return the losses so far.

    Raises:
        ValueError: the file is corrupt, its weights are not those of this model, its optimiser
            trained others, or it holds more than `n_steps` steps. Nothing is changed then.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
    if not {"losses", "random"} <= tensors.keys():
        raise ValueError(f"{path} is no checkpoint of a training run: losses or random are missing")
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    if _kinds(weights) != _kinds(model.state_dict()):
        raise ValueError(f"{path} belongs to another model: names, shapes or types differ")
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {name_of[p]: i for i, p in enumerate(trained) if p in name_of}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            name, key = full_name.removeprefix("optimizer.").rsplit(".", 1)
            if name not in index_of:
                raise ValueError(f"{path} trained {name}, which this optimizer does not")
            state.setdefault(index_of[name], {})[key] = tensor
    losses = tensors["losses"].tolist()
    if n_steps is not None and len(losses) > n_steps:
        raise ValueError(f"{path} has taken {len(losses)} steps, more than the {n_steps} wanted")
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors["random"])
    device = _cuda_of(model)
    if device is not None and "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], device)
    return losses


def _precision(model: nn.Module, autocast: torch.dtype | None) -> AbstractContextManager:
    """The context that the loss is computed in."""
    if autocast is None:
        return nullcontext()
    if autocast != torch.bfloat16:
        raise ValueError(
            f"autocast must be torch.bfloat16, got {autocast}: gradients of narrower range vanish "
            "unless the loss is scaled up, which this loop does not do"
        )
    return torch.autocast(next(model.parameters()).device.type, autocast)


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in state.items()}


def _cuda_of(model: nn.Module) -> torch.device | None:
    """The GPU that a model is on, which has a random state of its own."""
    return next((p.device for p in model.parameters() if p.is_cuda), None)
