"""A pass of training over real notes: real tokens a second, padding not counted.

    python -m benchmarks.lengths FOLDER --notes mtsamples.csv [--layers 2] [--sample 32]

Ours has batches of like length under a token budget, as train.py; theirs has as many notes in each
batch, drawn at random and padded to the longest, as Transformers' Trainer by default.
"""

import argparse
import statistics
import sys

import torch

import clinora
from benchmarks import common


def measure(args: argparse.Namespace) -> None:
    """Time a pass of each side over the same notes."""
    tokenizer = clinora.Tokenizer(
        args.tokenizer or common.find_base(args.base).folder / "tokenizer.model"
    )
    notes = clinora.read_notes(args.notes).on("training")
    chosen = torch.randperm(len(notes), generator=torch.Generator().manual_seed(0))[: args.sample]
    ids = [tokenizer.encode(notes[i].text, args.token_limit) for i in chosen.tolist()]
    real = sum(map(len, ids))
    ours = common.batches_of_like_length(ids, args.batch * args.token_limit)
    theirs = common.random_batches(ids, args.batch)
    step = common.our_step(common.our_model(args.base, 5, args.layers))
    their_step = common.their_step(common.their_model(args.base, 5, args.layers))
    seconds = common.alternate(
        {
            "ours": lambda: [step(batch) for batch in ours],
            "theirs": lambda: [their_step(batch) for batch in theirs],
        },
        args.repetitions,
    )
    rows = []
    for name, batches in (("ours", ours), ("theirs", theirs)):
        median = statistics.median(seconds[name])
        padded = sum(ids.numel() for ids, _ in batches)
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
    parser.add_argument("--notes", default="bundled", help="bundled, mtsamples or a CSV file")
    parser.add_argument("--tokenizer", help="a tokenizer.model (default: the base's)")
    parser.add_argument("--layers", type=int, help="cut the base after so many (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="notes of the limit's length")
    parser.add_argument("--sample", type=int, default=64, help="notes to train on")
    parser.add_argument("--token-limit", type=int, default=512, help="tokens read of a note")
    args = parser.parse_args(argv)
    common.begin(args)
    measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
