"""Every notebook runs: the solved copy as a whole, the student copy up to its open exercises and no
further.
"""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import save_file

from oodlib.claims import load_claims
from oodlib.data import embedded
from oodlib.files import locked
from oodlib.studies.vits.pool_table import PoolRow, write_pool
from oodlib.suite.course import student_copy
from oodlib.suite.notebooks import find_notebooks, list_notebooks
from oodlib.suite.runner import Options, make_plans, run_all
from oodlib.workspace import root

NOTEBOOKS = list_notebooks()
# of the core: code cells (a method, NNa_<paper>, has fewer), lines of the longest one, figures
MAX_CORE_CELLS, MAX_METHOD_CELLS, MAX_FIGURES = 32, 25, 8
MAX_LINES, MAX_METHOD_LINES = 25, 15


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root for what runs write, one for all test processes: what one has extracted or trained no
    other repeats. Same notebooks, data and package, other figures.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "project"
    with locked(folder.with_suffix(".lock")):
        for name in ("notebooks", "data", "oodlib", "requirements.lock", "pyproject.toml"):
            folder.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(root() / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_headless_in_the_smoke_profile(
    path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(path.stem, project, monkeypatch, profile="smoke")
    assert {"results.csv", "claims.json", "provenance.json"} <= {p.name for p in folder.iterdir()}


def run(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, *, profile: str, **extra: str
) -> Path:
    """Run a notebook or both halves of one below ``project``, with other parameters in a folder of
    their own; returns the folder of the last.
    """
    monkeypatch.setenv("OODLIB_ROOT", str(project))
    output = project / "figures" / "other" if extra else None
    options = Options(profile=profile, seed=0, device="cpu", extra=extra, output=output)
    plans, _ = make_plans(find_notebooks(name), options)
    assert run_all(plans, options) == []
    return plans[-1].folder


def reproduced(folder: Path) -> set[str]:
    claims = json.loads((folder / "claims.json").read_text())
    return {claim["id"] for claim in claims if claim["verdict"] == "reproduced"}


# papers of the paper profile, and which of their verdicts a random network may earn: identities
PAPER = {
    "gradnorm": {"gradnorm/C9", "gradnorm/C10"},
    "opnp": {"opnp/C8", "opnp/C10"},
    "grood": {"grood/I1", "grood/I2"},
    "scoreboard": set(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_paper_profile_runs_on_a_miniature_imagenet_tree(
    name: str, project: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    # those the tree has: some methods need each
    classes = {} if name == "gradnorm" else {"num_classes": "2"}
    network = timm.create_model(
        "test_resnet.r160_in1k", num_classes=int(classes.get("num_classes", 1000))
    )
    torch.save(network.state_dict(), tmp_path / "random.pth")
    extra = {
        "networks": "[test_resnet.r160_in1k]",
        "data_root": str(tree),
        "weights": str(tmp_path / "random.pth"),
        "expected_accuracy": "0.0",
        "n_boot": "20",
        **classes,
    }
    folder = run(name, project, monkeypatch, profile="paper", **extra)
    assert reproduced(folder) == PAPER[name]


@pytest.mark.slow
def test_the_paper_profile_of_flows_runs_and_small_flows_reproduce_only_identities(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {
        "networks": "[latin_glow:0, textures_glow:0]",
        "n_boot": "10",
        "n_layers": "30",
        "n_samples": "30",
    }
    folder = run("immature", project, monkeypatch, profile="paper", **extra)
    assert reproduced(folder) == {"immature_glow/C10"}


@pytest.mark.slow
def test_the_paper_profile_of_the_vit_study_runs_on_made_weights(
    project: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    data = tmp_path / "data"
    shutil.copytree(tree, data)
    train = data / "images_largescale" / "imagenet_1k" / "train"
    picture = next(train.rglob("*.JPEG"))
    for label in range(2, 1000):  # the covariance needs an image of every class
        (train / f"n{label:04d}").mkdir()
        shutil.copy(picture, train / f"n{label:04d}" / "0.JPEG")
    pool = [
        PoolRow(
            name=f"net-{data_set}",
            network="test_vit.r160_in1k",
            weights=f"{data_set}.safetensors",
            pretraining=data_set,
            objective="sigmoid",
            weight_decay=0.1,
            ft_lr=0.01,
        )
        for data_set in ("in1k", "in21k")
    ]
    for seed, row in enumerate(pool):
        torch.manual_seed(seed)
        save_file(timm.create_model(row.network).state_dict(), tmp_path / row.weights)
    write_pool(tmp_path / "two.csv", pool)
    extra = {
        "networks": f"[{tmp_path / 'two.csv'}]",
        "data_root": str(data),
        "weights": str(tmp_path),
        "n_boot": "20",
        "sweep": str(tmp_path / "sweep"),
    }
    folder = run("vit", project, monkeypatch, profile="paper", **extra)
    claims = json.loads((folder / "claims.json").read_text())
    assert not [c["id"] for c in claims if c["verdict"].endswith("reproduced")]
    assert (tmp_path / "sweep" / "net-in21k" / "scores.json").exists()


@pytest.mark.slow
def test_your_own_model_needs_no_more_than_unknown_images(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, image in enumerate(embedded("greek", n=12).images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    extra = {"model": "latin_fast", "unknown_folder": str(tmp_path)}
    folder = run("07", project, monkeypatch, profile="smoke", **extra)
    assert (folder / "extremes.png").exists() and not (folder / "class_order.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_student_copy_fails_only_where_an_exercise_is_open(
    path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OODLIB_ROOT", str(project))
    monkeypatch.delenv("OODLIB_OUTPUT", raising=False)
    notebook = nbformat.from_dict(student_copy(nbformat.read(path, as_version=4)))
    profile = yaml.safe_load((root() / "notebooks" / "profiles" / "smoke.yaml").read_text())
    values = {**profile["common"], **profile.get(path.stem, {})}
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    NotebookClient(
        notebook,
        timeout=600,
        allow_errors=True,
        kernel_name="python3",
        resources={"metadata": {"path": str(project / "notebooks")}},
    ).execute(env=dict(os.environ))
    errors = [
        o
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "error"
    ]
    exercises = {
        tag.split(":")[1]
        for c in notebook.cells
        for tag in c.metadata.get("tags", [])
        if "exercise:" in tag
    }
    assert {e.ename for e in errors} == {"NotImplementedError"}
    assert {e.evalue for e in errors} == exercises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_fits_a_lecture(path: Path) -> None:
    cells = [
        c
        for c in nbformat.read(path, as_version=4).cells
        if "appendix" not in c.metadata.get("tags", [])
    ]
    code = [c.source for c in cells if c.cell_type == "code"]
    method = re.match(r"\d+a_", path.stem)
    assert len(code) <= (MAX_METHOD_CELLS if method else MAX_CORE_CELLS)
    longest = max(len(c.splitlines()) for c in code)
    assert longest <= (MAX_METHOD_LINES if method else MAX_LINES)
    assert sum(len(re.findall(r"run\.figure\(", c)) for c in code) <= MAX_FIGURES


def test_a_paper_has_a_method_and_a_study_and_the_study_judges() -> None:
    halves = {path.stem for path in NOTEBOOKS if re.match(r"\d+[ab]_", path.stem)}
    methods = {name for name in halves if re.match(r"\d+a_", name)}
    assert {re.sub(r"^(\d+)a_", r"\1b_", name) for name in methods} <= halves
    assert {claim.notebook for claim in load_claims().values()} <= {p.stem for p in NOTEBOOKS}
    assert not any(load_claims(name) for name in methods)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_bare(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(
        not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"
    )
    assert notebook.metadata.kernelspec["name"] == "python3"
