"""Test beds: the paper profile's path on a miniature ImageNet tree, the embedded path with a tiny
network.
"""

import importlib

import numpy as np
import pytest
import torch

from oodlib import OodlibError
from oodlib.data import embedded
from oodlib.experiments import ImageNetFiles, beds, protocols
from oodlib.models import FastConvNet, shipped
from oodlib.models.shipped import Spec
from oodlib.models.training.classifier import Recipe

module = importlib.import_module(
    "oodlib.experiments.testbed"
)  # the package's testbed is its function
TAG = "test_resnet.r160_in1k"


@pytest.fixture
def in_process(monkeypatch):
    """Decode images in this process: no workers to start for a few pictures."""
    loader = protocols.image_loader
    monkeypatch.setattr(protocols, "image_loader", lambda images: loader(images, workers=0))


@pytest.fixture
def paper(tree, tmp_path, in_process):
    def make(*, expected=0.0, **options):
        files = ImageNetFiles(data_root=str(tree), pretrained=False, expected_accuracy=expected)
        return module.testbed(
            TAG, imagenet=files, cache=tmp_path / "banks", device="cpu", progress=False, **options
        )

    return make


def test_paper_path_gives_a_bank_for_every_set(paper):
    bed = paper()
    assert {name: len(bank) for name, bank in bed.ood.items()} == {
        "inaturalist": 6,
        "sun": 4,
        "places": 4,
        "textures": 4,
    }
    assert (len(bed.val), len(bed.test), bed.fit) == (
        1,
        24,
        None,
    )  # every image is tested, as in the paper
    assert bed.test.head.num_classes == 1000 and set(bed.test.labels) == {0, 1}
    assert bed.id_name == "imagenet-1k" and bed.group["textures"] == "far"


def test_paper_path_scores_what_needs_no_training_images_and_names_the_rest(paper, capsys):
    scores = beds.score(paper(n_test=5), ["msp", "gradnorm", "knn", "vim"])
    assert set(scores) == {"msp", "gradnorm"}
    assert (
        f"{TAG}: left out knn, vim: they learn from ID training images" in capsys.readouterr().out
    )
    assert {name: len(values) for name, values in scores["gradnorm"].items()} == {
        "id": 5,
        "inaturalist": 6,
        "sun": 4,
        "places": 4,
        "textures": 4,
    }


def test_paper_path_limits_each_set(paper):
    bed = paper(n_test=7, n_ood=3)
    assert len(bed.test) == 7 and {len(bank) for bank in bed.ood.values()} == {3}


def test_training_images_of_the_paper_path_come_with_a_disjoint_validation(
    tree, tmp_path, in_process
):
    files = ImageNetFiles(
        data_root=str(tree),
        pretrained=False,
        expected_accuracy=0.0,
        train=True,
        ood={"ninco": "near"},
    )
    bed = module.testbed(
        TAG, imagenet=files, cache=tmp_path / "banks", device="cpu", progress=False, n_fit=5
    )
    assert (len(bed.fit), len(bed.val), len(bed.test)) == (5, 1, 23)
    assert not set(bed.loaders["val"].dataset.paths) & set(bed.loaders["test"].dataset.paths)
    assert len(bed.clean_val["openimage-o-val"]) == 4 and not bed.leaks
    assert list(bed.tested) == ["id", "ninco"] and bed.tested["id"] is bed.test


def test_validation_part_of_a_tested_set_leaks(tree, tmp_path, in_process):
    files = ImageNetFiles(
        data_root=str(tree), pretrained=False, expected_accuracy=0.0, ood={"openimage-o": "far"}
    )
    bed = module.testbed(
        TAG, imagenet=files, cache=tmp_path / "banks", device="cpu", progress=False
    )
    assert bed.leaks == {"openimage-o-val": "openimage-o"} and not bed.clean_val


def test_low_id_accuracy_stops_the_paper_path(paper):
    with pytest.raises(
        OodlibError, match=r"test_resnet\.r160_in1k: accuracy .* expected at least 70\.0%"
    ):
        paper(expected=0.7)


def test_list_with_the_checkpoints_class_order(tree, tmp_path, in_process):
    lines = [
        f"imagenet_1k/val/n0{label}/{label}_{i}.JPEG {998 + label}\n"
        for label in range(2)
        for i in range(12)
    ]
    (tmp_path / "order.txt").write_text("".join(lines))
    files = ImageNetFiles(
        data_root=str(tree),
        id_list=str(tmp_path / "order.txt"),
        pretrained=False,
        expected_accuracy=0.0,
    )
    bed = module.testbed(
        TAG, imagenet=files, cache=tmp_path / "banks", device="cpu", progress=False
    )
    assert set(bed.test.labels) == {998, 999}


def test_imagenet200_takes_openood_s_checkpoint_and_lists(tree, tmp_path, in_process):
    from torchvision.models import resnet18

    data = tmp_path / "data"
    run = data / "results" / "imagenet200_resnet18_224x224_base_e90_lr0.1_default" / "s1"
    lists = data / "benchmark_imglist" / "imagenet200"
    for folder in (run, lists):
        folder.mkdir(parents=True)
    (data / "images_largescale").symlink_to(tree / "images_largescale")
    torch.save(resnet18(num_classes=200).state_dict(), run / "best.ckpt")
    (lists / "test_imagenet200.txt").write_text(
        "".join(f"imagenet_1k/val/n00/0_{i}.JPEG 7\n" for i in range(6))
    )
    files = ImageNetFiles(data_root=str(data), expected_accuracy=0.0, ood={"ninco": "near"})
    options = {"imagenet": files, "cache": tmp_path / "banks", "device": "cpu", "progress": False}
    bed = module.testbed("imagenet200_resnet18:1", **options)
    assert (
        bed.id_name == "imagenet-200"
        and bed.test.head.num_classes == 200
        and set(bed.test.labels) == {7}
    )
    with pytest.raises(
        OodlibError, match=r"imagenet200_resnet18:2: .*s2.best\.ckpt missing\. Unpack"
    ):
        module.testbed("imagenet200_resnet18:2", **options)


def test_image_listed_twice_is_refused(tree, tmp_path, in_process):
    (tmp_path / "twice.txt").write_text("imagenet_1k/val/n00/0_0.JPEG 0\n" * 20)
    files = ImageNetFiles(
        data_root=str(tree), id_list=str(tmp_path / "twice.txt"), pretrained=False
    )
    with pytest.raises(OodlibError, match="more than once"):
        module.testbed(TAG, imagenet=files, cache=tmp_path / "banks", device="cpu", progress=False)


def test_missing_set_is_named(tmp_path):
    with pytest.raises(OodlibError, match=r"imagenet-1k: the folder .* is missing"):
        module.testbed(TAG, imagenet=ImageNetFiles(data_root=str(tmp_path), pretrained=False))


def test_unknown_network_lists_the_known_ones():
    with pytest.raises(OodlibError, match=r"'latin_slow' is none of .*latin_fast.*ImageNetFiles"):
        module.testbed("latin_slow")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A test bed of embedded data whose network is trained here in a second, below a root of its
    own.
    """

    def make(*, expected=0.0, **options):
        spec = Spec(
            name="latin_fast",
            network=lambda: FastConvNet(26, widths=(4, 4, 8)),
            data=lambda split: embedded("latin", split, n=100),
            recipe=Recipe(epochs=1, batch_size=50),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            expected=expected,
        )
        monkeypatch.setitem(shipped.SPECS, "latin_fast", spec)
        monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
        return module.testbed(
            "latin_fast:live",
            n_fit=52,
            n_test=40,
            n_ood=10,
            device="cpu",
            progress=False,
            **options,
        )

    return make


def test_embedded_path(tiny):
    bed = tiny()
    assert (len(bed.fit), len(bed.val), len(bed.test)) == (52, 40, 40)
    assert set(bed.ood) == set(bed.group) and {len(bank) for bank in bed.ood.values()} == {10}
    assert set(bed.images) == {"fit", "val", "test", *bed.ood, *bed.ood_val}
    assert set(bed.clean_val) == {"patch_shuffled", "arabic"} and bed.leaks == {
        "greek-val": "greek"
    }
    np.testing.assert_array_equal(bed.test.labels, bed.images["test"].labels)
    assert bed.fit.meta["fingerprint"] == bed.fingerprints["fit"] == bed.images["fit"].fingerprint


def test_batches_give_the_inputs_behind_a_bank(tiny):
    bed = tiny()
    head = bed.model(torch.cat([x for x, _ in bed.batches("greek", batch_size=4)]))
    torch.testing.assert_close(
        head, torch.from_numpy(np.array(bed.ood["greek"].logits)), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(OodlibError, match=r"no set 'klingon'\. It has fit, val, test, greek"):
        bed.batches("klingon")


def test_snapshot_along_training():
    bed = module.testbed(
        "latin_fast:epoch0", n_fit=30, n_test=30, n_ood=5, device="cpu", progress=False
    )
    assert bed.test.accuracy < 0.5
    with pytest.raises(OodlibError, match="no variant 'best'"):
        module.testbed("latin_fast:best")


def test_embedded_splits_share_no_image(tiny):
    bed = tiny()
    hashes = [set(bed.images[name].image_hashes()) for name in ("fit", "val", "test")]
    assert len(set.union(*hashes)) == sum(map(len, hashes))


def test_shared_image_stops_the_test_bed(tiny, monkeypatch):
    monkeypatch.setattr(
        protocols,
        "embedded",
        lambda name, split="test", n=10, seed=0: embedded("latin", "test", n=n),
    )
    with pytest.raises(OodlibError, match="40 images of latin/test are also in latin/test"):
        tiny()


def test_low_id_accuracy_stops_the_embedded_path(tiny):
    with pytest.raises(OodlibError, match=r"latin_fast:live: accuracy .* expected at least 97\.0%"):
        tiny(expected=0.97)
