"""The command line ``python -m clinora``, or ``clinora`` after installation."""

import argparse
import importlib
import sys

COMMANDS = {
    "train": "fine-tune a base model with LoRA and evaluate it before and after",
    "eval": "evaluate a trained run on notes that it was not trained on",
    "predict": "classify every note in a file of any size",
    "serve": "classify notes on a page and through an API",
    "budget": "count the parameters and the memory of fine-tuning a model, without loading it",
}


def main(argv: list[str] | None = None, prog: str = "clinora") -> int:
    """Run the command that the first argument names, and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune Llama models with LoRA to classify clinical notes.",
        epilog=f"{prog} COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about)
    command = parser.parse_args(words[:1]).command  # the command parses the rest
    module = importlib.import_module(f"clinora.commands.{command}")
    return module.main(words[1:], f"{prog} {command}")


if __name__ == "__main__":
    sys.exit(main(prog="python -m clinora"))
