"""Measure how the predicted classes of notes change when the notes are written in capitals.

    python -m tools.capitals --notes mtsamples

For notes that the run has not seen, in capitals, as they are given to the model and as
``ordinary_case`` changes them: how many have the predicted class of the note in ordinary case, and
how many are correct.
"""

import argparse
import sys

import numpy as np

from clinora.classifier import Classifier
from clinora.notes import are_correct, clean_text, ordinary_case
from tools.unseen_notes import unseen_notes


def measure(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.sample < 1:
        raise ValueError(f"--sample is {args.sample}: expected 1 or more")
    classifier = Classifier.load(
        args.run, base=args.base, device=args.device, precision=args.precision
    )
    notes = unseen_notes(classifier, args)[: args.sample]
    if not notes:
        raise ValueError(f"{args.notes} has no notes that the run has not seen")
    ways = {
        "as it is written": lambda text: text,
        "in capitals": str.upper,
        "in capitals, read in lower case": lambda text: ordinary_case(text.upper()),
    }
    print("| note | predicted class unchanged | correct |\n|---|---:|---:|")
    written = None
    for way, change in ways.items():
        # Not classifier.encode, which would change the case.
        texts = [change(clean_text(note.text)) for note in notes]
        limit = classifier.token_limit
        ids = [classifier.tokenizer.encode(text, limit) for text in texts]
        predicted = classifier.logits(ids).argmax(-1).numpy()
        written = predicted if written is None else written
        same = np.mean(predicted == written)
        correct = np.mean(are_correct(notes, predicted.tolist()))
        print(f"| {way} | {same:.1%} | {correct:.1%} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="bundled or a run's folder")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", help="column of the texts (default: that of the run or named notes)")
    add("--label-column", help="column of the labels (default: that of the run or named notes)")
    add("--sample", type=int, default=150, help="most notes, chosen by their hashes")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    try:
        measure(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"capitals.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
