"""Student, solution and code-only copies of the notebooks, made from the one solved source.

Marks in a source notebook: ``# BEGIN SOLUTION`` ... ``# END SOLUTION`` around what the student
writes, in a cell tagged ``exercise:<id>``; ``check:<id>`` on the cell that checks it;
``instructor`` on cells no student sees; ``core`` and ``appendix`` on the rest. The student and code
copies hold the core (everything not tagged ``appendix``), the solution copy holds all.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.suite.notebooks import list_notebooks

_BEGIN, _END = re.compile(r"^\s*#+\s*BEGIN SOLUTION\s*$"), re.compile(r"^\s*#+\s*END SOLUTION\s*$")
Cell = dict[str, Any]


def exercise_of(cell: Cell) -> str | None:
    """The id in a cell's ``exercise:<id>`` tag, or None."""
    return next((tag.split(":", 1)[1] for tag in _tags(cell) if tag.startswith("exercise:")), None)


def _tags(cell: Cell) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def _source(cell: Cell) -> str:
    return "".join(cell["source"])


def _split(text: str, where: str) -> list[tuple[bool, list[str]]]:
    """Lines in runs: (inside a solution region, lines without the two delimiters)."""
    runs: list[tuple[bool, list[str]]] = [(False, [])]
    for line in text.split("\n"):
        begin, end = bool(_BEGIN.match(line)), bool(_END.match(line))
        if (begin and runs[-1][0]) or (end and not runs[-1][0]):
            raise OodlibError(
                f"{where}: BEGIN and END SOLUTION must alternate; see {line.strip()!r}."
            )
        if begin or end:
            runs.append((begin, [line] if begin else []))
        else:
            runs[-1][1].append(line)
    if runs[-1][0]:
        raise OodlibError(f"{where}: a BEGIN SOLUTION without its END SOLUTION.")
    return runs


def open_exercise(text: str, exercise: str) -> str:
    """``text`` with each solution region replaced by ``raise NotImplementedError("<exercise>")`` at
    its indentation.
    """
    lines: list[str] = []
    for inside, part in _split(text, exercise):
        if inside:
            indent = part[0][: len(part[0]) - len(part[0].lstrip())]
            lines.append(f'{indent}raise NotImplementedError("{exercise}")')
        else:
            lines += part
    return "\n".join(lines)


def _without_marks(text: str, where: str) -> str:
    return "\n".join(
        line for inside, part in _split(text, where) for line in (part[1:] if inside else part)
    )


def solution_copy(notebook: dict[str, Any]) -> dict[str, Any]:
    """Every cell, solved, without the delimiters."""
    return _copy(notebook, lambda cell: True, _without_marks)


def student_copy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The core, exercises open; without instructor and appendix cells."""
    return _copy(
        notebook, lambda cell: not {"instructor", "appendix"} & set(_tags(cell)), open_exercise
    )


def code_copy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The code and the headings of the student copy: for live coding and slides."""
    made = student_copy(notebook)
    cells = []
    for cell in made["cells"]:
        if cell["cell_type"] == "markdown":
            headings = [line for line in _source(cell).split("\n") if re.match(r"#{1,6} ", line)]
            cell["source"] = "\n".join(headings)
        if cell["source"]:
            cells.append(cell)
    return {**made, "cells": cells}


def _copy(notebook: dict[str, Any], keep: Any, change: Any) -> dict[str, Any]:
    made = copy.deepcopy(notebook)
    made["cells"] = [cell for cell in made["cells"] if keep(cell)]
    for cell in made["cells"]:
        if cell["cell_type"] != "code":
            continue
        text = _source(cell)
        exercise = exercise_of(cell)
        if "BEGIN SOLUTION" in text and exercise is None:
            raise OodlibError(
                "A cell with BEGIN SOLUTION needs a tag exercise:<id>. It begins: "
                f"{text.splitlines()[0]!r}."
            )
        cell["source"] = change(text, exercise) if exercise else text
        cell["outputs"], cell["execution_count"] = [], None
    return made


_COPIES = {"student": student_copy, "solution": solution_copy, "code": code_copy}


def make_course(target: Path, sources: list[Path] | None = None) -> list[str]:
    """Write ``target``/{student,solution,code}/<notebook>.ipynb; returns a line per notebook
    (exercises, cells).
    """
    summary = []
    for path in sources if sources is not None else list_notebooks():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for name, make in _COPIES.items():
            try:
                made = make(notebook)
            except OodlibError as error:
                raise OodlibError(f"{path.name}: {error}") from error
            write_text(
                target / name / path.name,
                json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n",
            )
        exercises = {exercise_of(cell) for cell in notebook["cells"]} - {None}
        summary.append(f"{path.stem}: {len(exercises)} exercises, {len(notebook['cells'])} cells")
    return summary
