"""Explaining a note by leaving parts out: seconds on the spot, and through the server's queue.

python -m benchmarks.explain [--threads 2]

The note is longer than the token limit of the bundled run, so that 512 tokens are read. Through the
queue, the texts are classified in the server's batches.
"""

import statistics
import sys

import clinora
from benchmarks import common
from clinora.device import keep_freed_memory
from clinora.explain import Part, effects, leave_one_out, parts_of, variants
from clinora.serving.batcher import Batcher


def explain_through_queue(batcher: Batcher, note: str) -> list[Part]:
    """Explain a note as the server does."""
    parts = parts_of(batcher.classifier, note)
    futures = batcher.submit(variants(parts))
    return effects(parts, [future.result() for future in futures])


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    args = common.parser(__doc__).parse_args(argv)
    common.begin(args)
    keep_freed_memory()  # as serve.py does
    classifier = clinora.Classifier.load("bundled", device="cpu")
    batcher = Batcher(classifier)
    note = "\n".join(note.text for note in clinora.read_notes("bundled").notes[:10])
    seconds = common.alternate(
        {
            "prediction alone": lambda: classifier([note]),
            "explanation on the spot": lambda: leave_one_out(classifier, note),
            "explanation through the queue": lambda: explain_through_queue(batcher, note),
        },
        args.repetitions,
    )
    batcher.close()
    print(f"{classifier.token_limit} tokens in {len(parts_of(classifier, note))} parts")
    rows = []
    for way, times in seconds.items():
        rows.append([way, f"{statistics.median(times):.2f}", f"{max(times):.2f}"])
    common.table(["", "median seconds", "longest"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
