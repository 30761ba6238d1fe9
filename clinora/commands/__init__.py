"""The commands ``clinora train``, ``eval``, ``serve`` and ``budget``, and what they share.

Each command is a module: its options, then the story of its job from top to bottom. Its ``main``
takes the words after the command and ``prog``, the command as it was typed: "clinora train",
"python -m clinora train" or "train.py". Messages repeat that form.

The modules import PyTorch and the rest of the package inside their functions. So ``--help`` waits
for as little as possible, and Ctrl-C finds its handler from the first moment.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

FAILED = 2  # exit status after an error, as argparse has it
STOPPED = 130  # exit status after Ctrl-C: 128 + SIGINT


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Make a parser whose help keeps the description's lines as they are."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--precision``."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", default="auto", help="auto, bf16, fp16 or fp32 (default: %(default)s)"
    )


def as_typed(prog: str, command: str) -> str:
    """Give a command in the form in which ``prog`` was typed.

    >>> as_typed("train.py", "eval")
    'python eval.py'
    >>> as_typed("clinora train", "eval")
    'clinora eval'
    >>> as_typed("python -m clinora train", "eval")
    'python -m clinora eval'
    """
    if prog.endswith(".py"):
        return f"python {command}.py"
    program, _, _ = prog.rpartition(" ")
    return f"{program} {command}"


def end_with(prog: str, text: str, status: int) -> NoReturn:
    """End the command with lines on standard error, the first of which names it."""
    sys.stderr.write(f"{prog}: {text}\n")
    sys.exit(status)


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn expected errors and Ctrl-C into one line on standard error and an exit status."""
    try:
        yield
    except (OSError, ValueError) as error:
        end_with(prog, str(error), FAILED)
    except KeyboardInterrupt:
        end_with(prog, "stopped", STOPPED)


def check_run(run: str, prog: str) -> None:
    """Check that a trained run is there.

    Raises:
        ValueError: It is not. The message says which command makes one.
    """
    if run != "bundled" and not Path(run).is_dir():
        train = as_typed(prog, "train")
        raise ValueError(f"there is no run {run}: {train} --run {run} makes one")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder to write into.

    Raises:
        ValueError: It cannot be made. The message names the option that gives another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder {folder} cannot be made ({error.strerror}): give another with {option}"
        ) from None
