"""Headless runs: what is done stays done, what fails leaves nothing half-made, and what is misspelt
is refused.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from oodlib import workspace
from oodlib.errors import OodlibError
from oodlib.files import locked
from oodlib.suite import runner
from oodlib.suite.notebooks import Notebook, find_notebooks, list_notebooks, load_profile
from oodlib.suite.progress import Progress
from oodlib.suite.runner import Options, is_done, make_plans, run_all
from oodlib.workspace import PROFILES, STAMP

PARAMETERS = 'profile: str = "laptop"  # which profile\nseed: int = 0  # seed\nn_test: int = 3'
CHECK = (
    "import os\nfrom pathlib import Path\n"
    "assert os.environ['HF_HUB_OFFLINE'] == '1' and os.environ['PYTHONHASHSEED'] == '0'\n"
    "Path(os.environ['OODLIB_OUTPUT'], 'said.txt').write_text(f'{profile} {seed} {n_test}')"
)


def write_notebook(root: Path, name: str, *code: str) -> None:
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    notebook = new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}
        },
    )
    (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for profile in PROFILES:
        (tmp_path / "notebooks" / "profiles" / f"{profile}.yaml").write_text(
            f"common: {{profile: {profile}}}\n"
        )
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    write_notebook(tmp_path, "01_good", CHECK)
    return tmp_path


def test_a_failure_leaves_nothing_half_made_and_the_next_run_resumes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(
        root,
        "02_bad",
        "open(__import__('os').environ['OODLIB_OUTPUT'] + '/half', 'w')",
        "n_test / 0",
    )
    options = Options(profile="smoke", seed=5, extra={"n_test": "7"})
    assert run_all(make_plans(None, options)[0], options) == ["02_bad"]
    shown = capsys.readouterr().err
    assert "n_test / 0" in shown and "ZeroDivisionError" in shown
    figures = root / "figures" / "smoke"
    assert [path.name for path in figures.iterdir()] == ["01_good"]
    assert (figures / "01_good" / "said.txt").read_text() == "smoke 5 7"
    assert (figures / "01_good" / "01_good.ipynb").exists()
    assert "ZeroDivisionError" in (root / "build" / "failed" / "smoke" / "02_bad.ipynb").read_text()

    write_notebook(root, "02_bad", "n_test / 1")
    before = (figures / "01_good" / STAMP).stat().st_mtime_ns
    plans, _ = make_plans(None, options)
    assert [is_done(plan) for plan in plans] == [True, False]
    assert run_all(plans, options) == []
    assert (figures / "01_good" / STAMP).stat().st_mtime_ns == before
    assert all(is_done(plan) for plan in plans)


def test_a_run_that_a_killed_process_took_away_is_put_back(root: Path) -> None:
    write_notebook(root, "02_bad", "n_test / 0")
    figures = root / "figures" / "smoke"
    for name in (".02_bad.old.part", ".02_bad.x.part"):
        (figures / name).mkdir(parents=True)
    (figures / ".02_bad.old.part" / "results.csv").touch()
    options = Options(profile="smoke")
    assert run_all(make_plans(find_notebooks("bad"), options)[0], options) == ["02_bad"]
    assert [path.relative_to(figures).as_posix() for path in figures.rglob("*")] == [
        "02_bad",
        "02_bad/results.csv",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM handler there")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_stops_all_kernels_and_leaves_no_trace(
    root: Path, sent: signal.Signals
) -> None:
    for name in ("03_slow", "04_deaf"):  # the second takes no notice of an interrupt
        write_notebook(
            root,
            name,
            "import os, pathlib, signal, time",
            "signal.signal(signal.SIGINT, signal.SIG_IGN)" if name == "04_deaf" else "",
            f"pathlib.Path(os.environ['OODLIB_ROOT'], '{name}').write_text(str(os.getpid()))\n"
            "time.sleep(60)",
        )
    command = ["notebook", "slow", "deaf", "--profile", "smoke", "--jobs", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "oodlib", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    files = [root / name for name in ("03_slow", "04_deaf")]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(sent)
    _, shown = child.communicate(timeout=60)
    assert child.returncode == 130
    assert shown == "Interrupted. Nothing half-done was kept; the same command resumes.\n"
    assert list((root / "figures" / "smoke").iterdir()) == []
    assert not (root / "build" / "failed").exists()
    assert not [file for file in files if psutil.pid_exists(int(file.read_text()))]


def reference(root: Path, name: str, seconds: float, mebibytes: float = 10) -> None:
    folder = root / "figures" / "reference" / "laptop" / name
    folder.mkdir(parents=True)
    facts = {"wall_seconds": seconds, "peak_memory_mib": mebibytes}
    (folder / "provenance.json").write_text(json.dumps(facts))


def test_the_longest_notebook_starts_first_and_all_have_one_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_notebook(root, "02_long", "import os\nassert os.environ['OMP_NUM_THREADS'] == '1'")
    reference(root, "01_good", 5)
    reference(root, "02_long", 70)
    options = Options(jobs=1)
    assert run_all(make_plans(None, options)[0], options) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["02_long", "done"], ["01_good", "done"]]
    assert lines[0].endswith(" of about 1:10")


def test_a_terminal_shows_a_live_line_for_each_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress({"01_a": 65.0})
    for name in ("01_a", "02_b"):
        progress.start(name)
    progress.cell("01_a", 3, 10)
    progress.tick()
    progress.end("01_a", "done")
    progress.close()
    shown = capsys.readouterr().out
    assert re.search(r"01_a +\|█+ +\| cell 4/10  00:00 of about 1:05", shown)
    assert re.search(r"02_b +\| +\| cell 0/1  00:00", shown)
    assert "01_a  done  0:00 of about 1:05\n" in shown


def test_as_many_notebooks_as_cores_and_memory_allow(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2, 5):
        write_notebook(root, f"0{number}_more", "1")
    plans = make_plans(None, Options())[0]
    monkeypatch.setattr(runner, "_cores", lambda: 3)
    assert runner._jobs(plans, {}) == 1  # nothing says what they need
    assert runner._jobs(plans, {"01_good": {"peak_memory_mib": 1}}) == 3
    facts = {"01_good": {"peak_memory_mib": 1}, "02_more": {"peak_memory_mib": 10**9}}
    assert runner._jobs(plans, facts) == 1


def test_a_notebook_runs_in_its_folder_and_this_process_stays_where_it_is(root: Path) -> None:
    here = Path.cwd()
    test = f"from pathlib import Path\nassert Path.cwd() == Path({str(root / 'notebooks')!r})"
    for name in ("02_a", "03_b"):
        write_notebook(root, name, test)
    options = Options(profile="smoke", jobs=3)
    assert run_all(make_plans(None, options)[0], options) == []
    assert Path.cwd() == here


def test_a_relative_root_is_that_of_the_kernel_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("OODLIB_ROOT", ".")
    assert runner._environment(root / "out", Options())["OODLIB_ROOT"] == str(root.resolve())


@pytest.mark.parametrize("change", ["notebook", "parameter", "seed", "device", "published"])
def test_a_change_makes_a_run_due(root: Path, change: str) -> None:
    before = make_plans(None, Options())[0][0].key
    options = {
        "parameter": Options(extra={"n_test": "4"}),
        "seed": Options(seed=1),
        "device": Options(device="cpu"),
    }
    if change == "notebook":
        write_notebook(root, "01_good", CHECK, "1")
    if change == "published":
        (root / "data" / "published").mkdir(parents=True)
        (root / "data" / "published" / "table.csv").write_text("1")
    assert make_plans(None, options.get(change, Options()))[0][0].key != before


def test_a_source_change_touches_only_its_users(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = root / "oodlib"
    package.mkdir()
    for name in ("__init__", "one", "two"):
        (package / f"{name}.py").write_text("")
    monkeypatch.setattr(workspace, "_PACKAGE", package)
    write_notebook(root, "01_good", "from oodlib.one import x")
    write_notebook(root, "02_other", "from oodlib.two import y")
    before = [plan.key for plan in make_plans(None, Options())[0]]
    (package / "one.py").write_text("x = 1")
    after = [plan.key for plan in make_plans(None, Options())[0]]
    assert after[0] != before[0] and after[1] == before[1]


def test_claims_of_another_notebook_do_not_make_a_run_due(root: Path) -> None:
    folder = root / "data" / "claims"
    folder.mkdir(parents=True)
    (folder / "good.yaml").write_text("notebook: 01_good\n")
    before = make_plans(None, Options())[0][0].key
    (folder / "other.yaml").write_text("notebook: 02_other\n")
    assert make_plans(None, Options())[0][0].key == before
    (folder / "good.yaml").write_text("notebook: 01_good\n# changed\n")
    assert make_plans(None, Options())[0][0].key != before


def test_a_misspelt_parameter_names_the_known_ones(root: Path) -> None:
    with pytest.raises(OodlibError, match=r"n_tset.*Known: profile, seed, n_test"):
        make_plans(None, Options(extra={"n_tset": "4"}))
    (root / "notebooks" / "profiles" / "smoke.yaml").write_text("01_good: {n_tset: 4}\n")
    with pytest.raises(OodlibError, match=r"smoke\.yaml.*n_tset.*Known: profile, seed, n_test"):
        make_plans(None, Options(profile="smoke"))


def test_a_profile_that_names_no_notebook_is_refused(root: Path) -> None:
    (root / "notebooks" / "profiles" / "smoke.yaml").write_text("01_godo: {n_test: 4}\n")
    with pytest.raises(OodlibError, match=r"01_godo.*Known: 01_good"):
        make_plans(None, Options(profile="smoke"))


def test_a_profile_can_skip_a_notebook(root: Path) -> None:
    (root / "notebooks" / "profiles" / "smoke.yaml").write_text("01_good: {skip: too long}\n")
    assert make_plans(None, Options(profile="smoke")) == ([], {"01_good": "too long"})


def test_a_notebook_is_found_by_any_word(root: Path) -> None:
    write_notebook(root, "04_vit_training_study")
    for name in ("vit", "study", "04_vit_training_study", "vit_training_study"):
        assert [path.stem for path in find_notebooks(name)] == ["04_vit_training_study"]
    with pytest.raises(OodlibError, match="Known: 01_good, 04_vit"):
        find_notebooks("resnet")


def test_a_number_or_a_word_names_both_halves(root: Path) -> None:
    both = ["04a_vit_study", "04b_vit_study"]
    for name in both:
        write_notebook(root, name)
    for name in ("04", "vit", "vit_study"):
        assert [path.stem for path in find_notebooks(name)] == both
    for name in ("04b", "04b_vit_study"):
        assert [path.stem for path in find_notebooks(name)] == both[1:]
    write_notebook(root, "05_study")
    with pytest.raises(OodlibError, match="names 04a_vit_study, 04b_vit_study, 05_study"):
        find_notebooks("study")


def test_common_values_go_to_the_notebooks_that_have_the_name(root: Path) -> None:
    (root / "notebooks" / "profiles" / "smoke.yaml").write_text("common: {n_test: 4, n_boot: 9}\n")
    (plan,), _ = make_plans(None, Options(profile="smoke"))
    assert plan.parameters == {"n_test": 4}


def test_parameters_agree_with_papermill(root: Path) -> None:
    import papermill

    path = root / "notebooks" / "01_good.ipynb"
    assert list(Notebook.read(path).parameters()) == list(papermill.inspect_notebook(str(path)))


def test_a_lock_of_a_killed_process_is_free(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "build" / "locks" / "smoke-01_good.lock"
    hold = (
        "from oodlib.files import locked\n"
        f"with locked({str(path)!r}): print('held', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "held\n"
    with locked(path, timeout=0) as mine:
        assert not mine
    threading.Timer(0.5, child.kill).start()
    options = Options(profile="smoke")
    assert run_all(make_plans(None, options)[0], options) == []
    assert "01_good  waiting for another run of it" in capsys.readouterr().out
    child.wait()
    assert (root / "figures" / "smoke" / "01_good" / STAMP).exists()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_committed_profiles_fit_the_committed_notebooks(profile: str) -> None:
    notebooks = [Notebook.read(path) for path in list_notebooks()]
    assert set(load_profile(profile, notebooks)) == {notebook.name for notebook in notebooks}
    assert all({"profile", "seed"} <= set(notebook.parameters()) for notebook in notebooks)
