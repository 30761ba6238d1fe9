"""Compare fine-tuning of the head, LoRA and full fine-tuning, over ranks and seeds.

    python -m tools.compare --notes mtsamples --out runs/compare --ranks 1 4 8 16 64 --seeds 0 1 2

Each training runs in its own process, so that its peak memory can be measured. A stopped training
resumes from its checkpoint, finished trainings are not repeated, and the table shows all results in
the folder. LoRA's alpha is twice the rank, so that the scaling is the same at every rank. The last
column compares each method with a linear model on TF-IDF of the same training texts, whose
settings are chosen on the validation notes.
"""

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn

import clinora
from clinora.baselines import TF_IDF, train_baselines
from clinora.checkpoint import find_base, write_atomically
from clinora.classifier import TOKEN_LIMIT
from clinora.device import choose_device, choose_dtype, keep_freed_memory
from clinora.evaluation import bootstrap_mean, classify, paired_gain, share_of
from clinora.figures import BLACK
from clinora.notes import LABEL_COLUMN, SPLITS, TEXT_COLUMN, are_correct, choose_classes
from clinora.report import png, read_steps
from clinora.resume import list_differences
from clinora.run import base_hashes
from clinora.targets import read_targets
from clinora.training import METRICS, InterruptedTraining, TrainingConfig, train

TUNES = ("head", "lora", "full")
# Peak learning rates, larger for fewer parameters. They were not tuned.
LEARNING_RATES = {"head": 1e-2, "lora": TrainingConfig().learning_rate, "full": 2e-4}

KEPT_RANKS = (0, 1, 2, 4, 8, 16, 64)  # to which the updates of full fine-tuning are reduced


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One training.

    Attributes:
        tune: "head", "lora" or "full".
        rank: LoRA's r; 0 for the others.
        seed: Seed of initialisation, order and dropout.
    """

    tune: str
    rank: int
    seed: int

    @property
    def group(self) -> str:
        """Name of the method, without the seed."""
        return f"r={self.rank}" if self.tune == "lora" else self.tune

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.group}-seed{self.seed}"


def train_point(point: Point, args: argparse.Namespace) -> None:
    """Train and measure one point and write its result; called in a new process."""
    try:
        result = measure(point, args)
        write_atomically(args.out / f"{point.name}.json", json.dumps(result).encode())
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"compare.py: {point.name}: {error}")
    except InterruptedTraining as error:
        sys.exit(f"compare.py: {point.name}: {error.args[0]}")


def measure(point: Point, args: argparse.Namespace) -> dict:
    """Train one point and classify the test notes."""
    keep_freed_memory()
    notes = read(args)
    device = choose_device(args.device)
    lora = None
    if point.tune == "lora":
        targets = read_targets(args.targets)
        lora = clinora.LoRAConfig(rank=point.rank, alpha=2 * point.rank, targets=targets)
    classifier = clinora.Classifier.new(
        args.base,
        notes.classes,
        lora,
        point.seed,
        token_limit=args.token_limit,
        device=args.device,
        # Trained parameters are float32; full fine-tuning trains all of them.
        precision="fp32" if point.tune == "full" else args.precision,
    )
    classifier.dtype = choose_dtype(device, args.precision)
    model = classifier.model
    if point.tune == "head":
        model.model.requires_grad_(False)
    config = TrainingConfig(
        steps=args.steps,
        notes_per_step=args.notes_per_step,
        learning_rate=getattr(args, f"learning_rate_{point.tune}"),
        seed=point.seed,
    )
    run = args.out / point.name
    run.mkdir(exist_ok=True)
    identity = {
        "data": [notes.fingerprint, notes.split_fingerprint],
        "base": base_hashes(model.source),
        "lora": None if lora is None else dataclasses.asdict(lora),
    }
    train(
        classifier, notes.on("training"), notes.on("validation"), config, run,
        identity=identity, resume=(run / METRICS).is_file(),
    )  # fmt: skip
    steps = read_steps(run / METRICS)
    peak = peak_bytes(device)
    answers = classify(classifier, notes.on("test"))
    result = dataclasses.asdict(point) | {
        "trainable": clinora.count_parameters(model).trainable,
        "steps": len(steps),
        "seconds": steps[-1]["seconds"],
        "peak_bytes": peak,
        "right": answers.correct.astype(int).tolist(),
    }
    if point.tune == "full":
        base = clinora.load_model(args.base, num_labels=len(notes.classes), dtype=torch.float32)
        result |= study_updates(classifier, base.to(device), notes.on("test"))
    shutil.rmtree(run)  # after full fine-tuning it is several times as large as the base
    return result


@torch.no_grad()
def study_updates(
    classifier: clinora.Classifier, base: nn.Module, notes: Sequence[clinora.Note]
) -> dict:
    """Measure how much of ΔW = W_tuned − W_base a low rank keeps, in the decoder's linear layers.

    This changes the classifier: at the end its layers have W_base + ΔW_r, with ΔW_r the best
    approximation of rank r (Eckart & Young 1936) and r the largest of ``KEPT_RANKS``.

    Returns:
        singular_values: for each layer by its full name, largest first, to four digits;
        right_at_rank: for each r of ``KEPT_RANKS`` and each note, 1 if the prediction is correct at
        that rank, else 0.
    """
    updates = {}
    for name, layer in classifier.model.model.named_modules():
        if isinstance(layer, nn.Linear):
            before = base.model.get_submodule(name).weight
            update = torch.linalg.svd((layer.weight - before).cpu(), full_matrices=False)
            updates[name] = (layer.weight, before, update)
    correct = {}
    for rank in KEPT_RANKS:
        for weight, before, (U, S, Vh) in updates.values():
            kept = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            weight.copy_(before + kept.to(before.device))
        correct[rank] = classify(classifier, notes).correct.astype(int).tolist()
    singular_values = {}
    for name, (_, _, update) in updates.items():
        singular_values[name] = [float(f"{value:.4g}") for value in update.S.tolist()]
    return {"singular_values": singular_values, "right_at_rank": correct}


def peak_bytes(device: torch.device) -> int | None:
    """Give this process's peak memory on a device, in bytes; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    _, kilobytes, _ = peak.split()
    return 1024 * int(kilobytes)


def summarise(
    results: Sequence[dict], notes: Sequence[clinora.Note], baseline: np.ndarray | None
) -> list[dict]:
    """Pool the seeds of each method.

    The intervals are bootstraps, over notes, of the mean over seeds and of its difference from the
    baseline.

    Args:
        results: The result of each training.
        notes: The N notes that all trainings were measured on.
        baseline: (N,) 1 where the baseline is correct, 0 elsewhere; None if there is none.
    """
    groups = {}
    for result in results:
        groups.setdefault((result["tune"], result["rank"]), []).append(result)
    rows = []
    for (tune, rank), group in groups.items():
        correct = np.array([result["right"] for result in group], float)  # (seeds, N)
        share = correct.mean(0)
        accuracy = share_of(bootstrap_mean(share, notes), len(notes))
        against = None
        if baseline is not None:
            against = paired_gain(share - baseline, notes)
        peaks = [result["peak_bytes"] for result in group if result["peak_bytes"]]
        between_seeds = None
        if len(group) > 1:
            between_seeds = float(correct.mean(1).std(ddof=1))
        rows.append(
            {
                "name": Point(tune=tune, rank=rank, seed=0).group,
                "tune": tune,
                "trainable": group[0]["trainable"],
                "seeds": len(group),
                "seconds": float(np.mean([result["seconds"] for result in group])),
                "peak_bytes": max(peaks) if peaks else None,
                "any_label_accuracy": accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
                "against_baseline": against,
                "between_seeds": between_seeds,
            }
        )
    return rows


def table(rows: Sequence[dict]) -> str:
    """Format the summary as a Markdown table."""
    lines = [
        "| tuned | parameters trained | seeds | peak MB | notes correct | 95% interval | "
        "points above TF-IDF |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else ""
        above = ""
        if row["against_baseline"]:
            gain, low, high = [100 * share for share in row["against_baseline"]]
            above = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(
            f"| {row['name']} | {row['trainable']:,} | {row['seeds']} | "
            f"{peak} | {row['any_label_accuracy']:.1%} | {row['low']:.1%} to {row['high']:.1%} | "
            f"{above} |"
        )
    return "\n".join(lines)


def rank_figure(points: Sequence[dict]) -> Figure:
    """Draw any-label accuracy against the number of trained parameters.

    Args:
        points: For each method: name; tune ("head", "lora" or "full"); trainable; and the shares
            any_label_accuracy, low and high.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = {"head": "s", "lora": "o", "full": "D"}
    for kind, marker in kinds.items():
        group = [point for point in points if point["tune"] == kind]
        if not group:
            continue
        share = np.array([point["any_label_accuracy"] for point in group])
        bounds = np.array([(point["low"], point["high"]) for point in group]).T
        axes.errorbar(
            [point["trainable"] for point in group], share, abs(bounds - share), color=BLACK,
            marker=marker, markerfacecolor="white" if kind != "lora" else BLACK,
            linestyle="-" if kind == "lora" else "none", capsize=3, label=kind,
        )  # fmt: skip
        for point in group:
            axes.annotate(
                point["name"], (point["trainable"], point["low"]), fontsize=8, rotation=90,
                ha="center", va="top", xytext=(0, -4), textcoords="offset points",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.2)
    axes.set(xlabel="parameters trained", ylabel="any-label accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Accuracy and the number of trained parameters")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    return figure


def read(args: argparse.Namespace) -> clinora.Notes:
    """Read the notes that the options name."""
    return clinora.read_notes(
        args.notes,
        text_column=args.text_column,
        label_column=args.label_column,
        classes=choose_classes(args.classes),
        split=args.split,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = TrainingConfig()
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results, table and figure")
    add("--tune", nargs="+", choices=TUNES, default=TUNES, help="what to train")
    add("--ranks", nargs="+", type=int, default=(1, 4, 8, 16, 64), help="ranks of LoRA")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds, with one training each")
    targets = clinora.LoRAConfig().targets
    add("--targets", nargs="+", default=targets, help="layers to adapt: names, or all-linear")
    add("--base", default="bundled", help="bundled, smollm2, a folder or a Hub id")
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", default=TEXT_COLUMN, help="column of the notes")
    add("--label-column", default=LABEL_COLUMN, help="column of the classes")
    add("--classes", nargs="+", help="names, one number k (the k most frequent), or all")
    add("--split", choices=SPLITS, default=SPLITS[0], help="texts, or rows (the published split)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    add("--token-limit", type=int, default=TOKEN_LIMIT, help="tokens read of a note")
    add("--steps", type=int, default=defaults.steps, help="optimiser steps of each training")
    add(
        "--notes-per-step",
        type=int,
        default=defaults.notes_per_step,
        help="notes that a step learns from",
    )
    for tune, rate in LEARNING_RATES.items():
        add(f"--learning-rate-{tune}", type=float, default=rate, help=f"peak (default: {rate})")
    args = parser.parse_args(argv)
    points = []
    for seed in args.seeds:
        for tune in args.tune:
            for rank in args.ranks if tune == "lora" else [0]:
                point = Point(tune=tune, rank=rank, seed=seed)
                if point not in points:
                    points.append(point)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # exiting also ends the training process
    try:
        return compare(args, points)
    except (OSError, ValueError) as error:
        parser.exit(2, f"compare.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "compare.py: stopped; run the same command to resume\n")


def compare(args: argparse.Namespace, points: Sequence[Point]) -> int:
    """Train each point that has no result yet, then write table and figure."""
    notes = read(args)
    if not notes.on("test"):
        raise ValueError(f"{args.notes} has no test notes")
    out = args.out
    free = ("out", "seeds", "ranks", "tune")  # may differ in a later call, which adds results
    fixed = {name: value for name, value in vars(args).items() if name not in free}
    fixed["notes"] = [notes.fingerprint, notes.split_fingerprint]
    fixed["order of the test notes"] = notes.order_of("test")
    fixed["base"] = base_hashes(find_base(args.base))
    fixed = json.loads(json.dumps(fixed))  # tuples become lists, as in the file
    options = out / "options.json"
    if options.is_file():
        differences = list_differences(json.loads(options.read_text()), fixed)
        if differences:
            raise ValueError(f"{out} holds other results: {'; '.join(differences)}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(options, (json.dumps(fixed, indent=2) + "\n").encode())
    print(f"Notes: {notes}; {len(points)} trainings", flush=True)
    for point in points:
        path = out / f"{point.name}.json"
        if path.is_file():
            continue
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=train_point, args=(point, args), daemon=True)
        process.start()
        process.join()
        if not path.is_file():
            raise ValueError(f"{point.name} failed: run the same command to try it again")
        share = np.mean(json.loads(path.read_text())["right"])
        print(f"{point.group}, seed {point.seed}: {share:.1%}", flush=True)
    # These include the results of earlier calls.
    results = [json.loads(path.read_text()) for path in out.glob("*-seed*.json")]
    results.sort(key=lambda result: (TUNES.index(result["tune"]), result["rank"], result["seed"]))
    test = notes.on("test")
    tf_idf = None
    for baseline in train_baselines(notes.on("training"), notes.on("validation"), test):
        if baseline.name == TF_IDF:
            tf_idf = are_correct(test, baseline.predicted).astype(float)
            print(f"{baseline.name}: {tf_idf.mean():.1%}; {baseline.settings}")
    rows = summarise(results, test, tf_idf)
    write_atomically(out / "results.json", (json.dumps(rows, indent=2) + "\n").encode())
    write_atomically(out / "table.md", (table(rows) + "\n").encode())
    write_atomically(out / "rank.png", png(rank_figure(rows)))
    print(f"\n{table(rows)}\n\nFigure: {out / 'rank.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
