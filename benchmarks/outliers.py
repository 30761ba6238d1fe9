"""Measure how much longer a prediction takes if the run has a limit for outliers.

    python -m benchmarks.outliers

Predictions with and without the limit alternate; the table gives the medians.
"""

import argparse
import statistics
import sys
import time

import clinora
from clinora.classifier import Classifier
from clinora.device import keep_freed_memory

SHORT = "Left knee pain after skiing. Suspected ACL tear."


def seconds(classifier: Classifier, texts: list[str]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    classifier(texts)
    return time.perf_counter() - begin


def measure(args: argparse.Namespace) -> None:
    """Print the table."""
    classifier = Classifier.load(args.run, device=args.device, precision=args.precision)
    if classifier.outliers is None:
        raise ValueError(f"{args.run} has no limit for outliers: expected a run that has one")
    limits = {"without": None, "with": classifier.outliers}
    notes = [note.text for note in clinora.read_notes("bundled").notes]
    long = "\n".join(notes)
    cases = {"one note of 512 tokens": [long], "one short note": [SHORT], "100 notes": notes[:100]}
    print("| | without, ms | with, ms | more |\n|---|---:|---:|---:|")
    for case, texts in cases.items():
        taken = {"without": [], "with": []}
        classifier(texts)  # warm up
        for _ in range(args.rounds):
            for way, limit in limits.items():
                classifier.outliers = limit
                taken[way].append(seconds(classifier, texts))
        without, with_limit = (statistics.median(taken[way]) for way in limits)
        more = with_limit / without - 1
        print(f"| {case} | {1e3 * without:.1f} | {1e3 * with_limit:.1f} | {more:.0%} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="bundled or a run's folder")
    add("--rounds", type=int, default=20, help="pairs of calls of each case")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        measure(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"outliers.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
