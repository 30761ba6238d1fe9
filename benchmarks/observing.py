"""What logs and metrics cost: notes classified per second by this clone and by an earlier one.

    git worktree add ../before COMMIT
    python -m benchmarks.observing --before ../before

``COMMIT`` is one without logs and metrics. Each clone serves the bundled adapter with its own
``serve.py``, this one with ``--log``. 32 clients send notes to one of the two services, then to the
other, and so on. Each client sends its next request after the response to the last.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import clinora
from benchmarks.common import NO_LIMIT, spread
from benchmarks.serving import load, note_of

HERE = Path(__file__).parents[1]


@contextmanager
def service(clone: Path, folder: Path, *options: str) -> Iterator[int]:
    """Run ``serve.py`` of a clone in a working directory; gives its port."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, clone.resolve() / "serve.py", "--port", "0", *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        if not line.startswith("Clinora: "):
            raise RuntimeError(f"the service of {clone} did not start")
        yield urlsplit(line.split()[-1]).port
    finally:
        process.terminate()
        process.wait()


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="clone without logs and metrics")
    parser.add_argument("--tokens", type=int, default=60, help="length of the note")
    parser.add_argument("--clients", type=int, default=32, help="number of clients")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of measurements")
    args = parser.parse_args(argv)
    note = note_of(clinora.Classifier.load("bundled"), args.tokens)
    rates: dict[str, list[float]] = {"before": [], "with log and metrics": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "access.log"
        options = ["--log", str(log), "--rate-limit", str(NO_LIMIT)]
        with service(args.before, folder) as before, service(HERE, folder, *options) as after:
            ports = dict(zip(rates, (before, after), strict=True))
            for port in ports.values():
                load(port, note, args.clients, 1.0)
            for _ in range(args.repetitions):
                for side, port in ports.items():
                    began = time.perf_counter()
                    seconds = load(port, note, args.clients, args.seconds)
                    rates[side].append(len(seconds) / (time.perf_counter() - began))
        print(f"{sum(file.stat().st_size for file in folder.glob('access.log*')):,} bytes of log")
    for side, found in rates.items():
        print(f"{side}: median {median(found):.0f} notes/s ({min(found):.0f}–{max(found):.0f})")
    ratios = [after / before for before, after in zip(*rates.values(), strict=True)]
    print(f"with log and metrics, to before: {spread(ratios)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
