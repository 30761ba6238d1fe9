"""Texts that are no English clinical notes, of several kinds, made without a network.

Sentences of ``other_texts.txt``, source code and manual of the installed Python, headers of
PyTorch, licences of installed packages, and lines that a generator of random numbers makes up.
"""

import json
import random
import string
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

import torch

SENTENCES = Path(__file__).with_name("other_texts.txt")
TEXTS = 40  # of each kind
SERVICES = ("web", "db", "mail", "cron", "auth", "cache", "proxy")
EVENTS = (
    "connection closed by peer", "request finished with status 200", "disk usage at 81%",
    "retry 3 of 5 after timeout", "worker started with pid 4711", "cache miss for key user:93",
    "configuration reloaded", "certificate expires in 12 days", "queue length 0, sleeping",
)  # fmt: skip
FIELDS = ("id", "price", "quantity", "in_stock", "rating", "width", "height", "colour", "url")


def other_texts(seed: int = 0) -> dict[str, list[str]]:
    """Make ``TEXTS`` texts of each kind; the same seed gives the same texts."""
    draw = random.Random(seed)
    kinds = {}
    for kind, sentences in read_sentences().items():
        is_list = kind == "Shopping lists"
        least, most, between = (4, 10, "\n") if is_list else (2, 5, " ")
        kinds[kind] = [
            between.join(draw.sample(sentences, draw.randint(least, most))) for _ in range(TEXTS)
        ]
    kinds["Python code"] = parts_of(python_files(), draw)
    kinds["C++ headers"] = parts_of(headers(), draw)
    kinds["Licences"] = parts_of(licences(), draw)
    kinds["Python's manual"] = parts_of(manual(), draw)
    kinds["Numbers"] = [numbers(draw) for _ in range(TEXTS)]
    kinds["Random letters"] = [random_letters(draw) for _ in range(TEXTS)]
    kinds["Log lines"] = [log_lines(draw) for _ in range(TEXTS)]
    kinds["JSON"] = [json_objects(draw) for _ in range(TEXTS)]
    return kinds


def read_sentences() -> dict[str, list[str]]:
    """Read the sentences of each kind."""
    kinds: dict[str, list[str]] = {}
    for line in SENTENCES.read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            kind = line.removeprefix("= ")
            kinds[kind] = []
        elif line and not line.startswith("#"):
            kinds[kind].append(line)
    return kinds


def parts_of(texts: list[str], draw: random.Random) -> list[str]:
    """Cut a run of 5 to 25 lines out of each of ``TEXTS`` texts."""
    parts = []
    for text in draw.sample(texts, TEXTS):
        lines = text.splitlines()
        size = draw.randint(5, 25)
        begin = draw.randint(0, max(0, len(lines) - size))
        parts.append("\n".join(lines[begin : begin + size]))
    return parts


def python_files() -> list[str]:
    """Give the modules of the standard library that have some hundred lines."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    return [text for text in texts if len(text.splitlines()) > 100]


def headers() -> list[str]:
    """Give the longer headers of PyTorch."""
    folder = Path(torch.__file__).parent / "include" / "torch"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.h"))]
    return [text for text in texts if len(text.splitlines()) > 100]


def manual() -> list[str]:
    """Give the longer chapters of Python's manual, as ``help`` shows them."""
    return [text for text in topics.values() if len(text.splitlines()) > 30]


def licences() -> list[str]:
    """Give the different licences of the installed packages."""
    texts = set()
    for package in distributions():
        for file in package.files or []:
            path = Path(package.locate_file(file))
            if path.name.upper().startswith("LICEN") and path.is_file():
                texts.add(path.read_text(encoding="utf-8", errors="replace"))
    return sorted(text for text in texts if len(text.splitlines()) > 15)


def numbers(draw: random.Random) -> str:
    """Make a table of numbers."""
    columns = draw.randint(2, 6)
    rows = []
    for _ in range(draw.randint(3, 20)):
        rows.append("\t".join(f"{draw.uniform(0, 10_000):.2f}" for _ in range(columns)))
    return "\n".join(rows)


def random_letters(draw: random.Random) -> str:
    """Make words of random letters."""
    words = []
    for _ in range(draw.randint(5, 80)):
        words.append("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 10))))
    return " ".join(words)


def log_lines(draw: random.Random) -> str:
    """Make lines as a server logs them."""
    lines = []
    for _ in range(draw.randint(3, 15)):
        time = (
            f"2024-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}T{draw.randint(10, 23)}:15:07"
        )
        level = draw.choice(("INFO", "WARNING", "ERROR", "DEBUG"))
        place = f"{draw.choice(SERVICES)}-{draw.randint(1, 9)}"
        lines.append(f"{time} {level} [{place}] {draw.choice(EVENTS)}")
    return "\n".join(lines)


def json_objects(draw: random.Random) -> str:
    """Make JSON objects, one a line."""
    lines = []
    for _ in range(draw.randint(2, 10)):
        names = draw.sample(FIELDS, draw.randint(3, 6))
        lines.append(json.dumps({name: draw.randint(0, 999) for name in names}))
    return "\n".join(lines)
