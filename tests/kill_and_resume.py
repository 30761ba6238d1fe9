"""Kill a training at random moments, resume it each time, and compare it with an uninterrupted run.

    python -m tests.kill_and_resume --kills 20 --precision bf16

Every other kill waits until a checkpoint is being written. The adapter must be the same to the bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from clinora.commands import train

STEPS = 8
# Each training is a fork of one process that has imported what training needs: imports take longer
# than a training of a few steps.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["clinora.evaluation", "clinora.report", "sklearn.linear_model", "sklearn.svm", "torch._dynamo"]
)
OPTIONS = [
    "--steps", str(STEPS), "--notes-per-step", "8", "--checkpoint-every", "1",
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


def start(log: Path, *options: object, **environment: str) -> BaseProcess:
    """Start a training in a process of its own; what it prints is appended to a file."""
    words = [str(option) for option in options]
    job = PROCESSES.Process(target=train_here, args=(log, words, environment))
    job.start()
    return job


def train_here(log: Path, words: list[str], environment: dict[str, str]) -> None:
    """Train in this process, as train.py does with these options."""
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    sys.exit(train.main(words, prog="train.py"))


def environments_of_two() -> list[dict[str, str]]:
    """Give the variables that torchrun sets for each of two processes."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def start_two(log: Path, *options: object) -> list[BaseProcess]:
    """Start one training on two processes."""
    return [start(log, *options, **environment) for environment in environments_of_two()]


def finish(job: BaseProcess, log: Path) -> None:
    """Wait for a training to end well."""
    job.join()
    if job.exitcode:
        raise RuntimeError(f"training ended with {job.exitcode}: {log.read_text()[-2000:]}")


def wait_for(job: BaseProcess, folder: Path, pattern: str) -> None:
    """Wait until a file is there or the job has ended."""
    while job.is_alive() and not list(folder.glob(pattern)):
        time.sleep(0.0005)


def show(folder: Path, precision: str, kills: int, seed: int) -> dict:
    """Train with and without kills; report the kills and whether the results are equal."""
    draw = random.Random(seed)
    log = folder / "log.txt"
    notes = write_notes(folder / "notes.csv", texts=120)
    options = ["--notes", notes, "--precision", precision, *OPTIONS]
    options += ["--steps", 12 * kills]  # more than are done between the kills
    whole = folder / "whole"
    finish(start(log, *options, "--run", whole), log)

    run = folder / "killed"
    options += ["--run", run]
    while_writing = 0
    for number in range(kills):
        done = last_checkpoint(run)
        job = start_or_resume(log, run, *options)
        further = draw.randint(1, 4)  # steps
        while job.is_alive() and last_checkpoint(run) < done + further:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))  # so that the kill falls inside a step
        if number % 2 == 1:
            wait_for(job, run, "checkpoint/.step-*")
        job.kill()
        job.join()
        if job.exitcode != -signal.SIGKILL:
            raise RuntimeError("training ended before it was killed")
        if list(run.glob("checkpoint/.step-*")):
            while_writing += 1
    finish(start_or_resume(log, run, *options), log)

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


def start_or_resume(log: Path, run: Path, *options: object) -> BaseProcess:
    """Resume a run if its training has begun, otherwise start it."""
    resume = ["--resume"] if (run / "metrics.jsonl").exists() else []
    return start(log, *options, *resume)


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
