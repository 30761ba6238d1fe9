"""A training step on an NF4 base beside one on the plain base: seconds, and peak memory.

    python -m benchmarks.shape tinyllama FOLDER      # once: 2.2 GB of random weights
    python -m benchmarks.nf4 FOLDER --batch 1 [--layers 4] [--memory] [--checkpointing]

"none" is the base in the dtype that train.py chooses. The peak memory is that of a process that
loads the base and trains one step. It includes Python and PyTorch, whose memory "imports" states.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks import common
from clinora.device import keep_freed_memory
from clinora.quantize import QUANTIZATIONS


def new_step(args: argparse.Namespace, quantize: str) -> Callable[[], None]:
    """Load a base and make a training step on one batch without padding."""
    model = common.our_model(args.base, 5, args.layers, quantize=quantize)
    model.model.activation_checkpointing = args.checkpointing
    step = common.our_step(model)
    batch = common.equal_batch(args.batch, args.tokens, 2000)
    return lambda: step(batch)


def measure(args: argparse.Namespace) -> None:
    """Time a step on each base in turns."""
    steps = {quantize: new_step(args, quantize) for quantize in QUANTIZATIONS}
    seconds = common.alternate(steps, args.repetitions)
    rows = []
    for quantize, times in seconds.items():
        longer = [1 / ratio for ratio in common.ratios(seconds, quantize, "none")]
        rows.append([quantize, f"{statistics.median(times):.2f}", common.spread(longer)])
    common.table(["base", "seconds a step", "times the seconds of none"], rows)


def measure_memory(args: argparse.Namespace) -> None:
    """Compare the peak memory of processes that train one step each."""
    words = [args.base, *common.words_of(args, "base", "memory", "side", "checkpointing")]
    if args.checkpointing:
        words.append("--checkpointing")
    peaks = {}
    for quantize in QUANTIZATIONS:
        peaks[quantize] = common.in_own_process("benchmarks.nf4", *words, "--side", quantize)
    rows = [["imports", f"{peaks['none']['imports'] / 1e9:.2f}", ""]]
    for quantize, found in peaks.items():
        share = found["peak"] / peaks["none"]["peak"]
        rows.append([quantize, f"{found['peak'] / 1e9:.2f}", f"{share:.2f}"])
    common.table(["base", "peak GB", "of none"], rows)


def one_side(args: argparse.Namespace) -> None:
    """Train one step on one base, and print the peak memory before and after."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    keep_freed_memory()  # as train.py does
    imports = common.peak_bytes()
    new_step(args, args.side)()
    print(json.dumps({"imports": imports, "peak": common.peak_bytes()}))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("base", help="a folder, or bundled")
    parser.add_argument("--layers", type=int, help="layers of the base to keep (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="notes per batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per note")
    parser.add_argument("--checkpointing", action="store_true", help="checkpoint activations")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    parser.add_argument("--side", choices=QUANTIZATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        one_side(args)
        return 0
    common.begin(args)
    if args.memory:
        measure_memory(args)
    else:
        measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
