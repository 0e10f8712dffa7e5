"""The command line and the Makefile: errors in one line, nothing heavy when nothing is due, one
call per target.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oodlib.__main__ import main
from oodlib.suite import doctor

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (
    "reproduce",
    "test",
    "test-quick",
    "lab",
    "data",
    "report",
    "verify",
    "student",
    "docs",
    "lint",
    "train",
    "clean",
    "doctor",
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "laptop.yaml").write_text("common: {profile: laptop}\n")
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("command", ["reproduce", "test", "data", "report", "clean"])
def test_an_unknown_profile_names_all_four(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--profile", "desktop"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "smoke, laptop, benchmark, paper; got 'desktop'" in shown


def test_bad_input_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["notebook", "gradnrom"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: 'gradnrom' must name one notebook")
    assert shown.endswith("it names none. Known: none.\n") and shown.count("\n") == 1


def test_the_handler_of_terminations_is_put_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["clean"]) == 0 and signal.getsignal(signal.SIGTERM) is before
    assert main(["notebook", "gradnrom"]) == 2 and signal.getsignal(signal.SIGTERM) is before


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--jbos", "2"])
    assert "--jbos" in capsys.readouterr().err


def test_clean_keeps_references_and_data(root: Path) -> None:
    for name in ("figures/laptop", "figures/reference", "build", "data"):
        (root / name).mkdir(parents=True)
    assert main(["clean"]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["data", "figures", "notebooks"]
    assert (root / "figures" / "reference").exists() and not (root / "figures" / "laptop").exists()


def test_nothing_to_do_imports_nothing_heavy() -> None:
    code = (
        "import sys, oodlib.__main__, oodlib.suite.runner as r, oodlib.suite.report\n"
        "r.make_plans(None, r.Options(profile='smoke'))\n"
        "assert not {'torch', 'papermill', 'matplotlib.pyplot', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_mismatch_of_torch_and_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, *more: object) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", broken)
    problems = doctor.check_env()
    assert any("do not match" in text and "requirements.lock" in text for text in problems)


def test_a_package_that_differs_from_the_lock_is_named(root: Path) -> None:
    (root / "requirements.lock").write_text(
        "numpy==0.1\nno-such-package==1.0 ; sys_platform != 'x'\nabc==1 ; python_version < '3'\n"
    )
    problems = "\n".join(doctor.check_env())
    assert (
        "the lock has 0.1" in problems
        and "no-such-package 1.0 is in the lock but not installed" in problems
    )
    assert "abc" not in problems


def test_doctor_names_files_and_folders_of_weights(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OODLIB_MIRROR", raising=False)
    folder = root / "data" / "checkpoints"
    (folder / "toy_glow_s0").mkdir(parents=True)
    for name in ("toy_s0.safetensors", "toy_s0.json"):
        (folder / name).touch()
    assert re.search(
        r"^weights +toy_glow_s0, toy_s0.safetensors$", doctor.describe()[0], re.MULTILINE
    )


# the tests themselves may be running under make, whose settings a second make would take over
OUTSIDE_MAKE = {
    name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_one_call(target: str) -> None:
    shown = subprocess.run(
        [
            "make",
            "-n",
            "-o",
            ".venv/.installed",
            target,
            "PROFILE=smoke",
            "DEVICE=cpu",
            "SEED=1",
            "ARGS=--x",
        ],
        cwd=ROOT,
        env=OUTSIDE_MAKE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    pattern = rf"\.venv/bin/python -m oodlib {target} --profile smoke --device cpu --seed 1 --x\s*"
    assert re.fullmatch(pattern, shown.splitlines()[-1])
    assert sum(" -m oodlib " in line for line in shown.splitlines()) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_failed_setup_leaves_no_stamp(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.lock").write_text("")
    done = subprocess.run(
        ["make", "setup", "PYTHON=false"], cwd=tmp_path, env=OUTSIDE_MAKE, capture_output=True
    )
    assert done.returncode != 0
    assert not (tmp_path / ".venv" / ".installed").exists()
