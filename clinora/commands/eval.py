"""Evaluate a trained run on notes that it was not trained on.

Without options: the bundled adapter on the bundled notes. With --run: the test split of the notes
that the run was trained on.

Example: {command} --run runs/demo
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clinora.commands import (
    add_machine_options,
    add_run_quantize_option,
    as_typed,
    check_run,
    make_folder,
    new_parser,
    one_line_errors,
)

if TYPE_CHECKING:
    from clinora.notes import Notes
    from clinora.run import DataRecord


def build_parser(prog: str = "clinora eval") -> argparse.ArgumentParser:
    """Define the options."""
    parser = new_parser(prog, __doc__.format(command=as_typed(prog, "eval")))
    add = parser.add_argument
    add("--run", default="bundled", help="folder of a trained run (default: %(default)s)")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--notes", help="bundled, mtsamples, a file or a folder (default: the run's)")
    add("--text-column", help="column of the texts (default: that of the run or named notes)")
    add("--label-column", help="column of the labels (default: that of the run or named notes)")
    add("--split-column", help="column of the splits (default: the run's if --notes is absent)")
    add(
        "--include-seen",
        action="store_true",
        help="also evaluate on training notes; the result is then not a test (default: off)",
    )
    add("--report", type=Path, help="output folder (default: one in the run's folder)")
    add(
        "--show-text",
        action="store_true",
        help="quote wrongly predicted notes in the report (default: off)",
    )
    add_run_quantize_option(parser)
    add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None, prog: str = "clinora eval") -> int:
    """Evaluate the run, write the report, and return the exit status."""
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(argv)
        sys.stdout.reconfigure(errors="replace")  # a console may lack a character of a class name
        evaluate_run(args, prog)
    return 0


def evaluate_run(args: argparse.Namespace, prog: str) -> None:
    """Load the run, read the notes, leave out those it has seen, evaluate, and write the report."""
    check_run(args.run, prog)
    from clinora.classifier import Classifier
    from clinora.device import keep_freed_memory
    from clinora.evaluation import assess
    from clinora.notes import SPLITS, read_notes
    from clinora.report import read_steps, results_table, write_report
    from clinora.run import RUN_FILE
    from clinora.training import METRICS

    keep_freed_memory()
    classifier = Classifier.load(
        args.run,
        base=args.base,
        device=args.device,
        precision=args.precision,
        quantize=args.quantize,
    )
    data = classifier.data
    if data is None:
        raise ValueError(
            f"{args.run} does not record which notes it has seen, so no note can test it"
        )
    bundled = args.run == "bundled"
    if args.notes:
        source = args.notes
    elif bundled:
        source = "bundled"
    else:
        source = data.source
    if source is None:
        raise ValueError(f"{args.run} does not record its notes: give a file with --notes")
    split_column = args.split_column
    if split_column is None and not args.notes:
        split_column = data.split_column
    split = data.split
    if split is None or split_column is not None:  # a column takes the place of the run's split
        split = SPLITS[0]
    text_column, label_column = data.columns_in(source)
    notes = read_notes(
        source,
        text_column=args.text_column or text_column,
        label_column=args.label_column or label_column,
        classes=classifier.labels,
        split=split,
        split_column=split_column,
        may_lack_classes=True,
    )

    own_split = data.is_split_of(notes)
    trained_on = 0
    if args.include_seen:
        measured = list(notes.notes)
        trained_on = sum(data.has_seen(note) for note in measured)
    elif own_split:
        measured = notes.on("test")
    else:
        measured = [note for note in notes.notes if not data.has_seen(note)]
    if not measured:
        raise ValueError(
            f"the run was trained on all {len(notes.notes):,} notes: --include-seen evaluates it "
            "on them anyway"
        )
    left_out = len(notes.notes) - len(measured)
    about = f"Notes: {notes}. {left_out:,} of them, which the run has seen, are left out."
    print(about, flush=True)

    if bundled:
        run = Path("runs", "bundled")
        steps = []
        holds_another = (run / RUN_FILE).exists() or (run / METRICS).exists()
        if holds_another and not args.report:
            raise ValueError(
                f"{run} holds another run: give a folder for the report of the bundled run with "
                "--report"
            )
    else:
        run = Path(args.run)
        steps = read_steps(run / METRICS)
    name = "report" if own_split else f"report-{Path(source).stem}"
    if args.include_seen:
        name += "-seen"
    folder = args.report or run / name
    make_folder(folder, "--report")
    results, answers = assess(
        classifier,
        notes,
        measured,
        trained_on=trained_on,
        learned_from=notes if own_split else read_own_notes(data, classifier.labels),
        seed=classifier.training_options.get("seed", 0),
    )
    write_report(
        folder,
        results,
        answers,
        measured,
        token_limit=classifier.token_limit,
        about=about,
        steps=steps,
        show_text=args.show_text,
    )
    print(f"\n{results_table(results)}\n\nReport: {folder / 'report.md'}")


def read_own_notes(data: "DataRecord", labels: Sequence[str]) -> "Notes | None":
    """Read the notes that a run was trained on; None if they are not on this machine unchanged."""
    from clinora.notes import read_notes

    if data.source is None:
        return None
    try:
        notes = read_notes(
            data.source,
            text_column=data.text_column,
            label_column=data.label_column,
            classes=labels,
            split=data.split,
            split_column=data.split_column,
            download=False,
        )
    except (OSError, ValueError):  # the file has gone or changed
        return None
    return notes if data.is_split_of(notes) else None
