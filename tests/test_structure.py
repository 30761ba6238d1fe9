"""The house rules that a reader relies on: which module imports which, and how small it stays."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clinora"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Arrows run one way: a module may import those that stand before it.
ORDER = [
    "lora",
    "llama",
    "budget",
    "tokenizer",
    "testing",
    "notes",
    "checkpoint",
    "classifier",
    "explain",
    "evaluation",
    "resume",
    "training",
    "figures",
    "report",
    "serving",
]
# These stand alone, so that each can be read, copied and used by itself.
ALONE = {"lora", "llama", "budget"}


def imports(source: str, exempt: str | None = None) -> set[str]:
    """Give the dotted names imported anywhere in a module but in the function ``exempt``."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) != exempt]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def imports_of(path: Path) -> set[str]:
    """Read a module's imports; what budget's main, a script, reads with is its own affair."""
    return imports(path.read_text(), exempt="main" if path == PACKAGE / "budget.py" else None)


def lines_of_code(path: Path) -> int:
    """Count lines that hold code: no blank line, comment or docstring."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = set()
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank and token.string:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def test_an_import_inside_a_function_or_method_is_seen():
    source = "def f():\n  import a.b\nclass C:\n  async def g(self):\n    from c import d\n"
    assert imports(source) == {"a.b", "c"}
    assert imports(source, exempt="f") == {"c"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    siblings = {n.split(".")[1] for n in imports_of(path) if n.startswith("clinora.")}
    siblings.discard(part)  # inside serving/
    allowed = set() if part in ALONE | {"tokenizer"} else set(ORDER[: ORDER.index(part)])
    assert siblings <= allowed


@pytest.mark.parametrize("name", sorted(ALONE))
def test_the_heart_needs_torch_and_the_standard_library_alone(name):
    roots = {n.split(".")[0] for n in imports_of(PACKAGE / f"{name}.py")}
    assert roots <= set(sys.stdlib_module_names) | {"torch"}


def test_the_heart_stays_under_450_lines_of_code():
    assert lines_of_code(PACKAGE / "lora.py") + lines_of_code(PACKAGE / "llama.py") < 450
