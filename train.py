"""Train: ``python train.py`` does what ``clinora train`` does."""

import sys

from clinora.commands.train import main

if __name__ == "__main__":
    sys.exit(main(prog="train.py"))
