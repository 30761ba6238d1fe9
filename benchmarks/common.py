"""Code that the benchmarks share: the two sides, timing in turns, matrix products and tables.

"Ours" is Clinora; "theirs" is Transformers with PEFT, combined as their documentation shows. Both
sides get the same base, the same ids and the same LoRA, and never run at the same time. They
compute in the dtype that train.py chooses: bfloat16, or float32 on a processor that lacks it.

Shapes: B batch, T tokens.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clinora
from clinora.checkpoint import find_base
from clinora.classifier import group_by_length, pad
from clinora.device import choose_dtype
from clinora.notes import Note

# What decides how fast a CPU multiplies matrices, as /proc/cpuinfo names it.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
CPU = torch.device("cpu")
NO_LIMIT = 10**9  # notes a minute: all clients of a benchmark are one user of the service
LORA = clinora.LoRAConfig(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"))


def parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="PyTorch's threads (default: PyTorch's choice)")
    parser.add_argument(
        "--repetitions", type=int, default=3, help="timings of each side, taken in turns"
    )
    return parser


def begin(args: argparse.Namespace) -> None:
    """Set the number of threads, and print the machine and the versions."""
    import peft
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = str(compute_dtype()).removeprefix("torch.")
    print(
        f"{_cpu()}, {torch.get_num_threads()} threads, {dtype}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}"
    )


def _cpu() -> str:
    """Give the processor's name and flags from the kernel, or else its name from Python."""
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.exists():
        return platform.processor() or platform.machine()
    values = {}
    for line in cpu_info.read_text().splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())  # all cores are alike
    name = values.get("model name") or platform.machine()
    if "flags" not in values:  # not an x86 processor
        return name
    flags = values["flags"].split()
    found = [flag for flag in CPU_FLAGS if flag in flags]
    return f"{name} ({' '.join(found) or 'no AVX2'})"


def compute_dtype(device: torch.device = CPU) -> torch.dtype:
    """Choose the dtype that both sides compute in, as train.py does."""
    return choose_dtype(device)


def autocast(device: torch.device = CPU) -> torch.autocast:
    """Give the context of a forward pass, as train.py and the Trainer with bf16 have it."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; the first column is aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = []
    for column in zip(*cells, strict=True):
        widths.append(max(len(cell) for cell in column))
    for first, *rest in cells:
        aligned = [first.ljust(widths[0])]
        for cell, width in zip(rest, widths[1:], strict=True):
            aligned.append(cell.rjust(width))
        print("  ".join(aligned).rstrip())


def alternate(sides: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Time the sides in turns, after one call of each that is not timed.

    Returns:
        The seconds of each side, one number for each repetition.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, run in sides.items():
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str = "ours", to: str = "theirs") -> list[float]:
    """Give how many times faster ``name`` is than ``to``, for each repetition."""
    pairs = zip(seconds[name], seconds[to], strict=True)
    return [other / own for own, other in pairs]


def spread(numbers: Sequence[float]) -> str:
    """Format the median of numbers with their minimum and maximum."""
    median = statistics.median(numbers)
    return f"{median:.2f} ({min(numbers):.2f}–{max(numbers):.2f})"


# --- the two sides ------------------------------------------------------------------------------


def our_model(
    base: str,
    labels: int,
    layers: int | None = None,
    adapt: bool = True,
    device: torch.device = CPU,
    quantize: str = "none",
) -> nn.Module:
    """Load a base as train.py does, with its first layers only and a new head."""
    model = clinora.load_model(
        base, num_labels=labels, dtype=compute_dtype(device), quantize=quantize
    ).to(device)
    if layers is not None:
        del model.model.layers[layers:]
    if adapt:
        torch.manual_seed(0)
        clinora.apply_lora(model, LORA)
    return model


def their_model(
    base: str,
    labels: int,
    layers: int | None = None,
    adapt: bool = True,
    device: torch.device = CPU,
) -> nn.Module:
    """Load the same model with Transformers, and wrap it with PEFT."""
    import peft
    import transformers

    changes = {}
    if layers is not None:
        changes["num_hidden_layers"] = layers
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        find_base(base).folder,
        num_labels=labels,
        dtype=compute_dtype(device),
        pad_token_id=0,  # "<unk>", which occurs in no note
        **changes,
    ).to(device)
    if not adapt:
        return model
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        lora_dropout=LORA.dropout,
        target_modules=list(LORA.targets),
    )
    return peft.get_peft_model(model, config)


Batch = tuple[Tensor, Tensor]  # ids (B, T), lengths (B,)


def our_step(model: nn.Module) -> Callable[..., None]:
    """Make a training step on batches: what train.py computes, without logs and checkpoints."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step(*batches: Batch) -> None:
        for ids, lengths in batches:
            with autocast(ids.device):
                logits = model(ids, lengths)
            _compute_gradient(logits)
        _update(trained, optimizer)

    return step


def their_step(model: nn.Module) -> Callable[..., None]:
    """Make the same step with Transformers and PEFT, under autocast as with the Trainer's bf16."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step(*batches: Batch) -> None:
        for ids, lengths in batches:
            positions = torch.arange(ids.size(1), device=ids.device)
            mask = (positions < lengths[:, None]).long()
            with autocast(ids.device):
                logits = model(input_ids=ids, attention_mask=mask).logits
            _compute_gradient(logits)
        _update(trained, optimizer)

    return step


def _compute_gradient(logits: Tensor) -> None:
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    F.cross_entropy(logits.float(), labels, reduction="sum").backward()


def _update(trained: list, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_ours(
    classifier: clinora.Classifier, notes: Sequence[Note], steps: int, batch: int, rate: float
) -> tuple[int, float]:
    """Train with ``clinora.training.train``; give the number of notes that it saw, and seconds."""
    from clinora.report import read_steps
    from clinora.training import METRICS, TrainingConfig, train

    config = TrainingConfig(steps=steps, notes_per_step=batch, learning_rate=rate)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        train(classifier, notes, [], config, Path(folder))
        seconds = time.perf_counter() - began
        points = read_steps(Path(folder, METRICS))
    return sum(point["notes"] for point in points), seconds


def random_groups(ids: Sequence[Sequence[int]], notes: int) -> list[list[Sequence[int]]]:
    """Draw the notes of each step at random; the last step has what is left."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [ids[i] for i in order]
    return [shuffled[start : start + notes] for start in range(0, len(ids), notes)]


def our_batches(notes: Sequence[Sequence[int]]) -> list[Batch]:
    """Divide the notes of a step as train.py does: into batches of similar length."""
    from clinora.training import TrainingConfig

    cpu = torch.device("cpu")
    groups = group_by_length([len(note) for note in notes], TrainingConfig().tokens_per_batch, cpu)
    return [pad([notes[i] for i in group], cpu) for group in groups]


def their_batches(notes: Sequence[Sequence[int]]) -> list[Batch]:
    """Batch the notes of a step as the Trainer does: together, padded to the longest."""
    return [pad(notes, torch.device("cpu"))]


def equal_batch(notes: int, tokens: int, vocabulary: int, device: torch.device = CPU) -> Batch:
    """Draw a batch of random ids without padding."""
    ids = torch.randint(3, vocabulary, (notes, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(device), torch.full((notes,), tokens, device=device)


# --- matrix products ----------------------------------------------------------------------------


class Products:
    """The matrix products of a model's linear layers in one forward (and backward) pass.

    They are recorded from a run and can be computed again alone. They use the model's own weights,
    so that the caches behave as in the model. Attention's products are not included.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object], backward: bool) -> None:
        self.forward: list[tuple[Tensor, int]] = []  # weight, rows
        self.backward: list[tuple[Tensor, int]] = []
        hooks = []
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(self._record))
        run()
        for hook in hooks:
            hook.remove()
        if not backward:
            self.backward.clear()

    def _record(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows = output.numel() // output.size(-1)
        self.forward.append((module.weight.detach(), rows))
        if inputs[0].requires_grad:
            self.backward.append((module.weight.detach(), rows))

    @property
    def flops(self) -> int:
        """Floating-point operations of all products; a multiply-add counts as 2."""
        return sum(2 * rows * weight.numel() for weight, rows in self.forward + self.backward)

    def compute(self) -> None:
        """Compute all products, on random inputs."""
        inputs: dict[tuple, Tensor] = {}

        def random_input(rows: int, width: int, dtype: torch.dtype) -> Tensor:
            key = (rows, width, dtype)
            if key not in inputs:
                inputs[key] = torch.randn(rows, width).to(dtype)
            return inputs[key]

        with torch.inference_mode():
            for weight, rows in self.forward:
                F.linear(random_input(rows, weight.size(1), weight.dtype), weight)
            for weight, rows in self.backward:
                random_input(rows, weight.size(0), weight.dtype) @ weight


# --- separate processes -------------------------------------------------------------------------


def peak_bytes() -> int:
    """Read this process's peak memory in bytes: the kernel's VmHWM."""
    status = Path("/proc/self/status").read_text()
    (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    _, kilobytes, _ = peak.split()
    return 1024 * int(kilobytes)


def words_of(args: argparse.Namespace, *without: str) -> list[str]:
    """Format the options as words of a command; those in ``without`` or not given are left out."""
    words = []
    for name, value in vars(args).items():
        if name not in without and value is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    return words


def in_own_process(module: str, *words: str) -> dict:
    """Run ``python -m module words`` and read the JSON on its last line."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(line: str) -> float:
    """Time a line of Python in a new process, without the start of the interpreter."""
    code = f"import time; t = time.perf_counter(); {line}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
