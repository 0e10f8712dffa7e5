"""Which modules a piece of code can reach, without importing any."""

from pathlib import Path

import pytest

from oodlib.depends import ModuleGraph

PACKAGE = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.bank import Bank\n"
                   "    from pkg.scores import create\n__version__ = '1'\n",
    "bank.py": "from pkg.errors import Error\n",
    "errors.py": "class Error(ValueError): ...\n",
    "metrics.py": "from .errors import Error\n",
    "loose.py": "import importlib\ndef get(name): return importlib.import_module(name)\n",
    "scores/__init__.py": "from pkg.scores.alpha import alpha\nfrom pkg.scores.base import create\n"
                          "from pkg.scores.beta import beta\n",
    "scores/base.py": "def create(name): ...\n",
    "scores/alpha.py": "from pkg.bank import Bank\nalpha = 1\n",
    "scores/beta.py": "beta = 2\n",
}
SCORES = {"scores", "scores.base", "scores.alpha", "scores.beta"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModuleGraph:
    root = tmp_path_factory.mktemp("package") / "pkg"
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return ModuleGraph(root)


@pytest.mark.parametrize(("code", "reached"), [
    ("import numpy", set()),
    ("import pkg\npkg.__version__", {""}),
    ("from pkg import metrics\nmetrics.auroc()", {"metrics", "errors"}),
    ("import pkg.metrics as m", {"metrics", "errors"}),
    ("import pkg\npkg.Bank()", {"", "bank", "errors"}),
    ("from pkg.scores.beta import beta", {"scores.beta"}),
    ("from pkg.scores import alpha", {"scores.alpha", "bank", "errors"}),
    ("from pkg import scores\nscores.beta", {"scores.beta"}),
    ("from pkg import scores\nprint(scores)", SCORES | {"bank", "errors"}),
    ("from pkg import create", SCORES | {"bank", "errors"}),
    ("import pkg\npkg.create('alpha')", SCORES | {"bank", "errors"}),
])
def test_reachable(graph: ModuleGraph, code: str, reached: set[str]) -> None:
    found = {name.removeprefix("pkg").removeprefix(".") for name in graph.reachable([code])}
    assert found == reached


def test_import_by_string_reaches_the_package(graph: ModuleGraph) -> None:
    assert graph.reachable(["from pkg.loose import get"]) == set(graph.files)


def test_code_that_does_not_parse_reaches_everything(graph: ModuleGraph) -> None:
    assert graph.reachable(["for"]) == set(graph.files)


def test_gradnorm_module_reaches_only_its_users() -> None:
    graph = ModuleGraph(Path(__file__).resolve().parents[1] / "oodlib")
    assert "oodlib.scores.gradnorm" in graph.reachable(["import oodlib\noodlib.create('gradnorm')"])
    assert "oodlib.scores.gradnorm" not in graph.reachable(["import oodlib\noodlib.metrics.auroc"])
