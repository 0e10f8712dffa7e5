"""Sweeps: what is done stays done, what is killed or fails is redone, plan and status need neither
weights nor data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sweep_pool
from PIL import Image
from sweep_pool import ROWS, TinySource, check_scenario, tiny_jobs
from test_main import OUTSIDE_MAKE
from torch import nn

from oodlib import FeatureBank, OodlibError, extract, metrics
from oodlib.__main__ import main
from oodlib.data import imagenet
from oodlib.data.imagenet import imagenet_split
from oodlib.files import write_json
from oodlib.models.small_vit import NETWORKS
from oodlib.studies.vits import imagenet_models
from oodlib.studies.vits.pool_table import PoolRow, read_pool, write_pool
from oodlib.studies.vits.reference import reference
from oodlib.studies.vits.score_table import SCORES, score_table
from oodlib.studies.vits.sweep import jobs as sweep
from oodlib.studies.vits.sweep import models_and_images
from oodlib.studies.vits.sweep.cost import describe_plan, estimate, network_cost
from oodlib.studies.vits.sweep.jobs import (
    Job,
    describe,
    make_jobs,
    prepare,
    run_job,
    state,
    try_lock,
)
from oodlib.studies.vits.sweep.launch import Resources, _submit_arrays, run_submitit, run_sweep
from oodlib.studies.vits.sweep.models_and_images import ImagenetSource, TrainedSource, find_source
from oodlib.studies.vits.sweep.tables import collect, make_table, read_record
from oodlib.workspace import root


@pytest.fixture
def children_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(root())]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "submitit-local"])
def test_a_rerun_does_only_what_was_killed_or_failed(
    where: str, tmp_path: Path, children_find_the_tests: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if where != "local":
        pytest.importorskip("submitit", reason="needs submitit (pip install 'oodlib[sweep]')")
    check_scenario(tmp_path, where, Resources(at_once=2, timeout=5), capsys)


@pytest.fixture
def swept(tmp_path: Path) -> list[Job]:
    """A finished sweep of one model, done in this process."""
    jobs, absent = prepare(tiny_jobs(tmp_path, ["good"]))
    assert not absent and [run_job(job) for job in jobs] == ["done"] * 3
    return jobs


def test_a_killed_job_leaves_nothing_that_counts_and_is_redone(
    tmp_path: Path, killed_process
) -> None:
    killed_process("sweep_pool", f"run_until_killed({str(tmp_path)!r})")
    (job,) = (job for job in prepare(tiny_jobs(tmp_path))[0] if job.name == "killed/odd")
    assert state(job) == ("missing", "")
    (part,) = job.folder.glob(".odd.*.part")
    assert (part / "features.npy").exists() and not (
        job.folder / "odd"
    ).exists()  # it was in the middle
    assert run_job(job) == "done" and not part.exists()
    assert len(FeatureBank.load(job.folder / "odd")) == ROWS["odd"]


def test_the_table_is_that_of_one_process(swept: list[Job]) -> None:
    job, source = swept[0], swept[0].source
    assert isinstance(source, TinySource)
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "device": "cpu", "progress": False}
    banks = {
        split: extract(source.open(job.row, split).model, source.images(split), **options)
        for split in ROWS
    }
    expected = score_table(reference([banks.pop("fit")], 3, per_class=20), banks)
    found = pd.read_parquet(job.folder / "scores.parquet")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)
    summary = (
        pd.DataFrame(read_record(job.folder / "scores.json")["summary"])
        .set_index("score")
        .loc["msp"]
    )
    ids, odd = (expected[expected["set"] == name] for name in ("id", "odd"))
    assert summary["accuracy"] == pytest.approx(banks["id"].accuracy)
    assert summary["fpr_pooled"] == pytest.approx(
        metrics.fpr_at_tpr(ids["msp"], odd["msp"], positive="id")
    )
    assert summary["auroc_pooled"] == pytest.approx(metrics.auroc(ids["msp"], odd["msp"]))
    assert summary["auroc"] == pytest.approx(
        np.mean([metrics.auroc(ids["msp"], part["msp"]) for _, part in odd.groupby("label")])
    )


def test_a_bank_without_logits_gives_them_again(swept: list[Job]) -> None:
    assert not list(swept[0].output.rglob("logits.npy"))
    bank = FeatureBank.load(swept[1].folder / "id")
    source = swept[1].source
    assert isinstance(source, TinySource)
    whole = extract(
        source.open(swept[1].row, "id").model,
        source.images("id"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        device="cpu",
        progress=False,
    )
    np.testing.assert_allclose(bank.logits, whole.logits, atol=1e-5)
    assert bank.accuracy == whole.accuracy


@pytest.mark.parametrize(
    "change",
    [
        {"row": PoolRow(name="good", network="good", seed=0, ft_lr=0.1)},
        {"inputs": ("other", "files")},
        {"source": TinySource(Path(), shift=1)},
    ],
)
def test_another_request_or_other_inputs_are_not_done(swept: list[Job], change: dict) -> None:
    assert state(swept[1]) == ("done", "")
    assert state(replace(swept[1], **change)) == ("missing", "")


def test_another_version_is_not_done(swept: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "version", lambda name: "0.0.0")
    assert state(replace(swept[1])) == ("missing", "")


def test_status_needs_no_inputs(swept: list[Job]) -> None:
    assert state(replace(swept[1], inputs=())) == ("done", "")


def test_a_job_that_is_running_elsewhere_is_left_alone(tmp_path: Path) -> None:
    job = prepare(tiny_jobs(tmp_path, ["good"]))[0][1]
    with try_lock(job) as mine:
        assert mine and state(job) == ("running", "")
        assert run_job(job) == "running"
        assert f"{'id':5}{0:>9}{1:>9}{0:>9}{0:>9}" in describe([job])
    assert state(job) == ("missing", "")


def test_all_features_of_the_training_images_are_kept_on_request(tmp_path: Path) -> None:
    job = prepare(
        make_jobs(
            [PoolRow(name="good", network="good")],
            TinySource(tmp_path),
            tmp_path,
            all_features=True,
        )
    )[0][0]
    assert run_job(job) == "done"
    assert (
        len(FeatureBank.load(job.folder / "fit")) == ROWS["fit"]
        and (job.folder / "fit.safetensors").is_file()
    )


def test_a_set_that_is_not_at_hand_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "absent-odd").touch()
    jobs, absent = prepare(tiny_jobs(tmp_path))
    assert absent == {"odd": "odd: the folder is missing."} and {job.split for job in jobs} == {
        "fit",
        "id",
    }


def test_a_damaged_result_fails_its_table_alone(swept: list[Job]) -> None:
    job = swept[2]
    (job.folder / "scores.json").unlink()
    with open(job.folder / "odd" / "features.npy", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x02\x03\x04")
    assert make_table(job.folder, tuple(ROWS)) == "failed"
    assert collect(job.output, ["good"], tuple(ROWS)) is None
    assert "good/scores: OodlibError: FeatureBank.load" in describe(swept)


def test_splits_of_two_networks_make_no_table(swept: list[Job]) -> None:
    write_json(
        swept[2].sidecar, {**read_record(swept[2].sidecar), "weights": "others", "finished": 0}
    )
    assert make_table(swept[0].folder, tuple(ROWS)) == "failed"
    assert "went through different weights" in describe(swept)


def test_a_table_is_made_once_and_again_after_a_new_result(swept: list[Job]) -> None:
    table = swept[0].folder / "scores.parquet"
    first = table.stat().st_mtime_ns
    assert make_table(swept[0].folder, tuple(ROWS)) == "done" and table.stat().st_mtime_ns == first
    swept[2].sidecar.unlink()
    assert run_job(swept[2]) == "done" and table.stat().st_mtime_ns > first


def test_shards_take_every_job_once_and_a_part_of_the_long_ones(tmp_path: Path) -> None:
    rows = [PoolRow(name=f"m{i}", network="m") for i in range(8)]
    jobs = make_jobs(rows, TinySource(tmp_path), tmp_path)
    shards = [jobs[i::3] for i in range(3)]
    assert sorted(job.name for shard in shards for job in shard) == sorted(job.name for job in jobs)
    assert {sum(job.split == "fit" for job in shard) for shard in shards} == {2, 3}


# the ImageNet pools


@pytest.fixture
def imagenet_source(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImagenetSource:
    """The tree of noise JPEGs, a network with two classes, and two pictures of each unit test."""
    from torchvision import transforms

    def split(name: str, data: Path, transform=None):
        return imagenet_split(name, data, transform, n=2 if name == "unit_tests" else None)

    monkeypatch.setattr(imagenet, "imagenet_split", split)
    transform = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    net = sweep_pool.TinyNet(0, tmp_path / "none")
    net.fc = nn.Linear(6, 2)
    monkeypatch.setattr(
        imagenet_models, "load_tagged", lambda row, weights: (net.eval(), transform)
    )
    return ImagenetSource(tree, None, workers=0)


def test_an_imagenet_model_from_images_to_summary(
    imagenet_source: ImagenetSource, tmp_path: Path
) -> None:
    rows = [PoolRow(name="net", network="vit", weights="net.npz")]
    jobs, absent = prepare(make_jobs(rows, imagenet_source, tmp_path, device="cpu"))
    assert not absent and [run_job(job) for job in jobs] == ["done"] * 8
    summary = pd.read_csv(collect(tmp_path, ["net"], imagenet_source.splits()))
    assert set(summary["set"]) == {
        "ninco",
        "ssb-hard",
        "inaturalist",
        "textures",
        "openimage-o",
        "unit_tests",
    }
    classes = summary[summary["score"] == "knn"].set_index("set")["classes"]
    assert classes["ninco"] == 2 and classes["openimage-o"] == 2 and classes["unit_tests"] == 17
    assert set(summary["score"]) == set(SCORES)


def test_the_splits_are_those_of_the_imagenet_models() -> None:
    assert models_and_images.IMAGENET == imagenet.SPLITS


def test_a_manifest_is_of_contents_not_times(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(tree, copy, copy_function=shutil.copyfile)
    ours, theirs = (ImagenetSource(folder, None, 0) for folder in (tree, copy))
    assert ours.manifest("ninco") == theirs.manifest("ninco")
    path = next((copy / "images_largescale" / "ninco").rglob("*.jpg"))
    Image.new("RGB", (8, 8)).save(path)
    assert ours.manifest("ninco") != theirs.manifest("ninco")


def test_other_weights_under_the_same_name_are_other_weights(tmp_path: Path) -> None:
    source, row = (
        ImagenetSource(None, tmp_path, 0),
        PoolRow(name="net", network="vit", weights="net.npz"),
    )
    assert source.weights(row) == ""
    (tmp_path / "net.npz").write_bytes(bytes(5_000_000))
    first = source.weights(row)
    (tmp_path / "net.npz").write_bytes(bytes(4_999_999) + b"\x01")
    assert first and source.weights(row) not in ("", first)


# plan and command line


def test_the_plan_of_the_imagenet_pool(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert main(["sweep", "--pool", "imagenet", "--dry-run"]) == 0
    assert time.process_time() - started < 30  # of a CPU, however busy it is
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert total.split()[1:3] == ["296", "2,368"]


def test_totals_add_up_and_follow_the_device(tmp_path: Path) -> None:
    rows = read_pool("imagenet")
    jobs = make_jobs(rows, ImagenetSource(None, None, 8), tmp_path)
    slow, fast = (
        estimate(jobs, tflops=tflops, cpus=cpus) for tflops, cpus in ((1, 8), (2, 10_000))
    )
    assert slow["models"].sum() == len(rows) and slow["jobs"].sum() == len(jobs)
    assert slow["images"].sum() == len(rows) * sum(jobs[0].source.counts().values())
    np.testing.assert_allclose(slow["hours"], 2 * fast["hours"])  # bound by computing
    decoding = estimate(jobs, tflops=1e6, cpus=1)
    np.testing.assert_allclose(decoding["hours"], decoding["images"] / 150 / 3600)  # by decoding
    whole = estimate(make_jobs(rows, jobs[0].source, tmp_path, all_features=True), tflops=1, cpus=8)
    features = whole["disk"].sum() - slow["disk"].sum()
    assert features == pytest.approx(1_281_167 * 4 * (224 * 768 + 72 * 512), rel=0.01)


def test_operations_are_those_of_the_formula() -> None:
    n, d, depth = 197, 768, 12
    blocks = depth * (n * (4 * d * d + 8 * d * d) + 2 * n * n * d)
    cost = network_cost("vit_base_patch16_224", 224, "raw")
    assert cost.flops == pytest.approx(2 * (blocks + 196 * 768 * d + d * 1000), rel=1e-3)
    assert (cost.width, cost.classes) == (768, 1000)


def test_the_plan_of_a_pool_trained_here(tmp_path: Path) -> None:
    source, networks = TrainedSource("cifar", 100, 50, 2), list(NETWORKS)
    text = describe_plan(
        make_jobs([PoolRow(name=name, network=name) for name in networks[:2]], source, tmp_path)
    )
    images = 2 * (100 + 50 + 2 * 98 + 17 * models_and_images._N_UNIT)
    assert f"{images:,}" in text and "CPU h" in text and "Training" in text


def test_status_imports_no_torch(tmp_path: Path) -> None:
    write_pool(
        tmp_path / "own.csv", [PoolRow(name="a", network="vit_base_patch16_224", weights="a.npz")]
    )
    arguments = [
        "sweep",
        "--status",
        "--pool",
        str(tmp_path / "own.csv"),
        "--output",
        str(tmp_path / "o"),
    ]
    code = (
        f"import sys; from oodlib.__main__ import main\nmain({arguments!r})\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["total", "0", "0", "0", "8"]
    assert not (tmp_path / "o").exists()  # looking leaves no trace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet*"], "no model of imagenet.csv is called 'resnet*'"),
        (["-p", "n_fit", "5"], "imagenet has no parameter 'n_fit'"),
        (["--where", "slurm", "--data-root", "/nowhere"], "the images of no split are available"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--pool", "imagenet", "--output", str(tmp_path), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--shard", "3/2"], ["--shard", "1"], ["--slurm", "account"]]
)
def test_misspelt_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--pool", "imagenet", *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_without_submitit_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(OodlibError, match=r"pip install 'oodlib\[sweep\]'"):
        run_submitit([], tmp_path, "slurm", Resources(), print)


def test_without_slurm_the_error_says_where_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="needs submitit (pip install 'oodlib[sweep]')")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OodlibError, match="no sbatch"):
        run_submitit([], tmp_path, "slurm", Resources(), print)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sweep_is_one_call() -> None:
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "sweep", "POOL=imagenet", "ARGS=--dry-run"],
        cwd=root(),
        env=OUTSIDE_MAKE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split() == [
        ".venv/bin/python",
        "-m",
        "oodlib",
        "sweep",
        "--pool",
        "imagenet",
        "--dry-run",
    ]


def test_an_array_is_no_larger_than_the_site_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Executor:
        def __init__(self) -> None:
            self.asked, self.arrays = {}, []

        def update_parameters(self, **given):
            self.asked = given

        def map_array(self, task, jobs):
            self.arrays.append((len(jobs), self.asked))
            return [
                type("Handle", (), {"job_id": f"{70 + len(self.arrays)}_{i}"})
                for i in range(len(jobs))
            ]

    monkeypatch.setattr(
        "oodlib.studies.vits.sweep.launch._ask", lambda command: "MaxArraySize            = 4\n"
    )
    jobs = make_jobs(
        [PoolRow(name=f"m{i}", network="m") for i in range(3)], TinySource(tmp_path), tmp_path
    )
    executor = Executor()
    pairs = list(_submit_arrays(executor, jobs, Resources(at_once=2, slurm={"account": "a"})))
    assert [job for job, _ in pairs] == jobs and [size for size, _ in executor.arrays] == [4, 4, 1]
    extra = [asked["slurm_additional_parameters"] for _, asked in executor.arrays]
    assert extra == [
        {"account": "a"},
        {"account": "a", "dependency": "afterany:71"},
        {"account": "a", "dependency": "afterany:72"},
    ]


def test_the_source_follows_from_the_name_of_the_pool() -> None:
    options = {"data": None, "weights": None, "workers": 1, "sizes": {}}
    assert isinstance(find_source(Path("imagenet_timm.csv"), **options), ImagenetSource)
    cifar = find_source(Path("cifar.csv"), **(options | {"sizes": {"n_test": "7"}}))
    assert isinstance(cifar, TrainedSource) and cifar.n_test == 7 and cifar.n_fit > 7
    with pytest.raises(OodlibError, match="n_ood must be a number of images, got 'few'"):
        find_source(Path("cifar.csv"), **(options | {"sizes": {"n_ood": "few"}}))


def test_a_sweep_that_is_done_starts_nothing(
    swept: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oodlib.studies.vits.sweep.launch.run_local", None)
    assert run_sweep(swept, swept[0].output, "local", Resources()) == 0
