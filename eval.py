"""Measure a trained run on notes that it was not trained on.

python eval.py                        # the bundled adapter on the bundled notes
python eval.py --run runs/demo        # on the test side of the notes it was trained on
"""

import argparse
import sys
from pathlib import Path

import clinora
from clinora.device import keep_freed_memory
from clinora.evaluation import assess
from clinora.report import read_steps, results_table, write_report
from clinora.training import METRICS


def main(argv: list[str] | None = None) -> int:
    """Evaluate and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="a folder that train.py wrote")
    add("--base", help="where the base is, if it has moved")
    add("--notes", help="bundled, mtsamples or a CSV file (default: the run's)")
    add("--text-column", help="the notes' column (default: the run's)")
    add("--label-column", help="the classes' column (default: the run's)")
    add("--include-seen", action="store_true", help="measure on training notes, too; no test")
    add("--report", type=Path, help="folder to write (default: the run's report/)")
    add("--show-text", action="store_true", help="quote mistaken notes in the report")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # a console may lack a letter of a class's name
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
    data = classifier.data
    if data is None:
        raise ValueError(
            f"{args.run} does not record which notes it has seen: nothing would be a test"
        )
    source = args.notes or ("bundled" if args.run == "bundled" else data.source)
    if source is None:
        raise ValueError(f"{args.run} does not record its notes: name a file with --notes")
    notes = clinora.read_notes(
        source,
        text_column=args.text_column or data.text_column or "transcription",
        label_column=args.label_column or data.label_column or "medical_specialty",
        classes=classifier.labels,
        split=data.split or "texts",
    )
    own = data.is_split_of(notes)
    trained_on = 0
    if args.include_seen:
        measured = list(notes.notes)
        trained_on = sum(data.has_seen(note) for note in measured)
    elif own:
        measured = notes.on("test")
    else:
        measured = [note for note in notes.notes if not data.has_seen(note)]
    if not measured:
        raise ValueError(
            f"the run was trained on all {len(notes.notes):,} notes: --include-seen measures on "
            "them all the same"
        )
    left_out = len(notes.notes) - len(measured)
    about = f"Notes: {notes}. {left_out:,} of them, which the run has seen, are left out."
    print(about, flush=True)

    results, answers = assess(classifier, notes, measured, trained_on=trained_on, own_split=own)
    run = Path("runs", "bundled") if args.run == "bundled" else Path(args.run)
    name = "report" if own else f"report-{Path(source).stem}"
    folder = args.report or run / (f"{name}-seen" if args.include_seen else name)
    write_report(
        folder, results, answers, measured, token_limit=classifier.token_limit, about=about,
        steps=read_steps(run / METRICS), show_text=args.show_text,
    )  # fmt: skip
    print(f"\n{results_table(results)}\n\nReport: {folder / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
