"""Measure speed and memory beside the reference implementations, on the same weights.

    python benchmarks/run.py             about two minutes on two cores
    python benchmarks/run.py --tiny      seconds, to see that everything runs
    python benchmarks/run.py --threads 1

Ours and the peer's take turns within one process, so that what slows the machine slows both. Each
line gives the median time of both, the ratio (peer / ours: above 1 we are faster), and what share
of this machine's measured peak ours reaches: of its matrix-multiply rate where arithmetic limits,
of its memory bandwidth where reading the weights does. Before anything is timed the results of the
two are compared. Peak memory is that of a fresh process for each side.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from llm_anatomy import masks  # noqa: E402
from llm_anatomy.attention import MultiHeadAttention, scaled_dot_product_attention  # noqa: E402
from llm_anatomy.models.transformer import Transformer  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and batches, and how often each side is timed."""

    d_model: int = 512
    d_ff: int = 2048
    n_heads: int = 8
    n_layers: int = 6
    vocab_size: int = 8000
    batch: int = 4
    length: int = 128
    new_tokens: int = 32
    rounds: int = 9


TINY = Sizes(32, 64, 4, 2, 101, 2, 16, 4, 2)


@dataclass(frozen=True)
class Line:
    """One line of the report: medians in seconds, and the share of the peak that ours reaches."""

    name: str
    ours: float
    peer: float
    share: float | None
    of: str

    @property
    def ratio(self) -> float:
        return self.peer / self.ours

    def __str__(self) -> str:
        share = "" if self.share is None else f"{self.share:6.0%} of {self.of}"
        times = f"{1e3 * self.ours:9.2f} ms {1e3 * self.peer:9.2f} ms"
        return f"{self.name:<34}{times}   {self.ratio:5.2f}   {share}"


def turns(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, ...]:
    """Time both in turn after a warm-up, the order changing each round; return the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for work in (ours, peer):
        work()
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            start = time.perf_counter()
            (ours, peer)[side]()
            times[side].append(time.perf_counter() - start)
    return tuple(statistics.median(side) for side in times)


def matmul_peak(n: int) -> float:
    """Return the best rate of square matrix products, in floating-point operations a second."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def bandwidth(mebibytes: int) -> float:
    """Return the best rate of reading memory in a matrix-vector product, in bytes a second."""
    matrix, vector = torch.randn(mebibytes * 256, 1024), torch.randn(1024)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - start)
    return matrix.numel() * matrix.element_size() / best


def twins(sizes: Sizes) -> tuple[Transformer, MarianMTModel]:
    """Return our Transformer and a MarianMTModel with the same random weights."""
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=sizes.vocab_size,
        decoder_vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        encoder_layers=sizes.n_layers,
        decoder_layers=sizes.n_layers,
        encoder_attention_heads=sizes.n_heads,
        decoder_attention_heads=sizes.n_heads,
        encoder_ffn_dim=sizes.d_ff,
        decoder_ffn_dim=sizes.d_ff,
        max_position_embeddings=4 * sizes.length,
        activation_function="relu",
        scale_embedding=True,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=sizes.vocab_size - 1,
        decoder_start_token_id=sizes.vocab_size - 1,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    peer = MarianMTModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder)
    return ours.eval(), peer


def batch(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return source and target tokens, none of them padding."""
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.batch, sizes.length)
    return tuple(
        torch.randint(1, sizes.vocab_size - 1, shape, generator=generator) for _ in range(2)
    )


def our_greedy(model: Transformer, source: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily with a cache and return the new tokens."""
    memory, caches = model.encode(source), model.new_caches(new_tokens)
    token = source.new_full((source.shape[0], 1), model.config.pad_id)
    found = []
    for _ in range(new_tokens):
        token = model.decode(token, memory, caches=caches)[:, -1:].argmax(dim=-1)
        found.append(token)
    return torch.cat(found, dim=1)


def peer_greedy(model: MarianMTModel, source: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily with the peer's cache, in the same loop, without generate's extras."""
    memory = model.get_encoder()(source, return_dict=True)
    token = source.new_full((source.shape[0], 1), model.config.decoder_start_token_id)
    past, found = None, []
    for _ in range(new_tokens):
        out = model(
            encoder_outputs=memory, decoder_input_ids=token, past_key_values=past, use_cache=True
        )
        past, token = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        found.append(token)
    return torch.cat(found, dim=1)


def flops(sizes: Sizes) -> float:
    """Return the operations of one forward pass of the encoder and decoder: products only."""
    D, T = sizes.d_model, sizes.length
    projections, ffn, mixing = 4 * D * D, 2 * D * sizes.d_ff, 2 * T * D
    encoder = sizes.n_layers * (projections + ffn + mixing)
    decoder = sizes.n_layers * (2 * projections + ffn + 2 * mixing)
    return 2.0 * sizes.batch * T * (encoder + decoder + D * sizes.vocab_size)


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def compare_models(sizes: Sizes, peak: float, rate: float) -> list[Line]:
    """Compare the Transformer with MarianMTModel: forward, training, prefill, greedy decoding."""
    ours, peer = twins(sizes)
    source, target = batch(sizes)
    lines, one_way = [], flops(sizes)
    with torch.inference_mode():
        theirs = peer(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(ours(source, target), theirs, rtol=1e-4, atol=1e-4)
        both = turns(
            lambda: ours(source, target),
            lambda: peer(input_ids=source, decoder_input_ids=target, use_cache=False),
            sizes.rounds,
        )
        lines.append(Line("forward", *both, one_way / both[0] / peak, "matrix-multiply peak"))

        memory = peer.get_encoder()(source, return_dict=True)
        ready = ours.encode(source)
        both = turns(
            lambda: ours.decode(target, ready, caches=ours.new_caches(sizes.length)),
            lambda: peer(encoder_outputs=memory, decoder_input_ids=target, use_cache=True),
            sizes.rounds,
        )
        decoder = one_way - flops_of_encoder(sizes)
        lines.append(Line("prefill", *both, decoder / both[0] / peak, "matrix-multiply peak"))

        alone = source[:1]
        n = sizes.new_tokens
        assert torch.equal(our_greedy(ours, alone, n), peer_greedy(peer, alone, n))
        both = turns(
            lambda: our_greedy(ours, alone, n),
            lambda: peer_greedy(peer, alone, n),
            sizes.rounds,
        )
        read = n * (parameter_bytes(ours.decoder) + parameter_bytes(ours.token_embedding))
        name = f"greedy decode with cache, {n} tokens"
        lines.append(Line(name, *both, read / both[0] / rate, "memory bandwidth"))

    def step(model: nn.Module, logits: Callable[[], Tensor]) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def work() -> None:
            loss = F.cross_entropy(logits().flatten(0, 1), target.flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

        return work

    ours.train()
    peer.train()
    both = turns(
        step(ours, lambda: ours(source, target)),
        step(peer, lambda: peer(input_ids=source, decoder_input_ids=target, use_cache=False)[0]),
        sizes.rounds,
    )
    lines.append(Line("training step", *both, 3 * one_way / both[0] / peak, "matrix-multiply peak"))
    return lines


def flops_of_encoder(sizes: Sizes) -> float:
    D, T = sizes.d_model, sizes.length
    each = 4 * D * D + 2 * D * sizes.d_ff + 2 * T * D
    return 2.0 * sizes.batch * T * sizes.n_layers * each


@torch.inference_mode()
def compare_attention(sizes: Sizes, peak: float) -> list[Line]:
    """Compare multi-head attention with PyTorch's module, and the taught with the fused kernel."""
    D, H, T = sizes.d_model, sizes.n_heads, sizes.length
    ours = MultiHeadAttention(D, H).eval()
    peer = nn.MultiheadAttention(D, H, batch_first=True).eval()
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    peer.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    biases = [p.bias if p.bias is not None else torch.zeros(D) for p in projections]
    peer.in_proj_bias.copy_(torch.cat(biases))
    peer.out_proj.weight.copy_(ours.o_proj.weight)
    peer.out_proj.bias.copy_(ours.o_proj.bias if ours.o_proj.bias is not None else torch.zeros(D))
    x, mask = torch.randn(sizes.batch, T, D), masks.causal(T, T)
    hidden = ~mask.reshape(T, T)

    def theirs() -> Tensor:
        return peer(x, x, x, attn_mask=hidden, need_weights=False)[0]

    torch.testing.assert_close(ours(x, mask=mask), theirs(), rtol=1e-4, atol=1e-5)
    both = turns(lambda: ours(x, mask=mask), theirs, sizes.rounds)
    work = 2.0 * sizes.batch * T * (4 * D * D + 2 * T * D)
    name = "MultiHeadAttention, nn's"
    lines = [Line(name, *both, work / both[0] / peak, "matrix-multiply peak")]

    q, k, v = (torch.randn(sizes.batch, H, T, D // H) for _ in range(3))
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask)[0], fused)
    both = turns(
        lambda: scaled_dot_product_attention(q, k, v, mask),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        sizes.rounds,
    )
    work = 2.0 * sizes.batch * T * 2 * T * D
    name = "taught attention, fused kernel"
    return [*lines, Line(name, *both, work / both[0] / peak, "matrix-multiply peak")]


def peak_memory(side: str, sizes: Sizes) -> float:
    """Return how many MiB one training step adds to a fresh process, above its start.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, __file__, "--memory", side, "--sizes", json.dumps(asdict(sizes))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.strip().splitlines()[-1])


def high_water() -> float:
    """Return the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    import resource

    scale = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def one_training_step(side: str, sizes: Sizes) -> float:
    """Return the peak memory that a forward and a backward pass of one side need, in MiB."""
    ours, peer = twins(sizes)
    source, target = batch(sizes)
    model = ours if side == "ours" else peer
    del ours, peer
    before = high_water()
    for _ in range(2):
        logits = (
            model(source, target)
            if side == "ours"
            else model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
        )
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    return high_water() - before


def report(sizes: Sizes, threads: int) -> list[Line]:
    """Measure and print everything."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    tiny = sizes == TINY
    peak, rate = matmul_peak(256 if tiny else 2048), bandwidth(8 if tiny else 256)
    print(
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {threads} threads"
    )
    print(f"matrix-multiply peak {peak / 1e9:.0f} GFLOP/s, memory {rate / 1e9:.1f} GB/s\n")
    print(f"{'':<34}{'ours':>12} {'peer':>12}   {'ratio':>5}   ours reaches")
    lines = [*compare_models(sizes, peak, rate), *compare_attention(sizes, peak)]
    for line in lines:
        print(line)
    memory = {side: peak_memory(side, sizes) for side in ("ours", "peer")}
    ratio = f"{memory['peer'] / memory['ours']:5.2f}" if memory["ours"] > 0 else "    –"
    name = "training memory above the weights"
    print(f"{name:<34}{memory['ours']:8.0f} MiB {memory['peer']:8.0f} MiB   {ratio}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes that run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = Sizes(**options.sizes) if options.sizes else TINY if options.tiny else Sizes()
    if options.memory:
        print(one_training_step(options.memory, sizes))
    else:
        report(sizes, options.threads)


if __name__ == "__main__":
    main()
