"""Measure speed and memory beside the reference implementations, on the same weights.

    python benchmarks/run.py                  some minutes
    python benchmarks/run.py --tiny           seconds, to see that everything runs
    python benchmarks/run.py --only decode    the rows whose name holds a word
    python benchmarks/run.py --threads 1

Sizes are those of GPT-2 (124M), BERT-base and T5-small, of a LLaMA as wide and deep as GPT-2, and
of a Transformer as wide as T5-small; the peers are their transformers classes with eager and with
sdpa attention. A text has 128 tokens; 64 are decoded. In the rows called lengthwise,
`decoding.lay_lengthwise` has turned our weights.

Ours, the peers and the machine's limit take turns within one process, so that what slows the
machine slows all; with one thread, time in which others have the core does not count. Before
anything is timed the results are compared. A line gives the median time of ours and of the peer,
the ratio (peer / ours: above 1 we are faster), the memory that each adds at its peak, and what
share of the limit ours reaches: of the rate of a matrix product where arithmetic limits, of the
rate of reading memory where reading the weights does.

Where the peer reads weights at a good part of memory's rate, little is left to be gained in
decoding. On one core of an AMD EPYC that did nothing else, ours reached laid lengthwise 81 % of the
rate in GPT-2, 70 % in LLaMA, 62 % in T5 and 50 % in the Transformer, and the peer 65, 52, 40 and
39 %: even the whole rate would bound the ratio in GPT-2 at 1.5.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks import measure, models  # noqa: E402


def report(sizes: models.Sizes, rounds: int, word: str = "") -> list[measure.Line]:
    """Measure the rows whose name holds the word, and print each as it is done.

    Raises:
        SystemExit: there is no such row.
    """
    chosen = {name: make for name, make in models.rows().items() if word.lower() in name.lower()}
    if not chosen:
        raise SystemExit(f"no row holds {word!r}; there are {', '.join(models.rows())}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tiny = sizes == models.TINY
    limits = {
        "multiplying": measure.multiplying(128 if tiny else 1024),
        "reading": measure.reading(4 if tiny else 256),
    }
    print(
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}, "
        f"threads: {torch.get_num_threads()}, rounds: {rounds}\n"
    )
    print(f"{'':<43}{'ours':>12} {'peer':>12}   ratio   {'ours':>8} {'peer':>8}   ours reaches")
    lines = []
    for name, make in chosen.items():
        bout = make(sizes)
        for line in measure.compare(name, bout, limits[bout.bound], rounds):
            print(line, flush=True)
            lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes that run")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name holds this")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report(models.TINY if options.tiny else models.Sizes(), options.rounds, options.only)


if __name__ == "__main__":
    main()
