"""Files and folders are replaced whole or not at all, whatever goes wrong on the way."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oodlib import files
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder, remove_parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file."""
    path = tmp_path / "run"
    fill(path, "before")
    return path


def fill(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "text").write_text(text)


def state(folder: Path) -> tuple[list[str], str]:
    """What lies beside and in the folder."""
    return sorted(os.listdir(folder.parent)), (folder / "text").read_text()


def kill_between_the_renames(folder: Path) -> None:
    code = (
        "import os, signal, sys\nfrom oodlib.files import atomic_folder\nreal = os.replace\n"
        "def replace(source, target):\n"
        "    real(source, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with atomic_folder(sys.argv[1]) as temporary:\n"
        "    (temporary / 'text').write_text('after')\n"
        "    os.replace = replace\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not folder.exists()


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    fill(folder, "after")
    assert state(folder) == (["run"], "after")
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_folder_as_it_was(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise PermissionError("in use")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError, match="in use"):
        fill(folder, "after")
    assert state(folder) == (["run"], "before")


def test_an_error_in_the_block_leaves_the_folder_as_it_was(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as temporary:
        (temporary / "text").write_text("half")
        raise KeyboardInterrupt
    assert state(folder) == (["run"], "before")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_what_a_killed_process_took_away_is_put_back_by_the_cleaner(folder: Path) -> None:
    kill_between_the_renames(folder)
    remove_parts(folder)
    assert state(folder) == (["run"], "before")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_what_a_killed_process_took_away_is_put_back_by_the_next_call(folder: Path) -> None:
    kill_between_the_renames(folder)
    with pytest.raises(ValueError), atomic_folder(folder):
        raise ValueError
    assert (folder / "text").read_text() == "before"
    remove_parts(folder)
    assert state(folder) == (["run"], "before")


def test_the_cleaner_leaves_other_names_alone(tmp_path: Path) -> None:
    names = [".run.x.part", ".run[1].x.part", ".run2.x.part", "run.part"]
    for name in names:
        (tmp_path / name).touch()
    remove_parts(tmp_path / "run[1]")
    assert sorted(os.listdir(tmp_path)) == sorted(set(names) - {".run[1].x.part"})


def test_a_sealed_file_is_read_back_with_its_record(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    files.write_sealed(path, lambda part: part.write_bytes(b"abc"), {"step": 3})
    assert files.read_sealed(path, "flow", "Train again.")["step"] == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.unlink(), "weights.bin is missing"),
        (lambda path: path.write_bytes(b"abd"), "weights.bin is damaged: its checksum"),
        (lambda path: path.with_suffix(".json").unlink(), "weights.json is missing"),
        (lambda path: path.with_suffix(".json").write_text("{"), "weights.json is damaged"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "not an object"),
    ],
)
def test_a_damaged_sealed_file_is_refused_with_the_remedy(tmp_path, fault, message) -> None:
    path = tmp_path / "weights.bin"
    files.write_sealed(path, lambda part: part.write_bytes(b"abc"), {})
    fault(path)
    with pytest.raises(OodlibError, match=re.escape(message) + ".*Train again."):
        files.read_sealed(path, "flow", "Train again.")


def test_a_lock_that_is_held_is_not_given_twice(tmp_path: Path) -> None:
    with files.locked(tmp_path / "a.lock") as first, files.locked(tmp_path / "a.lock", 0) as second:
        assert first and not second


def test_the_key_ignores_the_order_of_a_mapping_only() -> None:
    assert files.key_of({"a": 1, "b": [2, 3]}) == files.key_of({"b": [2, 3], "a": 1})
    assert files.key_of({"a": 1, "b": [2, 3]}) != files.key_of({"a": 1, "b": [3, 2]})
