"""Train variants of LoRA and full fine-tuning at several learning rates, on the same notes.

    python -m tools.sweep --notes mtsamples --token-limit 256 --steps 100 --out runs/sweep

A variant's best learning rate differs from another's, so each is measured at all of them. The
result of each training is a line of ``results.jsonl``: the lowest validation loss, which chooses
the rate, and which test notes were predicted correctly; both are null if the loss was not finite. A
stopped sweep resumes from the checkpoint of the training that it was in, and repeats no finished
training.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import clinora
from clinora.checkpoint import find_base, write_atomically
from clinora.classifier import TOKEN_LIMIT
from clinora.device import choose_device, choose_dtype, keep_freed_memory
from clinora.evaluation import classify
from clinora.lora import LoRAConfig
from clinora.notes import LABEL_COLUMN, TEXT_COLUMN
from clinora.report import read_steps
from clinora.resume import list_differences
from clinora.run import base_hashes
from clinora.training import METRICS, InterruptedTraining, TrainingConfig, train
from clinora.variants import DoRAConfig, OLoRAConfig, PiSSAConfig

# α is 2r, so that s = α/r is 2 at every rank; rsLoRA has the same s at rank 8.
METHODS: Mapping[str, LoRAConfig | None] = {
    "LoRA, r = 1": LoRAConfig(rank=1, alpha=2),
    "LoRA, r = 8": LoRAConfig(rank=8, alpha=16),
    "LoRA, r = 32": LoRAConfig(rank=32, alpha=64),
    "rsLoRA, r = 32": LoRAConfig(rank=32, alpha=2 * 8**0.5, rank_stabilized=True),
    "LoRA+, r = 8": LoRAConfig(rank=8, alpha=16),
    "DoRA, r = 8": DoRAConfig(rank=8, alpha=16),
    "PiSSA, r = 8": PiSSAConfig(rank=8, alpha=16),
    "OLoRA, r = 8": OLoRAConfig(rank=8, alpha=16),
    "full": None,
    # These two train nearly as many parameters as each other, on different layers.
    "LoRA, r = 42": LoRAConfig(rank=42, alpha=84),
    "LoRA, r = 8, all linear layers": LoRAConfig(rank=8, alpha=16, targets="all-linear"),
}
LORA_PLUS_RATIO = 16  # the authors' choice (Hayou et al. 2024, section 5)
LEARNING_RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)


def measure(method: str, rate: float, args: argparse.Namespace, notes: clinora.Notes) -> dict:
    """Train one method at one learning rate and classify the test notes."""
    lora = METHODS[method]
    classifier = clinora.Classifier.new(
        args.base,
        notes.classes,
        lora,
        args.seed,
        token_limit=args.token_limit,
        device=args.device,
        # Trained parameters are float32; full fine-tuning trains all of them.
        precision="fp32" if lora is None else args.precision,
    )
    classifier.dtype = choose_dtype(choose_device(args.device), args.precision)
    config = TrainingConfig(
        steps=args.steps,
        learning_rate=rate,
        lora_plus_ratio=LORA_PLUS_RATIO if method.startswith("LoRA+") else 1.0,
        validate_every=max(1, args.steps // 4),
        seed=args.seed,
    )
    run = args.out / f"{list(METHODS).index(method)}-{rate:g}-seed{args.seed}"
    run.mkdir(exist_ok=True)
    identity = {
        "method": method,
        "data": [notes.fingerprint, notes.split_fingerprint],
        "base": base_hashes(classifier.model.source),
    }
    result = {
        "method": method,
        "learning_rate": rate,
        "seed": args.seed,
        "trainable": clinora.count_parameters(classifier.model).trainable,
        "seconds": None,
        "validation_loss": None,
        "correct": None,
    }
    try:
        train(
            classifier, notes.on("training"), notes.on("validation"), config, run,
            identity=identity, resume=(run / METRICS).is_file(),
        )  # fmt: skip
    except FloatingPointError:  # the rate is too high
        pass
    else:
        steps = read_steps(run / METRICS)
        result["seconds"] = steps[-1]["seconds"]
        losses = [step.get("validation_loss", math.nan) for step in steps]
        result["validation_loss"] = min(filter(math.isfinite, losses), default=None)
        result["correct"] = classify(classifier, notes.on("test")).correct.astype(int).tolist()
    shutil.rmtree(run)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="what to train")
    add("--learning-rates", nargs="+", type=float, default=LEARNING_RATES, help="peak rates")
    add("--base", default="bundled", help="bundled, smollm2, a folder or a Hub id")
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", default=TEXT_COLUMN, help="column of the texts")
    add("--label-column", default=LABEL_COLUMN, help="column of the labels")
    add("--token-limit", type=int, default=TOKEN_LIMIT, help="tokens read of a note")
    add("--steps", type=int, default=TrainingConfig().steps, help="steps of each training")
    add("--seed", type=int, default=0, help="seed of every training")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    try:
        sweep(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"sweep.py: {error}\n")
    except (InterruptedTraining, KeyboardInterrupt):
        parser.exit(130, "sweep.py: stopped; run the same command to resume\n")
    return 0


def sweep(args: argparse.Namespace) -> None:
    """Measure every method at every learning rate that has no result yet."""
    keep_freed_memory()
    notes = clinora.read_notes(
        args.notes, text_column=args.text_column, label_column=args.label_column
    )
    for side in ("validation", "test"):
        if not notes.on(side):
            raise ValueError(f"{args.notes} has no {side} notes")
    options = {
        "notes": [notes.fingerprint, notes.split_fingerprint],
        "order of the test notes": notes.order_of("test"),
        "base": base_hashes(find_base(args.base)),
        "token_limit": args.token_limit,
        "steps": args.steps,
        "device": args.device,
        "precision": args.precision,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    before = args.out / "options.json"
    if before.is_file():
        differences = list_differences(json.loads(before.read_text()), options)
        if differences:
            raise ValueError(f"{args.out} holds other results: {'; '.join(differences)}")
    write_atomically(before, (json.dumps(options, indent=2) + "\n").encode())
    path = args.out / "results.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    results = [json.loads(line) for line in lines]
    done = {(r["method"], r["learning_rate"], r["seed"]) for r in results}
    for method in args.methods:
        for rate in args.learning_rates:
            if (method, rate, args.seed) in done:
                continue
            result = measure(method, rate, args, notes)
            lines.append(json.dumps(result))
            write_atomically(path, ("\n".join(lines) + "\n").encode())
            outcome = "the loss is not finite"
            if result["validation_loss"] is not None:
                correct = sum(result["correct"]) / len(result["correct"])
                outcome = f"validation loss {result['validation_loss']:.3f}, {correct:.1%} correct"
            print(f"{method}, learning rate {rate:g}: {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
