"""Kill the scoring of a file at random moments, resume it, and compare it with a whole run.

    python -m tests.kill_and_resume_predict --rows 20000 --kills 20

The merged file must be the same to the byte.
"""

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["clinora.predict"])
WORDS = [
    "fever",
    "pain",
    "knee",
    "heart",
    "cough",
    "fracture",
    "normal",
    "left",
    "right",
    "chronic",
    "acute",
    "no",
    "mild",
    "severe",
]


def write_notes(path: Path, rows: int) -> Path:
    """Write a file of different notes of 20 to 40 words."""
    draw = random.Random(0)
    with path.open("w") as file:
        file.write("id,transcription\n")
        for number in range(rows):
            words = draw.choices(WORDS, k=draw.randint(20, 40))
            file.write(f"{number},visit {number} {' '.join(words)}\n")
    return path


def score_here(options: list[str], rows_per_part: int) -> None:
    """Score a file in this process, as the command does with these options."""
    from clinora import predict
    from clinora.commands import predict as command

    predict.ROWS_PER_PART = rows_per_part
    sys.exit(command.main(options, "clinora predict"))


def show(folder: Path, rows: int, rows_per_part: int, kills: int, seed: int) -> dict:
    """Score with and without kills; report the kills and whether the results are equal."""
    draw = random.Random(seed)
    notes = write_notes(folder / "notes.csv", rows)
    options = ["--notes", str(notes), "--keep", "id", "--merge", "--device", "cpu", "--out"]

    def start(out: Path, *more: str) -> multiprocessing.process.BaseProcess:
        words = [*options, str(out), *more]
        job = PROCESSES.Process(target=score_here, args=(words, rows_per_part))
        job.start()
        return job

    whole = start(folder / "whole")
    whole.join()
    out = folder / "out"
    parts = rows // rows_per_part
    for number in range(kills):
        job = start(out, "--resume")
        # The parts are divided among the kills, so that none comes after the end.
        expected = (number + draw.random()) * (parts - 1) / kills
        while job.is_alive() and len(list(out.glob("part-*"))) < expected:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        job.kill()
        job.join()
        if job.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the job ended with {job.exitcode} before it was killed")
    last = start(out, "--resume")
    last.join()
    merged = [(path / "predictions.csv").read_bytes() for path in (folder / "whole", out)]
    return {"rows": merged[1].count(b"\n") - 1, "kills": kills, "identical": merged[0] == merged[1]}


def main(argv: list[str] | None = None) -> int:
    """Print the result; the exit status is 0 if the bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rows-per-part", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = show(Path(folder), args.rows, args.rows_per_part, args.kills, args.seed)
    print(json.dumps(report))
    return 0 if report["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
