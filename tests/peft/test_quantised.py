"""Four bits a weight: the published levels, the blocks, what is stored, and what is learned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.peft import lora
from llm_anatomy.peft.quantised import (
    QuantisedConfig,
    QuantisedLinear,
    bits_per_weight,
    nf4_levels,
    pack,
    quantise,
    quantise_base,
    restore_base,
    uniform_levels,
    unpack,
)
from llm_anatomy.peft.targets import freeze, trainable

# The table in the authors' code, bitsandbytes 0.50.2, and in the paper's appendix E.
PUBLISHED = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def tiny() -> GPT2:
    config = GPT2Config(vocab_size=29, n_layers=2, n_heads=3, d_model=12, d_ff=20, n_positions=16)
    return GPT2(config).eval()


def test_levels_are_the_published_ones():
    torch.testing.assert_close(nf4_levels(), PUBLISHED, rtol=0, atol=3e-7)
    assert nf4_levels()[7] == 0 and nf4_levels()[0] == -1 and nf4_levels()[-1] == 1


def test_levels_hold_nearly_equal_shares_of_a_normal_distribution():
    x = torch.randn(200_000)
    largest = torch.special.ndtri(torch.tensor(0.5 * (2 - 1 / 32 - 1 / 30)))
    middles = (nf4_levels()[1:] + nf4_levels()[:-1]) / 2
    inner = torch.bincount(torch.bucketize(x / largest, middles), minlength=16)[1:-1] / len(x)
    assert 0.055 < inner.min() and inner.max() < 0.075  # 1/16 is 0.0625


@pytest.mark.parametrize("group", [None, 3, 256])
@pytest.mark.parametrize("shape", [(64,), (5, 7), (9, 100), (1, 1)])
def test_every_value_takes_the_nearest_level_of_its_block(shape, group):
    w = torch.randn(shape)
    stored = quantise(w, block=16, group=group)
    flat, codes = w.flatten(), unpack(stored.codes, w.numel())
    for start in range(0, len(flat), 16):
        block = flat[start : start + 16]
        absmax = block.abs().max()
        want = (block[:, None] - nf4_levels() * absmax).abs().argmin(dim=1)
        assert torch.equal(codes[start : start + 16].long(), want)
        step = 0 if group is None else (stored.group_scales.max() / 127 * 0.51)
        torch.testing.assert_close(stored.absmax()[start // 16], absmax, rtol=0, atol=step + 1e-6)
    restored = stored.dequantise()
    assert restored.shape == w.shape
    scale = stored.absmax().repeat_interleave(16)[: len(flat)].view(shape)
    assert torch.equal(restored, nf4_levels()[codes.long()].view(shape) * scale)


def test_blocks_run_along_the_rows():
    w = torch.ones(4, 64)
    w[2] = 100.0
    stored = quantise(w, group=None)
    assert stored.scales.tolist() == [1.0, 1.0, 100.0, 1.0]
    assert torch.equal(stored.dequantise(), w)


def test_an_outlier_spoils_its_own_block_alone():
    w = torch.randn(2, 64)
    alone = quantise(w, group=None).dequantise()
    w[0, 3] = 1000.0
    assert torch.equal(quantise(w, group=None).dequantise()[1], alone[1])
    assert (quantise(w, group=None).dequantise()[0, 4:] == 0).all()


def test_a_block_of_zeros_stays_zero():
    w = torch.randn(4, 64)
    w[1] = 0.0
    assert not quantise(w, group=None).dequantise()[1].any()
    assert not quantise(torch.zeros(4, 64)).dequantise().any()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_two_codes_a_byte(n):
    codes = torch.randint(16, (n,), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.numel() == (n + 1) // 2
    assert torch.equal(unpack(packed, n), codes)


def test_the_first_code_is_the_upper_half_as_in_bitsandbytes():
    assert pack(torch.tensor([1, 15], dtype=torch.uint8)).item() == 0x1F


@pytest.mark.parametrize(("group", "bits"), [(None, 4.5), (256, 4.126953125)])
def test_bits_a_weight_as_computed_and_as_stored(group, bits):
    assert bits_per_weight(64, group) == bits
    w = torch.randn(1024, 512)
    got = quantise(w, group=group).n_bytes * 8 / w.numel()
    assert got == pytest.approx(bits, abs=1e-4)  # the one mean comes in addition


def test_nf4_errs_less_than_uniform_levels_on_normal_weights():
    w = torch.randn(512, 512)

    def error(levels: torch.Tensor, group: int | None = None) -> float:
        return (quantise(w, levels=levels, group=group).dequantise() - w).pow(2).mean().item()

    nf4, uniform = error(nf4_levels()), error(uniform_levels())
    assert 0.8 < nf4 / uniform < 0.87
    assert error(nf4_levels(), group=256) < 1.01 * nf4  # the second rounding costs next to nothing


def test_uniform_levels_win_on_uniform_weights():
    w = torch.rand(256, 256) * 2 - 1
    nf4 = (quantise(w).dequantise() - w).pow(2).mean()
    assert (quantise(w, levels=uniform_levels()).dequantise() - w).pow(2).mean() < nf4


def test_layer_computes_with_the_rounded_weight_and_passes_gradients_on():
    linear = nn.Linear(20, 30)
    layer = QuantisedLinear(linear, block=16)
    x = torch.randn(2, 5, 20, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.dequantise(), linear.bias))
    y.square().sum().backward()
    want = torch.autograd.grad(F.linear(x, layer.dequantise(), linear.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want)
    assert not trainable(layer)


def test_lora_learns_on_a_base_in_four_bits():
    model, tokens = tiny(), torch.randint(29, (2, 7))
    quantise_base(model, QuantisedConfig(block=16))
    before = copy.deepcopy(dict(model.named_buffers()))
    lora.add(model, lora.LoRAConfig(r=2, alpha=4.0))
    first = model(tokens)
    assert all(name.rpartition(".")[2].startswith("lora") for name in trainable(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    lora.remove(model)
    assert torch.equal(model(tokens), first)
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers())


def test_backward_keeps_no_weight_in_full():
    layer = QuantisedLinear(nn.Linear(64, 96, bias=False))
    sizes = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        layer(x).sum()
    assert max(sizes, default=0) < 64 * 96


def test_double_precision_and_half_precision_pass_through():
    layer = QuantisedLinear(nn.Linear(8, 6, bias=False))
    for dtype in (torch.float64, torch.bfloat16):
        assert layer(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_base_in_four_bits_and_back():
    model, tokens = tiny(), torch.randint(29, (2, 7))
    exact = model(tokens)
    names = quantise_base(model, QuantisedConfig(targets=("q_proj", "up_proj"), block=16))
    assert names == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attention.q_proj", "ffn.up_proj")]
    rounded = model(tokens)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    assert restore_base(model) == names
    torch.testing.assert_close(model(tokens), rounded)
    model.load_state_dict(tiny().state_dict())  # the names are the old ones


def test_layers_in_four_bits_are_saved_and_loaded():
    model, other = tiny(), tiny()
    for m in (model, other):
        quantise_base(m, QuantisedConfig(block=16, group=8))
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(29, (2, 7))
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: quantise_base(m, QuantisedConfig(targets=("w_q",))), "no module is called w_q"),
        (lambda m: quantise_base(m, QuantisedConfig(targets=("norm",))), "not a linear layer"),
        (lambda m: restore_base(m), "no layer in four bits"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_base_unharmed(spoil, message):
    model = tiny()
    before, tree = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(ValueError, match=message):
        spoil(model)
    assert str(model) == tree
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_twice_tied_or_beneath_a_method_is_refused():
    model = tiny()
    quantise_base(model, QuantisedConfig(targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.q_proj is in four bits already"):
        quantise_base(model, QuantisedConfig(targets=("k_proj", "q_proj")))
    assert isinstance(model.blocks[0].attention.k_proj, nn.Linear)
    freeze(model, "LoRA")
    with pytest.raises(ValueError, match="carries LoRA already"):
        quantise_base(model, QuantisedConfig(targets=("k_proj",)))
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(ValueError, match="a shares its weight"):
        quantise_base(tied, QuantisedConfig(targets=("a",)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.empty(0, 3)), "nothing to quantise"),
        (lambda: quantise(torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: quantise(torch.tensor([1e300], dtype=torch.float64)), "too large for 32 bits"),
        (lambda: quantise(torch.full((70,), 3e38)), "too large for 32 bits"),
        (lambda: quantise(torch.ones(3), block=0), "block must be a whole number"),
        (lambda: quantise(torch.ones(3), group=0), "group must be a whole number"),
        (lambda: quantise(torch.ones(3), levels=uniform_levels() * 2), "rise from -1 to 1"),
        (lambda: quantise(torch.ones(3), levels=nf4_levels().flip(0)), "rise from -1 to 1"),
        (lambda: QuantisedConfig(targets=()), "at least one name"),
        (lambda: QuantisedConfig(block=-1), "block must be"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bias", [True, False])
def test_the_old_precision_is_remembered(bias):
    """Models ask a layer for the type of its weight, and LoRA's factors take it."""
    model = nn.Sequential(nn.Linear(8, 6, bias=bias, dtype=torch.bfloat16)).eval()
    model[0].weight.requires_grad_(False)
    quantise_base(model, QuantisedConfig(targets=("0",)))
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, model[0].dequantise().bfloat16())
    assert not model[0].training
    lora.add(model, lora.LoRAConfig(r=2, targets=("0",)))
    assert model[0].lora_A.dtype == torch.bfloat16
    assert model(torch.ones(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    lora.remove(model)
    restore_base(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert not model[0].weight.requires_grad
    assert not model[0].training
    assert not bias or model[0].bias.requires_grad


@pytest.mark.parametrize("n", [0, 15, 17])
def test_levels_are_sixteen(n, unchecked):
    with pytest.raises(ValueError, match="must be 16 levels"):
        quantise(torch.ones(3), levels=torch.linspace(-1, 1, n))
