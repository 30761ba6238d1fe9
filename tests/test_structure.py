"""Which module imports which: a reader of one module need only know those before it."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clinora"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Imports run one way: a module may import those on the lines above its own, and those before it
# on its own line.
ORDER = [
    ["kernels", "modules", "targets"],
    ["lora", "llama"],
    ["variants", "quantize", "budget", "testing", "files", "checkpoint", "adapter", "combine"],
    ["tables", "tokenizer", "notes", "device"],
    ["calibration", "outliers", "run", "classifier"],
    ["explain", "baselines", "evaluation"],
    ["resume", "training", "predict", "cluster"],
    ["figures", "report"],
    ["serving"],
    ["commands"],
    ["__main__"],
]
# LoRA works on any model, so neither of these two may know the other.
APART = {"lora", "llama"}
# These five can be read, copied and used without the rest of the package.
HEART = ["kernels", "modules", "targets", "lora", "llama"]


def imports(source: str) -> set[str]:
    """Give the dotted names imported anywhere in a module but where it is run as a script."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_script_part(node)]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def is_script_part(node: ast.stmt) -> bool:
    """Tell whether a statement is ``if __name__ == "__main__": …``."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text())


def may_import(part: str) -> set[str]:
    names = [name for line in ORDER for name in line]
    allowed = set(names[: names.index(part)])
    return allowed - APART if part in APART else allowed


def test_an_import_inside_a_function_or_method_is_seen():
    source = "def f():\n  import a.b\nclass C:\n  async def g(self):\n    from c import d\n"
    assert imports(source) == {"a.b", "c"}


def test_an_import_of_the_script_part_alone_is_not_seen():
    source = "if a:\n  import b\nif __name__ == '__main__':\n  import c\n"
    assert imports(source) == {"b"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    siblings = {n.split(".")[1] for n in imports_of(path) if n.startswith("clinora.")}
    siblings.discard(part)  # inside serving/ and commands/
    assert siblings <= may_import(part)


@pytest.mark.parametrize("name", HEART)
def test_the_heart_needs_torch_and_the_standard_library_alone(name):
    roots = {n.split(".")[0] for n in imports_of(PACKAGE / f"{name}.py")}
    assert roots <= set(sys.stdlib_module_names) | {"torch", "clinora"}
