"""Fine-tune a base model with LoRA on clinical notes, and evaluate it before and after.

Without options: the bundled base on the bundled notes, offline.

Examples:
{command} --notes notes.csv --run runs/demo
{command} --notes notes.csv --base TinyLlama/TinyLlama-1.1B-Chat-v1.0
{on_two_processes} --run runs/two
"""

import argparse
import dataclasses
import gc
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from clinora.commands import (
    FAILED,
    STOPPED,
    add_machine_options,
    as_typed,
    end_with,
    make_folder,
    new_parser,
    one_line_errors,
)


def build_parser(prog: str = "clinora train") -> argparse.ArgumentParser:
    """Define the options; those for training and LoRA are made from their configurations."""
    from clinora.calibration import PROMISE
    from clinora.classifier import TOKEN_LIMIT
    from clinora.lora import LoRAConfig
    from clinora.notes import LABEL_COLUMN, SPLITS, TEXT_COLUMN
    from clinora.training import TrainingConfig
    from clinora.variants import VARIANTS

    description = __doc__.format(
        command=as_typed(prog, "train"), on_two_processes=shlex.join(torchrun(prog, 2))
    )
    parser = new_parser(prog, description)
    add = parser.add_argument
    add(
        "--base",
        default="bundled",
        help="bundled, smollm2, a folder or a Hub id (default: %(default)s)",
    )
    add("--revision", help="commit, branch or tag on the Hub (default: the Hub's main branch)")
    add(
        "--notes",
        default="bundled",
        help="bundled, mtsamples, a file (CSV, JSON lines, Parquet or Excel), or a folder with a "
        "sub-folder of text files for each class (default: %(default)s)",
    )
    add("--text-column", default=TEXT_COLUMN, help="column of the texts (default: %(default)s)")
    add("--label-column", default=LABEL_COLUMN, help="column of the labels (default: %(default)s)")
    add(
        "--classes",
        nargs="+",
        help="class names; or a number k, for the k most frequent classes; or all (default: the "
        "five published classes if the file has them, otherwise all)",
    )
    add(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="texts: equal texts are in the same split; rows: the published split, for comparison "
        "(default: %(default)s)",
    )
    add(
        "--split-column",
        help="column that gives the split of each row: training, validation or test (default: the "
        "hash of the text decides)",
    )
    add("--run", type=Path, help="output folder (default: a new one in runs/)")
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint of --run (default: off)",
    )
    add_machine_options(parser)
    add(
        "--quantize",
        default="none",
        help="weights of the base: none (as --precision says), nf4 (4.5 bits a weight) or "
        "nf4-double (4.13 bits a weight); a smaller base takes less memory and more time "
        "(default: %(default)s)",
    )
    add(
        "--token-limit",
        type=int,
        default=TOKEN_LIMIT,
        help="tokens of a note that are read (default: %(default)s)",
    )
    add(
        "--promise",
        type=float,
        default=PROMISE,
        help="target share of correct predictions among notes that are not referred to a person "
        "(default: %(default)s)",
    )
    add(
        "--show-text",
        action="store_true",
        help="quote wrongly predicted notes in the report (default: off)",
    )
    lora = LoRAConfig()
    add(
        "--variant",
        choices=VARIANTS,
        default="lora",
        help="LoRA, DoRA (trains the magnitude of each output's weights, too), or LoRA that starts "
        "from the base's largest singular values (pissa) or its QR decomposition (olora) "
        "(default: %(default)s)",
    )
    add(
        "--rank",
        type=int,
        default=lora.rank,
        help="r, the rank of the update B·A that LoRA adds to a weight; a larger r trains more "
        "parameters and allows a richer update (default: %(default)s)",
    )
    add(
        "--alpha",
        type=float,
        default=lora.alpha,
        help="strength of the update: B·A is multiplied by alpha / r, so a larger alpha moves the "
        "model further from its base (default: %(default)s)",
    )
    add(
        "--dropout",
        type=float,
        default=lora.dropout,
        help="share of LoRA's inputs that are set to zero in training (default: %(default)s)",
    )
    add(
        "--targets",
        nargs="+",
        default=lora.targets,
        help="layers that LoRA adapts: names, or all-linear for every linear layer but the head "
        f"(default: {' '.join(lora.targets)})",
    )
    for option in dataclasses.fields(TrainingConfig):
        flag = f"--{option.name.replace('_', '-')}"
        about = option.metadata["help"]
        if option.type is bool:
            add(flag, action="store_true", help=f"{about} (default: off)")
        else:
            default = option.default
            add(flag, type=option.type, default=default, help=f"{about} (default: {default})")
    add("--accumulate", nargs="?", const="", type=refuse_accumulate, help=argparse.SUPPRESS)
    return parser


def refuse_accumulate(_: str) -> NoReturn:
    """Refuse the option that older versions had.

    Raises:
        ArgumentTypeError: Always. The message names the options to use.
    """
    raise argparse.ArgumentTypeError(
        "this option is gone: --notes-per-step says how many notes a step learns from, and "
        "--tokens-per-batch how much of them is computed at once"
    )


def main(argv: list[str] | None = None, prog: str = "clinora train") -> int:
    """Train, evaluate, write the report, and return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors(prog):
        args = build_parser(prog).parse_args(words)
        sys.stdout.reconfigure(errors="replace")  # a redirect on Windows is not UTF-8
        with process_group():
            if args.run is None:
                args.run = new_run()
                words += ["--run", str(args.run)]
            if not args.resume:
                words += ["--resume"]
            how_to_resume = f"To resume: {shlex.join([*launcher(prog), *words])}"
            with training_errors(prog, args.run, how_to_resume):
                train_and_report(args, prog)
    return 0


def train_and_report(args: argparse.Namespace, prog: str) -> None:
    """Read the notes, train, calibrate and save a classifier, and evaluate it before and after."""
    import torch

    from clinora.calibration import check_promise
    from clinora.classifier import Classifier
    from clinora.device import choose_device, keep_freed_memory, world
    from clinora.evaluation import assess, calibrate, outlier_limit
    from clinora.notes import NAMED_NOTES, choose_classes, read_notes
    from clinora.report import model_table, read_steps, results_table, write_report
    from clinora.run import base_hashes
    from clinora.targets import read_targets
    from clinora.training import METRICS, TrainingConfig, train
    from clinora.variants import VARIANTS

    keep_freed_memory()
    rank, processes = world()
    first = rank == 0
    names = [option.name for option in dataclasses.fields(TrainingConfig)]
    options = {name: getattr(args, name) for name in names}
    config = TrainingConfig(**options)
    lora = VARIANTS[args.variant](
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=read_targets(args.targets),
    )
    check_promise(args.promise)
    if first:
        check_run_folder(args.run, args.resume)
    notes = read_notes(
        args.notes,
        text_column=args.text_column,
        label_column=args.label_column,
        classes=choose_classes(args.classes),
        split=args.split,
        split_column=args.split_column,
    )
    training = notes.on("training")
    validation = notes.on("validation")
    test = notes.on("test")
    if not training or not test:
        raise ValueError(
            f"{len(training)} training and {len(test)} test notes: at least one of each is needed"
        )

    device = choose_device(args.device)
    if device.type == "cuda" and processes > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    classifier = Classifier.new(
        args.base,
        notes.classes,
        lora,
        config.seed,
        revision=args.revision,
        token_limit=args.token_limit,
        device=str(device),
        precision=args.precision,
        quantize=args.quantize,
    )
    precision = str(classifier.dtype).removeprefix("torch.")
    if first:
        make_folder(args.run, "--run")
        print(f"Run: {args.run}\nNotes: {notes}\nModel:\n{model_table(classifier)}", flush=True)

    identity = {
        "data": {"notes": notes.fingerprint, "split": notes.split_fingerprint},
        "base": base_hashes(classifier.model.source),
        "lora": {"variant": args.variant, **dataclasses.asdict(lora)},
    }
    train(classifier, training, validation, config, args.run, identity=identity, resume=args.resume)
    if not first:
        return
    steps = read_steps(args.run / METRICS)
    print(f"Trained {len(steps)} steps in {steps[-1]['seconds']:.0f} s on {device}, {precision}.")
    source = args.notes
    if source not in NAMED_NOTES:
        source = str(Path(source).resolve())
    classifier.data = dataclasses.replace(
        classifier.data,
        source=source,
        text_column=args.text_column,
        label_column=args.label_column,
        split=args.split,
        split_column=args.split_column,
        fingerprint=notes.fingerprint,
        split_fingerprint=notes.split_fingerprint,
    )
    classifier.calibration = calibrate(classifier, validation, args.promise)
    classifier.outliers = outlier_limit(classifier, [*training, *validation])
    classifier.save(args.run)
    results, answers = assess(classifier, notes, test, learned_from=notes, seed=config.seed)
    report = args.run / "report"
    write_report(
        report,
        results,
        answers,
        test,
        token_limit=args.token_limit,
        about=f"Notes: {notes}.",
        steps=steps,
        show_text=args.show_text,
    )
    print(f"\n{results_table(results)}\n\nReport: {report / 'report.md'}")
    print(f"To evaluate it again: {as_typed(prog, 'eval')} --run {args.run}")
    print(f"To open its page: {as_typed(prog, 'serve')} --run {args.run}")


def check_run_folder(run: Path, resume: bool) -> None:
    """Check that training overwrites nothing, or that there is training to resume.

    This is stricter than ``training.check_folder``, which accepts files that belong to no run.

    Raises:
        ValueError: The folder is not empty, or holds no training to resume; or its name stands for
            the bundled run.
    """
    from clinora.training import METRICS

    if str(run) == "bundled":
        raise ValueError("--run bundled names the run of this package: choose another --run")
    if resume:
        if not (run / METRICS).is_file():
            raise ValueError(f"{run} holds no training to resume: give its folder with --run")
        return
    if not run.exists():
        return
    if run.is_dir():
        # Training that was killed at its very start leaves only hidden files of its history.
        leftovers = set(run.glob(f".{METRICS}.*"))
        if leftovers.issuperset(run.iterdir()):
            return
    raise ValueError(
        f"{run} exists and is not empty: choose another --run, remove it, or --resume it"
    )


# --- one or several processes, errors and resuming ----------------------------------------------


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if torchrun started this process, and leave it at the end."""
    if "RANK" not in os.environ:  # torchrun sets this variable
        yield
        return
    import torch.distributed as dist

    dist.init_process_group()  # gloo for the CPU, nccl for GPUs
    try:
        yield
    except BaseException as error:
        clear_frames(error)
        raise
    finally:
        # DistributedDataParallel must be freed before the group: otherwise its destructor holds
        # the GIL and waits for the group's threads, which wait for the GIL.
        gc.collect()  # objects of training may be in reference cycles
        dist.destroy_process_group()


def clear_frames(error: BaseException) -> None:
    """Clear the local variables in the tracebacks of an error and its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def new_run() -> Path:
    """Return a folder in ``runs/`` named by the time; all processes use that of the first."""
    from clinora.device import gathered

    folder = Path("runs", datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    return gathered(folder)[0]


@contextmanager
def training_errors(prog: str, run: Path, how_to_resume: str) -> Iterator[None]:
    """Turn errors and signals that end training early into a message that says how to resume."""
    from clinora.device import world
    from clinora.training import METRICS, InterruptedTraining

    try:
        yield
    except FloatingPointError as error:
        end_with(prog, str(error), FAILED)
    except InterruptedTraining as error:
        text, number = error.args
        if world()[0] == 0:
            end_with(prog, f"{text}\n{how_to_resume}", 128 + number)
        sys.exit(128 + number)
    except BrokenPipeError:  # the reader of the output has gone
        if (run / METRICS).is_file():  # training has begun
            sys.stderr.write(f"{prog}: stopped\n{how_to_resume}\n")
        raise
    except KeyboardInterrupt:
        message = "stopped"
        if (run / METRICS).is_file():  # training has begun
            message = f"stopped\n{how_to_resume}"
        end_with(prog, message, STOPPED)
    except RuntimeError as error:
        # The first from a GPU, the second from the CPU's allocator.
        if any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            end_with(prog, "out of memory: try fewer --tokens-per-batch in a new --run", FAILED)
        if world()[1] == 1:
            raise
        import torch.distributed as dist

        reason = str(error).partition("\n")[0]
        is_disconnect = "Connection" in reason or "connection" in reason
        if isinstance(error, dist.DistBackendError) or is_disconnect:
            reason = "another process has ended"
        end_with(prog, f"{reason}. {how_to_resume}", FAILED)


def launcher(prog: str) -> list[str]:
    """Return the words before the options of a command line that starts this command again."""
    if "RANK" in os.environ:
        return torchrun(prog, int(os.environ["LOCAL_WORLD_SIZE"]))
    return as_typed(prog, "train").split()


def torchrun(prog: str, processes: int) -> list[str]:
    """Return the words before the options of a command line for several processes.

    Without the ``--``, torchrun would read ``--run`` as its own option ``--run-path``.

    >>> " ".join(torchrun("train.py", 2))
    'torchrun --nproc-per-node=2 -- train.py'
    >>> " ".join(torchrun("clinora train", 2))
    'torchrun --nproc-per-node=2 --no-python -- clinora train'
    """
    program, *words = as_typed(prog, "train").split()
    if program == "clinora":
        return ["torchrun", f"--nproc-per-node={processes}", "--no-python", "--", program, *words]
    if words[0] == "-m":
        return ["torchrun", f"--nproc-per-node={processes}", "-m", "--", *words[1:]]
    return ["torchrun", f"--nproc-per-node={processes}", "--", *words]
