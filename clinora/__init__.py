"""LoRA and Llama written by hand, small and exact, to classify clinical notes."""

from importlib.metadata import version

from clinora.adapter import load_adapter, save_adapter
from clinora.checkpoint import load_model
from clinora.classifier import Classifier, Prediction
from clinora.llama import Llama, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import (
    LoRAConfig,
    LoRALinear,
    ParameterCount,
    apply_lora,
    count_parameters,
    lora_disabled,
    lora_parameter_count,
    lora_state_dict,
    lora_strength,
    merge_lora,
    merged_weight,
)
from clinora.notes import PUBLISHED_CLASSES, Note, Notes, read_notes
from clinora.tokenizer import Tokenizer

__version__ = version("clinora")

__all__ = [
    "PUBLISHED_CLASSES", "Classifier", "Llama", "LlamaConfig", "LlamaForCausalLM",
    "LlamaForSequenceClassification", "LoRAConfig", "LoRALinear", "Note", "Notes",
    "ParameterCount", "Prediction", "Tokenizer", "apply_lora", "count_parameters", "load_adapter",
    "load_model", "lora_disabled", "lora_parameter_count", "lora_state_dict", "lora_strength",
    "merge_lora", "merged_weight", "read_notes", "save_adapter",
]  # fmt: skip
