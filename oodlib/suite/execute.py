"""One notebook through papermill, with a progress line per cell and a failure that shows the cell."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

__all__ = ["NotebookFailure", "execute"]


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
    """papermill's engine with an environment for the kernel and a progress line."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        environment: dict[str, str],
        progress: _Progress,
        **options: Any,
    ) -> None:
        cell_start = nb_man.cell_start
        progress.cells = len(nb_man.nb.cells)  # papermill has added the cell with the parameters

        def start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            progress.cell(cell_index or 0)
            cell_start(cell, cell_index, **more)

        nb_man.cell_start = start
        client = _Client(
            nb_man,
            kernel_name=kernel_name,
            timeout=None,
            log_output=False,
            extra_arguments=["--IPKernelApp.log_level=50"],
        )  # cells tell their own errors
        try:
            client.execute(env=environment)
        except (
            KeyboardInterrupt
        ):  # nobody waits for the cell any more, and asyncio would print its traceback
            logging.getLogger("asyncio").disabled = True
            raise


class _Progress:
    """``01a_gradnorm  cell 12/40  0:35``: one line that is redrawn in a terminal, a line every 10 s
    in a log.
    """

    def __init__(self, name: str) -> None:
        self.name, self.cells, self.started, self.shown = name, 0, time.monotonic(), -1e9
        self.terminal = sys.stdout.isatty()

    def elapsed(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def cell(self, index: int) -> None:
        text = f"{self.name}  cell {index + 1}/{self.cells}  {self.elapsed()}"
        if self.terminal:
            print(f"\r{text}   ", end="", flush=True)
        elif time.monotonic() - self.shown > 10:
            print(text, flush=True)
            self.shown = time.monotonic()

    def end(self, word: str) -> None:
        print(
            f"{chr(13) if self.terminal else ''}{self.name}  {word}  {self.elapsed()}          ".rstrip(),
            flush=True,
        )


def execute(
    source: Path, target: Path, parameters: dict[str, Any], environment: dict[str, str]
) -> None:
    """Run ``source`` in a fresh kernel of this interpreter and write it, with its outputs, to
    ``target``.

    The kernel starts in the notebook's folder, as in JupyterLab. One that does not start (two
    kernels drew the same port) is started once more; no other error is tried again.

    Raises
    ------
    NotebookFailure : a cell raised, the kernel died or did not start, or the notebook could not be run at all
    """
    papermill_engines.register("oodlib", _Engine)
    progress = _Progress(source.stem)
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
                cwd=str(source.parent),
                autosave_cell_every=0,
                environment=environment,
                progress=progress,
            )
        except PapermillExecutionError as error:
            progress.end("FAILED")
            raise NotebookFailure(_explain(source.stem, error), _read(target, source)) from error
        except Exception as error:
            if attempt == 1 and isinstance(error, KernelNotStarted):
                continue
            progress.end("FAILED")
            message = f"{source.name} stopped ({type(error).__name__}: {error})."
            if isinstance(error, DeadKernelError):
                message += " Nearly always it ran out of memory: close other programs, or run a smaller profile."
            raise NotebookFailure(message, _read(target, source)) from error
        else:
            progress.end("done")
            return


def _read(target: Path, source: Path) -> str:
    return (target if target.exists() and os.path.getsize(target) else source).read_text(
        encoding="utf-8"
    )


def _explain(name: str, error: PapermillExecutionError) -> str:
    code = "\n".join(f"    {line}" for line in error.source.splitlines())
    trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
    if not sys.stderr.isatty():
        trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    return f"\n{name}: cell {error.cell_index + 1} of the executed copy failed\n{code}\n\n{trace}"
