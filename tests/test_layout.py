"""The floors of the house: a room imports only from rooms below it; no circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top to bottom, the way the data goes read upwards. A room is a file or a folder of oodlib; rooms
# of one floor do not import each other. `oodlib/__init__.py` hands on names from below and is
# imported by nobody inside.
FLOORS = [
    {"__main__"},
    {"apply", "experiments", "studies", "suite"},
    {"scores"},
    {"claims", "features", "gradients"},
    {"models"},
    {"data", "metrics"},
    {"arrays", "workspace"},
    {"files"},
    {"errors"},
]
# what a notebook may import from, besides whole packages: the studies hand on nothing
DEEP = "oodlib.studies."


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for path in (ROOT / "oodlib").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, known: dict[str, Path]) -> set[str]:
    """Our modules that a text imports: by name, from a package, or relative to ``module``."""
    package = (
        module if known.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    )
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for item in node.names:  # a submodule, or a name that the module itself holds
                longer = f"{base}.{item.name}"
                found.add(longer if longer in known else base)
    return {name for name in found if name in known}


def floor(module: str) -> int:
    """Height of a module's room, 0 at the bottom."""
    room = module.split(".")[1]
    return next(height for height, rooms in enumerate(reversed(FLOORS)) if room in rooms)


def arrows() -> list[tuple[str, str]]:
    known = modules()
    return [
        (module, other)
        for module, path in sorted(known.items())
        for other in sorted(imports(path.read_text(encoding="utf-8"), module, known))
        if module != "oodlib"
    ]


def test_every_room_stands_on_a_floor() -> None:
    rooms = {module.split(".")[1] for module in modules() if module != "oodlib"}
    assert rooms == set().union(*FLOORS)


def test_imports_run_down_only() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, other in arrows()
        if other == "oodlib"
        or (module.split(".")[1] != other.split(".")[1] and floor(module) <= floor(other))
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    below: dict[str, set[str]] = {}
    for module, other in arrows():
        below.setdefault(module, set()).add(other)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in below.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in below:
        visit(module, ())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_import_from_packages(path: Path) -> None:
    from oodlib.suite.notebooks import Notebook

    known = modules()
    for source in Notebook.read(path).code():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("oodlib"):
                assert node.module.count(".") < 2 or node.module.startswith(DEEP), (
                    f"from {node.module} import ..."
                )
                assert node.module in known


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("oodlib.scores.ash", "from oodlib import metrics", {"oodlib.metrics"}),
        ("oodlib.scores.ash", "import oodlib.files", {"oodlib.files"}),
        ("oodlib.scores.ash", "from . import energy", {"oodlib.scores.energy"}),
        (
            "oodlib.scores.ash",
            "from ..experiments.testbed import Testbed",
            {"oodlib.experiments.testbed"},
        ),
        (
            "oodlib.scores.ash",
            "def f():\n    from oodlib.suite import runner",
            {"oodlib.suite.runner"},
        ),
        (
            "oodlib.scores.ash",
            "from oodlib.scores import msp, Detector",
            {"oodlib.scores.msp", "oodlib.scores"},
        ),
    ],
)
def test_every_form_of_import_is_resolved(module: str, source: str, expected: set[str]) -> None:
    assert imports(source, module, modules()) == expected
