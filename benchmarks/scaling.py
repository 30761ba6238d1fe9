"""Growth: time and memory of training at 1×, 2× and 4× the notes, the tokens and the layers.

    python -m benchmarks.scaling [--width 256] [--notes 8] [--tokens 128] [--layers 2]

Every line is a process of its own on a base of random weights. Memory is its peak less what a
process holds that has made the model but not trained it.
"""

import argparse
import json
import statistics
import sys
import time

import torch

import clinora
from benchmarks import common
from clinora.llama import LlamaConfig, LlamaForSequenceClassification


def one_size(args: argparse.Namespace) -> dict[str, float]:
    """Train over so many notes, 8 a batch, and give seconds and bytes."""
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
    model = LlamaForSequenceClassification(config, 5).bfloat16()
    clinora.apply_lora(model, common.LORA)
    step, batch = common.our_step(model), common.equal_batch(8, args.tokens, 2000)
    at_rest = common.peak_bytes()
    step(batch)
    seconds = []
    for _ in range(args.repetitions):
        began = time.perf_counter()
        for _ in range(-(-args.notes // 8)):
            step(batch)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "bytes": common.peak_bytes() - at_rest}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    sizes = {"notes": 16, "tokens": 256, "layers": 4}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="at 1×")
    parser.add_argument("--width", type=int, default=512, help="of the hidden state")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        print(json.dumps(one_size(args)))
        return 0
    common.begin(args)
    rows = []
    for grown in sizes:
        first = None
        for times in (1, 2, 4):
            words = ["--one", "--width", str(args.width), "--repetitions", str(args.repetitions)]
            words += ["--threads", str(torch.get_num_threads())]
            for name in sizes:
                size = getattr(args, name) * (times if name == grown else 1)
                words += [f"--{name}", str(size)]
            found = common.in_own_process("benchmarks.scaling", *words)
            first = first or found
            grow = [f"{found[what] / first[what]:.2f}" for what in ("seconds", "bytes")]
            rows.append(
                [f"{grown} {times}×", f"{found['seconds']:.2f}", grow[0],
                 f"{found['bytes'] / 1e6:.0f}", grow[1]]
            )  # fmt: skip
    common.table(["", "seconds", "of 1×", "MB", "of 1×"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
