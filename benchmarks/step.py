"""A training step on batches without padding: share of the matmul rate, and peak memory.

    python -m benchmarks.shape tinyllama FOLDER      # once: 2.2 GB of random weights
    python -m benchmarks.step FOLDER [--layers 4] [--memory]

"alone" computes only the products of our step's linear layers, in the same run: its rate is the
machine's matmul rate at these shapes. Our step's share is the time that its products would take at
that rate, divided by the time of the step. Theirs has no share: it executes other products.
"""

import argparse
import json
import statistics
import sys

import torch

from benchmarks import common


def measure(args: argparse.Namespace) -> None:
    """Time our step, their step and our products alone."""
    batch = common.equal_batch(args.batch, args.tokens, 2000)
    ours = common.our_model(args.base, 5, args.layers)
    theirs = common.their_model(args.base, 5, args.layers)
    step = common.our_step(ours)
    their_step = common.their_step(theirs)
    products = common.Products(ours, lambda: step(batch), backward=True)
    seconds = common.alternate(
        {"ours": lambda: step(batch), "theirs": lambda: their_step(batch),
         "alone": products.compute},
        args.repetitions,
    )  # fmt: skip
    tokens = args.batch * args.tokens
    rate = products.flops / statistics.median(seconds["alone"])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        share = ""
        if name != "theirs":
            share = f"{products.flops / median / rate:.1%}"
        rows.append([name, f"{median:.2f}", f"{tokens / median:.0f}", share])
    common.table(["", "seconds a step", "tokens/s", "share of the matmul rate"], rows)
    print(
        f"matmul rate {rate / 1e9:.0f} GFLOP/s; {products.flops / 1e12:.2f} TFLOP a step executed"
    )
    print(f"times faster than theirs: {common.spread(common.ratios(seconds))}")


def measure_memory(args: argparse.Namespace) -> None:
    """Compare the peak memory of two processes; each loads a model and trains two steps."""
    words = [args.base, "--batch", str(args.batch), "--tokens", str(args.tokens)]
    if args.layers:
        words += ["--layers", str(args.layers)]
    words += ["--threads", str(torch.get_num_threads())]
    peaks = {}
    for side in ("ours", "theirs"):
        result = common.in_own_process("benchmarks.step", *words, "--side", side)
        peaks[side] = result["peak"]
    common.table(["", "peak GB"], [[side, f"{peak / 1e9:.2f}"] for side, peak in peaks.items()])
    print(f"ours of theirs: {peaks['ours'] / peaks['theirs']:.2f}")


def one_side(args: argparse.Namespace) -> None:
    """Train two steps on one side and print the peak memory."""
    if args.side == "ours":
        step = common.our_step(common.our_model(args.base, 5, args.layers))
    else:
        step = common.their_step(common.their_model(args.base, 5, args.layers))
    for _ in range(2):
        step(common.equal_batch(args.batch, args.tokens, 2000))
    print(json.dumps({"peak": common.peak_bytes()}))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("base", help="a folder, or bundled")
    parser.add_argument("--layers", type=int, help="layers of the base to keep (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="notes per batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per note")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not time")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        torch.set_num_threads(args.threads or torch.get_num_threads())
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
