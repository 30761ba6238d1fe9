"""How right is a training on few notes? Every note is classified by a run that has not seen it.

    python -m tools.cross_validate --notes bundled --folds 5

The different texts, in the order of their hashes, are dealt to the folds one by one. For each fold
a base is trained anew on the others, as ``train.py`` does with no validation side.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import clinora
from clinora.device import choose_device, choose_dtype, keep_freed_memory
from clinora.evaluation import baselines, bootstrap, classify, evaluate_random_heads, share_of
from clinora.training import InterruptedTraining, TrainingConfig, train


def deal(notes: Sequence[clinora.Note], folds: int) -> list[list[clinora.Note]]:
    """Deal notes to folds in the order of their hashes.

    Raises:
        ValueError: There are fewer than two folds, or fewer notes than folds.
    """
    if not 2 <= folds <= len(notes):
        raise ValueError(f"{folds} folds of {len(notes)} notes: expected 2 to {len(notes)}")
    order = sorted(notes, key=lambda note: note.sha256)
    return [order[fold::folds] for fold in range(folds)]


def train_fold(
    args: argparse.Namespace, labels: Sequence[str], training: Sequence[clinora.Note]
) -> clinora.Classifier:
    """Train the base anew on some notes."""
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.precision)
    model = clinora.load_model(args.base, num_labels=len(labels), dtype=dtype, device=device)
    clinora.apply_lora(model, clinora.LoRAConfig())
    tokenizer = clinora.Tokenizer(model.source.folder / "tokenizer.model")
    classifier = clinora.Classifier(model, tokenizer, labels, args.token_limit)
    config = TrainingConfig(steps=args.steps, learning_rate=args.learning_rate, seed=args.seed)
    with tempfile.TemporaryDirectory() as run:
        train(classifier, training, [], config, Path(run))
    return classifier


def cross_validate(args: argparse.Namespace) -> None:
    """Train and measure all folds; print the table."""
    notes = clinora.read_notes(args.notes)
    folds = deal(notes.notes, args.folds)
    right, before = {}, []
    for fold, measured in enumerate(folds):
        training = [note for other in folds if other is not measured for note in other]
        classifier = train_fold(args, notes.classes, training)
        before.append(evaluate_random_heads(classifier, measured).any_label_accuracy[0])
        answers = {"LoRA": classify(classifier, measured).named}
        answers |= baselines(training, measured)
        for name, named in answers.items():
            hits = [n in note.labels for n, note in zip(named, measured, strict=True)]
            right.setdefault(name, []).extend(hits)
        share = np.mean(right["LoRA"][-len(measured) :])
        print(f"fold {fold + 1}: {share:.1%} of {len(measured)} notes", flush=True)
    order = [note for fold in folds for note in fold]
    weights = [len(fold) for fold in folds]
    print(f"\n| {len(order)} notes, {len(folds)} folds | notes right | 95% interval |")
    print("|---|---:|---:|")
    print(f"| before: random heads | {np.average(before, weights=weights):.1%} | |")
    for name, hits in right.items():
        hits = np.array(hits, float)
        (share,) = bootstrap(lambda w, hits=hits: np.array([w @ hits / w.sum()]), order)
        share = share_of(share, len(order))
        print(f"| {name} | {share.value:.1%} | {share.low:.1%} to {share.high:.1%} |")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = TrainingConfig()
    add = parser.add_argument
    add("--notes", default="bundled", help="bundled, mtsamples or a CSV file")
    add("--base", default="bundled", help="bundled, a folder or a Hub id")
    add("--folds", type=int, default=5)
    add("--steps", type=int, default=defaults.steps, help="optimiser steps of each training")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak")
    add("--token-limit", type=int, default=512, help="tokens read of a note")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        cross_validate(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"cross_validate.py: {error}\n")
    except (InterruptedTraining, KeyboardInterrupt):
        parser.exit(130, "cross_validate.py: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
