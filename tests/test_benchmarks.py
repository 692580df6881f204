"""The benchmark runs, counts the operations that are done, and times all sides alike."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, models, run

ROOT = Path(__file__).resolve().parent.parent
SIZES = models.Sizes(models.Shape(32, 48, 4, 2), models.Shape(24, 40, 3, 2), 61, 7, 3, 5)
V, T = SIZES.most_tokens, SIZES.length


def products(shape: models.Shape, *, attentions: int = 1) -> int:
    """Multiplications of one layer for T positions: projections, feed-forward, scores, mixing."""
    D, F = shape.d_model, shape.d_ff
    return T * (attentions * (4 * D * D + 2 * T * D) + 2 * D * F)


def operations() -> dict[str, int]:
    """Two a multiplication, and as many again for each of the two gradients."""
    base, small = SIZES.base, SIZES.small
    gpt2 = base.n_layers * products(base)
    encoder = small.n_layers * products(small)
    decoder = small.n_layers * products(small, attentions=2)
    transformer = encoder + decoder + T * small.d_model * V
    D, groups, wide = base.d_model, base.n_heads // 4, 2 * base.d_ff // 3
    per_token = 2 * D * D + 2 * D * groups * (D // base.n_heads) + 3 * D * wide + 2 * T * D
    llama = base.n_layers * T * per_token
    return {
        "GPT-2 forward": 2 * (gpt2 + T * base.d_model * V),
        "GPT-2 prefill": 2 * (gpt2 + base.d_model * V),
        "GPT-2 training step": 6 * (gpt2 + T * base.d_model * V),
        "LLaMA forward": 2 * (llama + T * D * V),
        "LLaMA prefill": 2 * (llama + D * V),
        "LLaMA training step": 6 * (llama + T * D * V),
        "BERT forward": 2 * (gpt2 + T * base.d_model * (base.d_model + V)),
        "T5 encode": 2 * encoder,
        "Transformer forward": 2 * transformer,
        "Transformer training step": 6 * transformer,
    }


@pytest.mark.parametrize("name", operations())
def test_operations_are_those_of_the_formula(name):
    assert models.rows()[name](SIZES).amount == operations()[name]


@pytest.mark.parametrize("name", ["GPT-2", "LLaMA", "T5", "Transformer"])
def test_decoding_reads_the_weights_that_it_uses(name):
    """A weight that no new token needs can be lost after the first one."""
    ours, _ = models.model_and_peers(name, SIZES)
    used = set()
    for module in ours.modules():
        module.register_forward_hook(lambda m, inputs, out: used.add(m) if out.numel() else None)
    decoder_only = name in ("GPT-2", "LLaMA")
    memory = None if decoder_only else ours.encode(torch.tensor([[1, 2]]))
    caches = ours.new_caches(4)
    logits, token = models.last_logits(ours, memory), torch.tensor([[3]])
    with torch.no_grad():
        logits(token, caches)
        used.clear()
        logits(token, caches)
    models.model_and_peers.cache_clear()  # this one has hooks
    matrices = [m.weight for m in used if isinstance(m, torch.nn.Linear)]
    if name != "LLaMA":  # its output layer is a module of its own
        matrices.append(ours.token_embedding.weight)
    layers = ours.blocks if decoder_only else ours.decoder
    once = ("cross_attention.k_proj", "cross_attention.v_proj")
    rest = [
        p for n, p in layers.named_parameters() if p.ndim == 1 and not any(w in n for w in once)
    ]
    assert models.weights_read(ours) == 4 * sum(p.numel() for p in [*matrices, *rest])


def test_every_row_compares_what_is_equal():
    """Both sides are at work on the same weights, of which there is one copy for both peers."""
    for name, make in models.rows().items():
        bout = make(SIZES)
        ours = bout.ours()
        assert len(bout.peers) in (1, 2), name
        for work in bout.peers.values():
            measure.check_same(ours, work())
    ours, peers = models.model_and_peers("GPT-2", SIZES)
    a, b = (dict(peer.named_parameters()) for peer in peers.values())
    assert all(a[name] is b[name] for name in a)
    assert [peer.config._attn_implementation for peer in peers.values()] == ["eager", "sdpa"]


def test_a_peer_with_another_result_is_refused():
    limit = measure.multiplying(8)
    for ours, theirs in (
        (torch.tensor([50_000, 3]), torch.tensor([50_001, 3])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01])),
        ((torch.ones(1), torch.ones(1)), (torch.ones(1), torch.zeros(1))),
    ):
        with pytest.raises(AssertionError):
            measure.check_same(ours, theirs)
        bout = measure.Bout(lambda a=ours: a, {"peer": lambda b=theirs: b}, "multiplying", 1.0)
        with pytest.raises(AssertionError):
            measure.compare("row", bout, limit, 1)


def test_training_steps_leave_the_weights_alone():
    """Otherwise the sides would drift apart between rounds."""
    bout = models.rows()["GPT-2 training step"](SIZES)
    first, again = bout.ours(), bout.ours()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_sides_take_turns_in_alternating_order():
    calls = []
    works = [lambda side=side: calls.append(side) for side in "abc"]
    assert len(measure.turns(works, rounds=3)) == 3
    assert "".join(calls) == "abc" + "cba" + "abc"


def test_a_line_holds_the_ratio_and_the_share(monkeypatch):
    """Twice the amount of the limit in four times its time is half of the limit."""
    monkeypatch.setattr(measure, "turns", lambda works, rounds: [4.0, 6.0, 2.0, 1.0])
    bout = measure.Bout(lambda: torch.ones(1), dict.fromkeys("ab", lambda: torch.ones(1)), "", 20.0)
    limit = measure.Limit("the limit", lambda: None, 10.0)
    a, b = measure.compare("row", bout, limit, 1)
    assert (a.name, a.ours, a.peer, a.ratio, a.share) == ("row, a", 4.0, 6.0, 1.5, 0.5)
    assert (b.name, b.ours, b.peer, b.ratio, b.share) == ("row, b", 4.0, 2.0, 0.5, 0.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak can be asked for")
def test_peak_memory_is_what_a_call_adds():
    held = torch.ones(2**24)  # 64 MiB, before
    for mebibytes in (100, 30, 100):
        added = measure.peak_memory(lambda n=mebibytes: torch.ones(n * 2**18).sum())
        assert added == pytest.approx(mebibytes, abs=4)
    assert held.sum() == 2**24


def test_a_word_picks_rows(capsys):
    lines = run.report(models.TINY, rounds=1, word="bert")
    assert [line.name for line in lines] == ["BERT forward, eager", "BERT forward, sdpa"]
    assert all(str(line) in capsys.readouterr().out for line in lines[:1])
    with pytest.raises(SystemExit, match="no row holds 'xyz'; there are GPT-2 forward, "):
        run.report(models.TINY, rounds=1, word="xyz")


@pytest.mark.slow
def test_the_command_prints_every_line():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/run.py", "--tiny", "--threads", "1", "--rounds", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    number = r" +(?:[\d.]+|–)"
    columns = rf"{number} ms{number} ms{number}{number} MiB{number} MiB +\d+% of (.*)$"
    lines = re.findall(rf"^(\S.*?){columns}", done.stdout, re.MULTILINE)
    expected = []
    for name in models.rows():
        alone = {"MultiHeadAttention": ["nn's"], "taught attention": ["fused kernel"]}
        limit = "memory bandwidth" if "decode" in name else "matrix-multiply peak"
        expected += [(f"{name}, {peer}", limit) for peer in alone.get(name, ["eager", "sdpa"])]
    assert lines == expected
