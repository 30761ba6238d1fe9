"""Count the parameters and the memory of fine-tuning a Llama model, without loading it.

Example: {prog} config.json --rank 8 --targets q_proj v_proj
"""

import argparse
import sys
from typing import TYPE_CHECKING

from clinora.commands import new_parser, one_line_errors

if TYPE_CHECKING:
    from clinora.budget import Budget, Target


def build_parser(prog: str = "clinora budget") -> argparse.ArgumentParser:
    """Define the options."""
    from clinora.budget import ELEMENT_BYTES
    from clinora.lora import LoRAConfig
    from clinora.quantize import QUANTIZATIONS

    lora = LoRAConfig()
    parser = new_parser(prog, __doc__.format(prog=prog))
    add = parser.add_argument
    add("source", help="bundled, smollm2, a config.json, a folder that has one, or a Hub id")
    add("--revision", help="commit, branch or tag on the Hub (default: the Hub's main branch)")
    add(
        "--rank",
        type=int,
        default=lora.rank,
        help="r, the rank of LoRA's update B·A; a larger r trains more parameters "
        "(default: %(default)s)",
    )
    add(
        "--targets",
        nargs="+",
        default=lora.targets,
        help="linear layers that LoRA adapts: names, or all-linear for all of them "
        f"(default: {' '.join(lora.targets)})",
    )
    add("--labels", type=int, default=5, help="classes of the head (default: %(default)s)")
    add("--batch", type=int, default=4, help="notes in a batch (default: %(default)s)")
    add("--tokens", type=int, default=512, help="tokens of each note (default: %(default)s)")
    add(
        "--precision",
        choices=ELEMENT_BYTES,
        default="bf16",
        help="precision to train in (default: %(default)s)",
    )
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="weights of the base's linear layers with LoRA or with the head alone; full training "
        "is counted without (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None, prog: str = "clinora budget") -> int:
    """Print the budget of a model as tables, and return the exit status."""
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(argv)
        sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
        print_budget(args)
    return 0


def print_budget(args: argparse.Namespace) -> None:
    """Read the model's shape, compute the budget of each method and print the tables."""
    from clinora.budget import METHODS, FineTuning, budget, linear_shapes, lora_targets
    from clinora.checkpoint import find_config
    from clinora.llama import LlamaConfig
    from clinora.targets import ALL_LINEAR, read_targets

    config = LlamaConfig.from_json(find_config(args.source, args.revision))
    names = read_targets(args.targets)
    if names == ALL_LINEAR:
        names = tuple(linear_shapes(config))
    targets = lora_targets(config, args.rank, names)
    budgets = []
    for method in METHODS:
        tuning = FineTuning(
            method=method,
            batch=args.batch,
            tokens=args.tokens,
            precision=args.precision,
            rank=args.rank,
            targets=names,
            quantize="none" if method == "full" else args.quantize,
        )
        budgets.append(budget(config, tuning, args.labels))
    print(_target_table(targets))
    print()
    print(_bytes_table(targets, args.precision, args.quantize))
    print()
    shape = f"{args.batch} × {args.tokens} tokens, {args.labels} classes, {args.precision}"
    if args.quantize != "none":
        shape += f", base in {args.quantize}"
    print(f"{shape}; MB:")
    print(_budget_table(budgets))


def _target_table(targets: list["Target"]) -> str:
    from clinora.budget import break_even_rank

    lora_title = f"LoRA r={targets[0].rank}"
    rows = [("target", "out × in", "layers", "full", lora_title, "times fewer", "saves up to r")]
    for target in targets:
        shape = f"{target.out_features:,} × {target.in_features:,}"
        break_even = break_even_rank(target.out_features, target.in_features)
        rows.append(
            (
                target.name,
                shape,
                f"{target.layers}",
                f"{target.full:,}",
                f"{target.lora:,}",
                f"{target.times_fewer:,.1f}",
                f"{break_even:,}",
            )
        )
    full = sum(target.full for target in targets)
    lora = sum(target.lora for target in targets)
    rows.append(("all", "", "", f"{full:,}", f"{lora:,}", f"{full / lora:,.1f}", ""))
    return _table(rows)


def _bytes_table(targets: list["Target"], precision: str, quantize: str) -> str:
    titles = (
        "LoRA weights", "LoRA gradients", "LoRA AdamW",
        "full weights", "full gradients", "full AdamW",
    )  # fmt: skip
    totals = [0] * len(titles)
    rows = [(f"MB, {precision}", *titles)]
    for target in targets:
        lora = target.held_bytes("lora", precision, quantize)
        sizes = [*lora, *target.held_bytes("full", precision)]
        for column, size in enumerate(sizes):
            totals[column] += size
        rows.append((target.name, *map(_megabytes, sizes)))
    rows.append(("all", *map(_megabytes, totals)))
    return _table(rows)


def _budget_table(budgets: list["Budget"]) -> str:
    rows = [("", "trainable", "share", "weights", "gradients", "AdamW", "activations", "total")]
    for budget in budgets:
        trainable = f"{budget.trainable:,}"
        share = f"{budget.trainable / budget.parameters:.3%}"
        sizes = (
            budget.weights, budget.gradients, budget.optimizer, budget.activations, budget.total
        )  # fmt: skip
        rows.append((budget.method, trainable, share, *map(_megabytes, sizes)))
    return _table(rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Align the first column to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
