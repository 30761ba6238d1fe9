"""LoRA and Llama, written by hand, to classify clinical notes.

>>> import clinora
>>> model = clinora.load_model("bundled", num_labels=5)  # or a folder, or a Hub id
>>> _ = clinora.apply_lora(model, clinora.LoRAConfig(rank=8, alpha=16))
>>> count = clinora.count_parameters(model)
>>> print(f"{count.trainable:,} of {count.total:,} parameters are trained")
55,360 of 8,374,400 parameters are trained
>>> classifier = clinora.Classifier.load("bundled")  # or a run's folder
>>> prediction = classifier(["Severe chest pain. ECG shows ST elevation."])[0]
>>> print(prediction.as_text())
Predicted Label: Cardiovascular / Pulmonary

``clinora.train`` fine-tunes a classifier, ``clinora.testing`` has assertions for unit tests, and
``clinora.budget`` counts parameters and bytes without loading a model.

A name is imported when it is first used, so ``import clinora`` does not wait for PyTorch.
"""

import importlib
import itertools
from typing import Any

__version__ = "0.1.0"

# The public names by module. __init__.pyi lists the same names for editors and type checkers.
_NAMES = {
    "adapter": ("load_adapter", "save_adapter"),
    "checkpoint": ("load_model",),
    "classifier": ("Classifier", "Prediction"),
    "combine": ("add_adapters", "load_adapters"),
    "llama": ("Llama", "LlamaConfig", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "lora": (
        "LoRAConfig",
        "LoRALinear",
        "ParameterCount",
        "apply_lora",
        "count_parameters",
        "lora_disabled",
        "lora_parameter_count",
        "lora_state_dict",
        "lora_strength",
        "merge_lora",
        "merged_weight",
    ),
    "notes": ("PUBLISHED_CLASSES", "Note", "Notes", "read_notes"),
    "tokenizer": ("Tokenizer",),
    "training": ("TrainingConfig", "train"),
    "variants": ("DoRAConfig", "OLoRAConfig", "PiSSAConfig"),
}
_MODULES = ("budget", "testing")  # public modules

__all__ = [*_MODULES, *itertools.chain(*_NAMES.values())]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"clinora.{name}")
    for module, names in _NAMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"clinora.{module}"), name)
            globals()[name] = value  # later uses do not call this function
            return value
    raise AttributeError(f"module 'clinora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
