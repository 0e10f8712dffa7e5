"""Where things lie in the repository, and what the four profiles ask of each notebook. No heavy
import.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oodlib.errors import OodlibError
from oodlib.workspace import check_profile, root


@dataclass(frozen=True)
class Notebook:
    """One notebook of the suite: its name ("01a_gradnorm"), its file, and its cells as stored."""

    name: str
    path: Path
    cells: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> Notebook:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cells = tuple(
                {
                    "type": cell["cell_type"],
                    "tags": cell.get("metadata", {}).get("tags", []),
                    "source": "".join(cell["source"]),
                }
                for cell in content["cells"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise OodlibError(
                f"{path.name} is not a version-4 notebook ({error}). Restore it from git."
            ) from error
        return cls(path.stem, path, cells)

    def code(self) -> list[str]:
        """Sources of the code cells, IPython magics and shell lines blanked."""
        return [
            "\n".join(
                "pass" if line.startswith(("%", "!")) else line
                for line in cell["source"].split("\n")
            )
            for cell in self.cells
            if cell["type"] == "code"
        ]

    def parameters(self) -> dict[str, Any]:
        """Names and default values of the cell tagged ``parameters``; empty where there is none."""
        found: dict[str, Any] = {}
        for cell in self.cells:
            if cell["type"] != "code" or "parameters" not in cell["tags"]:
                continue
            for node in ast.parse(cell["source"]).body:
                target = (
                    node.targets[0]
                    if isinstance(node, ast.Assign)
                    else getattr(node, "target", None)
                )
                if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(
                    target, ast.Name
                ):
                    continue
                try:
                    found[target.id] = ast.literal_eval(node.value)  # type: ignore[arg-type]
                except (ValueError, TypeError) as error:
                    raise OodlibError(
                        f"{self.name}: the parameters cell may hold literals only, "
                        f"{target.id} is none. Compute it in the next cell."
                    ) from error
        return found


def list_notebooks() -> list[Path]:
    """The notebooks of the suite, in reading order."""
    return sorted((root() / "notebooks").glob("*.ipynb"))


def find_notebooks(name: str) -> list[Path]:
    """The notebooks of one number called ``name``, in reading order.

    One in full ("01a_gradnorm") or by number and half ("01a"); both halves by number ("01") or by
    any word of the name ("gradnorm").
    """
    paths = list_notebooks()
    found = [path for path in paths if path.stem == name.removesuffix(".ipynb")]
    found = found or [path for path in paths if name in _words(path.stem)]
    if len({_number(path.stem) for path in found}) != 1:
        known = ", ".join(path.stem for path in paths) or "none"
        called = ", ".join(path.stem for path in found) or "none"
        raise OodlibError(
            f"{name!r} must name one notebook or both halves of one; it names {called}. "
            f"Known: {known}."
        )
    return found


def _number(stem: str) -> str:
    return stem.split("_")[0].rstrip("ab")


def _words(stem: str) -> set[str]:
    first, _, rest = stem.partition("_")
    return {first, _number(stem), rest, *rest.split("_")}


def load_profile(profile: str, notebooks: list[Notebook]) -> dict[str, dict[str, Any] | str]:
    """Parameters of each notebook in a profile, or the reason (text) why the profile skips it.

    ``notebooks/profiles/<profile>.yaml`` holds a mapping ``common``, of which each notebook gets
    the names that its parameters cell has, and one mapping per notebook, where a name that the
    cell lacks is an error; ``skip: reason`` leaves a notebook out.
    """
    path = root() / "notebooks" / "profiles" / f"{check_profile(profile)}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise OodlibError(
            f"Cannot read the profile {path.name}: {error}. Restore it from git."
        ) from error
    every = {path.stem for path in list_notebooks()}
    unknown = sorted(set(content) - every - {"common"})
    if unknown:
        raise OodlibError(
            f"{path.name} names {', '.join(unknown)}, which is no notebook. "
            f"Known: {', '.join(sorted(every))}."
        )
    plan: dict[str, dict[str, Any] | str] = {}
    for notebook in notebooks:
        own = content.get(notebook.name) or {}
        if "skip" in own:
            plan[notebook.name] = str(own["skip"])
            continue
        check_names(notebook, own, where=path.name)
        known, common = notebook.parameters(), content.get("common") or {}
        plan[notebook.name] = {k: v for k, v in common.items() if k in known} | own
    return plan


def check_names(notebook: Notebook, values: dict[str, Any], *, where: str) -> None:
    """Raise OodlibError where ``values`` holds a name that the notebook's parameters cell lacks."""
    known = notebook.parameters()
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise OodlibError(
            f"{where}: {notebook.name} has no parameter {', '.join(unknown)}. "
            f"Known: {', '.join(known) or 'none'}."
        )
