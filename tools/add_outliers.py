"""Give a run that has none the limit below which a text is unlike its notes.

    python -m tools.add_outliers --run RUN --notes NOTES

NOTES is what the run was trained on: its training and validation notes choose the limit, as
``clinora train`` does. Only the key "outliers" of ``clinora.json`` is added; all other bytes of the
run stay the same.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import clinora
from clinora.checkpoint import BUNDLED
from clinora.classifier import Classifier
from clinora.evaluation import outlier_limit
from clinora.notes import SPLITS
from clinora.run import RunRecord


def add_limit(run: str, base: str | None, source: str) -> None:
    """Choose the limit and write the record."""
    folder = BUNDLED / "adapter" if run == "bundled" else Path(run)
    record = RunRecord.read(folder)
    classifier = Classifier.load(run, base=base)
    data = record.data
    if data is None:
        raise ValueError(f"{folder} does not record which notes it was trained on")
    text_column, label_column = data.columns_in(source)
    notes = clinora.read_notes(
        source,
        text_column=text_column,
        label_column=label_column,
        classes=record.labels,
        split=data.split or SPLITS[0],
        split_column=data.split_column,
    )
    if not data.is_split_of(notes):
        raise ValueError(f"{folder} was not trained on the training notes of {source}")
    limit = outlier_limit(classifier, [*notes.on("training"), *notes.on("validation")])
    if limit is None:
        raise ValueError(f"{source} has too few notes to choose a limit")
    replace(record, outliers=limit).write(folder)
    print(f"{folder}: {limit}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="bundled or a run's folder")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--notes", required=True, help="the notes that it was trained on")
    args = parser.parse_args(argv)
    try:
        add_limit(args.run, args.base, args.notes)
    except (OSError, ValueError) as error:
        parser.exit(2, f"add_outliers.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
