"""Fine-tune a Llama with LoRA on clinical notes, and measure it before and after.

python train.py                                        # the bundled base and notes, offline
python train.py --notes notes.csv --base TinyLlama/TinyLlama-1.1B-Chat-v1.0
"""

import argparse
import dataclasses
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

import clinora
from clinora.classifier import choose_device, choose_dtype
from clinora.evaluation import evaluate, evaluate_random_heads
from clinora.notes import NAMED_NOTES
from clinora.report import model_table, results_table, write_report
from clinora.training import TrainingConfig, train


def build_parser() -> argparse.ArgumentParser:
    """Describe the options; those of training and LoRA are made from their configurations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="bundled", help="bundled, a folder or a Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of the Hub")
    parser.add_argument("--notes", default="bundled", help="bundled, mtsamples or a CSV file")
    parser.add_argument("--text-column", default="transcription", help="the notes' column")
    parser.add_argument("--label-column", default="medical_specialty", help="the classes' column")
    parser.add_argument("--classes", nargs="+", help="names, or one number k: the most frequent")
    parser.add_argument("--run", type=Path, help="folder to write (default: a new one in runs/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument("--token-limit", type=int, default=512, help="tokens read of a note")
    lora = clinora.LoRAConfig()
    parser.add_argument("--rank", type=int, default=lora.rank, help="LoRA's r")
    parser.add_argument("--alpha", type=float, default=lora.alpha, help="LoRA's α; scaling is α/r")
    parser.add_argument("--dropout", type=float, default=lora.dropout, help="on LoRA's input")
    parser.add_argument("--targets", nargs="+", default=lora.targets, help="layers to adapt")
    for option in dataclasses.fields(TrainingConfig):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,
            default=option.default,
            help=f"{option.metadata['help']} (default: {option.default})",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train and report; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        run_job(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"train.py: {error}\n")
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Read, measure, train, write, measure again."""
    names = [option.name for option in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(args, name) for name in names})
    lora = clinora.LoRAConfig(
        rank=args.rank, alpha=args.alpha, dropout=args.dropout, targets=tuple(args.targets)
    )
    run = args.run or Path("runs", datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} exists and is not empty: choose another --run or remove it")
    classes = args.classes
    if classes and len(classes) == 1 and classes[0].isdigit():
        classes = int(classes[0])
    notes = clinora.read_notes(
        args.notes, text_column=args.text_column, label_column=args.label_column, classes=classes
    )
    print(f"Notes: {notes}")
    training, test = notes.on("training"), notes.on("test")
    if not training or not test:
        raise ValueError(f"{len(training)} training and {len(test)} test notes: both must be there")

    torch.manual_seed(config.seed)
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.precision)
    model = clinora.load_model(
        args.base,
        num_labels=len(notes.classes),
        revision=args.revision,
        dtype=dtype,
        device=device,
    )
    clinora.apply_lora(model, lora)
    tokenizer = clinora.Tokenizer(model.source.folder / "tokenizer.model")
    about = {
        "notes": {
            "source": args.notes if args.notes in NAMED_NOTES else str(Path(args.notes).resolve()),
            "text_column": args.text_column,
            "label_column": args.label_column,
            "fingerprint": notes.fingerprint,
            "seen": sorted(note.sha256[:16] for note in training),
        },
        "training": dataclasses.asdict(config) | {"precision": str(dtype).removeprefix("torch.")},
        "versions": {"clinora": clinora.__version__, "torch": torch.__version__},
    }
    classifier = clinora.Classifier(model, tokenizer, notes.classes, args.token_limit, about=about)
    print(f"Model:\n{model_table(classifier)}")
    run.mkdir(parents=True, exist_ok=True)

    before = evaluate_random_heads(classifier, test, seed=config.seed)
    began = time.perf_counter()
    train(classifier, training, config, run / "metrics.jsonl")
    print(f"Trained in {time.perf_counter() - began:.0f} s on {device}, {dtype}.")
    classifier.save(run)
    evaluation = evaluate(classifier, test)
    write_report(run / "report", notes.classes, evaluation, before, about=f"Notes: {notes}.")
    print(f"\n{results_table(notes.classes, evaluation, before)}\n")
    print(f"Run: {run}; again: python eval.py --run {run}; page: python serve.py --run {run}")


if __name__ == "__main__":
    sys.exit(main())
