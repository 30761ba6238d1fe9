"""Write a base of random weights at the exact shape of TinyLlama or SmolLM2-135M, in bfloat16.

    python -m benchmarks.shape tinyllama FOLDER [--tokenizer tokenizer.model]    # 2.2 GB
    python -m benchmarks.shape smollm2 FOLDER                                    # 0.3 GB

Speed and memory do not depend on the values of the weights. Accuracy does, so it cannot be measured
with this base.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from clinora.llama import LlamaConfig, LlamaForCausalLM

SHAPES = {
    # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0 at revision fe8a4ea1.
    "tinyllama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    # The shape of HuggingFaceTB/SmolLM2-135M-Instruct.
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
}


def write_base(shape: str, folder: Path, tokenizer: Path | None = None, seed: int = 0) -> None:
    """Write config.json, model.safetensors and a copy of the tokenizer's file, if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / f"tokenizer{tokenizer.suffix}")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json(folder / "config.json"))
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in model.state_dict().items():
        weight = torch.empty(tensor.shape, dtype=torch.bfloat16)
        if "norm" in name:
            weight.fill_(1)
        else:
            weight.normal_(0, 0.02, generator=draw)
        weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    """Write the folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES, help="the model whose shape to write")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.model or tokenizer.json to copy there"
    )
    args = parser.parse_args(argv)
    write_base(args.shape, args.folder, args.tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
