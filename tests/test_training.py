"""Training: the loss and the schedules against their formulas, and runs that can be interrupted."""

import copy
import errno
import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from llm_anatomy import training
from llm_anatomy.models.transformer import Transformer, TransformerConfig
from llm_anatomy.training import (
    cosine_with_warmup,
    inverse_sqrt_schedule,
    layer_groups,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
    smoothed_cross_entropy,
    train,
    unfreeze,
)

# --- Loss -----------------------------------------------------------------------------------------


@given(smoothing=st.floats(0.0, 0.99), seed=st.integers(0, 99))
def test_smoothed_loss_and_gradient_are_torch_s(smoothing, seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (3, 5))
    targets[torch.rand(3, 5) < 0.3] = -100
    targets[0, 0] = 6  # one target at least
    ours = smoothed_cross_entropy(logits, targets, smoothing)
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-9, rtol=1e-9)


def test_smoothed_loss_by_hand():
    """Four tokens, 0.1 to share: the true one has 0.925 to match, each other one 0.025."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    log_p = [x - math.log(sum(math.exp(y) for y in (2, 1, 0, -1))) for x in (2, 1, 0, -1)]
    expected = -(0.025 * log_p[0] + 0.925 * log_p[1] + 0.025 * log_p[2] + 0.025 * log_p[3])
    got = smoothed_cross_entropy(logits, torch.tensor([1]))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_least_smoothed_loss_is_the_entropy_of_the_target():
    target = torch.full((6,), 0.3 / 6, dtype=torch.float64)
    target[2] += 0.7
    loss = smoothed_cross_entropy(target.log()[None], torch.tensor([2]), smoothing=0.3)
    torch.testing.assert_close(loss, -(target * target.log()).sum())


def test_another_index_can_be_ignored():
    logits, targets = torch.randn(4, 6), torch.tensor([3, 0, 5, 0])
    got = smoothed_cross_entropy(logits, targets, 0.2, ignore_index=0)
    torch.testing.assert_close(got, smoothed_cross_entropy(logits[[0, 2]], targets[[0, 2]], 0.2))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\), got {smoothing}"):
        smoothed_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), smoothing)


def test_a_loss_without_targets_is_refused():
    with pytest.raises(ValueError, match="every target is ignored"):
        smoothed_cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100]))


# --- Schedules ------------------------------------------------------------------------------------


def test_schedule_of_the_paper():
    """Equation 3, and the peak of the base model: about 7e-4 at step 4000."""
    for step in (1, 2, 3999, 4000, 4001, 100_000):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert inverse_sqrt_schedule(step, 512) == pytest.approx(expected, rel=1e-12)
    assert inverse_sqrt_schedule(4000, 512) == pytest.approx(6.988e-4, rel=1e-4)


@pytest.mark.parametrize("warmup", [1, 2, 7, 40])
def test_schedule_of_the_paper_rises_in_a_line_and_falls_with_the_root(warmup):
    rates = [inverse_sqrt_schedule(step, 24, warmup, scale=3.0) for step in range(1, 200)]
    assert rates.index(max(rates)) + 1 == warmup
    assert max(rates) == pytest.approx(3.0 / math.sqrt(24 * warmup))
    for step, rate in enumerate(rates, start=1):
        share = step / warmup if step <= warmup else math.sqrt(warmup / step)
        assert rate == pytest.approx(max(rates) * share)


@pytest.mark.parametrize(("step", "warmup"), [(0, 10), (-3, 10), (5, 0)])
def test_schedule_of_the_paper_counts_from_1(step, warmup):
    with pytest.raises(ValueError, match=f"count from 1, got {step} and {warmup}"):
        inverse_sqrt_schedule(step, 512, warmup)


@pytest.mark.parametrize(("n_steps", "warmup"), [(20, 0), (20, 5), (21, 20), (1, 0)])
def test_cosine_is_that_of_transformers(n_steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, n_steps)
    for step in range(1, n_steps + 1):
        optimizer.step()
        theirs.step()
        got = cosine_with_warmup(step, n_steps, 0.3, warmup)
        assert got == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


def test_cosine_ends_at_its_floor():
    rates = [cosine_with_warmup(step, 30, 0.5, 10, floor=0.1) for step in range(1, 31)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert rates[19] == pytest.approx(0.3)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize(
    ("step", "n_steps", "warmup"), [(0, 10, 2), (11, 10, 2), (1, 10, 10), (1, 10, -1), (1, 0, 0)]
)
def test_cosine_refuses_what_lies_outside(step, n_steps, warmup):
    message = f"got step {step}, n_steps {n_steps}, warmup {warmup}"
    with pytest.raises(ValueError, match=message):
        cosine_with_warmup(step, n_steps, 0.1, warmup)


# --- Parameter groups -----------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(TransformerConfig(vocab_size=9, d_model=8, n_heads=2, d_ff=12))
    model.decoder.requires_grad_(False)
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    trained = {name for name in names.values() if not name.startswith("decoder")}
    assert decayed | kept == trained and not decayed & kept
    assert kept == {n for n in trained if n.endswith("bias") or "norm" in n}
    assert "token_embedding.weight" in decayed


class Stack(nn.Module):
    """Four layers from the input to the output, two of them in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(11))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


# blocks.1 must not take blocks.10 with it
STACK = [["embedding"], [f"blocks.{i}" for i in range(1, 11)], ["blocks.0"], ["norm", "head"]]


def test_rates_shrink_towards_the_input():
    """Howard and Ruder: each layer 2.6 times slower than the one above; vectors never decay."""
    model = Stack()
    scale, decay = {}, {}
    for group in layer_groups(model, STACK, weight_decay=0.1):
        for p in group["params"]:
            assert p not in scale
            scale[p], decay[p] = group["lr_scale"], group["weight_decay"]
    assert set(scale) == set(model.parameters())
    for name, p in model.named_parameters():
        layer = next(
            i for i, ms in enumerate(STACK) if any((name + ".").startswith(m + ".") for m in ms)
        )
        assert scale[p] == pytest.approx(2.6 ** (layer - 3)), name
        assert decay[p] == (0.1 if p.ndim > 1 else 0.0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (STACK[1:], "embedding.weight is in no layer"),
        ([*STACK, ["head"]], "head.weight is named twice, in layer 3 and in layer 4"),
        ([*STACK, ["body"]], "body of layer 4 is no module or parameter"),
        ([["block"], *STACK[1:]], "block of layer 0 is no module or parameter"),
    ],
)
def test_layers_that_are_not_the_model_s_are_refused(layers, message):
    model = Stack()
    with pytest.raises(ValueError, match=message):
        layer_groups(model, layers)
    with pytest.raises(ValueError, match=message):
        unfreeze(model, layers, 1)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("decay", [0.0, -1.0, math.nan])
def test_a_decay_that_is_not_positive_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be positive"):
        layer_groups(Stack(), STACK, decay)


@pytest.mark.parametrize("n", range(5))
def test_the_last_layers_are_unfrozen_first(n):
    model = Stack()
    unfreeze(model, STACK, 2)  # what is frozen may thaw, and what has thawed may freeze
    unfreeze(model, STACK, n)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {
        name
        for name, _ in model.named_parameters()
        for layer in STACK[len(STACK) - n :]
        if any((name + ".").startswith(module + ".") for module in layer)
    }
    assert learning == wanted


@pytest.mark.parametrize("n", [-1, 5])
def test_more_layers_than_there_are_cannot_be_unfrozen(n):
    with pytest.raises(ValueError, match="there are 4 layers"):
        unfreeze(Stack(), STACK, n)


# --- The loop -------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Dropout makes each step depend on the random state, the buffer on each step before."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(3, width, bias=False)  # its norm shifts
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.4)
        self.second = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.norm(self.first(x)).relu()))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def batch_at(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)


def schedule(step: int) -> float:
    return cosine_with_warmup(step, 12, 0.1, warmup=3)


def never(model: nn.Module, batch: object) -> Tensor:
    raise AssertionError("there is no step left to take")


def toy(seed: int) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIMIZERS = {
    "default": lambda model: None,
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "plain": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "decayed": lambda model: torch.optim.AdamW(parameter_groups(model, 0.3), amsgrad=True),
}


def test_a_run_is_the_plain_loop():
    ours, by_hand = toy(1), toy(1)
    optimizer = torch.optim.AdamW(by_hand.parameters(), betas=(0.9, 0.98), eps=1e-9, weight_decay=0)
    torch.manual_seed(2)
    expected = []
    for step in range(1, 13):
        loss = loss_of(by_hand.train(), batch_at(step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
        if norm > 0.7:
            for p in by_hand.parameters():
                p.grad *= 0.7 / norm
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        expected.append(loss.item())
    torch.manual_seed(2)
    losses = train(ours, loss_of, batch_at, 12, schedule, clip_norm=0.7)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("killed_at", [1, 4, 8, 12])
def test_a_killed_run_ends_as_if_it_had_never_been_killed(tmp_path, optimizer, killed_at):
    """Killed between two checkpoints, before the first and in the last step."""
    whole = toy(1)
    torch.manual_seed(2)
    expected = train(whole, loss_of, batch_at, 12, schedule, optimizer=optimizer(whole))
    after = torch.get_rng_state()

    def until_killed(model, batch):
        if torch.equal(batch[0], batch_at(killed_at)[0]):
            raise KeyboardInterrupt
        return loss_of(model, batch)

    first = toy(1)
    torch.manual_seed(2)
    where = dict(folder=tmp_path, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(first, until_killed, batch_at, 12, schedule, optimizer=optimizer(first), **where)

    if killed_at > 3:  # before, there is nothing to go on from
        first = toy(77)  # another process: other weights, another random state
    else:
        torch.manual_seed(2)
    losses = train(first, loss_of, batch_at, 12, schedule, optimizer=optimizer(first), **where)
    assert losses == expected
    assert same(first, whole)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_group_has_its_share_of_the_rate():
    """SGD moves a layer by its share of the rate times the gradient, here in one step."""
    model = Stack()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(layer_groups(model, STACK, decay=0.5), lr=1.0)
    train(model, loss_of, batch_at, 1, lambda step: 0.1, optimizer=optimizer, clip_norm=None)
    moved = [model.head, model.blocks[0], model.blocks[10], model.embedding]
    names = ["head", "blocks.0", "blocks.10", "embedding"]
    for name, layer, scale in zip(names, moved, [1, 0.5, 0.25, 0.125], strict=True):
        expected = before[f"{name}.weight"] - 0.1 * scale * layer.weight.grad
        torch.testing.assert_close(layer.weight.detach(), expected)


def gradually(model: nn.Module, step: int) -> Tensor:
    """A layer more in every third step."""
    unfreeze(model, STACK, min(4, 1 + (step - 1) // 3))
    return loss_of(model, batch_at(step))


def layered(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(layer_groups(model, STACK, weight_decay=0.1), lr=0.0)


def test_frozen_layers_stay_until_their_turn():
    model = Stack()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, gradually, lambda step: step, 6, schedule, optimizer=layered(model))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith(("norm", "head", "blocks.0."))}


@pytest.mark.parametrize("killed_at", [4, 8, 12])
def test_a_gradual_run_ends_as_if_it_had_never_been_killed(tmp_path, killed_at):
    """Layers that were still frozen when the run was saved begin with a clean optimizer."""
    torch.manual_seed(1)
    whole, first, second = Stack(), Stack(), Stack()
    first.load_state_dict(whole.state_dict())
    expected = train(whole, gradually, lambda step: step, 12, schedule, optimizer=layered(whole))

    def until_killed(model, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return gradually(model, step)

    where = dict(folder=tmp_path, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(first, until_killed, lambda s: s, 12, schedule, optimizer=layered(first), **where)
    losses = train(second, gradually, lambda s: s, 12, schedule, optimizer=layered(second), **where)
    assert losses == expected
    assert same(second, whole)


def test_an_ended_run_goes_on_when_more_steps_are_wanted(tmp_path):
    whole, parts = toy(1), toy(1)
    torch.manual_seed(2)
    expected = train(whole, loss_of, batch_at, 12, schedule)
    torch.manual_seed(2)
    assert train(parts, loss_of, batch_at, 5, schedule, folder=tmp_path) == expected[:5]
    parts = toy(77)
    assert train(parts, loss_of, batch_at, 12, schedule, folder=tmp_path) == expected
    assert same(parts, whole)
    again = toy(78)
    assert train(again, never, batch_at, 12, schedule, folder=tmp_path) == expected
    assert same(again, whole)
    with pytest.raises(ValueError, match="has taken 12 steps, more than the 11 wanted"):
        train(again, loss_of, batch_at, 11, schedule, folder=tmp_path)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(toy(1), loss_of, batch_at, 3, schedule, save_every=1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_while_saving_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    model = toy(1)
    losses = train(model, loss_of, batch_at, 4, schedule, folder=tmp_path)
    before = copy.deepcopy(model)

    def half_a_file(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_file", half_a_file)
        with pytest.raises(KeyboardInterrupt):
            train(model, loss_of, batch_at, 8, schedule, folder=tmp_path)
    again = toy(77)
    assert train(again, never, batch_at, 4, schedule, folder=tmp_path) == losses
    assert same(again, before)


@pytest.mark.parametrize("killed_in", ["save_file", "replace"])
def test_a_save_that_never_ends_leaves_a_run_to_go_on_from(tmp_path, monkeypatch, killed_in):
    """Killed with half a file written, or with a whole one that has no name yet."""
    whole, first = toy(1), toy(1)
    torch.manual_seed(2)
    expected = train(whole, loss_of, batch_at, 8, schedule)
    torch.manual_seed(2)
    train(first, loss_of, batch_at, 4, schedule, folder=tmp_path)

    def killed(source, path):
        if killed_in == "save_file":
            path.write_bytes(b"half")
        raise KeyboardInterrupt

    place = training if killed_in == "save_file" else training.os
    with monkeypatch.context() as patch:
        patch.setattr(place, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            train(toy(77), loss_of, batch_at, 6, schedule, folder=tmp_path)
    again = toy(78)
    assert train(again, loss_of, batch_at, 8, schedule, folder=tmp_path) == expected
    assert same(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path, monkeypatch, error):
    losses = train(toy(1), loss_of, batch_at, 4, schedule, folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    before = path.read_bytes()
    model, trained = toy(77), toy(1)

    def no_space(tensors, path):
        trained.load_state_dict(model.state_dict())
        path.write_bytes(b"as much as fits")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_file", no_space)
        message = (
            r"checkpoint\.safetensors could not be written, the older checkpoint is whole: .*No s"
        )
        with pytest.raises(OSError, match=message):
            train(model, loss_of, batch_at, 6, schedule, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    assert same(model, trained) and not model.training
    assert train(toy(78), loss_of, batch_at, 6, schedule, folder=tmp_path)[:4] == losses


def test_a_write_that_fails_half_way_is_reported(tmp_path):
    """A limit on the size of files stands for the disk that is full."""
    resource = pytest.importorskip("resource")
    model, path = toy(1), tmp_path / "c.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written, there is no older one: .*large"):
            save_checkpoint(path, model, adam(model), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(path, model, adam(model), [])


def test_mixed_precision_rounds_the_products_and_keeps_the_weights(tmp_path):
    """8 bits of a number are left in bfloat16: the loss moves by less than a hundredth."""
    seen = []

    def watched(model, batch):
        hidden = model.first(batch[0])
        seen.append((hidden.dtype, model.second(hidden).dtype))
        return loss_of(model, batch)

    narrow, one, other = toy(1), toy(1), toy(1)
    options = dict(folder=tmp_path, autocast=torch.bfloat16)
    losses = train(narrow, watched, batch_at, 8, lambda step: 1e-3, **options)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    torch.manual_seed(2)
    (exact,) = train(one, loss_of, batch_at, 1, schedule)
    torch.manual_seed(2)
    (rounded,) = train(other, loss_of, batch_at, 1, schedule, autocast=torch.bfloat16)
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-2)
    again = toy(77)
    assert train(again, never, batch_at, 8, schedule, **options) == losses
    assert same(again, narrow)


def test_mixed_precision_is_off_unless_asked_for():
    def watched(model, batch):
        assert not torch.is_autocast_enabled("cpu")
        return loss_of(model, batch)

    train(toy(1), watched, batch_at, 2, schedule)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mixed_precision_of_another_type_is_refused(dtype):
    with pytest.raises(ValueError, match=f"autocast must be torch.bfloat16, got {dtype}"):
        train(toy(1), never, batch_at, 2, schedule, autocast=dtype)


def test_each_step_has_its_rate_and_its_own_gradient():
    """The gradient of this loss is the step's number: the weight falls by rate times number."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    asked = []

    def rates(step):
        asked.append(step)
        return 10.0**-step

    slower = nn.Parameter(torch.zeros(1))
    model.register_parameter("other", slower)
    groups = [{"params": [model.weight]}, {"params": [slower], "lr": 5.0}]
    train(
        model,
        lambda m, number: number * (m.weight.sum() + m.other.sum()),
        float,
        4,
        rates,
        optimizer=torch.optim.SGD(groups, lr=7.0),
        clip_norm=None,
    )
    assert sorted(set(asked)) == [1, 2, 3, 4]
    for weight in (model.weight, slower):
        assert weight.item() == pytest.approx(-(0.1 + 0.02 + 0.003 + 0.0004))


@pytest.mark.parametrize(
    ("clip_norm", "length"), [(None, 13.0), (20.0, 13.0), (13.1, 13.0), (1.0, 1.0), (0.5, 0.5)]
)
def test_a_gradient_that_is_too_long_is_shortened(clip_norm, length):
    """(3, 4, 12) has length 13; two parameters hold it together."""
    model = nn.Linear(2, 1)
    before = torch.cat((model.weight[0], model.bias)).detach().clone()
    gradient = torch.tensor([3.0, 4.0, 12.0])
    train(
        model,
        lambda m, g: m.weight[0] @ g[:2] + m.bias[0] * g[2],
        lambda step: gradient,
        1,
        lambda step: 1.0,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        clip_norm=clip_norm,
    )
    moved = before - torch.cat((model.weight[0], model.bias))
    torch.testing.assert_close(moved, gradient * length / 13, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(tmp_path, bad):
    model, short = toy(1), toy(1)
    torch.manual_seed(2)
    losses = train(short, loss_of, batch_at, 4, schedule)
    before = dict(copy.deepcopy(short).named_parameters())

    def broken(model, batch):
        loss = loss_of(model, batch)
        return loss * bad if torch.equal(batch[0], batch_at(5)[0]) else loss

    torch.manual_seed(2)
    with pytest.raises(FloatingPointError, match=f"the loss is {bad} at step 5"):
        train(model, broken, batch_at, 9, schedule, folder=tmp_path, save_every=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not model.training
    again = toy(77)
    assert train(again, never, batch_at, 4, schedule, folder=tmp_path) == losses
    assert same(again, short)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_model_as_it_was(clip_norm):
    """The root of 0 is 0, with a slope of infinity."""
    model = nn.Linear(3, 1)
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match=r"the gradient has norm (inf|nan) at step 1"):
        train(
            model,
            lambda m, x: (m.weight * 0).sum().sqrt() + m.bias.sum(),
            float,
            3,
            schedule,
            clip_norm=clip_norm,
        )
    assert same(model, before)


def test_modes_of_the_model():
    model, modes = toy(1).eval(), []

    def watched(model, batch):
        modes.append(model.training)
        if len(modes) > 3:
            raise RuntimeError("stop")
        return loss_of(model, batch)

    train(model, watched, batch_at, 3, schedule)
    assert modes == [True] * 3 and not model.training
    with pytest.raises(RuntimeError, match="stop"):
        train(model, watched, batch_at, 3, schedule)
    assert not model.training


def test_a_transformer_learns_a_batch_by_heart():
    config = TransformerConfig(
        vocab_size=13,
        n_encoder_layers=1,
        n_decoder_layers=1,
        n_heads=2,
        d_model=16,
        d_ff=32,
        dropout=0.0,
    )
    model = Transformer(config)
    source, target = torch.randint(1, 13, (4, 6)), torch.randint(1, 13, (4, 6))

    def loss(model, batch):
        return smoothed_cross_entropy(model(source, target[:, :-1]), target[:, 1:], 0.0)

    losses = train(model, loss, lambda step: None, 150, lambda step: 5e-3)
    assert losses[0] > 2.0
    with torch.no_grad():
        assert loss(model, None) < 0.05
        assert torch.equal(model(source, target[:, :-1]).argmax(-1), target[:, 1:])


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(toy(1), loss_of, batch_at, 3, schedule, folder=folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copy(trained / "checkpoint.safetensors", tmp_path)
    return tmp_path


def refused(folder, message: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The checkpoint is refused with a message, and nothing is changed by it."""
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        train(model, loss_of, batch_at, 5, schedule, optimizer=optimizer, folder=folder)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert repr(optimizer.state_dict()) == repr(state)
    assert torch.equal(torch.get_rng_state(), random)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
    ],
)
def test_a_damaged_checkpoint_is_refused(folder, damage):
    path = folder / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    model = toy(5)
    refused(folder, "is corrupt or truncated", model, adam(model))


@pytest.mark.parametrize("name", ["losses", "random"])
def test_weights_alone_are_no_checkpoint(folder, name):
    path = folder / "checkpoint.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    model = toy(5)
    refused(folder, "is no checkpoint of a training run", model, adam(model))


@pytest.mark.parametrize(
    "other",
    [
        lambda: Toy(width=7),
        lambda: Toy().double(),
        lambda: nn.Sequential(nn.Linear(3, 2)),
        lambda: nn.ModuleDict({"first": nn.Linear(3, 6, bias=False), "second": nn.Linear(6, 2)}),
    ],
    ids=["shapes", "types", "names", "fewer"],
)
def test_the_checkpoint_of_another_model_is_refused(folder, other):
    model = other()
    refused(folder, "belongs to another model: names, shapes or types differ", model, adam(model))


def test_the_checkpoint_of_other_trained_parameters_is_refused(folder):
    """By their place in the optimizer alone, a moment would reach the wrong parameter."""
    model = toy(5)
    model.first.requires_grad_(False)
    refused(folder, r"trained first\.weight, which this optimizer does not", model, adam(model))


def test_moments_find_their_parameters_by_name(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW([*model["a"].parameters(), *model["b"].parameters()])
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer, [1.0, 0.5])
    other = copy.deepcopy(model)
    turned = torch.optim.AdamW([*other["b"].parameters(), *other["a"].parameters()])
    assert load_checkpoint(tmp_path / "c", other, turned) == [1.0, 0.5]
    theirs = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        for key, value in optimizer.state[theirs[name]].items():
            assert torch.equal(turned.state[parameter][key], value), f"{name} {key}"


def test_the_random_state_of_a_gpu_is_kept_too(tmp_path, monkeypatch):
    """Dropout on a GPU draws from there. No test has one, so a number stands for it."""
    gpu, state = torch.device("cuda", 1), {}
    monkeypatch.setattr(training, "_cuda_of", lambda model: gpu)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda t, device: state.update({device: t}))
    state[gpu] = torch.tensor([5, 3, 9], dtype=torch.uint8)
    model = toy(1)
    save_checkpoint(tmp_path / "c", model, adam(model), [])
    state[gpu] = torch.tensor([0, 0, 0], dtype=torch.uint8)
    load_checkpoint(tmp_path / "c", model, adam(model))
    assert state[gpu].tolist() == [5, 3, 9]


# --- Progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "silent"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)]
)
def test_the_bar_keeps_quiet_when_asked(monkeypatch, capsys, folder, value, silent):
    if value is None:
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TQDM_DISABLE", value)
    asked = {}

    def bar(steps, **options):
        asked.update(options)
        return real(steps, **options)

    real = training.tqdm
    monkeypatch.setattr(training, "tqdm", bar)
    train(toy(1), loss_of, batch_at, 5, schedule, folder=folder, description="counting")
    said = capsys.readouterr()
    assert said.out == ""
    assert asked["disable"] is silent  # a notebook's bar does not read the variable by itself
    assert (asked["initial"], asked["total"]) == (3, 5)
    assert ("counting" in said.err) is not silent
