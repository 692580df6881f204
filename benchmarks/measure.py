"""How two implementations are compared: their results, then their time and memory, in turn."""

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Limit:
    """Work that does nothing but what the machine does fastest, and how much of it that is."""

    name: str
    work: Callable[[], object]
    amount: float


def multiplying(n: int) -> Limit:
    """A product of square matrices; the amount is in floating-point operations."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return Limit("matrix-multiply peak", lambda: a @ b, 2.0 * n**3)


def reading(mebibytes: int) -> Limit:
    """A sum over much memory; the amount is in bytes."""
    x = torch.ones(mebibytes * 2**18)
    return Limit("memory bandwidth", x.sum, 4.0 * x.numel())


@dataclass(frozen=True)
class Bout:
    """The same work, done by us and by others, and how much of it there is at least.

    `amount` counts operations where `bound` is "multiplying", bytes where it is "reading".
    """

    ours: Work
    peers: Mapping[str, Work]
    bound: str
    amount: float


@dataclass(frozen=True)
class Line:
    """Ours beside one peer: median seconds, peak MiB, and the share of the limit ours reaches."""

    name: str
    ours: float
    peer: float
    share: float
    of: str
    our_memory: float | None
    peer_memory: float | None

    @property
    def ratio(self) -> float:
        return self.peer / self.ours

    def __str__(self) -> str:
        memory = ["   –" if m is None else f"{m:4.0f}" for m in (self.our_memory, self.peer_memory)]
        return (
            f"{self.name:<43}{1e3 * self.ours:9.2f} ms {1e3 * self.peer:9.2f} ms   "
            f"{self.ratio:5.2f}   {memory[0]} MiB {memory[1]} MiB   {self.share:5.0%} of {self.of}"
        )


def compare(name: str, bout: Bout, limit: Limit, rounds: int) -> list[Line]:
    """Check that the results agree, then measure; one line for each peer.

    Raises:
        AssertionError: a peer computes something else.
    """
    works = [bout.ours, *bout.peers.values()]
    expected, *others = [work() for work in works]
    for other in others:
        check_same(expected, other)
    del expected, others, other
    memory = [peak_memory(work) for work in works]
    limit.work()
    ours, *theirs, fastest = turns([*works, limit.work], rounds)
    share = bout.amount / ours / (limit.amount / fastest)
    return [
        Line(f"{name}, {peer}", ours, seconds, share, limit.name, memory[0], mebibytes)
        for peer, seconds, mebibytes in zip(bout.peers, theirs, memory[1:], strict=True)
    ]


def check_same(ours: Tensor | tuple[Tensor, ...], peer: Tensor | tuple[Tensor, ...]) -> None:
    """Tokens must be equal, and other numbers close."""
    if isinstance(ours, Tensor) and not ours.is_floating_point():
        assert torch.equal(ours, peer), f"{ours.tolist()} is not {peer.tolist()}"
    else:
        torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4)


def turns(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Time all in turn, backwards in every other round; return the median seconds of each.

    What slows the machine for a while slows all of them. With one thread the clock is that of the
    process, which stands still while others have the core.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    for _ in range(rounds):
        for side in order:
            start = clock()
            works[side]()
            times[side].append(clock() - start)
        order.reverse()
    return [statistics.median(side) for side in times]


def flops(work: Callable[[], object]) -> float:
    """Count the operations of all products. The counter sees no fused kernel: none is used here."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def peak_memory(work: Callable[[], object]) -> float | None:
    """Return how many MiB a call adds to this process at its peak; None where no one tells."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # memory that was freed, and kept for later, would hide new memory
    reset.write_text("5")  # the peak starts anew
    before = int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])
    work()
    return (int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) - before) / 1024
