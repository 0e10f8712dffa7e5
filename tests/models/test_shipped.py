"""Training to a shipped file: resume gives the same bytes, provenance fits, tampering shows,
snapshots load.
"""

import json

import numpy as np
import pytest
import torch

from oodlib import OodlibError
from oodlib.data import ImageSet
from oodlib.files import sha256
from oodlib.models import FastConvNet, shipped
from oodlib.models.shipped import Spec, load_or_train, load_trained, train_and_save
from oodlib.models.training.classifier import Recipe, evaluate

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    lr=0.5,
    schedule="triangle",
    warmup=0.2,
    whiten_bias_epochs=1,
    lookahead=True,
    flip="alternating",
    shift=1,
)


def data(split: str) -> ImageSet:
    """Two classes of noise, one brighter than the other."""
    rng = np.random.default_rng(len(split))
    labels = np.arange(64) % 2
    images = rng.integers(0, 128, (64, 3, 16, 16)) + 100 * labels[:, None, None, None]
    return ImageSet("bright", split, images.astype(np.uint8), labels)


class Stopped(Exception):
    pass


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Recipe "tiny" below a root of its own; gives a function that registers it, with snapshots
    where asked for.
    """
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))

    def register(snapshots=(), recipe=RECIPE):
        spec = Spec(
            name="tiny",
            network=lambda: FastConvNet(2, widths=(4, 4, 6)),
            data=data,
            recipe=recipe,
            mean=MEAN,
            std=STD,
            expected=0.5,
            snapshots=snapshots,
        )
        monkeypatch.setitem(shipped.SPECS, "tiny", spec)

    register()
    return register


def stop_after(monkeypatch, epochs):
    """Make training raise after so many epochs, once the progress is on disk."""
    real = shipped.train

    def train(*arguments, on_epoch, **options):
        def stop(epoch, model):
            on_epoch(epoch, model)
            if epoch == epochs:
                raise Stopped

        return real(*arguments, on_epoch=stop, **options)

    monkeypatch.setattr(shipped, "train", train)


def test_interrupted_run_ends_in_the_same_file(tiny, monkeypatch, tmp_path):
    whole = train_and_save("tiny", device="cpu", output=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        train_and_save("tiny", device="cpu", output=tmp_path / "resumed")
    assert not list((tmp_path / "resumed").glob("*")) and list(
        (tmp_path / "data" / "training").iterdir()
    )
    resumed = train_and_save("tiny", device="cpu", output=tmp_path / "resumed")
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "data" / "training").iterdir())


def test_resumed_run_does_not_train_finished_epochs_again(tiny, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        train_and_save("tiny", device="cpu")
    seen = []
    real = shipped.train
    monkeypatch.setattr(
        shipped,
        "train",
        lambda *a, on_epoch, **o: real(
            *a, on_epoch=lambda epoch, model: (seen.append(epoch), on_epoch(epoch, model)), **o
        ),
    )
    train_and_save("tiny", device="cpu")
    assert seen == [3]


def test_provenance_describes_the_file(tiny):
    path = train_and_save("tiny", seed=4, device="cpu")
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.name == "tiny_s4.safetensors" and record["sha256"] == sha256(path)
    assert (record["seed"], record["n_train"], record["n_test"], record["dtype"]) == (
        4,
        64,
        64,
        "float16",
    )
    assert record["train_fingerprint"] == data("train").fingerprint
    assert record["test_fingerprint"] == data("test").fingerprint
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3]


def test_the_code_is_on_record_and_compared_for_live_networks_only(tiny, monkeypatch):
    code = shipped.code_hash("oodlib.models.shipped")
    path = train_and_save("tiny", device="cpu")
    assert json.loads(path.with_suffix(".json").read_text())["code"] == code
    assert load_or_train("tiny", device="cpu").provenance["code"] == code
    monkeypatch.setattr(shipped, "code_hash", lambda *_: "edited")
    assert load_trained("tiny").provenance["code"] == code
    assert load_or_train("tiny", device="cpu").provenance["code"] == "edited"


def test_stated_accuracy_is_that_of_the_file_as_loaded(tiny):
    train_and_save("tiny", device="cpu")
    trained, test = load_trained("tiny"), data("test")
    accuracy = evaluate(
        trained.model,
        torch.from_numpy(test.images),
        torch.from_numpy(test.labels),
        torch.tensor(trained.mean),
        torch.tensor(trained.std),
    )
    assert trained.provenance["accuracy"] == accuracy > 0.6
    assert trained.provenance["expected"] == 0.5 and not trained.model.training


def test_seed_decides_the_network(tiny, tmp_path):
    files = [
        train_and_save("tiny", seed=seed, device="cpu", output=tmp_path / folder).read_bytes()
        for seed, folder in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert files[0] == files[1] != files[2]


def test_tampered_file_is_refused(tiny):
    path = train_and_save("tiny", device="cpu")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        OodlibError, match=r"damaged: its checksum is not the recorded one.*Restore it from git"
    ):
        load_trained("tiny")


def test_snapshots_load_and_the_last_is_the_network(tiny):
    tiny(snapshots=(0, 1, 3))
    train_and_save("tiny", device="cpu")
    first, last, whole = (
        load_trained("tiny", epoch=0),
        load_trained("tiny", epoch=3),
        load_trained("tiny"),
    )
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(last.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert not torch.equal(first.model.head.weight, last.model.head.weight)
    with pytest.raises(OodlibError, match=r"no snapshot of epoch 2. Saved ones: \(0, 1, 3\)"):
        load_trained("tiny", epoch=2)


def test_missing_weights_say_how_to_train_them(tiny):
    with pytest.raises(
        OodlibError,
        match=r"tiny_s7.json is missing.*python -m oodlib train tiny --seed 7 .present: none",
    ):
        load_trained("tiny", seed=7)


def test_unknown_name():
    with pytest.raises(OodlibError, match=r"no training recipe 'tinny'.*cifar10_fast, latin_fast"):
        train_and_save("tinny")


def test_live_network_is_trained_once(tiny, monkeypatch):
    first = load_or_train("tiny", device="cpu")
    monkeypatch.setattr(shipped, "train_and_save", None)
    assert load_or_train("tiny", device="cpu").provenance == first.provenance


def test_live_network_of_another_recipe_is_not_used_again(tiny):
    first = load_or_train("tiny", device="cpu")
    tiny(recipe=Recipe(epochs=1, batch_size=20, lr=0.03))
    assert load_or_train("tiny", device="cpu").provenance["recipe"] != first.provenance["recipe"]


def test_command_line_passes_seed_and_device(tiny, monkeypatch, capsys):
    from oodlib.__main__ import main

    assert main(["train", "tiny", "--seed", "2", "--device", "cpu"]) == 0
    assert load_trained("tiny", seed=2).provenance["device"] == "cpu"
    assert "tiny_s2.safetensors" in capsys.readouterr().out
    assert main(["train", "tinny"]) == 2
