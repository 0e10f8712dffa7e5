"""A user's network, feature files and labels: what is accepted, its results, every refusal."""

import csv
import importlib
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from torch.utils.data import DataLoader

from oodlib import FeatureBank, OodlibError, create
from oodlib.apply import command, inputs
from oodlib.apply.class_order import check_classes
from oodlib.apply.inputs import FeatureFile, open_images
from oodlib.apply.network import load_network
from oodlib.metrics import threshold

CODE = """
import numpy as np, torch
from torch import nn
def tensor(picture):
    return torch.from_numpy(np.array(picture.resize((4, 4)))).permute(2, 0, 1) / 255
def make():
    torch.manual_seed({seed})
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3)), tensor
def nothing():
    return nn.Linear(2, 2)
def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def own(tmp_path):
    """A user's file, and folders id/ and new/ of small images; gives the path of the file."""
    name = f"net_{tmp_path.name}"
    file = tmp_path / f"{name}.py"
    file.write_text(CODE.format(seed=0))
    rng = np.random.default_rng(0)
    for folder in ("id", "new"):
        (tmp_path / folder).mkdir()
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(
                tmp_path / folder / f"{i}.png"
            )
    yield file
    sys.modules.pop(name, None)  # of the test that imports it


def run(tmp_path, *arguments):
    command.main(
        [
            *map(str, arguments),
            "--output",
            str(tmp_path / "s.csv"),
            "--cache",
            str(tmp_path / "cache"),
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
    )
    with open(tmp_path / "s.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_function_in_a_file_is_scored_with_its_own_transform(own, tmp_path):
    rows = run(
        tmp_path,
        "--model",
        f"{own}:make",
        "--images",
        tmp_path / "new",
        "--id-images",
        tmp_path / "id",
        "--detector",
        "energy",
    )
    model, transform = load_network(f"{own}:make")
    with torch.no_grad():
        logits = {
            name: model(
                torch.stack([transform(Image.open(tmp_path / name / f"{i}.png")) for i in range(7)])
            )
            for name in ("id", "new")
        }
    scores = {name: -value.logsumexp(1).numpy() for name, value in logits.items()}
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores["new"], rtol=1e-5)
    limit = threshold(scores["id"])
    assert [row["decision"] for row in rows] == [
        "OOD" if score > limit else "ID" for score in scores["new"]
    ]


def test_a_function_in_an_importable_module(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    model, transform = load_network(f"{own.stem}:make")
    assert not model.training and transform(Image.new("RGB", (8, 8))).shape == (3, 4, 4)


def test_the_transform_is_known_by_the_same_name_in_every_run_until_its_file_changes(own):
    first = repr(load_network(f"{own}:make")[1])
    assert repr(load_network(f"{own}:make")[1]) == first
    own.write_text(CODE.format(seed=1))
    assert repr(load_network(f"{own}:make")[1]) != first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:nothing", r"must return \(model, transform\).*got Linear"),
        ("{file}:broken", "broken failed .*KeyError"),
        ("{file}:absent", "absent failed .*AttributeError"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("no_such_package.net:make", "failed .*ModuleNotFoundError"),
    ],
)
def test_functions_that_do_not_fit(own, name, message):
    with pytest.raises(OodlibError, match=message):
        load_network(name.format(file=own))


def test_options_of_timm_models_are_refused_for_functions(own):
    with pytest.raises(OodlibError, match="comes with its own weights"):
        load_network(f"{own}:make", num_classes=3)


def test_a_file_named_like_a_known_module_is_no_other_module(own, tmp_path):
    (tmp_path / "csv.py").write_text(CODE.format(seed=0))
    assert isinstance(load_network(f"{tmp_path / 'csv.py'}:make")[0], nn.Module)
    assert sys.modules["csv"] is csv


WITH_SIBLINGS = """
from torch import nn
import helper
class Crop:
    def __call__(self, picture):
        return helper.tensor(picture)
def make():
    import parts.late
    return nn.Sequential(nn.Flatten(), nn.Linear(parts.late.WIDTH, 3)), {transform}
"""


@pytest.fixture
def with_siblings(own, tmp_path):
    """A user's file with imports from beside it, where files have names of Python's modules."""

    def make(transform="Crop()"):
        own.write_text(WITH_SIBLINGS.format(transform=transform))
        (tmp_path / "helper.py").write_text(
            CODE + "class Own:\n    __call__ = staticmethod(tensor)\n"
        )
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / "late.py").write_text("WIDTH = 48\n")
        for name in ("json", "colorsys", "utils"):
            (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
        return own

    return make


def test_a_file_imports_what_lies_beside_it_and_leaves_nothing_behind(with_siblings):
    path, modules = [*sys.path], set(sys.modules)
    sys.modules.pop("colorsys", None)
    model, transform = load_network(f"{with_siblings()}:make")
    assert transform(Image.new("RGB", (8, 8))).shape == (3, 4, 4) and model[1].in_features == 48
    assert sys.path == path
    assert {name for name in set(sys.modules) - modules if not name.startswith("_own_")} == set()
    for name in ("helper", "parts", "utils"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_a_file_that_fails_leaves_nothing_behind(own, tmp_path):
    path, modules = [*sys.path], set(sys.modules)
    (tmp_path / "half.py").write_text("x = 1\n")
    own.write_text("import half\nraise KeyError('weights')\n")
    with pytest.raises(OodlibError, match=r"failed .*KeyError"):
        load_network(f"{own}:make")
    assert sys.path == path and set(sys.modules) == modules


def test_a_folder_that_is_on_the_path_stays_there(own, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{own.stem}_x.py").write_text("y = 1\n")
    own.write_text(f"import {own.stem}_x\n" + CODE.format(seed=0))
    before = [*sys.path]
    load_network(f"{own}:make")
    assert sys.path == before and sys.modules.pop(f"{own.stem}_x").y == 1


def test_a_changed_file_beside_the_model_changes_the_transforms_name(with_siblings, tmp_path):
    file = with_siblings()
    first = repr(load_network(f"{file}:make")[1])
    assert (
        first == repr(load_network(f"{file}:make")[1])
        and file.stem in first
        and "_own_" not in first
    )
    with open(tmp_path / "helper.py", "a") as text:
        text.write("more = 1\n")
    assert repr(load_network(f"{file}:make")[1]) != first


@pytest.mark.parametrize("transform", ["Crop()", "helper.tensor", "helper.Own()"])
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_worker_processes_find_the_transform(with_siblings, tmp_path, transform, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    found = load_network(f"{with_siblings(transform)}:make")[1]
    images = open_images(tmp_path / "new", found)
    batch, labels = next(
        iter(DataLoader(images, batch_size=7, num_workers=1, multiprocessing_context=start))
    )
    expected = torch.stack([found(images.picture(i)) for i in range(7)])
    assert torch.equal(batch, expected) and labels.tolist() == [-1] * 7


def test_a_file_of_the_same_name_in_another_folder_is_another_model(own, tmp_path):
    (tmp_path / "second").mkdir()
    second = tmp_path / "second" / own.name
    second.write_text(CODE.format(seed=1))
    weights = [load_network(f"{file}:make")[0][1].weight for file in (own, second, own)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_a_head_that_is_not_linear_is_one_clear_error(own, tmp_path):
    own.write_text(CODE.format(seed=0).replace("nn.Linear(6, 3))", "nn.Linear(6, 3), nn.ReLU())"))
    with pytest.raises(OodlibError, match="no linear layer gives the model's output"):
        run(tmp_path, "--model", f"{own}:make", "--images", tmp_path / "new")


@pytest.fixture
def arrays(blobs):
    """Of the blobs: feature file contents of fit, ID and new rows."""

    def of(bank):
        found = {
            "features": bank.features,
            "weight": bank.head.weight.astype(np.float32),
            "bias": bank.head.bias.astype(np.float32),
            "logits": bank.logits.astype(np.float32),
        }
        return found if bank.labels is None else found | {"labels": bank.labels}

    return dict(zip(("fit", "id", "new"), map(of, blobs), strict=True))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_feature_files_give_the_detectors_scores(blobs, arrays, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(inputs, "SHARD", 150)
    for name, values in arrays.items():
        values = {key: np.ascontiguousarray(value) for key, value in values.items()}
        np.savez(tmp_path / f"{name}.npz", **values) if suffix == ".npz" else save_file(
            values, tmp_path / f"{name}.safetensors"
        )
    new, fit, ids = (tmp_path / f"{name}{suffix}" for name in ("new", "fit", "id"))
    rows = run(
        tmp_path,
        "--images",
        new,
        "--fit-images",
        fit,
        "--id-images",
        ids,
        "--detector",
        "mahalanobis",
        "--save-detector",
        tmp_path / "kept",
    )
    train, _, ood = blobs
    detector = create("mahalanobis").fit(train)
    np.testing.assert_allclose(
        [float(row["score"]) for row in rows], detector.score(ood), rtol=1e-6
    )
    assert np.mean([row["decision"] == "OOD" for row in rows]) > 0.5
    assert rows[3]["path"] == f"{new}:3"
    assert run(tmp_path, "--images", new, "--detector-file", tmp_path / "kept") == rows


def test_logits_alone_do_for_methods_of_the_logits(arrays, blobs, tmp_path):
    np.savez(
        tmp_path / "new.npz", logits=arrays["new"]["logits"], paths=[f"p{i}" for i in range(400)]
    )
    rows = run(tmp_path, "--images", tmp_path / "new.npz", "--detector", "gen")
    np.testing.assert_allclose(
        [float(row["score"]) for row in rows], create("gen").score(blobs[2]), rtol=1e-5
    )
    assert [row["path"] for row in rows[:2]] == ["p0", "p1"]
    with pytest.raises(OodlibError, match=r"gradnorm needs features; .* holds logits alone"):
        run(tmp_path, "--images", tmp_path / "new.npz", "--detector", "gradnorm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None, "logits": None}, "it needs features and the head's weight"),
        ({"weight": np.ones((4, 9))}, "need the same D"),
        ({"logits": np.zeros((400, 4))}, "differs from the logits"),
        ({"labels": np.zeros(3, int)}, "need equal row counts"),
        ({"features": np.full((400, 16), np.nan)}, "NaN"),
        ({"features": np.zeros((0, 16)), "logits": None}, "hold no row"),
    ],
)
def test_feature_files_that_do_not_fit(arrays, tmp_path, change, message):
    np.savez(
        tmp_path / "x.npz",
        **{key: value for key, value in (arrays["new"] | change).items() if value is not None},
    )
    with pytest.raises(OodlibError, match=message):
        FeatureFile(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_are_none(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_text("no features")
    with pytest.raises(OodlibError, match="cannot be read as"):
        FeatureFile(tmp_path / f"x{suffix}")
    with pytest.raises(OodlibError, match="there is no file"):
        FeatureFile(tmp_path / f"y{suffix}")


def test_feature_files_of_two_networks_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "new.npz", **arrays["new"])
    np.savez(
        tmp_path / "id.npz", features=arrays["id"]["features"], weight=arrays["id"]["weight"][::-1]
    )
    with pytest.raises(OodlibError, match="the heads of two networks"):
        run(tmp_path, "--images", tmp_path / "new.npz", "--id-images", tmp_path / "id.npz")


def test_a_detector_of_other_features_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "new.npz", **arrays["new"])
    run(tmp_path, "--images", tmp_path / "new.npz", "--save-detector", tmp_path / "kept")
    np.savez(
        tmp_path / "other.npz",
        features=arrays["new"]["features"],
        weight=arrays["new"]["weight"][::-1],
    )
    with pytest.raises(OodlibError, match="fitted on a network with weights"):
        run(tmp_path, "--images", tmp_path / "other.npz", "--detector-file", tmp_path / "kept")


def test_features_and_images_do_not_mix(own, arrays, tmp_path):
    np.savez(tmp_path / "new.npz", **arrays["new"])
    with pytest.raises(OodlibError, match="brings its own head"):
        run(tmp_path, "--model", f"{own}:make", "--images", tmp_path / "new.npz")
    with pytest.raises(OodlibError, match="--model is needed"):
        run(tmp_path, "--images", tmp_path / "new")


def relabelled(bank, labels):
    return FeatureBank.from_arrays(
        bank.features, weight=bank.head.weight, bias=bank.head.bias, labels=labels
    )


def test_right_order_has_no_hint(blobs):
    check = check_classes(blobs[1])
    assert (
        check.accuracy == check.best > 0.9
        and check.hint == ""
        and check.order.tolist() == [0, 1, 2, 3]
    )


def test_wrong_order_is_told_from_wrong_answers(blobs):
    test = blobs[1]
    swapped = check_classes(relabelled(test, np.array([0, 2, 3, 1])[test.labels]))
    assert (
        swapped.accuracy < 0.3 < 0.9 < swapped.best and "label 1 are called class 3" in swapped.hint
    )
    noise = check_classes(relabelled(test, np.random.default_rng(0).permutation(test.labels)))
    assert "near chance" in noise.hint


def test_labels_that_are_not_the_classes_are_not_judged(blobs):
    assert check_classes(relabelled(blobs[1], None)) is None
    assert check_classes(relabelled(blobs[1], np.minimum(blobs[1].labels, 2))) is None


def test_unknown_labels_are_left_out_and_counted(blobs, arrays, tmp_path, capsys):
    test = blobs[1]
    labels = np.where(np.arange(len(test)) % 8 == 0, -1, test.labels)
    check, known = check_classes(relabelled(test, labels)), test.subset(labels >= 0)
    assert check.accuracy == check_classes(known).accuracy > 0.9 and check.order.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert (check.n, check.unknown) == (350, 50)
    np.savez(tmp_path / "id.npz", **arrays["id"] | {"labels": labels})
    run(tmp_path, "--images", tmp_path / "id.npz", "--id-images", tmp_path / "id.npz")
    assert (
        f"accuracy {known.accuracy:.1%} (50 of unknown label left out)" in capsys.readouterr().out
    )


def test_wrong_order_is_a_warning_on_the_command_line(arrays, tmp_path, capsys):
    for name in ("new", "id"):
        values = dict(arrays[name])
        if name == "id":
            values["labels"] = np.array([3, 2, 1, 0])[values["labels"]]
        np.savez(tmp_path / f"{name}.npz", **values)
    run(tmp_path, "--images", tmp_path / "new.npz", "--id-images", tmp_path / "id.npz")
    assert "sort in the model's order" in capsys.readouterr().err


def test_conv_heads_count_as_linear(own, tmp_path):
    own.write_text(
        CODE.format(seed=0).replace(
            "nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3)",
            "nn.Conv2d(3, 6, 4), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten()",
        )
    )
    assert len(run(tmp_path, "--model", f"{own}:make", "--images", tmp_path / "new")) == 7
    assert isinstance(load_network(f"{own}:make")[0], nn.Module)
