"""Course copies: students see no solution, solutions paste back, and nothing else changes."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from oodlib.errors import OodlibError
from oodlib.suite import course
from oodlib.suite.notebooks import list_notebooks

EXERCISE = '''def double(x: float) -> float:
    """Return twice x."""
    # hint: add it to itself
    # BEGIN SOLUTION
    secret = x + x
    return secret
    # END SOLUTION'''


def made_notebook() -> dict[str, Any]:
    cells = [
        new_markdown_cell("# Title\n\nProse."),
        new_code_cell("import math", metadata={"tags": ["core"]}),
        new_code_cell(EXERCISE, metadata={"tags": ["core", "exercise:toy-1"]}),
        new_code_cell("assert double(2) == 4", metadata={"tags": ["core", "check:toy-1"]}),
        new_code_cell("key = 'for the teacher'", metadata={"tags": ["instructor"]}),
        new_code_cell("more = math.pi", metadata={"tags": ["appendix"]}),
    ]
    return json.loads(json.dumps(new_notebook(cells=cells)))


def notebooks() -> list[Any]:
    return [
        pytest.param(made_notebook(), id="made"),
        *[
            pytest.param(json.loads(path.read_text(encoding="utf-8")), id=path.stem)
            for path in list_notebooks()
        ],
    ]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def exercises(notebook: dict[str, Any]) -> dict[str, str]:
    return {name: source(cell) for cell in notebook["cells"] if (name := course.exercise_of(cell))}


def solutions(text: str) -> list[str]:
    """The texts of the solution regions, in order."""
    regions = re.findall(r"# BEGIN SOLUTION\n(.*?)\n *# END SOLUTION", text, re.DOTALL)
    assert len(regions) == text.count("BEGIN SOLUTION")
    return regions


def signatures(text: str) -> list[str]:
    """The headers of functions and classes in a cell."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            found.append(f"def {node.name}({ast.unparse(node.args)})")
        elif isinstance(node, ast.ClassDef):
            found.append(f"class {node.name}")
    return sorted(found)


def run_cells(notebook: dict[str, Any]) -> list[Exception]:
    space: dict[str, Any] = {}
    errors = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            try:
                exec(compile(source(cell), "<cell>", "exec"), space)
            except Exception as error:
                errors.append(error)
    return errors


def test_the_solved_copy_runs_and_the_student_copy_fails_only_where_open() -> None:
    assert run_cells(course.solution_copy(made_notebook())) == []
    errors = run_cells(course.student_copy(made_notebook()))
    assert [(type(error), str(error)) for error in errors] == [(NotImplementedError, "toy-1")]


def test_what_each_copy_holds() -> None:
    def code(notebook: dict[str, Any]) -> str:
        return "\n".join(source(cell) for cell in notebook["cells"])

    student, solution = (
        code(course.student_copy(made_notebook())),
        code(course.solution_copy(made_notebook())),
    )
    lecture = code(course.code_copy(made_notebook()))
    assert "teacher" in solution and "math.pi" in solution and "secret" in solution
    for text in (student, lecture):
        assert "teacher" not in text and "math.pi" not in text and "secret" not in text
        assert "# hint: add it to itself" in text
        assert '    raise NotImplementedError("toy-1")' in text
    assert "Prose." in student and "Prose." not in lecture and "# Title" in lecture


@pytest.mark.parametrize("notebook", notebooks())
def test_no_solution_leaks(notebook: dict[str, Any]) -> None:
    for make in (course.student_copy, course.code_copy):
        text = json.dumps(make(notebook), ensure_ascii=False)
        assert "BEGIN SOLUTION" not in text and "END SOLUTION" not in text
        for name, cell in exercises(notebook).items():
            opened = exercises(make(notebook)).get(name)
            for solution in solutions(cell):
                assert opened is None or solution.strip() not in opened
                if len(solution.strip()) > 40:  # shorter ones may well occur elsewhere
                    assert json.dumps(solution.strip(), ensure_ascii=False)[1:-1] not in text


@pytest.mark.parametrize("notebook", notebooks())
def test_solutions_pasted_back_give_the_solved_copy(notebook: dict[str, Any]) -> None:
    solved, student = (
        exercises(course.solution_copy(notebook)),
        exercises(course.student_copy(notebook)),
    )
    for name, text in exercises(notebook).items():
        if name not in student:  # an exercise of the appendix
            continue
        lines, answers = [], solutions(text)
        for line in student[name].split("\n"):
            lines.append(
                answers.pop(0) if line.strip() == f'raise NotImplementedError("{name}")' else line
            )
        assert "\n".join(lines) == solved[name] and not answers


@pytest.mark.parametrize("notebook", notebooks())
def test_signatures_are_equal(notebook: dict[str, Any]) -> None:
    solved, student = (
        exercises(course.solution_copy(notebook)),
        exercises(course.student_copy(notebook)),
    )
    for name, text in student.items():
        outer = signatures(text)
        assert set(outer) <= set(signatures(solved[name]))
        assert (
            f'NotImplementedError("{name}")' in text
            or "BEGIN SOLUTION" not in exercises(notebook)[name]
        )


@pytest.mark.parametrize("notebook", notebooks())
def test_every_exercise_is_tagged_once_and_its_check_follows(notebook: dict[str, Any]) -> None:
    names = [course.exercise_of(cell) for cell in notebook["cells"] if course.exercise_of(cell)]
    assert len(names) == len(set(names))
    tags = [tag for cell in notebook["cells"] for tag in cell["metadata"].get("tags", [])]
    for tag in tags:
        if tag.startswith("check:"):
            assert tag.removeprefix("check:") in names
            assert tags.index(tag) > tags.index(f"exercise:{tag.removeprefix('check:')}")


def test_make_course_writes_valid_notebooks(tmp_path: Path) -> None:
    path = tmp_path / "01_toy.ipynb"
    path.write_text(json.dumps(made_notebook()))
    assert course.make_course(tmp_path / "course", [path]) == ["01_toy: 1 exercises, 6 cells"]
    for kind in ("student", "solution", "code"):
        nbformat.validate(nbformat.read(tmp_path / "course" / kind / "01_toy.ipynb", as_version=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# BEGIN SOLUTION\nx = 1", "without its END"),
        ("# END SOLUTION", "must alternate"),
        ("# BEGIN SOLUTION\n# BEGIN SOLUTION\n# END SOLUTION", "must alternate"),
    ],
)
def test_unbalanced_marks_are_refused(text: str, message: str) -> None:
    with pytest.raises(OodlibError, match=message):
        course.open_exercise(text, "x")


def test_a_solution_without_an_exercise_tag_is_refused() -> None:
    notebook = made_notebook()
    notebook["cells"][2]["metadata"]["tags"] = ["core"]
    with pytest.raises(OodlibError, match="needs a tag exercise:<id>"):
        course.student_copy(notebook)
