"""Training and inference on one GPU: tokens per second, share of the product rate, peak memory.

    python -m benchmarks.gpu [--bases bundled smollm2 tinyllama]

Each side is measured as it is and compiled: ours layer by layer (``layer.compile()``), theirs as a
whole (``torch.compile``). The bases of SmolLM2's and TinyLlama's shape have random weights, which
are written to a temporary folder first. Memory is what PyTorch had allocated at most, the model
included. The product rate is that of one large product in the compute dtype. Only our linear
layers' products count towards a share; theirs has none, since it executes other products.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import common
from benchmarks.shape import SHAPES, write_base

Run = Callable[[], object]
VOCABULARY = 2000  # ids below this exist in every base


def product_rate(device: torch.device, size: int, repetitions: int) -> float:
    """Measure the rate of a (size × size) · (size × size) product, in operations per second."""
    dtype = common.compute_dtype(device)
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = time_runs(lambda: a @ a, device, repetitions)
    return 2 * size**3 / statistics.median(seconds)


def time_runs(run: Run, device: torch.device, repetitions: int) -> list[float]:
    """Time a computation, after three calls that are not timed: they compile and settle memory."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repetitions):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_model(side: str, base: str, device: torch.device, adapt: bool) -> nn.Module:
    """Load one side's model, compiled if the side's name says so."""
    if side.startswith("ours"):
        model = common.our_model(base, 5, adapt=adapt, device=device)
        if side.endswith("compiled"):
            for layer in model.model.layers:
                layer.compile()
        return model
    model = common.their_model(base, 5, adapt=adapt, device=device)
    if side.endswith("compiled"):
        model.compile()
    return model


def make_training(side: str, base: str, batch: common.Batch) -> tuple[Run, nn.Module]:
    """Make a training step of one side on a batch."""
    ids, _ = batch
    model = make_model(side, base, ids.device, adapt=True)
    make_step = common.our_step if side.startswith("ours") else common.their_step
    step = make_step(model)
    return lambda: step(batch), model


def make_inference(side: str, base: str, batch: common.Batch) -> tuple[Run, nn.Module]:
    """Make a forward pass of one side on a batch, without an adapter."""
    ids, lengths = batch
    model = make_model(side, base, ids.device, adapt=False).eval()

    @torch.inference_mode()
    def run() -> None:
        with common.autocast(ids.device):
            if side.startswith("ours"):
                model(ids, lengths)
            else:
                model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return run, model


def measure(base: str, training: bool, args: argparse.Namespace, rate: float) -> None:
    """Measure all sides on one base, one after the other, and print a table."""
    batch = common.equal_batch(args.batch, args.tokens, VOCABULARY, args.device)
    make = make_training if training else make_inference
    seconds = {}
    rows = []
    for side in args.sides:
        torch.compiler.reset()  # else a later side could exceed the limit of compilations
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(args.device)
        run, model = make(side, base, batch)
        seconds[side] = time_runs(run, args.device, args.repetitions)
        memory = ""
        if args.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(args.device) / 1e9:.2f}"
        median = statistics.median(seconds[side])
        share = ""
        if side == "ours":
            flops = common.Products(model, run, backward=training).flops
            share = f"{flops / median / rate:.1%}"
        speed = f"{args.batch * args.tokens / median:,.0f}"
        rows.append([side, f"{1000 * median:.1f}", speed, share, memory])
        del run, model
    common.table(["", "ms", "tokens/s", "share of the product rate", "peak GB"], rows)
    for ours, theirs in (("ours", "theirs"), ("ours compiled", "theirs compiled")):
        if ours in seconds and theirs in seconds:
            faster = statistics.median(seconds[theirs]) / statistics.median(seconds[ours])
            print(f"{ours}: {faster:.2f} times faster than {theirs}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    sides = ("ours", "theirs", "ours compiled", "theirs compiled")
    parser = common.parser(__doc__)
    parser.set_defaults(repetitions=10)
    parser.add_argument(
        "--bases", nargs="+", choices=("bundled", *SHAPES), default=("bundled", *SHAPES),
        help="bases to measure",
    )  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="what to measure")
    parser.add_argument("--batch", type=int, default=16, help="notes per batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per note")
    parser.add_argument("--product", type=int, default=8192, help="size of the large product")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cuda, or cpu to try")
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU was found: run this on a machine with one, or try --device cpu")
    common.begin(args)
    if args.device.type == "cuda":
        print(torch.cuda.get_device_name(args.device))
    rate = product_rate(args.device, args.product, args.repetitions)
    print(f"product rate {rate / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.bases:
            base = name
            if name in SHAPES:
                base = str(Path(temporary, name))
                write_base(name, Path(base))
                name = f"{name}'s shape with random weights"
            for training in (True, False):
                what = "a training step" if training else "inference"
                print(f"\n{name}, {what}, {args.batch} × {args.tokens} tokens")
                measure(base, training, args, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
