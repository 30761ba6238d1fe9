"""Checkpoints of training: a resumed run ends with the same bits as one that was never stopped."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from clinora.checkpoint import CheckpointError, write_atomically
from clinora.device import gathered, world

CHECKPOINTS_KEPT = 2
# Changes when the same options no longer lead to the same steps, or are recorded otherwise.
LOOP_VERSION = 4


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        tensors: ``trained.NAME``, ``optimizer.NAME.KEY``, ``best.NAME`` and ``random.RANK.KIND``.
        numbers: step, best, worse, seconds, the scaler's state, the run's identity and the version
            of the loop.
        sha256: Hash of the tensors and the numbers.
    """

    path: Path
    tensors: dict[str, Tensor]
    numbers: dict
    sha256: str


class State:
    """Everything that determines the next step, and its checkpoints on disk.

    A checkpoint is one file, such as ``step-000050.safetensors``, so it is complete or absent. It
    holds tensors, and in its header a JSON object with the numbers, the identity and a sha256.

    Args:
        folder: Where the checkpoints are.
        trained: The trained parameters, by name.
        optimizers: The optimisers; each trained parameter belongs to one of them.
        scaler: Scales the loss in float16.
        identity: Everything else that determines the result (data, options, base). A checkpoint
            with another identity is refused.

    Attributes:
        step: Number of finished steps.
        best: The lowest validation loss (nats); None before the first validation.
        worse: Number of validations since the best one.
        seconds: Training time before this process started or resumed the run.
    """

    def __init__(
        self,
        folder: Path,
        trained: dict[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        identity: dict,
    ) -> None:
        self.folder = folder
        self.trained = trained
        self.scaler = scaler
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        self.device = next(iter(trained.values())).device
        self.optimizer_of: dict[nn.Parameter, torch.optim.Optimizer] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer_of[parameter] = optimizer
        self.step = 0
        self.best: float | None = None
        self.worse = 0
        self.best_tensors: dict[str, Tensor] = {}
        self.kept: list[Path] = []  # checkpoints of this training, oldest first
        self.seconds = 0.0
        self.began = time.perf_counter()

    def keep_if_best(self, loss: float) -> None:
        """Remember the trained parameters if this validation loss is the lowest so far."""
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
            self.worse = 0
            for name, parameter in self.trained.items():
                self.best_tensors[name] = parameter.detach().clone()
        else:
            self.worse += 1

    @torch.no_grad()
    def keep_best(self) -> None:
        """Copy the parameters with the lowest validation loss into the model, if there are any."""
        for name, tensor in self.best_tensors.items():
            self.trained[name].copy_(tensor)

    def elapsed(self) -> float:
        """Give the training time in seconds, including the time before the run was resumed."""
        return self.seconds + time.perf_counter() - self.began

    def save(self) -> None:
        """Write a checkpoint unless this step has one, and remove all but the last two.

        Every process must call this; the first process writes.

        Raises:
            OSError: The file cannot be written. The previous checkpoint is intact.
        """
        path = self.folder / f"step-{self.step:06d}.safetensors"
        if path in self.kept:
            return
        rank, _ = world()
        tensors = self._tensors()
        if rank == 0:
            self._write(path, tensors)
        self.kept = [*self.kept, path][-CHECKPOINTS_KEPT:]
        if rank == 0:
            self._remove_others()
        gathered(None)  # the other processes wait until the file is written

    def load(self) -> None:
        """Continue from the last intact checkpoint, or from step 0 if there is no checkpoint.

        Raises:
            CheckpointError: All checkpoints are damaged, the processes read different ones, or the
                checkpoint belongs to other data, another configuration, another model or another
                version of the loop.
        """
        saved = self._read_newest()
        if saved is None and self.paths():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: train again in another folder"
            )
        hashes = gathered(saved.sha256 if saved else None)
        if len(set(hashes)) > 1:
            raise CheckpointError(
                f"the processes read different checkpoints in {self.folder}: all of them need the "
                "same folder"
            )
        if saved is None:
            _say(f"There is no checkpoint in {self.folder} yet: training starts from step 0.")
            return
        if saved.numbers.get("loop") != LOOP_VERSION:
            raise CheckpointError(
                f"{saved.path} was written by another version of Clinora, whose checkpoints this "
                "one does not resume: use that version, or train again in another folder"
            )
        differences = list_differences(saved.numbers["identity"], self.identity)
        if differences:
            raise CheckpointError(
                f"{saved.path} belongs to another run: {'; '.join(differences)}. Resume with the "
                "options that the run started with"
            )
        before = shapes_of(below(saved.tensors, "trained."))
        differences = list_differences(before, shapes_of(self.trained))
        if differences:
            raise CheckpointError(
                f"{saved.path} belongs to a model with other trained parameters "
                f"({len(differences)} differ), such as {differences[0]}. Resume with the model "
                "that the run started with"
            )
        self._restore(saved)

    def paths(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        paths = self.folder.glob("step-*.safetensors")
        # By length first: the names of steps above 999,999 are longer.
        return sorted(paths, key=lambda path: (len(path.name), path.name))

    def last_checkpoint(self) -> str:
        """Give a sentence that names the last checkpoint."""
        paths = self.paths()
        if not paths:
            return "There is no checkpoint yet."
        return f"The last checkpoint is {paths[-1]}."

    def _tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint, with the random states of all processes."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"trained.{name}"] = parameter
            for key, value in self.optimizer_of[parameter].state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        for name, tensor in self.best_tensors.items():
            tensors[f"best.{name}"] = tensor
        for rank, states in enumerate(gathered(random_states(self.device))):
            for kind, state in states.items():
                tensors[f"random.{rank}.{kind}"] = state
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        on_cpu = {}
        for name, tensor in tensors.items():
            on_cpu[name] = tensor.detach().cpu().contiguous()
        numbers = {
            "step": self.step,
            "best": self.best,
            "worse": self.worse,
            "seconds": self.elapsed(),
            "scaler": self.scaler.state_dict(),
            "identity": self.identity,
            "loop": LOOP_VERSION,
        }
        text = json.dumps(numbers)
        metadata = {"state": text, "sha256": hash_state(text, on_cpu)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(on_cpu, metadata=metadata))

    def _remove_others(self) -> None:
        """Remove older and damaged checkpoints, and half-written files of a killed process."""
        for path in [*self.paths(), *self.folder.glob(".step-*")]:
            if path not in self.kept:
                path.unlink()

    def _read_newest(self) -> SavedState | None:
        """Read the newest intact checkpoint; None if there is none."""
        for path in reversed(self.paths()):
            saved = read_checkpoint(path)
            if saved is not None:
                return saved
            _say(f"{path} is damaged: training goes back to the checkpoint before it.")
        return None

    @torch.no_grad()
    def _restore(self, saved: SavedState) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(saved.tensors[f"trained.{name}"])
            state = below(saved.tensors, f"optimizer.{name}.")
            for key, tensor in state.items():
                is_step_count = tensor.ndim == 0  # AdamW keeps it on the CPU
                state[key] = tensor.to("cpu" if is_step_count else parameter.device)
            self.optimizer_of[parameter].state[parameter] = state
        best = below(saved.tensors, "best.")
        self.best_tensors = {name: tensor.to(self.device) for name, tensor in best.items()}
        rank, _ = world()
        set_random_states(below(saved.tensors, f"random.{rank}."), self.device)
        self.scaler.load_state_dict(saved.numbers["scaler"])
        self.step = saved.numbers["step"]
        self.best = saved.numbers["best"]
        self.worse = saved.numbers["worse"]
        self.seconds = saved.numbers["seconds"]
        self.kept = [saved.path]


def read_checkpoint(path: Path) -> SavedState | None:
    """Read a checkpoint; None if it is damaged.

    Raises:
        OSError: The file cannot be read.
    """
    path.open("rb").close()  # a missing permission is not damage
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
            text = metadata["state"]
            sha256 = metadata["sha256"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return None
    if sha256 != hash_state(text, tensors):
        return None
    return SavedState(path, tensors, json.loads(text), sha256)


def hash_state(text: str, tensors: dict[str, Tensor]) -> str:
    """Hash a text and the names, dtypes, shapes and bits of tensors, in order of their names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix; give them names without it."""
    selected = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = tensor
    return selected


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Give the shape of each tensor, by its name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Give the states of the generators that dropout draws from, by type of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to what ``random_states`` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


def list_differences(before: dict, now: dict, inside: str = "") -> list[str]:
    """List the differences between two nested dictionaries."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name = f"{inside}{key}"
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += list_differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {_short(old)} then, {_short(new)} now")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _say(text: str) -> None:
    """Print a line on the first process, above any progress bar."""
    rank, _ = world()
    if rank == 0:
        tqdm.write(text)
