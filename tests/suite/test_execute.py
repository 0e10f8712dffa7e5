"""A kernel that does not start is started once more; nothing else is tried again."""

import json
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.clientwrap import PapermillNotebookClient

from oodlib.suite.execute import NotebookFailure, execute


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "01_toy.ipynb"
    path.write_text(
        json.dumps(
            new_notebook(
                cells=[new_code_cell("print('ran')")],
                metadata={
                    "kernelspec": {
                        "name": "python3",
                        "language": "python",
                        "display_name": "Python 3",
                    }
                },
            )
        )
    )
    return path


def fail(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, times: int) -> list[str]:
    """Let a method of papermill's client fail so many times; returns the list of its calls."""
    real, calls = getattr(PapermillNotebookClient, method), []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) <= times:
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(PapermillNotebookClient, method, failing)
    return calls


def test_a_kernel_that_did_not_start_is_started_once_more(
    notebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail(
        monkeypatch, "start_new_kernel_client", RuntimeError("Kernel died before replying"), 1
    )
    target = notebook.with_name("done.ipynb")
    execute(notebook, target, {}, {})
    assert len(calls) == 2 and "ran" in target.read_text()


def test_a_kernel_that_never_starts_is_one_failure(
    notebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail(
        monkeypatch, "start_new_kernel_client", RuntimeError("Kernel died before replying"), 9
    )
    with pytest.raises(NotebookFailure, match="KernelNotStarted: Kernel died before replying"):
        execute(notebook, notebook.with_name("done.ipynb"), {}, {})
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("start_new_kernel", OSError("no such folder")),
        ("papermill_execute_cells", RuntimeError("out of step")),
    ],
)
def test_no_other_error_before_the_first_cell_is_tried_again(
    notebook: Path, method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail(monkeypatch, method, error, 1)
    with pytest.raises(NotebookFailure, match=str(error)):
        execute(notebook, notebook.with_name("done.ipynb"), {}, {})
    assert len(calls) == 1
