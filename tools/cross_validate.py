"""Cross-validate training on few notes: each note is classified by a run that has not seen it.

    python -m tools.cross_validate --notes bundled --folds 5 --out runs/folds

The different texts, in the order of their hashes, are divided among the folds in turn. For each
fold a new classifier is trained on the other folds, as ``train.py`` does without validation notes.
The settings of the linear model on TF-IDF are chosen on one of the other folds, and then it is
trained on all of them. With ``--out``, a stopped training resumes from its checkpoint, finished
trainings are not repeated, and the measures are also written there, to ``cross_validation.json``. A
run whose ``report/`` holds this file shows them on its model card.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

import clinora
from clinora.baselines import TF_IDF, LinearModel, choose_settings
from clinora.classifier import TOKEN_LIMIT
from clinora.device import keep_freed_memory
from clinora.evaluation import (
    bootstrap_mean,
    classify,
    evaluate_random_heads,
    paired_gain,
    share_of,
)
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN, are_correct
from clinora.report import CrossValidation, write_cross_validation
from clinora.run import base_hashes
from clinora.targets import read_targets
from clinora.training import METRICS, InterruptedTraining, TrainingConfig, train


def split_into_folds(notes: Sequence[clinora.Note], folds: int) -> list[list[clinora.Note]]:
    """Divide notes among folds, in the order of their hashes.

    Raises:
        ValueError: There are fewer notes than folds, or fewer than three folds: one to measure, one
            to choose the settings of the linear model, and one for it to learn from.
    """
    if not 3 <= folds <= len(notes):
        raise ValueError(f"{folds} folds of {len(notes)} notes: expected 3 to {len(notes)} folds")
    order = sorted(notes, key=lambda note: note.sha256)
    return [order[fold::folds] for fold in range(folds)]


def train_fold(
    args: argparse.Namespace,
    labels: Sequence[str],
    training: Sequence[clinora.Note],
    run: Path,
) -> clinora.Classifier:
    """Train a new classifier on some notes, or resume that training in the run's folder."""
    lora = clinora.LoRAConfig(targets=read_targets(args.targets))
    classifier = clinora.Classifier.new(
        args.base,
        labels,
        lora,
        args.seed,
        token_limit=args.token_limit,
        device=args.device,
        precision=args.precision,
    )
    config = TrainingConfig(steps=args.steps, learning_rate=args.learning_rate, seed=args.seed)
    identity = {
        "base": base_hashes(classifier.model.source),
        "lora": dataclasses.asdict(lora),
    }
    run.mkdir(parents=True, exist_ok=True)
    resume = (run / METRICS).is_file()
    train(classifier, training, [], config, run, identity=identity, resume=resume)
    return classifier


def predict_tf_idf(
    others: Sequence[Sequence[clinora.Note]], measured: Sequence[clinora.Note]
) -> np.ndarray:
    """Tune a linear model on TF-IDF on the other folds, and classify the measured notes."""
    validation, *rest = others
    settings = choose_settings(list(chain(*rest)), validation)
    return LinearModel(list(chain(*others)), settings).predict(measured)


def cross_validate(args: argparse.Namespace, out: Path) -> CrossValidation:
    """Train and measure every fold, each with its own folder in ``out``."""
    notes = clinora.read_notes(
        args.notes, text_column=args.text_column, label_column=args.label_column
    )
    folds = split_into_folds(notes.notes, args.folds)
    correct: dict[str, list[np.ndarray]] = {"LoRA": [], TF_IDF: []}  # one array for each fold
    before = []
    for number, measured in enumerate(folds, 1):
        others = [fold for fold in folds if fold is not measured]
        classifier = train_fold(args, notes.classes, list(chain(*others)), out / f"fold-{number}")
        heads = evaluate_random_heads(classifier, measured, seed=args.seed)
        mean, _ = heads.any_label_accuracy
        before.append(mean)
        lora = classify(classifier, measured).correct
        tf_idf = are_correct(measured, predict_tf_idf(others, measured))
        correct["LoRA"].append(lora)
        correct[TF_IDF].append(tf_idf)
        print(
            f"fold {number}, {len(measured)} notes: LoRA {lora.mean():.1%}, {TF_IDF} "
            f"{tf_idf.mean():.1%}",
            flush=True,
        )
    order = [note for fold in folds for note in fold]
    lora = np.concatenate(correct["LoRA"]).astype(float)
    tf_idf = np.concatenate(correct[TF_IDF]).astype(float)
    return CrossValidation(
        about=f"Notes: {notes}.",
        notes=len(order),
        folds=len(folds),
        before=np.average(before, weights=[len(fold) for fold in folds]).item(),
        accuracy=share_of(bootstrap_mean(lora, order), len(order)),
        of_folds=tuple(fold.mean().item() for fold in correct["LoRA"]),
        tf_idf=share_of(bootstrap_mean(tf_idf, order), len(order)),
        tf_idf_of_folds=tuple(fold.mean().item() for fold in correct[TF_IDF]),
        against=paired_gain(lora - tf_idf, order),
    )


def print_table(measures: CrossValidation) -> None:
    """Print the measures over all folds."""
    print(f"\n| {measures.notes} notes, {measures.folds} folds | notes correct | 95% interval |")
    print("|---|---:|---:|")
    print(f"| before: random heads | {measures.before:.1%} | |")
    for name, share in (("LoRA", measures.accuracy), (TF_IDF, measures.tf_idf)):
        print(f"| {name} | {share.value:.1%} | {share.low:.1%} to {share.high:.1%} |")
    gain = measures.against
    print(
        f"\nLoRA minus {TF_IDF}, paired: {100 * gain.value:+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = TrainingConfig()
    targets = clinora.LoRAConfig().targets
    add = parser.add_argument
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", default=TEXT_COLUMN, help="column of the texts")
    add("--label-column", default=LABEL_COLUMN, help="column of the labels")
    add("--base", default="bundled", help="bundled, smollm2, a folder or a Hub id")
    add("--out", type=Path, help="folder that keeps the trainings (default: a temporary one)")
    add("--targets", nargs="+", default=targets, help="layers to adapt: names, or all-linear")
    add("--folds", type=int, default=5, help="number of folds")
    add("--steps", type=int, default=defaults.steps, help="optimiser steps of each training")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak learning rate")
    add("--token-limit", type=int, default=TOKEN_LIMIT, help="tokens read of a note")
    add("--seed", type=int, default=0, help="seed of every training")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            out = args.out or Path(temporary)
            measures = cross_validate(args, out)
            write_cross_validation(out, measures)
            print_table(measures)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"cross_validate.py: {error}\n")
    except (InterruptedTraining, KeyboardInterrupt):
        hint = "the same command resumes" if args.out else "--out would have kept the trainings"
        parser.exit(130, f"cross_validate.py: stopped; {hint}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
