"""Measure what share of several kinds of text a run flags as not a clinical note.

    python -m tools.outlier_table --data FOLDER

FOLDER has ``mtsamples.csv`` and ``mtsdialog/mtsdialog.csv``, as for ``tools.fit_outliers``.
Clinical texts are those of the test split; other texts are of the kinds that the detector was
fitted with, and of kinds that it was not fitted with.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import clinora
from clinora.classifier import Classifier
from clinora.serving.words import EXAMPLES
from tools.clinical_lists import TO_MEASURE, clinical_lists
from tools.fit_outliers import TUNED, notes_of
from tools.other_text import other_texts

MOST = 100  # notes that are changed in each way, and lists of each kind
TYPOS = 0.08  # share of the words with two letters exchanged


def clinical_texts(data: Path) -> dict[str, list[str]]:
    """Give clinical texts of the test split and ordinary variations of them, by kind."""
    draw = random.Random(0)
    five_classes = clinora.read_notes(data / "mtsamples.csv").on("test")
    kinds = {"MTSamples, the five classes": [note.text for note in five_classes]}
    kinds |= notes_of(data, "test")
    notes = kinds["MTSamples"][:MOST]
    kinds["MTSamples, with typing errors"] = [with_typos(note, draw) for note in notes]
    kinds["MTSamples, in lower case"] = [note.lower() for note in notes]
    kinds["MTSamples, in capitals"] = [note.upper() for note in notes]
    kinds |= clinical_lists(TO_MEASURE, MOST, seed=0)
    kinds["The page's examples"] = list(EXAMPLES)
    return kinds


def with_typos(text: str, draw: random.Random) -> str:
    """Exchange two neighbouring letters in some words."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and draw.random() < TYPOS:
            at = draw.randrange(len(word) - 1)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def print_table(title: str, kinds: dict[str, Sequence[str]], classifier: Classifier) -> None:
    """Print the share of each kind that scores below the run's limit."""
    print(f"| {title} | texts | flagged as not a note |\n|---|---:|---:|")
    for kind, texts in kinds.items():
        scores = classifier.outlier_scores([classifier.encode(text) for text in texts])
        share = (scores < classifier.outliers.limit).mean()
        print(f"| {kind} | {len(texts)} | {share:.1%} |", flush=True)
    print()


def measure(args: argparse.Namespace) -> None:
    """Print the three tables."""
    classifier = Classifier.load(
        args.run, base=args.base, device=args.device, precision=args.precision
    )
    if classifier.outliers is None:
        raise ValueError(f"{args.run} has no limit: add one with tools.add_outliers")
    other = other_texts()
    tuned = {kind: other.pop(kind) for kind in TUNED}
    print_table("clinical texts", clinical_texts(args.data), classifier)
    print_table("other texts that the detector was not fitted with", other, classifier)
    print_table("other texts that it was fitted with", tuned, classifier)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the notes")
    add("--run", default="bundled", help="bundled or a run's folder")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    try:
        measure(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"outlier_table.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
