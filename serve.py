"""Serve: ``python serve.py`` does what ``clinora serve`` does."""

import sys

from clinora.commands.serve import main

if __name__ == "__main__":
    sys.exit(main(prog="serve.py"))
