"""Fine-tune a Llama with LoRA on clinical notes, and measure it before and after.

python train.py                                        # the bundled base and notes, offline
python train.py --notes notes.csv --base TinyLlama/TinyLlama-1.1B-Chat-v1.0
torchrun --nproc-per-node=2 -- train.py --run runs/two # on two processes or GPUs

Without the -- torchrun would take --run for its own --run-path.
"""

import argparse
import dataclasses
import gc
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

import clinora
from clinora.calibration import PROMISE, check_promise
from clinora.classifier import TOKEN_LIMIT
from clinora.device import choose_device, gathered, keep_freed_memory, world
from clinora.evaluation import assess, calibrate
from clinora.notes import NAMED_NOTES, SPLITS, choose_classes
from clinora.report import model_table, read_steps, results_table, write_report
from clinora.run import base_hashes
from clinora.training import METRICS, InterruptedTraining, TrainingConfig, train


def build_parser() -> argparse.ArgumentParser:
    """Describe the options; those of training and LoRA are made from their configurations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="bundled", help="bundled, a folder or a Hub id")
    add("--revision", help="commit, branch or tag of the Hub")
    add("--notes", default="bundled", help="bundled, mtsamples or a CSV file")
    add("--text-column", default="transcription", help="the notes' column")
    add("--label-column", default="medical_specialty", help="the classes' column")
    add("--classes", nargs="+", help="names, one number k (the most frequent), or all")
    add("--split", choices=SPLITS, default="texts", help="rows: as published, for comparison")
    add("--run", type=Path, help="folder to write (default: a new one in runs/)")
    add("--resume", action="store_true", help="go on from the last checkpoint of --run")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    add("--token-limit", type=int, default=TOKEN_LIMIT, help="tokens read of a note")
    add("--promise", type=float, default=PROMISE, help="share right of what the run will answer")
    add("--show-text", action="store_true", help="quote mistaken notes in the report")
    lora = clinora.LoRAConfig()
    add("--rank", type=int, default=lora.rank, help="LoRA's r")
    add("--alpha", type=float, default=lora.alpha, help="LoRA's alpha; the scaling is alpha / r")
    add("--dropout", type=float, default=lora.dropout, help="on LoRA's input")
    add("--targets", nargs="+", default=lora.targets, help="layers to adapt")
    for option in dataclasses.fields(TrainingConfig):
        switch = {"action": "store_true"} if option.type is bool else {"type": option.type}
        about = f"{option.metadata['help']} (default: {option.default})"
        flag = f"--{option.name.replace('_', '-')}"
        add(flag, default=option.default, help=about, **switch)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train and report; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
    command = ["python", "train.py", *(sys.argv[1:] if argv is None else argv)]
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group()  # gloo for the CPU, nccl for GPUs
        command[:1] = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", "--"]
    if args.run is None:
        args.run = gathered(Path("runs", datetime.now().strftime("%Y-%m-%d-%H%M%S")))[0]
        command += ["--run", str(args.run)]
    go_on = f"To go on: {shlex.join(command if args.resume else [*command, '--resume'])}\n"
    try:
        run_job(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"train.py: {error}\n")
    except InterruptedTraining as error:
        text, number = error.args
        parser.exit(128 + number, f"train.py: {text}\n{go_on}" if world()[0] == 0 else "")
    except KeyboardInterrupt:
        parser.exit(130, f"train.py: stopped\n{go_on if (args.run / METRICS).is_file() else ''}")
    except RuntimeError as error:
        if "memory" in str(error):  # of a GPU, or the CPU's allocator
            parser.exit(2, "train.py: out of memory: try fewer --tokens-per-batch\n")
        if world()[1] == 1:
            raise
        lost = isinstance(error, dist.DistBackendError) or "onnection" in str(error)
        why = "another process has ended" if lost else str(error).partition("\n")[0]
        parser.exit(2, f"train.py: {why}. {go_on}")
    finally:
        if dist.is_initialized():
            # What is left of training in reference cycles would hold the group's threads, and a
            # thread that is still there at exit aborts the process.
            gc.collect()
            dist.destroy_process_group()
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Read, train, calibrate, write, measure before and after."""
    rank, processes = world()
    first = rank == 0
    names = [option.name for option in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(args, name) for name in names})
    lora = clinora.LoRAConfig(
        rank=args.rank, alpha=args.alpha, dropout=args.dropout, targets=tuple(args.targets)
    )
    check_promise(args.promise)
    if first:
        check_run(args.run, args.resume)
    notes = clinora.read_notes(
        args.notes,
        text_column=args.text_column,
        label_column=args.label_column,
        classes=choose_classes(args.classes),
        split=args.split,
    )
    training, validation, test = (notes.on(side) for side in ("training", "validation", "test"))
    if not training or not test:
        raise ValueError(f"{len(training)} training and {len(test)} test notes: both must be there")

    device = choose_device(args.device)
    if device.type == "cuda" and processes > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    classifier = clinora.Classifier.new(
        args.base,
        notes.classes,
        lora,
        config.seed,
        revision=args.revision,
        token_limit=args.token_limit,
        device=str(device),
        precision=args.precision,
    )
    precision = str(classifier.dtype).removeprefix("torch.")
    if first:
        print(f"Run: {args.run}\nNotes: {notes}\nModel:\n{model_table(classifier)}", flush=True)
        args.run.mkdir(parents=True, exist_ok=True)

    identity = {
        "data": {"notes": notes.fingerprint, "split": notes.split_fingerprint},
        "base": base_hashes(classifier.model.source),
        "lora": dataclasses.asdict(lora),
        "token_limit": args.token_limit,
        "precision": precision,
        "device": device.type,
    }
    train(classifier, training, validation, config, args.run, identity=identity, resume=args.resume)
    if not first:
        return
    steps = read_steps(args.run / METRICS)
    print(f"Trained {len(steps)} steps in {steps[-1]['seconds']:.0f} s on {device}, {precision}.")
    classifier.data = dataclasses.replace(
        classifier.data,
        source=args.notes if args.notes in NAMED_NOTES else str(Path(args.notes).resolve()),
        text_column=args.text_column,
        label_column=args.label_column,
        split=args.split,
        fingerprint=notes.fingerprint,
        split_fingerprint=notes.split_fingerprint,
    )
    classifier.calibration = calibrate(classifier, validation, args.promise)
    classifier.save(args.run)
    results, answers = assess(classifier, notes, test, seed=config.seed)
    write_report(
        args.run / "report", results, answers, test, token_limit=args.token_limit,
        about=f"Notes: {notes}.", steps=steps, show_text=args.show_text,
    )  # fmt: skip
    print(f"\n{results_table(results)}\n\nReport: {args.run / 'report' / 'report.md'}")
    print(f"Again: python eval.py --run {args.run}; page: python serve.py --run {args.run}")


def check_run(run: Path, resume: bool) -> None:
    """Refuse a folder that training would write over, or that is not there to go on with."""
    if resume:
        if not (run / METRICS).is_file():
            raise ValueError(f"{run} holds no training to resume: give its folder with --run")
    # A kill at the very beginning leaves a hidden beginning of the history, and nothing else.
    elif run.exists() and (not run.is_dir() or {*run.iterdir()} - {*run.glob(f".{METRICS}.*")}):
        raise ValueError(
            f"{run} exists and is not empty: choose another --run, remove it, or --resume it"
        )


if __name__ == "__main__":
    sys.exit(main())
