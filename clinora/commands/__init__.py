"""The commands ``clinora train``, ``eval``, ``predict``, ``serve`` and ``budget``, and their code.

Each command is one module: first its options, then the steps of its job from top to bottom. Its
``main`` takes the arguments after the command, and ``prog``, the command as the user typed it:
"clinora train", "python -m clinora train" or "train.py". Messages use the same form.

The modules import PyTorch and the rest of the package inside their functions. Therefore ``--help``
is fast, and Ctrl-C is handled from the start.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

FAILED = 2  # exit status after an error, the same as argparse's
STOPPED = 130  # exit status after Ctrl-C: 128 + SIGINT
PIPE_CLOSED = 141  # exit status when the reader of the output has gone: 128 + SIGPIPE


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Create a parser whose help keeps the line breaks of the description."""
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


def add_run_quantize_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantize`` of a command that loads a run."""
    parser.add_argument(
        "--quantize",
        default="auto",
        help="weights of the base: auto (as in training), none, nf4 (4.5 bits a weight) or "
        "nf4-double (4.13 bits a weight) (default: %(default)s)",
    )


def as_typed(prog: str, command: str) -> str:
    """Return a command in the form in which the user typed ``prog``.

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
    """Write the command's name and a text to standard error, and exit with a status."""
    sys.stderr.write(f"{prog}: {text}\n")
    sys.exit(status)


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn expected errors and Ctrl-C into one line on standard error and an exit status."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, because an error at exit would be a traceback
    except BrokenPipeError:
        # The reader, such as `head`, has read enough. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except (OSError, ValueError) as error:
        end_with(prog, str(error), FAILED)
    except KeyboardInterrupt:
        end_with(prog, "stopped", STOPPED)


def check_run(run: str, prog: str) -> None:
    """Check that the folder of a trained run exists.

    Raises:
        ValueError: The folder does not exist. The message gives the command that trains a run.
    """
    if run != "bundled" and not Path(run).is_dir():
        train = as_typed(prog, "train")
        raise ValueError(f"there is no run {run}: train one with {train} --run {run}")


def make_folder(folder: Path, option: str) -> None:
    """Create an output folder.

    Raises:
        ValueError: The folder cannot be created. The message names the option for another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder {folder} cannot be created ({error.strerror}): give another with {option}"
        ) from None
