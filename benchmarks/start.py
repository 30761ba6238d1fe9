"""Start: seconds to import, to load a base and to answer the first note, each in a new process.

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
    """Go through the start of one side; what it imports is timed elsewhere."""
    exec(IMPORTS[args.side])
    ids = torch.randint(3, 2000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    make = common.our_model if args.side == "ours" else common.their_model
    marks = [time.perf_counter()]
    model = make(args.base, 5, args.layers, adapt=False).eval()
    marks.append(time.perf_counter())
    with torch.inference_mode():
        if args.side == "ours":
            model(ids, torch.tensor([args.tokens]))
        else:
            model(input_ids=ids)
    marks.append(time.perf_counter())
    return {"load": marks[1] - marks[0], "first note": marks[2] - marks[1]}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("base", help="a folder, or bundled")
    parser.add_argument("--layers", type=int, help="cut the base after so many (default: all)")
    parser.add_argument("--tokens", type=int, default=500, help="of the first note")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        print(json.dumps(one_side(args)))
        return 0
    common.begin(args)
    words = [args.base, "--tokens", str(args.tokens), "--threads", str(torch.get_num_threads())]
    words += ["--layers", str(args.layers)] if args.layers else []
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in IMPORTS}
    for _ in range(args.repetitions):
        for side, line in IMPORTS.items():
            found = {
                "import": common.seconds_of(line),
                "torch alone": common.seconds_of("import torch"),
            }
            found |= common.in_own_process("benchmarks.start", *words, "--side", side)
            for name, value in found.items():
                seconds[side].setdefault(name, []).append(value)
    rows = [
        [name, *(f"{statistics.median(seconds[side][name]):.2f}" for side in IMPORTS)]
        for name in seconds["ours"]
    ]
    common.table(["seconds", *IMPORTS], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
