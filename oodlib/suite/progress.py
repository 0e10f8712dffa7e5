"""What the running notebooks do: a live line for each in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_EVERY = 30.0  # seconds between two lines about one notebook in a log


class Progress:
    """``01a_gradnorm  cell 12/40  0:35 of about 1:00`` for each running notebook.

    ``expected`` holds the seconds of earlier runs. Several threads may report at once; the thread
    that waits for them calls `tick` about once a second.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.expected = expected
        self.terminal = sys.stdout.isatty()
        self.bars: dict[str, Any] = {}
        self.started: dict[str, float] = {}
        self.reported: dict[str, float] = {}

    def start(self, name: str) -> None:
        self.started[name] = self.reported[name] = time.monotonic()
        self.bars[name] = tqdm(
            desc=f"{name:24}",
            total=1,
            leave=False,
            dynamic_ncols=True,
            disable=not self.terminal,
            file=sys.stdout,
            bar_format="{desc} |{bar:20}| cell {n}/{total}  {elapsed}" + self._about(name),
        )

    def cell(self, name: str, index: int, cells: int) -> None:
        bar = self.bars[name]
        bar.n, bar.total = index + 1, cells
        bar.refresh()

    def tick(self) -> None:
        """Redraw the clocks; in a log, report what has been running for a while."""
        for name, bar in list(self.bars.items()):
            bar.refresh()
            if not self.terminal and time.monotonic() - self.reported[name] >= _EVERY:
                self.reported[name] = time.monotonic()
                self.write(f"{name}  cell {bar.n}/{bar.total}  {self._elapsed(name)}")

    def end(self, name: str, word: str) -> None:
        self.bars.pop(name).close()
        self.write(f"{name}  {word}  {self._elapsed(name)}")

    def write(self, text: str, *, error: bool = False) -> None:
        """Print whole lines, above the live ones."""
        file = sys.stderr if error else sys.stdout
        if self.terminal:
            tqdm.write(text, file=file)
        else:
            print(text, file=file, flush=True)

    def close(self) -> None:
        while self.bars:
            self.bars.popitem()[1].close()

    def _elapsed(self, name: str) -> str:
        return _clock(time.monotonic() - self.started[name]) + self._about(name)

    def _about(self, name: str) -> str:
        return f" of about {_clock(self.expected[name])}" if name in self.expected else ""


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
