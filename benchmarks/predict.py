"""Scoring a large file: rows per second, and the memory from the first 10,000 rows to the last.

    python -m benchmarks.predict [--rows 1000000] [--format csv]

The rows are generated, all different, with notes of 20 to 40 tokens. ``clinora predict`` scores
them with the bundled run in its own process, whose memory is read twice a second.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import clinora
from benchmarks import common
from clinora.predict import ROWS_PER_PART
from clinora.tables.writing import FORMATS

FIRST_ROWS = 10_000
TOKENS = (20, 40)  # of a note


def word_tokens(classifier: clinora.Classifier) -> dict[str, int]:
    """Give words of the bundled notes, with the tokens that each takes after another word."""
    words = set()
    for note in clinora.read_notes("bundled").notes:
        words |= {word for word in note.text.lower().split() if word.isalpha()}
    start = len(classifier.encode("x"))
    counts = {}
    for word in sorted(words):
        tokens = len(classifier.encode(f"x {word}")) - start
        if len(classifier.encode(f"x {word} {word}")) == start + 2 * tokens:
            counts[word] = tokens
    return counts


def write_rows(path: Path, rows: int, classifier: clinora.Classifier) -> None:
    """Write a CSV file of different notes."""
    draw = random.Random(0)
    counts = word_tokens(classifier)
    words = list(counts)
    with path.open("w") as file:
        file.write("id,transcription\n")
        for number in range(rows):
            digits = " ".join(str(number))  # makes the note different
            left = draw.randint(*TOKENS) - len(classifier.encode(digits))
            text = [digits]
            while left > 0:
                word = draw.choice(words)
                if counts[word] <= left:
                    text.append(word)
                    left -= counts[word]
            file.write(f"{number},{' '.join(text)}\n")


def measure(source: Path, out: Path, output_format: str) -> dict[str, float]:
    """Score a file in its own process; give seconds, and MB after the first rows and at most."""
    words = ["predict", "--notes", source, "--out", out, "--keep", "id", "--format", output_format]
    began = time.perf_counter()
    job = subprocess.Popen([sys.executable, "-m", "clinora", *map(str, words)])
    process = psutil.Process(job.pid)
    first = 0.0
    most = 0.0
    while job.poll() is None:
        try:
            used = process.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            break
        most = max(most, used)
        done = ROWS_PER_PART * len(list(out.glob("part-*")))
        if done < FIRST_ROWS:
            first = most
        time.sleep(0.5)
    if job.wait():
        raise RuntimeError("clinora predict failed")
    return {"seconds": time.perf_counter() - began, "first": first, "most": most}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the results")
    args = parser.parse_args(argv)
    common.begin(args)
    classifier = clinora.Classifier.load("bundled", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "notes.csv")
        write_rows(source, args.rows, classifier)
        result = measure(source, Path(folder, "out"), args.format)
    seconds = result["seconds"]
    print(f"{args.rows:,} rows in {seconds:.0f} s: {args.rows / seconds:.0f} rows/s")
    print(
        f"memory: {result['first']:.0f} MB up to row {FIRST_ROWS:,}, "
        f"{result['most'] - result['first']:.0f} MB more up to the last"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
