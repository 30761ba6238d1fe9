"""Train the bundled base with LoRA at several ranks: accuracy, parameters and spectra of ΔW.

    python -m tools.ranks --notes mtsamples --out runs/ranks

The page's tab about LoRA shows the result, ``ranks.json``, from a copy in ``clinora/bundled``.
LoRA's alpha is twice the rank, so that the scaling is the same at every rank. Each training writes
a file of its own, so a stopped call can be repeated: it skips the trainings that have a file.
``options.json`` says how they were trained; a call with other notes or options is refused.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import clinora
from clinora.checkpoint import find_base, write_atomically
from clinora.evaluation import bootstrap_mean, classify, share_of
from clinora.explain import layer_updates
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN
from clinora.resume import list_differences
from clinora.run import base_hashes
from clinora.training import InterruptedTraining, TrainingConfig, train

STEPS = 60
TOKEN_LIMIT = 128


def measure(rank: int, notes: clinora.Notes, token_limit: int, config: TrainingConfig) -> dict:
    """Train at one rank, classify the test notes and measure each layer's update."""
    lora = clinora.LoRAConfig(rank=rank, alpha=2 * rank)
    classifier = clinora.Classifier.new(
        "bundled", notes.classes, lora, config.seed, token_limit=token_limit, precision="fp32"
    )
    with tempfile.TemporaryDirectory() as run:
        train(classifier, notes.on("training"), notes.on("validation"), config, run)
    updates = []
    for update in layer_updates(classifier.model):
        updates.append(
            {
                "name": update.name,
                "share": round_to_four(update.share),
                "singular_values": [round_to_four(value) for value in update.singular_values],
                "effective_rank": round_to_four(update.effective_rank),
            }
        )
    return {
        "rank": rank,
        "seed": config.seed,
        "parameters": clinora.count_parameters(classifier.model).lora,
        "right": classify(classifier, notes.on("test")).correct.astype(int).tolist(),
        "updates": updates,
    }


def round_to_four(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def summarise(results: list[dict], test: list[clinora.Note]) -> list[dict]:
    """Pool the seeds of each rank, in the order of the ranks.

    The interval is a bootstrap, over notes, of the mean over seeds. The updates are those of the
    first seed.
    """
    of_rank: dict[int, list[dict]] = {}
    for result in sorted(results, key=lambda result: (result["rank"], result["seed"])):
        of_rank.setdefault(result["rank"], []).append(result)
    rows = []
    for rank, group in of_rank.items():
        shares = np.mean([result["right"] for result in group], 0)  # (N,)
        accuracy = share_of(bootstrap_mean(shares, test), len(test))
        rows.append(
            {
                "rank": rank,
                "parameters": group[0]["parameters"],
                "seeds": len(group),
                "accuracy": round_to_four(accuracy.value),
                "low": round_to_four(accuracy.low),
                "high": round_to_four(accuracy.high),
                "updates": group[0]["updates"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train and write the results; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results")
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", default=TEXT_COLUMN, help="column of the texts")
    add("--label-column", default=LABEL_COLUMN, help="column of the labels")
    add("--ranks", nargs="+", type=int, default=(1, 2, 4, 8, 16, 32), help="ranks of LoRA")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds, with one training each")
    add("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    add(
        "--token-limit",
        type=int,
        default=TOKEN_LIMIT,
        help="tokens read of a note (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        write_results(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"ranks.py: {error}\n")
    except (InterruptedTraining, KeyboardInterrupt):
        parser.exit(130, "ranks.py: stopped; the same command trains what has no result yet\n")
    return 0


def write_results(args: argparse.Namespace) -> None:
    """Train what has no file yet, and write ``ranks.json``."""
    notes = clinora.read_notes(
        args.notes, text_column=args.text_column, label_column=args.label_column
    )
    if not notes.on("test"):
        raise ValueError(f"{args.notes} has no test notes")
    config = TrainingConfig(steps=args.steps, validate_every=args.steps)
    options = {
        "notes": [notes.fingerprint, notes.split_fingerprint],
        "order of the test notes": notes.order_of("test"),
        "base": base_hashes(find_base("bundled")),
        "token_limit": args.token_limit,
        "training": dataclasses.asdict(config),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    before = args.out / "options.json"
    if before.is_file():
        differences = list_differences(json.loads(before.read_text()), options)
        if differences:
            raise ValueError(
                f"{args.out} holds results of other options: {'; '.join(differences)}. Choose "
                "another folder, or the options of before"
            )
    write_atomically(before, (json.dumps(options, indent=2) + "\n").encode())
    results = []
    for seed in args.seeds:
        for rank in args.ranks:
            path = args.out / f"r={rank}-seed{seed}.json"
            if not path.is_file():
                result = measure(
                    rank, notes, args.token_limit, dataclasses.replace(config, seed=seed)
                )
                write_atomically(path, json.dumps(result).encode())
            result = json.loads(path.read_text())
            print(f"rank {rank}, seed {seed}: {np.mean(result['right']):.1%}", flush=True)
            results.append(result)
    test = notes.on("test")
    report = {
        "training_notes": len(notes.on("training")),
        "test_notes": len(test),
        "seeds": list(args.seeds),
        "token_limit": args.token_limit,
        "training": options["training"],
        "ranks": summarise(results, test),
    }
    write_atomically(args.out / "ranks.json", (json.dumps(report) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
