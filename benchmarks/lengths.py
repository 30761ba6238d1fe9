"""A training pass over real notes: tokens per second, without padding.

    python -m benchmarks.lengths FOLDER --notes mtsamples.csv [--layers 2] [--sample 32]

A step learns from a number of random notes. Ours divides them into batches of similar length, as
train.py does. Theirs pads all of them to the longest, as Transformers' Trainer does by default.
"""

import argparse
import statistics
import sys

import torch

import clinora
from benchmarks import common
from clinora.checkpoint import find_tokenizer


def measure(args: argparse.Namespace) -> None:
    """Time a pass of each side over the same notes."""
    tokenizer_file = args.tokenizer
    if tokenizer_file is None:
        tokenizer_file = find_tokenizer(args.base)
    tokenizer = clinora.Tokenizer(tokenizer_file)
    notes = clinora.read_notes(args.notes).on("training")
    chosen = torch.randperm(len(notes), generator=torch.Generator().manual_seed(0))[: args.sample]
    ids = [tokenizer.encode(notes[i].text, args.token_limit) for i in chosen.tolist()]
    real = sum(len(note) for note in ids)  # tokens, without padding
    groups = common.random_groups(ids, args.batch)
    ours = [common.our_batches(group) for group in groups]
    theirs = [common.their_batches(group) for group in groups]
    step = common.our_step(common.our_model(args.base, 5, args.layers))
    their_step = common.their_step(common.their_model(args.base, 5, args.layers))
    seconds = common.alternate(
        {
            "ours": lambda: [step(*batches) for batches in ours],
            "theirs": lambda: [their_step(*batches) for batches in theirs],
        },
        args.repetitions,
    )
    rows = []
    for name, steps in (("ours", ours), ("theirs", theirs)):
        median = statistics.median(seconds[name])
        batches = [batch for step_batches in steps for batch in step_batches]
        padded = sum(padded_ids.numel() for padded_ids, _ in batches)
        rows.append(
            [
                name,
                len(batches),
                f"{1 - real / padded:.1%}",
                f"{median:.1f}",
                f"{real / median:.0f}",
            ]
        )
    common.table(["", "batches", "padding", "seconds", "real tokens/s"], rows)
    print(f"{len(ids)} notes, {real:,} tokens")
    print(f"times faster than theirs: {common.spread(common.ratios(seconds))}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("base", help="a folder, or bundled")
    parser.add_argument("--notes", default="bundled", help="bundled, mtsamples or a file")
    parser.add_argument("--tokenizer", help="a tokenizer file (default: the base's)")
    parser.add_argument("--layers", type=int, help="layers of the base to keep (default: all)")
    parser.add_argument("--batch", type=int, default=16, help="notes that a step learns from")
    parser.add_argument("--sample", type=int, default=64, help="notes to train on")
    parser.add_argument("--token-limit", type=int, default=512, help="tokens read of a note")
    args = parser.parse_args(argv)
    common.begin(args)
    measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
