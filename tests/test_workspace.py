"""One root: everything obeys OODLIB_ROOT, and code that is installed alone says what it lacks."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oodlib.data
from oodlib.claims import load_claims
from oodlib.data.cifar import tiny_imagenet_classes
from oodlib.errors import OodlibError
from oodlib.models.shipped import load_trained
from oodlib.studies.vits.pool_table import find_pool
from oodlib.workspace import code_hash, data_root, root

PACKAGE = Path(oodlib.data.__file__).parents[1]
SENTENCE = (
    "This installation of oodlib holds the code alone: clone the repository and set OODLIB_ROOT"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel installs it: without the repository around it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(PACKAGE, folder / "oodlib", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with the package of ``folder``, outside the repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OODLIB_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(folder), **environment},
    )


def test_arrays_need_no_repository(installed: Path) -> None:
    code = (
        "import numpy as np, oodlib, oodlib.workspace as w\n"
        "logits = np.array([[9.0, 0.0], [1.0, 0.9]])\n"
        "assert oodlib.scores.msp(logits).argmax() == 1 and oodlib.create('msp')\n"
        f"assert str(w._PACKAGE.parent) == {str(installed.resolve())!r}\n"
    )
    done = python(installed, "-c", code)
    assert done.returncode == 0, done.stderr


def test_what_reads_the_repository_says_that_it_is_missing(installed: Path) -> None:
    calls = [
        "oodlib.data.published('imagenet')",
        "oodlib.models.shipped.load_trained('latin_fast')",
        "oodlib.data.cifar.tiny_imagenet_classes()",
        "oodlib.claims.load_claims()",
        "oodlib.studies.vits.pool_table.read_pool('cifar')",
        "oodlib.data.public.prepare.load('cifar10', 'test')",
    ]
    code = (
        "import oodlib.claims, oodlib.data.cifar, oodlib.models.shipped\n"
        "import oodlib.studies.vits.pool_table\n"
        f"for call in {calls}:\n"
        "    try:\n        eval(call)\n"
        "    except oodlib.OodlibError as error:\n        print(error)\n"
    )
    done = python(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls) and len(set(lines)) == 1 and lines[0].startswith(SENTENCE)


@pytest.mark.parametrize("command", ["reproduce", "clean", "data --profile paper"])
def test_a_command_without_the_repository_is_one_sentence(installed: Path, command: str) -> None:
    done = python(installed, "-m", "oodlib", *command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {SENTENCE}") and done.stderr.count("\n") == 1


def test_doctor_without_the_repository_tells_what_it_can(installed: Path) -> None:
    done = python(installed, "-m", "oodlib", "doctor")
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith("Python") and f"PROBLEM     {SENTENCE}" in done.stdout


def test_the_code_alone_with_a_root_is_whole(installed: Path) -> None:
    code = "import oodlib.data as d; print(len(d.published('imagenet')))"
    done = python(installed, "-c", code, OODLIB_ROOT=str(root().resolve()))
    assert int(done.stdout) == len(oodlib.data.published("imagenet"))


def test_everything_is_read_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, before = tiny_imagenet_classes()[0], code_hash("oodlib.errors")
    for name in ("manifests", "published", "claims", "checkpoints", "pools"):
        (tmp_path / "data" / name).mkdir(parents=True)
    header = (
        (root() / "data" / "manifests" / "tiny_imagenet_classes.csv").read_text().splitlines()[0]
    )
    (tmp_path / "data" / "manifests" / "tiny_imagenet_classes.csv").write_text(
        f"{header}\nn0,word,,,\n"
    )
    shutil.copy(
        root() / "data" / "published" / "imagenet.csv", tmp_path / "data" / "published" / "mine.csv"
    )
    (tmp_path / "data" / "pools" / "mine.csv").touch()
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.delenv("OODLIB_DATA", raising=False)
    assert [c.wnid for c in tiny_imagenet_classes()] == ["n0"]
    assert len(oodlib.data.published("mine")) and load_claims() == {}
    with pytest.raises(OodlibError, match=r"Known: mine\.$"):
        oodlib.data.published("imagenet")
    with pytest.raises(OodlibError, match=r"\(present: none\)"):
        load_trained("latin_fast")
    assert (
        find_pool("mine") == tmp_path / "data" / "pools" / "mine.csv"
        and data_root() == tmp_path / "data"
    )
    monkeypatch.delenv("OODLIB_ROOT")
    assert tiny_imagenet_classes()[0] == first and code_hash("oodlib.errors") == before


def test_no_other_module_looks_for_files_beside_itself() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "__file__"
    }
    assert found == {"workspace.py"}
