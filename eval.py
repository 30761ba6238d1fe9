"""Measure a trained run on notes that it was not trained on.

python eval.py                        # the bundled adapter on the bundled notes
python eval.py --run runs/demo        # on the test side of the notes it was trained on
"""

import argparse
import sys
from pathlib import Path

import clinora
from clinora.evaluation import evaluate, evaluate_random_heads
from clinora.report import results_table, write_report


def main(argv: list[str] | None = None) -> int:
    """Evaluate and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="bundled", help="a folder that train.py wrote")
    parser.add_argument("--base", help="where the base is, if it has moved")
    parser.add_argument("--notes", help="bundled, mtsamples or a CSV file")
    parser.add_argument("--text-column", default="transcription", help="the notes' column")
    parser.add_argument("--label-column", default="medical_specialty", help="the classes' column")
    parser.add_argument("--report", type=Path, help="folder to write (default: the run's report/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    try:
        run_job(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"eval.py: {error}\n")
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Load the run, read notes, leave out those it has seen, measure and write the report."""
    classifier = clinora.Classifier.load(
        args.run, base=args.base, device=args.device, precision=args.precision
    )
    recorded = classifier.about["notes"]
    source, columns = args.notes, (args.text_column, args.label_column)
    if source is None and args.run == "bundled":
        source = "bundled"
    elif source is None:
        source, columns = recorded["source"], (recorded["text_column"], recorded["label_column"])
    notes = clinora.read_notes(
        source, text_column=columns[0], label_column=columns[1], classes=classifier.labels
    )
    print(f"Notes: {notes}")
    seen = set(recorded["seen"])
    own = notes.fingerprint == recorded["fingerprint"]
    unseen = notes.on("test") if own else [n for n in notes.notes if n.sha256[:16] not in seen]
    print(f"Measured on {len(unseen):,} texts that the run was not trained on.")

    before = evaluate_random_heads(classifier, unseen)
    evaluation = evaluate(classifier, unseen)
    run = Path("runs", "bundled") if args.run == "bundled" else Path(args.run)
    folder = args.report or run / ("report" if own else f"report-{Path(source).stem}")
    write_report(folder, classifier.labels, evaluation, before, about=f"Notes: {notes}.")
    print(f"\n{results_table(classifier.labels, evaluation, before)}\n\nReport: {folder}")


if __name__ == "__main__":
    sys.exit(main())
