"""`oodlib score` on small images with a tiny timm network: the CSV, reuse, and refusals."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from oodlib import FeatureBank, OodlibError, create
from oodlib.apply import command, inputs, score_csv
from oodlib.features.extract import extract, stream
from oodlib.files import write_json
from oodlib.metrics import threshold
from oodlib.models import FastConvNet, shipped

TAG, CLASSES = "test_resnet.r160_in1k", 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Random three-class weights, and small images in fit/ (by class), id/ and new/."""
    root = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(TAG, num_classes=CLASSES)
    save_file(model.state_dict(), root / "net.safetensors")
    rng = np.random.default_rng(0)
    for folder, count in (("fit/a", 6), ("fit/b", 6), ("fit/c", 6), ("id", 10), ("new", 5)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(
                root / folder / f"im {i}.png"
            )
    return root


@pytest.fixture
def score(made, tmp_path):
    """Run the command on the made network; gives the rows of the CSV, and keeps the exit code."""

    def run(*arguments, images=made / "new"):
        output = tmp_path / "out" / "scores.csv"
        run.code = command.main(
            [
                "--model",
                TAG,
                "--weights",
                str(made / "net.safetensors"),
                "--num-classes",
                str(CLASSES),
                "--images",
                str(images),
                "--output",
                str(output),
                "--cache",
                str(tmp_path / "cache"),
                "--device",
                "cpu",
                "--workers",
                "0",
                *map(str, arguments),
            ]
        )
        with open(output, newline="") as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt a call behind its first four safe rows; later calls also write four at a time."""
    monkeypatch.setattr(inputs, "SHARD", 4)

    def run(call):
        def interrupt(*arguments):
            write_json(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(score_csv, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                call()

    return run


def values(rows):
    return np.array([float(row["score"]) for row in rows])


def bank(made, folder):
    model, transform = command.load_network(
        TAG, weights=str(made / "net.safetensors"), num_classes=CLASSES
    )
    images = inputs.open_images(made / folder, transform)
    return extract(
        model,
        [(torch.stack([x for x, _ in images]), torch.from_numpy(images.labels))],
        device="cpu",
    )


def test_weights_file_is_the_one_that_is_used(made):
    model, _ = command.load_network(TAG, weights=str(made / "net.safetensors"), num_classes=CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = timm.create_model(TAG, num_classes=CLASSES).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_scores_are_the_detectors_and_paths_open(made, score):
    rows = score("--detector", "energy")
    assert [row["path"] for row in rows] == [str(made / "new" / f"im {i}.png") for i in range(5)]
    np.testing.assert_allclose(values(rows), create("energy").score(bank(made, "new")), rtol=1e-5)
    assert {row["decision"] for row in rows} == {""}


def test_decision_follows_the_threshold_on_id_images(made, score):
    rows = score("--detector", "max_logit", "--id-images", made / "id", "--tpr", "0.5")
    limit = threshold(create("max_logit").score(bank(made, "id")), tpr=0.5)
    assert [row["decision"] for row in rows] == [
        "OOD" if value > limit else "ID" for value in values(rows)
    ]


def test_detector_that_learns_is_fitted(made, score):
    rows = score("--detector", "knn", "-p", "k", "3", "--fit-images", made / "fit")
    expected = create("knn", k=3).fit(bank(made, "fit")).score(bank(made, "new"))
    np.testing.assert_allclose(values(rows), expected, rtol=1e-4)


def test_saved_detector_gives_the_same_file(made, score, tmp_path):
    kept = tmp_path / "kept.safetensors"
    first = score(
        "--detector",
        "mahalanobis",
        "--fit-images",
        made / "fit",
        "--id-images",
        made / "id",
        "--save-detector",
        kept,
    )
    assert score("--detector-file", kept) == first
    assert {row["decision"] for row in first} <= {"ID", "OOD"}


def test_saved_detector_of_another_network_is_refused(made, score, tmp_path):
    kept = tmp_path / "kept.safetensors"
    score("--save-detector", kept)
    other = timm.create_model(TAG, num_classes=CLASSES)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(OodlibError, match=r"fitted on a network with weights .* this one has"):
        score("--detector-file", kept, "--weights", tmp_path / "other.safetensors")


def test_list_with_and_without_labels(made, score):
    (made / "list.txt").write_text("new/im 0.png\nnew/im 1.png 7\n\n")
    rows = score(images=made / "list.txt")
    np.testing.assert_array_equal(values(rows), values(score())[:2])


def test_one_image(made, score):
    assert len(score(images=made / "new" / "im 0.png")) == 1


def test_second_run_reads_features_of_fit_and_id_images_from_the_cache(made, score, monkeypatch):
    arguments = (
        "--detector",
        "knn",
        "-p",
        "k",
        "3",
        "--fit-images",
        made / "fit",
        "--id-images",
        made / "id",
    )
    first, passes = score(*arguments), []

    def count(*arguments, **options):
        passes.append(arguments)
        return stream(*arguments, **options)

    monkeypatch.setattr(sys.modules["oodlib.features.extract"], "stream", count)
    assert score(*arguments) == first and not passes


def test_memory_holds_two_shards_whatever_the_number_of_images(made, score, tmp_path, monkeypatch):
    """Rows of all banks that are alive while a shard is scored."""
    monkeypatch.setattr(inputs, "SHARD", 3)
    original, alive, held = FeatureBank.__init__, weakref.WeakSet(), []

    def remember(self, *arguments, **values):
        original(self, *arguments, **values)
        alive.add(self)

    monkeypatch.setattr(FeatureBank, "__init__", remember)
    original_score = command.Detector.score

    def measure(self, bank):
        held.append(sum(len(b) for b in alive))
        return original_score(self, bank)

    monkeypatch.setattr(command.Detector, "score", measure)
    most = {}
    for n in (12, 48):
        (tmp_path / "list.txt").write_text(f"{made / 'new' / 'im 0.png'}\n" * n)
        held.clear()
        assert len(score("--batch-size", 3, images=tmp_path / "list.txt")) == n
        most[n] = max(held)
    assert 3 <= most[12] == most[48] <= 6


def test_an_interrupted_run_goes_on_behind_its_safe_rows(
    made, score, tmp_path, monkeypatch, capsys
):
    arguments = {"images": made / "fit"}  # 18 images
    monkeypatch.setattr(inputs, "SHARD", 4)
    whole = score("--batch-size", 4, **arguments)
    (tmp_path / "out" / "scores.csv").unlink()
    original, seen = command.Detector.score, []

    def interrupt(self, bank):
        seen.append(len(bank))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, bank)

    with monkeypatch.context() as patch:
        patch.setattr(command.Detector, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score("--batch-size", 4, **arguments)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scores.csv.part",
        "scores.csv.part.json",
    ]
    with open(tmp_path / "out" / "scores.csv.part", "ab") as file:
        file.write(b"half a row")  # what a kill in the middle of a write leaves
    monkeypatch.setattr(
        command.Detector,
        "score",
        lambda self, bank: (seen.append(len(bank)), original(self, bank))[1],
    )
    seen.clear()
    assert score("--batch-size", 4, **arguments) == whole
    assert "Resuming after the 8 rows" in capsys.readouterr().out and sum(seen) == 18 - 8
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scores.csv"]


@pytest.mark.parametrize("change", ["detector", "image"])
def test_a_run_with_another_detector_or_image_starts_again(
    made, score, tmp_path, interrupted, capsys, change
):
    shutil.copytree(made / "fit", tmp_path / "some")
    interrupted(lambda: score("--batch-size", 4, images=tmp_path / "some"))
    if change == "image":
        shutil.copy(made / "new" / "im 1.png", tmp_path / "some" / "a" / "im 1.png")
    detector = "energy" if change == "detector" else "msp"
    rows = score("--batch-size", 4, "--detector", detector, images=tmp_path / "some")
    assert len(rows) == 18 and "Resuming" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "knn"], "--fit-images"),
        (
            ["--detector", "mahalanobis", "--fit-images", "id"],
            "one folder for each of the model's 3 classes",
        ),
        (["--detector-file", "x", "--detector", "knn"], "brings a fitted detector. Omit"),
        (["--id-images", "nowhere"], "nowhere is neither a folder nor a file"),
        (["--detector-file", "nowhere"], "there is no file"),
        (["--output", "id"], "id is not a regular file"),
        (["--output", "net.safetensors/scores.csv"], "--output .* cannot be written"),
        (["--save-detector", "net.safetensors/detector"], "--save-detector .* cannot be written"),
        (["--output", "id" * 200], "File name too long.* Check the path"),
        (["--cache", "net.safetensors"], "--cache .* cannot be written"),
        (["--tpr", "95"], "--tpr must lie in"),
        (["--batch-size", "0"], "--batch-size must be >= 1"),
        (["--workers", "-1"], "--workers >= 0"),
        (["--device", "zz"], "device zz cannot be used"),
        (["--images", ""], "path is empty"),
        (["--detector", "knn", "-p", "k", "abc"], "k must be of type int"),
    ],
)
def test_bad_arguments(made, score, arguments, message):
    with pytest.raises(OodlibError, match=message):
        score(*(made / part if part.startswith(("id", "net.")) else part for part in arguments))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def transform(picture): raise ValueError('first line\\nlast')",
            r"\(ValueError: first line\)",
        ),
        (
            "def transform(picture): return picture",
            r"did not pass through the transform and the model \(TypeError",
        ),
        (
            "def transform(picture): return torch.zeros(2, 2)",
            r"the transform and the model \(RuntimeError",
        ),
    ],
)
def test_transform_that_fails_is_one_line(made, tmp_path, code, message, workers):
    (tmp_path / "own_net.py").write_text(
        f"import torch\n{code}\ndef make():\n    return torch.nn.Sequential("
        "torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), "
        "torch.nn.Linear(2, 2)), transform\n"
    )
    with pytest.raises(OodlibError, match=message) as caught:
        command.main(
            [
                "--model",
                f"{tmp_path / 'own_net.py'}:make",
                "--images",
                str(made / "new"),
                "--workers",
                workers,
                "--output",
                str(tmp_path / "out.csv"),
                "--device",
                "cpu",
            ]
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "out.csv").exists()


def test_interrupted_command_goes_on_and_writes_the_csv_of_one_run(made, tmp_path, capsys):
    """The first run hangs behind image 600, so that SIGINT meets it after 512 safe rows."""
    (tmp_path / "hanging_net.py").write_text(
        "import os, signal, time, numpy, torch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "seen = []\n"
        "def transform(picture):\n"
        "    seen.append(1)\n"
        "    time.sleep(60 if 'HANG' in os.environ and len(seen) > 600 else 0)\n"
        "    return torch.from_numpy(numpy.asarray(picture, dtype='float32') / 255)\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Flatten(), torch.nn.Linear(24 * 20 * 3, 3)\n"
        "    return torch.nn.Sequential(*layers), transform\n"
    )
    (tmp_path / "list.txt").write_text(
        "".join(f"{made / 'new'}/im {i % 5}.png\n" for i in range(700))
    )
    asked = [
        "--model",
        f"{tmp_path / 'hanging_net.py'}:make",
        "--images",
        str(tmp_path / "list.txt"),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--output",
    ]
    once = subprocess.Popen(
        [sys.executable, "-m", "oodlib", "score", *asked, str(tmp_path / "a.csv")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HANG": "1"},
    )
    while not (tmp_path / "a.csv.part.json").exists() and once.poll() is None:
        time.sleep(0.02)
    once.send_signal(signal.SIGINT)
    errors = once.communicate(timeout=30)[1]
    assert once.returncode == 130 and "Interrupted." in errors and "Traceback" not in errors
    assert not (tmp_path / "a.csv").exists()
    for name in ("a.csv", "b.csv"):
        command.main([*asked, str(tmp_path / name)])
    assert capsys.readouterr().out.count("Resuming after the 512 rows") == 1
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_full_disk_is_one_error_that_says_so(score, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_csv.os, "fsync", full)
    with pytest.raises(OodlibError, match=r"No space left on device.* the free disk space"):
        score()


def test_a_run_with_another_ood_prototype_starts_again(made, score, interrupted, capsys):
    """It is left out of the detector's repr, being too long for it."""

    def run(value):
        return score(
            "--detector",
            "grood",
            "-p",
            "ood_prototype",
            [value] * 96,
            "-p",
            "bank_filter",
            "all",
            "--fit-images",
            made / "fit",
            "--batch-size",
            4,
            images=made / "fit",
        )

    interrupted(lambda: run(0.0))
    run(1.0)
    assert "Resuming" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_images_that_cannot_be_decoded_are_named_and_the_others_are_scored(
    made, score, tmp_path, capsys, workers
):
    shutil.copytree(made / "new", tmp_path / "mixed")
    for name in ("a cut.jpg", "im 2 cut.png"):
        (tmp_path / "mixed" / name).write_bytes(b"\xff\xd8\xff")
    rows = score("--workers", workers, "--detector", "energy", images=tmp_path / "mixed")
    assert [
        i for i, row in enumerate(rows) if row["decision"] == "unreadable" and row["score"] == ""
    ] == [0, 3]
    np.testing.assert_allclose(
        values(rows[i] for i in (1, 2, 4, 5, 6)),
        create("energy").score(bank(made, "new")),
        rtol=1e-5,
    )
    shown = capsys.readouterr()
    assert (
        "5 images scored with energy" in shown.out
        and "2 of 7 images cannot be decoded" in shown.err
    )
    assert score.code == 1


def test_images_that_cannot_be_decoded_are_counted_over_an_interruption(
    made, score, interrupted, tmp_path, capsys
):
    shutil.copytree(made / "new", tmp_path / "mixed")
    for name in ("im 1.png", "im 4.png"):  # one in the safe rows, one behind them
        (tmp_path / "mixed" / name).write_bytes(b"")

    def run():
        return score("--batch-size", 4, images=tmp_path / "mixed")

    interrupted(run)
    assert [row["decision"] for row in run()] == ["", "unreadable", "", "", "unreadable"]
    shown = capsys.readouterr()
    assert (
        "Resuming after the 4 rows" in shown.out and "2 of 5 images cannot be decoded" in shown.err
    )


@pytest.mark.parametrize("workers", ["0", "1"])
def test_no_csv_is_left_where_no_image_can_be_decoded(made, score, tmp_path, workers):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(OodlibError, match="bad: none of the 1 images can be decoded") as caught:
        score("--workers", workers, images=tmp_path / "bad")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_image_among_the_id_images_is_named(made, score, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(OodlibError, match=r"cut\.jpg: the image cannot be decoded"):
        score("--id-images", tmp_path / "bad")


def test_file_that_is_no_list(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\xff\x00")
    with pytest.raises(OodlibError, match="neither an image"):
        inputs.open_images(tmp_path / "a.bin", lambda picture: picture)


def test_suite_network_sees_32_pixels_normalised(monkeypatch):
    net = FastConvNet(2, widths=(4, 4, 4))
    trained = shipped.Trained(net, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), {})
    seeds = []
    monkeypatch.setattr(
        shipped, "load_trained", lambda name, *, seed: (seeds.append(seed), trained)[1]
    )
    model, transform = command.load_network("cifar10_fast:2")
    assert seeds == [2] and isinstance(model, nn.Module)
    x = transform(Image.new("RGB", (100, 64), (255, 0, 0)))
    assert (
        x.shape == (3, 32, 32)
        and x[0].unique().tolist() == [2.0]
        and x[1].unique().tolist() == [-2.0]
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar10_fast:x", {}),
        ("resnet20_cifar10:1", {}),
        ("resnet20_cifar10", {"weights": "w.pth"}),
    ],
)
def test_wrong_network_names(name, options):
    with pytest.raises(OodlibError, match="load_network: "):
        command.load_network(name, **options)
