"""TinyLlama's exact shape, with random weights: what it takes to load and to train a step."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from benchmarks.shape import write_base
from clinora.device import choose_dtype

pytestmark = pytest.mark.slow

# Of the file on the Hub, at revision fe8a4ea1.
HUB_BYTES, HUB_TENSORS = 2_200_119_864, 201
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinyllama")
    write_base("tinyllama", folder)
    yield folder
    (folder / "model.safetensors").unlink()  # pytest would keep it for three sessions


def peak_bytes(code: str) -> int:
    """Run code in a process of its own and give the most memory that it held, in bytes.

    The kernel's high-water mark of the process; a child's ru_maxrss would start at its parent's.
    """
    code += """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def test_the_file_has_the_size_and_tensors_of_the_hubs(folder):
    path = folder / "model.safetensors"
    assert path.stat().st_size == HUB_BYTES
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert len(names) == HUB_TENSORS
    assert {"model.embed_tokens.weight", "model.layers.21.mlp.down_proj.weight"} <= names


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_takes_little_more_than_the_file(folder):
    code = f"""
import torch, clinora
model = clinora.load_model({str(folder)!r}, num_labels=5)
for p in model.parameters():  # the map is lazy: read every page
    p.detach().view(-1).view(torch.uint8)[::4096].sum()
"""
    assert peak_bytes(code) <= 1.15 * HUB_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.skipif(
    choose_dtype(torch.device("cpu")) != torch.bfloat16,
    reason="this CPU has no bfloat16: the step's products would take a quarter of an hour",
)
def test_a_training_step_on_512_tokens_runs_in_under_5_gib(folder):
    code = f"""
import torch, clinora
model = clinora.load_model({str(folder)!r}, num_labels=5, dtype=torch.bfloat16).train()
clinora.apply_lora(model, clinora.LoRAConfig())
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(32000, (1, 512), generator=torch.Generator().manual_seed(0))
with torch.autocast("cpu", torch.bfloat16):
    logits = model(ids, torch.tensor([512]))
torch.nn.functional.cross_entropy(logits.float(), torch.tensor([3])).backward()
optimizer.step()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""
    assert peak_bytes(code) < 5 * GIB
