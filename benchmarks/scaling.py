"""Scaling: time and memory of training at 1×, 2× and 4× the notes, the tokens and the layers.

    python -m benchmarks.scaling [--width 256] [--notes 8] [--tokens 128] [--layers 2]

Each line is measured in its own process, on a base of random weights. Memory is the peak minus the
peak before training, when the model has been built.
"""

import argparse
import json
import math
import statistics
import sys
import time

import torch

import clinora
from benchmarks import common
from clinora.llama import LlamaConfig, LlamaForSequenceClassification


def one_size(args: argparse.Namespace) -> dict[str, float]:
    """Train on the notes in batches of 8, and give seconds and bytes."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=args.tokens,
    )
    model = LlamaForSequenceClassification(config, 5).to(common.compute_dtype())
    clinora.apply_lora(model, common.LORA)
    step = common.our_step(model)
    batch = common.equal_batch(8, args.tokens, 2000)
    before_training = common.peak_bytes()
    step(batch)
    seconds = []
    for _ in range(args.repetitions):
        began = time.perf_counter()
        for _ in range(math.ceil(args.notes / 8)):
            step(batch)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "bytes": common.peak_bytes() - before_training}


def measure(args: argparse.Namespace, sizes: dict[str, int]) -> dict[str, float]:
    """Measure one size in a process of its own, whose peak of memory is that of this size."""
    options = sizes | {
        "width": args.width,
        "repetitions": args.repetitions,
        "threads": torch.get_num_threads(),
    }
    words = ["--one"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return common.in_own_process("benchmarks.scaling", *words)


def row(name: str, found: dict[str, float], first: dict[str, float]) -> list[str]:
    """Give a row of the table."""
    return [
        name,
        f"{found['seconds']:.2f}",
        f"{found['seconds'] / first['seconds']:.2f}",
        f"{found['bytes'] / 1e6:.0f}",
        f"{found['bytes'] / first['bytes']:.2f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    sizes = {"notes": 16, "tokens": 256, "layers": 4}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{name} at 1×")
    parser.add_argument("--width", type=int, default=512, help="width of the hidden state")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        print(json.dumps(one_size(args)))
        return 0
    common.begin(args)
    smallest = {name: getattr(args, name) for name in sizes}
    first = measure(args, smallest)
    rows = [row("1×", first, first)]
    for grown in sizes:
        for times in (2, 4):
            larger = smallest | {grown: times * smallest[grown]}
            rows.append(row(f"{grown} {times}×", measure(args, larger), first))
    common.table(["", "seconds", "of 1×", "MB", "of 1×"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
