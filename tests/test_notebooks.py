"""The course: committed with what it printed and drew, and running from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A cell of Markdown that shows an answer when a reader unfolds it.
ANSWER = r"<details>\n<summary>Answer</summary>\n\n```python\n(?P<code>.+?)\n```\n\n.*</details>"
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


def test_the_course_has_seven_chapters():
    assert [path.stem[:3] for path in CHAPTERS] == [f"{n:02}_" for n in range(1, 8)]


@each_chapter
def test_a_chapter_tells_what_it_teaches_what_it_needs_and_where_to_go_on(path):
    cells = read(path).cells
    assert re.match(r"# \d · .+\?\n", cells[0].source)
    assert "**After this chapter you can**" in cells[0].source
    assert "**You should know**" in cells[0].source
    place = CHAPTERS.index(path)
    neighbours = CHAPTERS[max(0, place - 1) : place] + CHAPTERS[place + 1 : place + 2]
    assert re.findall(r"\((.+?)\)", cells[-1].source) == [other.name for other in neighbours]


@each_chapter
def test_a_chapter_installs_the_library_first(path):
    assert "%pip install" in code_cells(read(path))[0].source


@each_chapter
def test_a_chapter_leaves_the_memory_allocator_alone(path):
    assert "keep_freed_memory" not in path.read_text()


def exercises_of(notebook):
    """The exercises of a chapter: the question, the blank, and the code of the folded answer."""
    cells = notebook.cells
    (start,) = [i for i, cell in enumerate(cells) if "## Exercises" in cell.source]
    rest = cells[start + 1 : -1]  # the last cell leads to the other chapters
    folded = [re.fullmatch(ANSWER, cell.source, re.DOTALL) for cell in rest[2::3]]
    return list(zip(rest[::3], rest[1::3], [match["code"] for match in folded], strict=True))


@each_chapter
def test_an_exercise_is_a_question_a_blank_that_is_checked_and_a_folded_answer(path):
    exercises = exercises_of(read(path))
    assert len(exercises) >= 3
    for number, (question, blank, answer) in enumerate(exercises, start=1):
        assert question.source.startswith(f"**{number}.** ")
        called = f'check("{path.stem[1]}.{number}", '
        assert "..." in blank.source and called in blank.source and called in answer
        assert [output.text for output in blank.outputs] == ["Not yet\n"]


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
def test_a_chapter_runs_says_what_it_said_and_its_answers_are_correct(path):
    committed, now = read(path), read(path)
    for cell in code_cells(now):
        cell.outputs = []
    answers = {blank.id: nbformat.v4.new_code_cell(code) for _, blank, code in exercises_of(now)}
    whole = read(path)
    whole.cells = []
    for cell in now.cells:
        whole.cells.append(cell)
        if cell.id in answers:
            whole.cells.append(answers[cell.id])
    client = NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()  # raises where a cell does
    for answer in answers.values():
        assert "".join(output.text for output in answer.outputs).endswith("Correct\n")
    assert printed(now) == printed(committed)
    assert drawn(now) == drawn(committed)
