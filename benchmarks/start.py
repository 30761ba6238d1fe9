"""Start: seconds to import, to load a base and to classify the first note, in new processes.

python -m benchmarks.start FOLDER [--layers 4]
"""

import argparse
import json
import statistics
import sys
import time

import torch

from benchmarks import common

IMPORTS = {
    "ours": "from clinora import load_model",
    "theirs": "from transformers import AutoModelForSequenceClassification; import peft",
}


def one_side(args: argparse.Namespace) -> dict[str, float]:
    """Time the start of one side; the imports come first and are timed elsewhere."""
    exec(IMPORTS[args.side])
    ids = torch.randint(3, 2000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    make = common.our_model if args.side == "ours" else common.their_model
    began = time.perf_counter()
    model = make(args.base, 5, args.layers, adapt=False).eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        if args.side == "ours":
            model(ids, torch.tensor([args.tokens]))
        else:
            model(input_ids=ids)
    ended = time.perf_counter()
    return {"load": loaded - began, "first note": ended - loaded}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("base", help="a folder, or bundled")
    parser.add_argument("--layers", type=int, help="layers of the base to keep (default: all)")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of the first note")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        print(json.dumps(one_side(args)))
        return 0
    common.begin(args)
    words = [args.base, "--tokens", str(args.tokens), "--threads", str(torch.get_num_threads())]
    if args.layers:
        words += ["--layers", str(args.layers)]
    seconds: dict[str, dict[str, list[float]]] = {}  # by side and part of the start
    for side in IMPORTS:
        seconds[side] = {}
    for _ in range(args.repetitions):
        for side, line in IMPORTS.items():
            found = {
                "import": common.seconds_of(line),
                "torch alone": common.seconds_of("import torch"),
            }
            found |= common.in_own_process("benchmarks.start", *words, "--side", side)
            for name, value in found.items():
                seconds[side].setdefault(name, []).append(value)
    rows = []
    for name in seconds["ours"]:
        medians = [statistics.median(seconds[side][name]) for side in IMPORTS]
        rows.append([name, *(f"{median:.2f}" for median in medians)])
    common.table(["seconds", *IMPORTS], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
