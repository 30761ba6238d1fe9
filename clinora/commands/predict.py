"""Predict the class of every note in a file of any size.

Each row of the file gives one row of results, in the same order: its number, the columns of --keep,
label, confidence, refer, tokens, truncated and error. The results never contain a note, unless its
column is kept.

Example: {command} --run runs/demo --notes archive.parquet --out results --keep id
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from clinora.commands import (
    STOPPED,
    add_machine_options,
    add_run_quantize_option,
    as_typed,
    check_run,
    end_with,
    new_parser,
    one_line_errors,
)

ENGINE_HELP = """what computes: this process, or Ray on this machine or on the cluster that the
environment variable RAY_ADDRESS gives (default: %(default)s)"""


def build_parser(prog: str = "clinora predict") -> argparse.ArgumentParser:
    """Define the options."""
    from clinora.notes import TEXT_COLUMN
    from clinora.tables.writing import FORMATS

    parser = new_parser(prog, __doc__.format(command=as_typed(prog, "predict")))
    add = parser.add_argument
    add("--run", default="bundled", help="folder of a trained run (default: %(default)s)")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add(
        "--notes",
        type=Path,
        required=True,
        help="a file: CSV, JSON lines (both may be gzipped), Parquet or Excel (required)",
    )
    add("--out", type=Path, required=True, help="output folder (required)")
    add("--text-column", default=TEXT_COLUMN, help="column of the texts (default: %(default)s)")
    add("--keep", nargs="+", default=[], help="columns that the results have, too (default: none)")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="format of the parts (default: %(default)s)",
    )
    add("--merge", action="store_true", help="make one file of the parts (default: off)")
    add(
        "--resume",
        action="store_true",
        help="continue at the first missing part of --out (default: off)",
    )
    add("--engine", choices=("local", "ray"), default="local", help=ENGINE_HELP)
    add("--actors", type=int, help="with ray: copies of the classifier (default: 1)")
    add(
        "--gpus-per-actor",
        type=float,
        help="with ray: GPUs of each copy, 1 or a share of one (default: 0, the CPU)",
    )
    add_run_quantize_option(parser)
    add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None, prog: str = "clinora predict") -> int:
    """Score the file, and return the exit status."""
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(argv)
        try:
            predict(args, prog)
        except KeyboardInterrupt:
            end_with(prog, "stopped; the same command with --resume continues", STOPPED)
    return 0


def predict(args: argparse.Namespace, prog: str) -> None:
    """Score the file with the chosen engine."""
    check_run(args.run, prog)
    options = {
        "text_column": args.text_column,
        "keep": args.keep,
        "output_format": args.format,
        "resume": args.resume,
        "merge": args.merge,
    }
    # Only what was given, because the defaults stand elsewhere.
    given = {"actors": args.actors, "gpus_per_actor": args.gpus_per_actor}
    cluster = {name: value for name, value in given.items() if value is not None}
    if args.engine == "ray":
        results = predict_on_cluster(args, options | cluster)
    elif cluster:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in cluster)
        raise ValueError(f"{flags}: only with --engine ray")
    else:
        results = predict_here(args, options)
    print(f"Results: {results}", file=sys.stderr)


def predict_here(args: argparse.Namespace, options: dict[str, Any]) -> Path:
    """Load the run and score the file in this process."""
    from clinora.classifier import Classifier
    from clinora.device import keep_few_kernels, keep_freed_memory
    from clinora.predict import predict_file

    keep_freed_memory()
    keep_few_kernels()
    classifier = Classifier.load(
        args.run,
        base=args.base,
        device=args.device,
        precision=args.precision,
        quantize=args.quantize,
    )
    return predict_file(classifier, args.run, args.notes, args.out, **options)


def predict_on_cluster(args: argparse.Namespace, options: dict[str, Any]) -> Path:
    """Score the file with Ray."""
    if args.device != "auto":
        raise ValueError("--device: not with --engine ray, where --gpus-per-actor decides")
    from clinora.cluster import predict_with_ray

    return predict_with_ray(
        args.run,
        args.notes,
        args.out,
        base=args.base,
        precision=args.precision,
        quantize=args.quantize,
        **options,
    )
