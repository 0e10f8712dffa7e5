"""What is committed stays within its budget: megabytes of binary artefacts and of reference
results.
"""

import subprocess
from pathlib import Path

import pytest

from oodlib.suite.verify import LIMIT_MB

ROOT = Path(__file__).resolve().parents[1]
BUDGET = {"data/checkpoints": 40.0, "figures/reference": LIMIT_MB}  # of the 80 megabytes in all
BINARY = {".safetensors", ".npz", ".npy", ".parquet", ".jpg", ".jpeg", ".png", ".pt", ".bin"}


def committed(*folders: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


@pytest.mark.parametrize("folder", BUDGET)
def test_a_folder_stays_within_its_budget(folder: str) -> None:
    assert megabytes(committed(folder)) <= BUDGET[folder]


def test_binary_artefacts_take_80_megabytes_at_most() -> None:
    assert megabytes([path for path in committed() if path.suffix in BINARY]) <= 80


def test_weights_lie_beside_their_provenance() -> None:
    alone = [
        path.name
        for path in committed("data")
        if path.suffix == ".safetensors"
        and not path.with_suffix(".json").exists()
        and not (path.parent / "run.json").exists()
    ]
    assert not alone
