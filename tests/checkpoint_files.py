"""Helpers for the tests of bases and adapters on disk: edit a file, compare logits."""

import json

import torch
from safetensors.torch import load_file, save_file

IDS = torch.tensor([[1, 5, 9, 30, 42, 7], [1, 8, 3, 0, 0, 0]])
LENGTHS = torch.tensor([6, 3])


def edit_json(path, **changes):
    """Change keys of a JSON file; a key whose new value is ``...`` is removed."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(path, edit):
    """Apply ``edit`` to the dict of a safetensors file's tensors, and write the file again."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reference_logits(model):
    """Give Transformers' logits of IDS; its pooling recognises padding by the token id 0."""
    with torch.no_grad():
        return model(IDS, attention_mask=(IDS != 0).long()).logits


def our_logits(model):
    """Give our logits of IDS, whose rows have LENGTHS tokens."""
    with torch.no_grad():
        return model(IDS, LENGTHS)
