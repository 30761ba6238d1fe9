"""The public names for editors and type checkers: clinora/__init__.py imports them lazily."""

from clinora import budget as budget
from clinora import testing as testing
from clinora.adapter import load_adapter as load_adapter
from clinora.adapter import save_adapter as save_adapter
from clinora.checkpoint import load_model as load_model
from clinora.classifier import Classifier as Classifier
from clinora.classifier import Prediction as Prediction
from clinora.combine import add_adapters as add_adapters
from clinora.combine import load_adapters as load_adapters
from clinora.llama import Llama as Llama
from clinora.llama import LlamaConfig as LlamaConfig
from clinora.llama import LlamaForCausalLM as LlamaForCausalLM
from clinora.llama import LlamaForSequenceClassification as LlamaForSequenceClassification
from clinora.lora import LoRAConfig as LoRAConfig
from clinora.lora import LoRALinear as LoRALinear
from clinora.lora import ParameterCount as ParameterCount
from clinora.lora import apply_lora as apply_lora
from clinora.lora import count_parameters as count_parameters
from clinora.lora import lora_disabled as lora_disabled
from clinora.lora import lora_parameter_count as lora_parameter_count
from clinora.lora import lora_state_dict as lora_state_dict
from clinora.lora import lora_strength as lora_strength
from clinora.lora import merge_lora as merge_lora
from clinora.lora import merged_weight as merged_weight
from clinora.notes import PUBLISHED_CLASSES as PUBLISHED_CLASSES
from clinora.notes import Note as Note
from clinora.notes import Notes as Notes
from clinora.notes import read_notes as read_notes
from clinora.tokenizer import Tokenizer as Tokenizer
from clinora.training import TrainingConfig as TrainingConfig
from clinora.training import train as train
from clinora.variants import DoRAConfig as DoRAConfig
from clinora.variants import OLoRAConfig as OLoRAConfig
from clinora.variants import PiSSAConfig as PiSSAConfig

__version__: str
