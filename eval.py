"""Evaluate: ``python eval.py`` does what ``clinora eval`` does."""

import sys

from clinora.commands.eval import main

if __name__ == "__main__":
    sys.exit(main(prog="eval.py"))
