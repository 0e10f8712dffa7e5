"""One notebook through papermill, and a failure that shows the cell."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError


class NotebookFailure(Exception):
    """A notebook stopped; the text shows the cell and its traceback, ``executed`` is the notebook
    so far (JSON).
    """

    def __init__(self, message: str, executed: str) -> None:
        super().__init__(message)
        self.executed = executed


class KernelNotStarted(Exception):
    """The kernel's process died, or gave no answer, before it could run a cell."""


class _Client(PapermillNotebookClient):
    def start_new_kernel_client(self, **options: Any) -> Any:
        try:
            return super().start_new_kernel_client(**options)
        except RuntimeError as error:
            raise KernelNotStarted(str(error)) from error


class _Engine(NBClientEngine):
    """papermill's engine with an environment and a folder for the kernel, and news of each cell."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, kernel: dict[str, Any], on_cell: Any, **_: Any
    ) -> None:
        cell_start = nb_man.cell_start

        def start(cell: Any, cell_index: int = 0, **more: Any) -> None:
            on_cell(cell_index, len(nb_man.nb.cells))
            cell_start(cell, cell_index, **more)

        nb_man.cell_start = start
        quiet = ["--IPKernelApp.log_level=50"]  # cells report their own errors
        client = _Client(nb_man, kernel_name=kernel_name, timeout=None, extra_arguments=quiet)
        client.execute(**kernel)


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    environment: dict[str, str],
    on_cell: Callable[[int, int], None] = lambda index, cells: None,
) -> None:
    """Run ``source`` in a fresh kernel of this interpreter and write it, with its outputs, to
    ``target``.

    The kernel starts in the notebook's folder, as in JupyterLab. One that does not start (two
    kernels drew the same port) is started once more; no other error is tried again. Before each
    cell ``on_cell`` is called with its index and the number of cells. Several threads may call this
    at once: the working directory of this process does not change.

    Raises
    ------
    NotebookFailure : a cell raised, the kernel died or did not start, or the notebook could not run
    """
    papermill_engines.register("oodlib", _Engine)
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                engine_name="oodlib",
                progress_bar=False,
                request_save_on_cell_execute=False,
                kernel={"env": environment, "cwd": str(source.parent)},
                on_cell=on_cell,
            )
            return
        except PapermillExecutionError as error:
            raise NotebookFailure(_explain(source.stem, error), _read(target, source)) from error
        except Exception as error:
            if attempt == 1 and isinstance(error, KernelNotStarted):
                continue
            message = f"{source.name} stopped ({type(error).__name__}: {error})."
            if isinstance(error, DeadKernelError):
                message += (
                    " Most likely it ran out of memory: close other programs, use --jobs 1, or "
                    "run a smaller profile."
                )
            raise NotebookFailure(message, _read(target, source)) from error


def _read(target: Path, source: Path) -> str:
    path = target if target.exists() and target.stat().st_size else source
    return path.read_text(encoding="utf-8")


def _explain(name: str, error: PapermillExecutionError) -> str:
    code = "\n".join(f"    {line}" for line in error.source.splitlines())
    trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
    if not sys.stderr.isatty():
        trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    return f"\n{name}: cell {error.cell_index + 1} of the executed copy failed\n{code}\n\n{trace}"
