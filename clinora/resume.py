"""Checkpoints of training, from which it goes on to the same bits, on one process or several."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from clinora.checkpoint import CheckpointError, write_atomically
from clinora.device import gathered, world

CHECKPOINTS_KEPT = 2


class State:
    """What decides the next step, and its checkpoints: ``step-000050.safetensors`` and so on.

    A checkpoint is one file, so it is there whole or not at all: tensors, and in its header a
    JSON object with the numbers, the identity and a sha256 of the tensors.

    Attributes:
        step: Steps done.
        best: The lowest validation loss; None before the first.
        worse: Validations since then.
        seconds: Training time of the runs before this one.
    """

    def __init__(
        self,
        folder: Path,
        trained: dict[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        identity: dict,
    ) -> None:
        self.folder, self.trained, self.scaler = folder, trained, scaler
        self.optimizer = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
        self.device = next(iter(trained.values())).device
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        self.step, self.best, self.worse, self.seconds = 0, None, 0, 0.0
        self.best_tensors: dict[str, Tensor] = {}
        self.kept: list[Path] = []  # checkpoints of this training, the oldest first
        self.began = time.perf_counter()

    def judge(self, loss: float) -> None:
        """Remember the trained parameters if their validation loss is the lowest so far."""
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.worse = loss, 0
            self.best_tensors = {n: p.detach().clone() for n, p in self.trained.items()}
        else:
            self.worse += 1

    @torch.no_grad()
    def keep_best(self) -> None:
        """Put the parameters that validated best into the model, if any were validated."""
        for name, tensor in self.best_tensors.items():
            self.trained[name].copy_(tensor)

    def elapsed(self) -> float:
        """Give the seconds of training, those before a resumption included."""
        return self.seconds + time.perf_counter() - self.began

    def save(self) -> None:
        """Write a checkpoint, then remove all but the last two; the first process alone writes."""
        tensors = {f"trained.{n}": p.detach() for n, p in self.trained.items()}
        tensors |= {f"best.{n}": t for n, t in self.best_tensors.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer[parameter].state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        for rank, states in enumerate(gathered(self.random_states())):
            tensors |= {f"random.{rank}.{kind}": t for kind, t in states.items()}
        if world()[0] == 0:
            tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            numbers = {
                "step": self.step, "best": self.best, "worse": self.worse,
                "seconds": self.elapsed(), "scaler": self.scaler.state_dict(),
                "identity": self.identity,
            }  # fmt: skip
            text = json.dumps(numbers)
            metadata = {"state": text, "sha256": hash_state(text, tensors)}
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{self.step:06d}.safetensors"
            write_atomically(path, save(tensors, metadata=metadata))
            self.kept = [*self.kept[1 - CHECKPOINTS_KEPT :], path]
            # Of another training, damaged, or the hidden beginning of one that a kill cut short.
            for old in {*self.paths(), *self.folder.glob(".step-*")} - {*self.kept}:
                old.unlink()
        gathered(None)  # the others wait until it is there

    def load(self) -> None:
        """Go on from the last whole checkpoint, or from the beginning if there is none yet.

        Raises:
            CheckpointError: All are damaged, the processes see different ones, or it is of
                another data, config or base.
        """
        found, paths = None, self.paths()
        while paths and found is None:
            found = read_state(path := paths.pop())
            if found is None:
                self._say(f"{path} is damaged: going back to the checkpoint before.")
        if found is None and self.paths():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: train again, into another folder"
            )
        if len(set(gathered(found and found[2]))) > 1:
            raise CheckpointError(f"the processes do not see the same checkpoints in {self.folder}")
        if found is None:
            self._say(f"There is no checkpoint in {self.folder} yet: training from the beginning.")
            return
        tensors, numbers, _ = found
        if differences := unlike(numbers["identity"], self.identity):
            raise CheckpointError(
                f"{path} is of another run: {'; '.join(differences)}. Resume with the options "
                "that it was begun with"
            )
        self.kept = [path]
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"trained.{name}"])
                prefix = f"optimizer.{name}."
                self.optimizer[parameter].state[parameter] = {
                    # AdamW keeps its step count on the CPU
                    key.removeprefix(prefix): t.to(parameter.device if t.ndim else "cpu")
                    for key, t in tensors.items()
                    if key.startswith(prefix)
                }
        self.best_tensors = {
            name.removeprefix("best."): t.to(self.device)
            for name, t in tensors.items()
            if name.startswith("best.")
        }
        self.scaler.load_state_dict(numbers["scaler"])
        self.step, self.best, self.worse = (numbers[key] for key in ("step", "best", "worse"))
        self.seconds = numbers["seconds"]
        torch.set_rng_state(tensors[f"random.{world()[0]}.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"random.{world()[0]}.cuda"], self.device)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(tensors[f"random.{world()[0]}.mps"])

    def _say(self, text: str) -> None:
        if world()[0] == 0:
            tqdm.write(text)

    def random_states(self) -> dict[str, Tensor]:
        """Give the states of the generators that dropout draws from."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def paths(self) -> list[Path]:
        """List the checkpoints, the oldest first."""
        paths = self.folder.glob("step-*.safetensors")
        return sorted(paths, key=lambda path: (len(path.name), path.name))  # beyond six digits, too

    def last_checkpoint(self) -> str:
        """Say which checkpoint is the last."""
        paths = self.paths()
        return f"The last checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."


def read_state(path: Path) -> tuple[dict[str, Tensor], dict, str] | None:
    """Read tensors, numbers and hash of a checkpoint; None if it is damaged.

    Raises:
        OSError: The file cannot be read.
    """
    path.open("rb").close()  # a file that may not be read is not damaged
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text, sha256 = (file.metadata()[key] for key in ("state", "sha256"))
    except (SafetensorError, OSError, TypeError, KeyError):
        return None
    return (tensors, json.loads(text), sha256) if sha256 == hash_state(text, tensors) else None


def hash_state(text: str, tensors: dict[str, Tensor]) -> str:
    """Hash a text, and names, dtypes, shapes and bits of tensors, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def unlike(was: dict, now: dict, inside: str = "") -> list[str]:
    """List where two nested dictionaries differ."""
    found = []
    for key in sorted(was.keys() | now.keys()):
        name, a, b = f"{inside}{key}", was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += unlike(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {_short(a)} then, {_short(b)} now")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
