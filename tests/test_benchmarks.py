"""The benchmark runs, counts the operations that are done, and times both sides alike."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run

ROOT = Path(__file__).resolve().parent.parent
SIZES = run.Sizes(24, 40, 3, 2, 29, 2, 7, 4, 2)


def test_operations_are_those_that_torch_counts():
    """The counter does not see a fused kernel, hence the one made of products."""
    ours, _ = run.twins(SIZES)
    source, target = run.batch(SIZES)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        memory = ours.encode(source)
    assert counter.get_total_flops() == run.flops_of_encoder(SIZES)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours.decode(target, memory)
    assert counter.get_total_flops() == run.flops(SIZES) - run.flops_of_encoder(SIZES)


def test_both_sides_decode_the_same():
    ours, peer = run.twins(SIZES)
    source = run.batch(SIZES)[0]
    with torch.no_grad():
        a, b = (run.our_greedy(ours, source, 5), run.peer_greedy(peer, source, 5))
    assert torch.equal(a, b)


def test_sides_take_turns_in_alternating_order():
    calls = []
    run.turns(lambda: calls.append("ours"), lambda: calls.append("peer"), rounds=4)
    assert calls == ["ours", "peer"] + ["ours", "peer", "peer", "ours"] * 2


@pytest.mark.slow
def test_the_command_prints_every_line():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/run.py", "--tiny", "--threads", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"^(\S.*?) +[\d.]+ ms +[\d.]+ ms +[\d.]+ ", done.stdout, re.MULTILINE)
    assert [line.split(",")[0] for line in lines] == [
        "forward",
        "prefill",
        "greedy decode with cache",
        "training step",
        "MultiHeadAttention",
        "taught attention",
    ]
    assert re.search(
        r"^training memory .* MiB +[\d.]+ MiB|^training memory .*MiB", done.stdout, re.M
    )
