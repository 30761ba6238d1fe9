"""Turn a Llama in a GGUF file into a folder in the Hub's layout, which ``--base`` takes.

    python -m tools.gguf_to_hub tinyllama.Q8_0.gguf bases/tinyllama

The folder gets config.json, model.safetensors and tokenizer.json or tokenizer.model. Quantised
weights are dequantised. The weights have the narrowest dtype that holds all of them exactly, so
the conversion loses nothing. For a quantised file that is float32: a float16 scale, of 11
significant bits, times an integer needs more bits than float16 or bfloat16 have. ``--bfloat16``
rounds, and halves such a folder.
"""

import argparse
import dataclasses
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from clinora.checkpoint import WEIGHTS, CheckpointError, check_tensors, write_atomically
from clinora.files import START_BYTES, recognise
from clinora.llama import LlamaConfig, LlamaForCausalLM, RopeScaling, scale_frequencies
from tools.gguf_tokenizer import tokenizer_files

# The names of the modules, in GGUF and on the Hub.
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the inverse frequencies; not a parameter

# A GGUF file holds the factors that follow from these values, but not the values themselves.
# Every Llama 3.1, 3.2 and 3.3 has these.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def import_gguf() -> ModuleType:
    """Import the package gguf.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "the package gguf is not installed: pip install -c constraints.txt -e '.[gguf]'"
        ) from None
    return gguf


# --- Reading ------------------------------------------------------------------------------------


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the metadata and the tensors of a GGUF file.

    Returns:
        The metadata's values by key, and the tensors of the ``gguf`` package by name. Their data
        is mapped from the file.

    Raises:
        CheckpointError: It is not a complete GGUF file, or a tensor's quantisation is unknown.
        OSError: The file cannot be read.
    """
    gguf = import_gguf()
    with file.open("rb") as stream:
        start = stream.read(START_BYTES)
    kind = recognise(start)
    if kind is not None:
        raise CheckpointError(f"{file} {kind}")
    if not start.startswith(b"GGUF"):
        raise CheckpointError(f"{file} is not a GGUF file")
    try:
        reader = gguf.GGUFReader(file)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # of many kinds: the reader does not check where the file ends
        unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if unknown:
            raise CheckpointError(
                f"{file} has a tensor of quantisation type {unknown[1]}, which is unknown"
            ) from None
        raise CheckpointError(f"{file} is truncated or damaged: download it again") from None
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise CheckpointError(f"{file} is big-endian: expected a little-endian file")
    return values, {tensor.name: tensor for tensor in reader.tensors}


def check_architecture(values: dict[str, Any], file: Path) -> None:
    """Check that a file holds a whole model, of an architecture that Clinora computes.

    Raises:
        CheckpointError: It does not.
    """
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file} has the architecture {architecture!r}: expected 'llama'")
    # Each line: the key, the values that are supported, what any other value means.
    requirements = [
        ("general.type", (None, "model"), "is not a model"),
        ("split.count", (None, 0, 1), "is one part of several: join them first"),
        ("llama.expert_count", (None, 0), "is a mixture of experts, which is not supported"),
        ("llama.rope.scaling.type", (None, "none"), "scales RoPE, which is not supported"),
        # Without a type, llama.cpp scales linearly by the factor.
        ("llama.rope.scaling.factor", (None, 0.0, 1.0), "scales RoPE, which is not supported"),
        ("llama.rope.scale_linear", (None, 0.0, 1.0), "scales RoPE, which is not supported"),
    ]
    for key, supported, otherwise in requirements:
        if values.get(key) not in supported:
            raise CheckpointError(f"{file} {otherwise} ({key} is {values[key]!r})")


# --- Configuration ------------------------------------------------------------------------------


def read_config(values: dict[str, Any], tensors: dict[str, Any], file: Path) -> LlamaConfig:
    """Read a model's shape.

    Raises:
        CheckpointError: A value is missing, or RoPE is not that of a Llama.
        ValueError: Values do not fit together.
    """

    def take(key: str) -> Any:
        if f"llama.{key}" not in values:
            raise CheckpointError(f"{file} lacks llama.{key}")
        return values[f"llama.{key}"]

    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file} has no tensor token_embd.weight")
    heads = take("attention.head_count")
    try:
        config = LlamaConfig(
            vocab_size=hub_shape(tensors["token_embd.weight"])[0],
            hidden_size=take("embedding_length"),
            intermediate_size=take("feed_forward_length"),
            num_hidden_layers=take("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=values.get("llama.attention.head_count_kv", heads),
            head_dim=values.get("llama.attention.key_length"),
            max_position_embeddings=take("context_length"),
            rms_norm_eps=shortest(take("attention.layer_norm_rms_epsilon")),
            rope_theta=shortest(values.get("llama.rope.freq_base", 10_000.0)),
            tie_word_embeddings="output.weight" not in tensors,
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    rotated = values.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise CheckpointError(
            f"{file} rotates {rotated} of {config.head_dim} entries of a head: expected all"
        )
    return config


def shortest(number: float) -> float:
    """Give a float32 as the number with the fewest digits that rounds to it: 1e-05."""
    return float(str(np.float32(number)))


def hub_shape(tensor: Any) -> tuple[int, ...]:
    """Give the shape of a tensor of the ``gguf`` package as PyTorch orders it."""
    return tuple(int(size) for size in reversed(tensor.shape))


def config_json(
    config: LlamaConfig, values: dict[str, Any], scaling: RopeScaling | None, dtype: torch.dtype
) -> bytes:
    """Give the content of ``config.json``."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        **dataclasses.asdict(config),
        "rope_scaling": None,
    }
    if scaling is not None:
        content["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    for name in ("bos_token_id", "eos_token_id"):
        content[name] = values.get(f"tokenizer.ggml.{name}")
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def recover_scaling(tensors: dict[str, Any], config: LlamaConfig, file: Path) -> RopeScaling | None:
    """Find the ``rope_scaling`` from which a file's factors follow; None if it scales nothing.

    Raises:
        CheckpointError: They do not follow from the values that Llama 3 has.
    """
    if ROPE_FACTORS not in tensors:
        return None
    factors = torch.tensor(tensors[ROPE_FACTORS].data)
    exponents = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    frequencies = config.rope_theta**-exponents  # (E/2,)
    if factors.shape == frequencies.shape:
        if torch.all(factors == 1):
            return None
        if factors[-1] > 1:
            scaling = RopeScaling(factor=factors[-1].item(), **LLAMA3_SCALING)
            expected = frequencies / scale_frequencies(frequencies, scaling)
            if torch.allclose(factors.double(), expected, rtol=1e-4, atol=0):
                return scaling
    raise CheckpointError(
        f"{file}: the factors in {ROPE_FACTORS} do not follow from the RoPE scaling of Llama 3 "
        f"({', '.join(f'{name} {value}' for name, value in LLAMA3_SCALING.items())}); no other "
        "is supported"
    )


# --- Weights ------------------------------------------------------------------------------------


def hub_name(name: str) -> str:
    """Give a parameter's name on the Hub; a name that is unknown stays."""
    in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if in_layer and in_layer[2] in LAYER_MODULES:
        return f"model.layers.{in_layer[1]}.{LAYER_MODULES[in_layer[2]]}.weight"
    module = name.removesuffix(".weight")
    return f"{MODULES[module]}.weight" if module in MODULES else name


def check_parameters(tensors: dict[str, Any], config: LlamaConfig, file: Path) -> None:
    """Check that the tensors, by their names on the Hub, are exactly a model's parameters.

    Raises:
        CheckpointError: They are not.
    """
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
        found = {name: torch.empty(hub_shape(tensor)) for name, tensor in tensors.items()}
    check_tensors(found, expected, f"the tensors in {file}")


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back in the Hub's order.

    RoPE rotates pairs of entries of each head. llama.cpp stores the two of a pair side by side; on
    the Hub they are half a head apart.

    Args:
        rows: (heads · E, D).
        heads: The number of query heads, or of key heads.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # (heads, E/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def dequantised(
    tensors: dict[str, Any], config: LlamaConfig, file: Path
) -> Iterator[tuple[str, Tensor]]:
    """Give each parameter's name and its values in float32, one after the other.

    Raises:
        CheckpointError: The ``gguf`` package cannot dequantise a tensor.
    """
    gguf = import_gguf()
    for name, tensor in tensors.items():
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{file}: {tensor.name} has the quantisation {tensor.tensor_type.name}, which "
                "cannot be dequantised"
            ) from None
        if name.endswith("q_proj.weight"):
            array = halves_from_pairs(array, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            array = halves_from_pairs(array, config.num_key_value_heads)
        yield name, torch.from_numpy(np.array(array, dtype=np.float32))


def narrowest_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Give bfloat16 or float16 if it holds all values of float32 tensors exactly, else float32."""
    fitting = [torch.bfloat16, torch.float16]
    for tensor in parameters:
        fitting = [dtype for dtype in fitting if torch.equal(tensor.to(dtype).float(), tensor)]
        if not fitting:
            return torch.float32
    return fitting[0]


# --- The folder ---------------------------------------------------------------------------------


def convert(file: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer of a GGUF file into a folder.

    Args:
        file: The GGUF file.
        folder: A folder that exists.
        dtype: Dtype of the weights; None: the narrowest that holds all of them exactly.

    Raises:
        CheckpointError: The file is damaged, or holds something that is not supported.
        ValueError: Sizes in the file do not fit together.
        OSError: The file cannot be read, or the folder cannot be written.
    """
    values, tensors = read_gguf(file)
    check_architecture(values, file)
    config = read_config(values, tensors, file)
    parameters = {hub_name(name): tensors[name] for name in tensors if name != ROPE_FACTORS}
    check_parameters(parameters, config, file)
    scaling = recover_scaling(tensors, config, file)
    tokenizer = tokenizer_files(values, config.vocab_size, file)
    if dtype is None:
        dtype = narrowest_dtype(tensor for _, tensor in dequantised(parameters, config, file))
    weights = {}
    converted = dequantised(parameters, config, file)
    for name, tensor in tqdm(converted, desc="tensors", total=len(parameters), disable=None):
        weights[name] = tensor.to(dtype)
    write_atomically(folder / "config.json", config_json(config, values, scaling, dtype))
    for name, content in tokenizer.items():
        write_atomically(folder / name, content)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    # save_file lets only the owner read the file, and does not wait until it is on the disk.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that is complete or absent: give a temporary one, and rename it at the end.

    Raises:
        CheckpointError: There is a file or a folder with files at ``path``.
        OSError: The folder cannot be written.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already: expected a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, help="a GGUF file that holds a Llama")
    add("folder", type=Path, help="a new or an empty folder")
    add("--bfloat16", action="store_true", help="round the weights to bfloat16")
    args = parser.parse_args(argv)
    try:
        with new_folder(args.folder) as folder:
            convert(args.file, folder, torch.bfloat16 if args.bfloat16 else None)
    except (OSError, ValueError, SafetensorError) as error:
        parser.exit(2, f"gguf_to_hub.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "gguf_to_hub.py: stopped; nothing was written\n")
    print(f"{args.folder} holds {', '.join(sorted(file.name for file in args.folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
