"""The base's training loop.

Muon trains the matrices, and AdamW the embedding and the norms, all on float32 master weights. The
forward and backward passes compute in bfloat16, except for the embedding, whose gradient sums many
rows.

Shapes: B windows, T tokens, D width, V vocabulary.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clinora.checkpoint import write_atomically
from clinora.llama import LlamaForCausalLM
from clinora.resume import State, hash_state

# The tokens of a window, and the share of the training at which the stage ends. Training starts
# with short windows because attention costs less in them.
STAGES = ((512, 0.8), (1024, 1.0))
HELD_OUT_WINDOWS = 32  # at most, with the length of the first stage
# The head computes the logits of this many tokens at a time: few enough for the caches of a CPU,
# and many for a GPU, to need few launches.
HEAD_TOKENS = 1024
HEAD_TOKENS_CUDA = 8192
LOSS_EVERY = 50  # steps
CHECKPOINT_EVERY = 100  # steps


def windows(ids: np.ndarray, length: int, count: int, seed: int) -> Iterator[Tensor]:
    """Cut the stream into windows and yield them in random order, without end.

    At the end of an epoch, fewer than ``count`` remaining windows are left out.

    Yields:
        (count, length + 1) token ids.

    Raises:
        ValueError: There are fewer windows than ``count``.
    """
    starts = np.arange(0, len(ids) - length, length)
    if len(starts) < count:
        raise ValueError(f"{len(ids):,} tokens make {len(starts)} windows of {length}, not {count}")
    draw = np.random.default_rng((seed, length))
    while True:
        order = draw.permutation(starts)
        for i in range(0, len(order) - count + 1, count):
            rows = [ids[start : start + length + 1] for start in order[i : i + count]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_windows(unseen: np.ndarray) -> int:
    """Count the windows that the held-out loss is measured on."""
    return min(HELD_OUT_WINDOWS, (len(unseen) - 1) // STAGES[0][0])


def batches(ids: np.ndarray, steps: int, tokens: int, seed: int, done: int) -> Iterator[Tensor]:
    """Yield the windows of all stages, without those of the first ``done`` steps."""
    begin = 0
    for length, share in STAGES:
        end = round(steps * share)
        windows_of_stage = windows(ids, length, tokens // length, seed)
        for step in range(begin, end):
            window = next(windows_of_stage)
            if step >= done:
                yield window
        begin = end


def learn(model: LlamaForCausalLM, window: Tensor, backward: bool) -> float:
    """Compute the mean cross-entropy of the next token, in nats, for windows (B, T + 1).

    All logits together, (B·T, V) float32, would be the largest tensor. So the logits and their
    gradient are computed for a part of the tokens at a time.

    Args:
        model: The base.
        window: (B, T + 1) token ids.
        backward: Whether to compute the gradients of the parameters, too.
    """
    size = HEAD_TOKENS_CUDA if window.device.type == "cuda" else HEAD_TOKENS
    ids = window[:, :-1]
    targets = window[:, 1:].flatten()
    table = model.model.embed_tokens.weight
    hidden = model.model(ids).flatten(0, 1)  # (B·T, D)
    head_input = hidden.detach().requires_grad_(backward)
    # The sum stays on the device: .item() in every part would wait for the GPU.
    total = torch.zeros((), device=window.device)
    for part, target in zip(head_input.split(size), targets.split(size), strict=True):
        logits = F.linear(part, table.bfloat16()).float()  # (size, V)
        loss = F.cross_entropy(logits, target, reduction="sum") / len(targets)
        if backward:
            loss.backward()
        total += loss.detach()
    if backward:
        hidden.backward(head_input.grad)
    return total.item()


def pretrain(
    model: LlamaForCausalLM,
    ids: np.ndarray,
    unseen: np.ndarray,
    *,
    steps: int,
    tokens: int,
    lr: float,
    seed: int,
    folder: Path,
    resume: bool,
) -> list[dict]:
    """Train for some steps of ``tokens`` tokens: warm-up over 5%, then linear decay to 0.

    Leaves the model in bfloat16. Checkpoints are written into ``folder``.

    Returns:
        A dictionary for every ``LOSS_EVERY`` steps and for the last step: step, tokens, loss and
        held-out loss (nats), seconds.

    Raises:
        CheckpointError: The checkpoint belongs to another training.
        FloatingPointError: The loss is not finite.
    """
    device = next(model.parameters()).device
    masters = {}
    for name, parameter in model.named_parameters():
        masters[name] = nn.Parameter(parameter.detach().clone())
    model.bfloat16()
    model.model.embed_tokens.float()
    cast = model.model.embed_tokens.register_forward_hook(_to_bfloat16)
    optimizers = _make_optimizers(masters, lr)
    identity = {
        "shape": dataclasses.asdict(model.model.config),
        "ids": hash_state("", {"ids": torch.from_numpy(ids.astype(np.int32))}),
        "device": device.type,
        "training": {"steps": steps, "tokens": tokens, "lr": lr, "seed": seed, "stages": STAGES},
    }
    state = State(folder, masters, optimizers, torch.amp.GradScaler(enabled=False), identity)
    curve_file = folder / "curve.json"
    curve = []
    if resume:
        state.load()
        if state.step > 0:
            points = json.loads(curve_file.read_text())
            curve = [point for point in points if point["step"] <= state.step]

    _round_masters(model, masters)
    held_out = next(windows(unseen, STAGES[0][0], held_out_windows(unseen), seed=0))
    bar = tqdm(
        total=steps * tokens, initial=state.step * tokens, unit="token", unit_scale=True,
        desc="pretraining",
    )  # fmt: skip
    for window in batches(ids, steps, tokens, seed, state.step):
        step = state.step + 1
        _set_learning_rate(optimizers, lr * _learning_rate_factor(step, steps))
        loss = learn(model, window.to(device), backward=True)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: try a lower --lr")
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _round_masters(model, masters)
        state.step = step
        bar.update(tokens)
        if step % LOSS_EVERY == 0 or step == steps:
            with torch.no_grad():
                validation = learn(model, held_out.to(device), backward=False)
            curve.append(
                {"step": step, "tokens": step * tokens, "loss": round(loss, 4),
                 "held_out": round(validation, 4), "seconds": round(state.elapsed(), 1)}
            )  # fmt: skip
            bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{validation:.3f}")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(curve_file, json.dumps(curve).encode())
            state.save()
    bar.close()
    cast.remove()
    model.bfloat16()
    return curve


def _to_bfloat16(_module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
    return embedded.bfloat16()


def _make_optimizers(
    masters: dict[str, nn.Parameter], lr: float
) -> Sequence[torch.optim.Optimizer]:
    """Make Muon for the matrices and AdamW for the embedding and the norms."""
    matrices = []
    rest = []
    for name, parameter in masters.items():
        if parameter.ndim == 2 and "embed" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def _round_masters(model: LlamaForCausalLM, masters: dict[str, nn.Parameter]) -> None:
    """Copy the masters into the model, rounded to its dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(masters[name])


def _learning_rate_factor(step: int, steps: int) -> float:
    """Give the share of the peak at a step, counted from 1: warm-up, then linear decay."""
    warmup = max(1, steps // 20)
    return min(step / warmup, (steps - step + 1) / (steps - warmup + 1))


def _set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def matmul_rate(device: torch.device, size: int | None = None) -> float:
    """Measure the machine's rate for bfloat16 products of size × size, in operations per second.

    The default size is large enough to use the whole machine.
    """
    if size is None:
        size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).bfloat16()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
