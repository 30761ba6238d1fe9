"""A run on disk: what ``clinora.json`` records."""

import dataclasses
import hashlib
import json

from clinora.checkpoint import Source, weights_sha256
from clinora.llama import LlamaConfig

RUN_FILE = "clinora.json"
SCHEMA = 1
# What of a base a run is bound to, by the key of its hash in the run's file.
BOUND = {"sha256": "weights", "tokenizer_sha256": "tokenizer.model", "config_sha256": "config.json"}


def base_hashes(source: Source) -> dict[str, str]:
    """Give the sha256 of a base's weights, tokenizer and configuration: what a run is bound to.

    Of the configuration, it is that of the values: a file written in another way is the same.

    Raises:
        CheckpointError: The folder holds no weights.
        FileNotFoundError: It holds no tokenizer or no configuration.
        ValueError: The configuration is not a Llama's.
    """
    weights = weights_sha256(source.folder)
    tokenizer = (source.folder / "tokenizer.model").read_bytes()
    config = LlamaConfig.from_json(source.folder / "config.json")
    values = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
    hashes = (hashlib.sha256(data).hexdigest() for data in (tokenizer, values))
    return dict(zip(BOUND, (weights, *hashes), strict=True))
