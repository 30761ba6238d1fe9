"""What is installed: the wheel and its command, what it needs, and what importing does."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import clinora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clinora"
PIP_OPTIONS = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


def copy_of_the_project(folder: Path) -> Path:
    """Copy what a build needs; it leaves folders in its tree that a later build would take up."""
    folder.mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "clinora", ignore=skipped)
    return folder


def install(environment: Path, *what: str | Path) -> Path:
    """Install into a new virtual environment that has the packages of this one; gives its bin."""
    venv.create(environment)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    scripts = Path(sysconfig.get_path("scripts", "venv", paths))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = shutil.which("python", path=scripts)
    command = [sys.executable, "-m", "pip", "--python", python, "install", *PIP_OPTIONS]
    subprocess.run([*command, *what], check=True)
    return scripts


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end; gives what it printed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    copy = copy_of_the_project(folder / "copy")
    command = [sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, str(copy), "-w", str(folder)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


# --- the wheel ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_holds_the_package_with_all_that_is_bundled(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("clinora/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"clinora/bundled/notes.csv", "clinora/bundled/base/model.safetensors"} <= files
    assert "clinora/py.typed" in files
    assert packed == files


@pytest.mark.slow
def test_the_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name.split("-")[1] == clinora.__version__


@pytest.mark.slow
def test_the_installed_command_trains_measures_and_counts(wheel, tmp_path):
    scripts = install(tmp_path / "environment", wheel)
    python = shutil.which("python", path=scripts)
    command = shutil.which("clinora", path=scripts)
    work = tmp_path / "work"
    work.mkdir()
    place = call(python, "-c", "import clinora; print(clinora.__file__)", cwd=work)
    assert Path(place).is_relative_to(tmp_path / "environment")

    words = {"Heart": "cardiac", "Bone": "fracture"}
    rows = [f"visit {i}: {word},{label}" for i in range(30) for label, word in words.items()]
    notes = "\n".join(["transcription,medical_specialty", *rows]) + "\n"
    (work / "notes.csv").write_text(notes)
    call(command, "train", "--steps", "2", "--notes", "notes.csv", "--run", "run", cwd=work)
    shutil.rmtree(work / "run" / "report")
    call(command, "eval", "--run", "run", cwd=work)
    report = json.loads((work / "run" / "report" / "metrics.json").read_text())
    assert report["labels"] == ["Bone", "Heart"]

    shutil.copy(PACKAGE / "bundled" / "base" / "config.json", work)
    options = ["config.json", "--rank", "3"]
    printed = call(command, "budget", *options, cwd=work)
    assert "LoRA r=3" in printed
    assert call(python, "-m", "clinora", "budget", *options, cwd=work) == printed
    assert call(python, "-m", "clinora.budget", *options, cwd=work) == printed


@pytest.mark.slow
def test_beside_a_clone_named_clinora_the_package_is_found(tmp_path):
    """Python takes the clone's folder for a namespace package unless a path has a regular one."""
    clone = copy_of_the_project(tmp_path / "clinora")
    scripts = install(tmp_path / "environment", "--editable", clone)
    python = shutil.which("python", path=scripts)
    place = call(python, "-c", "import clinora; print(clinora.__file__)", cwd=tmp_path).strip()
    assert Path(place) == clone / "clinora" / "__init__.py"


# --- what it needs --------------------------------------------------------------------------------


def imported_roots(folder: Path) -> set[str]:
    """Give the first names of all that the modules in a folder import, wherever they do."""
    roots = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.partition(".")[0])
    return roots - set(sys.stdlib_module_names)


def declared(*sections: tuple[str, str]) -> set[str]:
    """Give the names of the distributions that setup.cfg lists, as packaging normalises them."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    names = set()
    for section, option in sections:
        for line in settings[section][option].split("\n"):
            if line and not line.startswith("#"):
                names.add(normalised(line))
    return names


def normalised(requirement: str) -> str:
    name = requirement.replace("=", ">").replace("[", ">").partition(">")[0].strip()
    return name.lower().replace("_", "-")


def undeclared(roots: set[str], names: set[str]) -> set[str]:
    """Give the imports of which no distribution is declared."""
    distributions = packages_distributions()
    return {
        root
        for root in roots
        if not names & {normalised(name) for name in distributions.get(root, [root])}
    }


def test_every_package_that_is_imported_is_declared():
    roots = imported_roots(PACKAGE) - {"clinora"}
    assert {"torch", "gradio", "uvicorn", "sklearn"} <= roots
    # The extras are for what few need; the errors that ask for them are tested with their modules.
    extras = [("options.extras_require", extra) for extra in ("files", "cluster")]
    names = declared(("options", "install_requires"), *extras)
    assert undeclared(roots, names) == set()


@pytest.mark.parametrize("folder", ["tests", "tools", "benchmarks"])
def test_every_package_that_the_clone_imports_is_declared(folder):
    own = {path.stem for path in ROOT.iterdir()} | {path.stem for path in (ROOT / folder).iterdir()}
    names = declared(("options", "install_requires"), ("options.extras_require", "dev"))
    assert undeclared(imported_roots(ROOT / folder) - own, names) == set()


def test_an_undeclared_import_is_found():
    assert undeclared({"torch", "sklearn", "pytest"}, {"torch", "scikit-learn"}) == {"pytest"}


# --- what importing gives and does ----------------------------------------------------------------


def test_every_public_name_is_reachable():
    for name in clinora.__all__:
        assert getattr(clinora, name) is not None
    assert {"train", "TrainingConfig", "testing", "budget", "Classifier"} <= set(clinora.__all__)


def test_what_was_not_yet_used_is_listed_too():
    spec = importlib.util.spec_from_file_location("fresh", PACKAGE / "__init__.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert set(clinora.__all__) <= set(dir(fresh))


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="load_modle"):
        clinora.load_modle  # noqa: B018


def test_editors_are_told_of_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        for alias in node.names:
            module = importlib.import_module(node.module)
            assert alias.asname == alias.name
            assert getattr(clinora, alias.name) is getattr(module, alias.name)
    assert {alias.name for node in imports for alias in node.names} == set(clinora.__all__)


IMPORT_EVERYTHING = """
import importlib, json, os, sys

def state():
    files = sorted(os.path.join(folder, name) for top in sys.argv[1:3]
                   for folder, names, others in os.walk(top) for name in names + others)
    return {"environment": dict(os.environ), "files": files, "folder": os.getcwd()}

libraries, modules = json.load(sys.stdin)
for name in libraries:  # what these do when they are imported is theirs
    importlib.import_module(name)
before = state()
for name in modules:
    importlib.import_module(name)
assert "clinora.serving.app" in sys.modules
print(json.dumps([before, state()]))
"""


@pytest.mark.slow
def test_importing_makes_no_file_and_sets_no_variable(tmp_path):
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts).removesuffix(".__init__"))
    libraries = sorted(imported_roots(PACKAGE) - {"clinora", "ray"})  # ray is rarely installed
    libraries += ["matplotlib.figure", "sklearn.linear_model", "safetensors.torch"]
    environment = os.environ | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, home, work],
        input=json.dumps([libraries, modules]),
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after == before
