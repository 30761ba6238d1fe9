"""Kill a training at random moments, resume it each time, and compare it with an uninterrupted run.

    python -m tests.kill_and_resume --kills 20 --precision bf16

Every other kill waits until a checkpoint is being written. The adapter must be the same to the bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 8
OPTIONS = [
    "--steps", str(STEPS), "--tokens-per-batch", "256", "--checkpoint-every", "1",
    "--validate-every", "10", "--device", "cpu", "--rank", "4",
]  # fmt: skip


def write_notes(path: Path, texts: int = 700) -> Path:
    """Write a file of short notes of two classes, which differ in one word."""
    words = {"Heart": "chest pain", "Bone": "fracture"}
    rows = [
        f"visit {i}: {word},{label}" for i in range(texts // 2) for label, word in words.items()
    ]
    path.write_text("transcription,medical_specialty\n" + "\n".join(rows) + "\n")
    return path


def start(notes: Path, run: Path, precision: str, *more: str) -> subprocess.Popen:
    """Start train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "--notes", str(notes), "--run", str(run)]
    return subprocess.Popen(
        [*command, "--precision", precision, *OPTIONS, *more],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(job: subprocess.Popen) -> None:
    """Wait for a training to end well."""
    _, error = job.communicate()
    if job.returncode:
        raise RuntimeError(f"train.py ended with {job.returncode}: {error.decode()[-2000:]}")


def wait_for(job: subprocess.Popen, folder: Path, pattern: str) -> None:
    """Wait until a file is there or the job has ended."""
    while job.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.0005)


def show(folder: Path, precision: str, kills: int, seed: int) -> dict:
    """Train with and without kills; report the kills and whether the results are equal."""
    draw = random.Random(seed)
    notes = write_notes(folder / "notes.csv")
    steps = ("--steps", str(20 * kills))  # more than are done between the kills
    whole = folder / "whole"
    finish(start(notes, whole, precision, *steps))

    run = folder / "killed"
    while_writing = 0
    for number in range(kills):
        done = last_checkpoint(run)
        job = start_or_resume(notes, run, precision, *steps)
        further = draw.randint(1, 10)  # steps
        while job.poll() is None and last_checkpoint(run) < done + further:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))  # so that the kill falls inside a step
        if number % 2 == 1:
            wait_for(job, run, "checkpoint/.step-*")
        job.send_signal(signal.SIGKILL)
        job.communicate()
        if job.returncode != -signal.SIGKILL:
            raise RuntimeError("train.py ended before it was killed")
        if list(run.glob("checkpoint/.step-*")):
            while_writing += 1
    finish(start_or_resume(notes, run, precision, *steps))

    expected = (whole / "adapter_model.safetensors").read_bytes()
    resumed = (run / "adapter_model.safetensors").read_bytes()
    return {
        "precision": precision,
        "kills": kills,
        "while writing": while_writing,
        "identical": resumed == expected,
    }


def last_checkpoint(run: Path) -> int:
    """Give the step of the newest checkpoint; 0 if there is none."""
    names = [path.stem for path in run.glob("checkpoint/step-*.safetensors")]
    return max([int(name.removeprefix("step-")) for name in names], default=0)


def start_or_resume(notes: Path, run: Path, precision: str, *more: str) -> subprocess.Popen:
    """Resume a run if its training has begun, otherwise start it."""
    resume = ["--resume"] if (run / "metrics.jsonl").exists() else []
    return start(notes, run, precision, *more, *resume)


def main(argv: list[str] | None = None) -> int:
    """Print the result; the exit status is 0 if the bits are the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = show(Path(folder), args.precision, args.kills, args.seed)
    print(json.dumps(report))
    return 0 if report["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
