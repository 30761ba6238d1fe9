"""What a built wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_holds_the_package_with_all_that_is_bundled(tmp_path):
    """Built from a copy, as a build leaves folders in the tree that a later one would pick up."""
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "clinora", copy / "clinora", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", str(copy), "-w", tmp_path], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("clinora/")}
    files = {p.relative_to(copy).as_posix() for p in (copy / "clinora").rglob("*") if p.is_file()}
    assert {"clinora/bundled/notes.csv", "clinora/bundled/base/model.safetensors"} <= files
    assert packed == files
