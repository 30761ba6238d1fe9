"""The course: committed with what it printed and drew, and running from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What each cell printed, without its numbers: those that must hold are asserted there."""
    texts = [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in code_cells(notebook)
    ]
    return [re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?%?", "#", text).split() for text in texts]


def drawn(notebook):
    """How many pictures each cell drew."""
    return [
        sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in code_cells(notebook)
    ]


def test_the_course_has_six_chapters():
    assert [path.stem[:3] for path in CHAPTERS] == [f"{n:02}_" for n in range(1, 7)]


@each_chapter
def test_a_chapter_begins_with_a_question_and_ends_with_checked_exercises(path):
    cells = read(path).cells
    assert re.match(r"# \d · .+\?\n", cells[0].source)
    (start,) = [i for i, cell in enumerate(cells) if "## Exercises" in cell.source]
    questions, answers = cells[start::2], cells[start + 1 :: 2]
    assert len(questions) == len(answers) >= 3
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        assert f"**{number}.**" in question.source
        assert answer.metadata["tags"] == ["answer"]
        assert answer.metadata["jupyter"]["source_hidden"]
        assert "assert" in answer.source


@each_chapter
def test_a_chapter_is_committed_as_it_ran(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|usr)/", path.read_text())


@pytest.mark.slow
@each_chapter
def test_a_chapter_runs_and_says_what_it_said(path):
    committed, now = read(path), read(path)
    for cell in code_cells(now):
        cell.outputs = []
    client = NotebookClient(now, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()  # raises where a cell does, such as a false answer
    assert printed(now) == printed(committed)
    assert drawn(now) == drawn(committed)
