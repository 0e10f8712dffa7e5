"""One forward pass: the head is found, rows keep their order, the cache is keyed, an interrupted
pass resumes.
"""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from oodlib import FeatureBank, OodlibError, extract, workspace
from oodlib.data import ImageSet
from oodlib.features.extract import stream
from oodlib.models import FastConvNet
from oodlib.models.device import weights_hash
from oodlib.models.hooks import find_head

STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        "noise",
        "test",
        rng.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8),
        rng.integers(0, 4, 30),
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return FastConvNet(4, widths=(8, 8, 8)).eval()


def test_bank_holds_what_the_model_computes(model, images):
    bank = extract(model, images, **STATS, batch_size=7, device="cpu")
    x = (torch.from_numpy(images.images).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        np.testing.assert_allclose(bank.features, model.features(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bank.logits, model(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(bank.labels, images.labels)


def test_every_part_of_the_model_keeps_its_mode(images):
    model = FastConvNet(4, widths=(8, 8, 8)).train()
    model.blocks.eval()  # frozen batch statistics
    before = [module.training for module in model.modules()]
    extract(model, images, **STATS, device="cpu")
    assert [module.training for module in model.modules()] == before


def test_head_of_features_is_the_logits(model, images):
    bank = extract(model, images, **STATS, device="cpu")
    np.testing.assert_allclose(bank.head(bank.features), bank.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_timm_models_are_split(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(4, 3, 64, 64) if "vit" not in name else torch.randn(4, 3, 160, 160)
    bank = extract(model, [(x, torch.arange(4))], device="cpu")
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    np.testing.assert_allclose(bank.features, pre_logits, rtol=1e-3, atol=1e-4)


def test_torchvision_resnet_is_split():
    torchvision = pytest.importorskip("torchvision")
    assert (
        find_head(torchvision.models.resnet18(num_classes=3).eval(), torch.randn(2, 3, 32, 32))
        == "fc"
    )


def test_one_by_one_convolution_is_a_head():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1), nn.Flatten())
    bank = extract(model, [(torch.randn(6, 3, 8, 8), torch.zeros(6))], device="cpu")
    assert bank.features.shape == (6, 3) and bank.head.weight.shape == (5, 3)


def test_head_followed_by_an_activation_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softplus())
    with pytest.raises(OodlibError, match="no linear layer gives"):
        find_head(model, torch.randn(2, 3, 2, 2))


def test_squeezenet_is_refused():
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(OodlibError, match="linear layer"):
        find_head(torchvision.models.squeezenet1_1(num_classes=3).eval(), torch.randn(2, 3, 64, 64))


def test_named_layers_are_pooled(model, images):
    bank = extract(model, images, **STATS, layers=["blocks.0", "blocks.1"], device="cpu")
    assert {k: v.shape for k, v in bank.layers.items()} == {
        "blocks.0": (30, 8),
        "blocks.1": (30, 8),
    }


def test_unknown_layer_is_named(model, images):
    with pytest.raises(OodlibError, match=r"no layer 'layer9'.*whiten"):
        extract(model, images, **STATS, layers=["layer9"], device="cpu")


def test_loader_and_image_set_agree(model, images):
    x = (torch.from_numpy(images.images).float() / 255 - 0.5) / 0.25
    loader = DataLoader(TensorDataset(x, torch.from_numpy(images.labels)), batch_size=8)
    a, b = extract(model, images, **STATS, device="cpu"), extract(model, loader, device="cpu")
    np.testing.assert_allclose(a.features, b.features, rtol=1e-5, atol=1e-6)


def test_shuffled_loader_is_refused(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.zeros(4)), shuffle=True)
    with pytest.raises(OodlibError, match="shuffle=False"):
        extract(model, loader, device="cpu")


@pytest.mark.parametrize("on_disk", [False, True])
def test_loader_that_gives_more_rows_than_its_dataset_holds_is_refused(model, tmp_path, on_disk):
    loader = DataLoader(
        TensorDataset(torch.zeros(3, 3, 32, 32), torch.zeros(3)), batch_sampler=[[0, 1], [2, 0]]
    )
    with pytest.raises(OodlibError, match="more rows than the 3 of its dataset"):
        extract(
            model,
            loader,
            device="cpu",
            cache=tmp_path if on_disk else None,
            model_name="net",
            fingerprint="made",
        )


def test_device_that_is_not_there_is_refused(model, images):
    with pytest.raises(OodlibError, match="device zz cannot be used"):
        extract(model, images, **STATS, device="zz")


def test_raw_pixels_need_statistics(model, images):
    with pytest.raises(OodlibError, match="mean= and std="):
        extract(model, images, device="cpu")


class Counting(nn.Module):
    """Counts the rows it sees and can fail at one of them, as a killed pass would."""

    def __init__(self, fail_after: int | None = None):
        super().__init__()
        self.head = nn.Linear(3, 2)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.rows, self.fail_after = 0, fail_after

    def forward(self, x):
        if self.fail_after is not None and self.rows >= self.fail_after:
            raise KeyboardInterrupt
        self.rows += len(x)
        return self.head(x.mean((2, 3)))


def test_finished_bank_is_opened_and_not_computed(tmp_path, images):
    extract(Counting(), images, **STATS, cache=tmp_path, device="cpu")
    again = Counting()
    bank = extract(again, images, **STATS, cache=tmp_path, device="cpu")
    assert again.rows == 0 and isinstance(bank.features, np.memmap)


def test_interrupted_pass_resumes_at_the_last_shard(tmp_path, images):
    options = {**STATS, "cache": tmp_path, "batch_size": 5, "shard_rows": 10, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        extract(Counting(fail_after=25), images, **options)
    resumed = Counting()
    bank = extract(resumed, images, **options)
    assert resumed.rows <= 30 - 20 + 2  # two rows look for the head
    whole = extract(Counting(), images, **STATS, device="cpu")
    np.testing.assert_array_equal(bank.features, whole.features)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("change", ["weights", "data", "transform", "layers"])
def test_cache_key_follows(tmp_path, images, change):
    extract(Counting(), images, **STATS, cache=tmp_path, device="cpu")
    model, data, options = Counting(), images, {**STATS, "layers": []}
    if change == "weights":
        nn.init.zeros_(model.head.weight)
    elif change == "data":
        data = images.subset(slice(0, 29))
    elif change == "transform":
        options["std"] = (0.5, 0.5, 0.5)
    else:
        options["layers"] = ["head"]
    extract(model, data, cache=tmp_path, device="cpu", **options)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


@pytest.fixture
def fresh_hashes():
    """What is known of the code is forgotten before and after."""
    workspace.code_hash.cache_clear()
    yield workspace.code_hash.cache_clear
    workspace.code_hash.cache_clear()


@pytest.mark.parametrize("change", ["the network's file", "a file that the pass reaches", "timm"])
def test_edited_code_or_another_timm_gives_a_new_bank(
    tmp_path, images, model, monkeypatch, fresh_hashes, change
):
    options = {**STATS, "cache": tmp_path, "device": "cpu"}
    first = extract(model, images, **options).meta
    fresh_hashes()
    assert extract(model, images, **options).meta == first
    sha256, version = workspace.sha256, workspace.version
    file = {
        "the network's file": "fast_convnet.py",
        "a file that the pass reaches": "augment.py",
    }.get(change)
    if file:
        monkeypatch.setattr(
            workspace, "sha256", lambda path: "edited" if path.name == file else sha256(path)
        )
    else:
        monkeypatch.setattr(
            workspace, "version", lambda name: "0.0" if name == "timm" else version(name)
        )
    fresh_hashes()
    other = extract(model, images, **options).meta
    assert {name for name in first if first[name] != other[name]} == {"code"}
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_an_edited_class_of_the_users_gives_a_new_bank(tmp_path, images):
    code = (
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.head = torch.nn.Linear(3, 2)\n    def forward(self, x):\n"
        "        return self.head(x.{}((2, 3)))\n"
    )
    banks = []
    for name in ("mean", "amax", "mean"):
        (tmp_path / "net.py").write_text(code.format(name))
        spec = importlib.util.spec_from_file_location("net_of_a_user", tmp_path / "net.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        banks.append(extract(module.Net(), images, **STATS, cache=tmp_path / "banks", device="cpu"))
    del sys.modules["net_of_a_user"]
    assert banks[0].meta == banks[2].meta and banks[0].meta["weights"] == banks[1].meta["weights"]
    assert not np.allclose(banks[0].features, banks[1].features)


def test_damaged_bank_is_refused(tmp_path, images):
    path = tmp_path / "bank"
    extract(Counting(), images, **STATS, device="cpu").save(path)
    with open(path / "features.npy", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(OodlibError, match="checksum"):
        FeatureBank.load(path)


def test_half_a_bank_is_refused(tmp_path):
    (tmp_path / "bank.json").write_text(json.dumps({"meta": {}, "sha256": {"features.npy": "0"}}))
    with pytest.raises(OodlibError, match="not a complete bank"):
        FeatureBank.load(tmp_path)


def test_save_and_load_round_trip(tmp_path, model, images):
    bank = extract(model, images, **STATS, layers=["blocks.0"], device="cpu")
    bank.save(tmp_path / "bank")
    loaded = FeatureBank.load(tmp_path / "bank")
    for a, b in [
        (bank.features, loaded.features),
        (bank.logits, loaded.logits),
        (bank.labels, loaded.labels),
        (bank.head.weight, loaded.head.weight),
        (bank.layers["blocks.0"], loaded.layers["blocks.0"]),
    ]:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((2, 4))}, "same D"),
        ({"bias": np.ones(3)}, "bias must be"),
        ({"labels": np.zeros(9)}, "labels must be"),
        ({"features": np.full((10, 3), np.nan)}, "NaN"),
        ({"features": np.ones((0, 3))}, "no row"),
        ({"logits": np.ones((10, 2))}, "differs from the logits"),
    ],
)
def test_bank_refuses_arrays_that_do_not_fit(change, message):
    arrays = {"features": np.eye(10, 3), "weight": np.ones((2, 3)), "bias": np.ones(2)} | change
    with pytest.raises(OodlibError, match=message):
        FeatureBank.from_arrays(**arrays)


def test_unknown_labels_count_neither_as_right_nor_as_wrong():
    bank = FeatureBank.from_arrays(
        np.eye(4, 2), weight=np.eye(2), labels=[0, 0, -1, -1]
    )  # answers 0, 1, 0, 0
    assert bank.accuracy == 0.5 and bank.unknown == 2 and "2 labels unknown" in repr(bank)
    assert bank.require_accuracy(0.5) == 0.5 and "unknown" not in repr(bank.subset(slice(0, 2)))
    with pytest.raises(
        OodlibError, match=r"accuracy 50\.0% on 2 ID images \(2 of unknown label left out\)"
    ):
        bank.require_accuracy(0.6)
    with pytest.raises(OodlibError, match=r"no labels\. All are -1"):
        bank.subset(slice(2, 4)).accuracy  # noqa: B018


def test_weights_hash_sees_one_changed_value(model):
    before = weights_hash(model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-6
    assert weights_hash(model) != before


class ChannelsLast(nn.Module):
    """As Swin: its first layer gives (n, h, w, channels)."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.stem(x.permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 5)])
def test_layers_of_channels_last_networks_are_averaged_over_positions(size):
    bank = extract(
        ChannelsLast(),
        [(torch.randn(4, 3, *size), torch.zeros(4).long())],
        layers=["stem"],
        device="cpu",
    )
    np.testing.assert_allclose(bank.layers["stem"], bank.features, rtol=1e-5, atol=1e-6)


def test_timm_swin_stages_have_their_widths():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=3,
        img_size=64,
        window_size=2,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
    )
    bank = extract(
        model,
        [(torch.randn(2, 3, 64, 64), torch.arange(2))],
        layers=["layers.0", "layers.3"],
        device="cpu",
    )
    assert [bank.layers[name].shape[1] for name in ("layers.0", "layers.3")] == [12, 96]


def test_stream_gives_the_same_rows_in_banks_of_bounded_size(model, images):
    whole = extract(model, images, **STATS, batch_size=4, device="cpu")
    parts = list(
        stream(
            model,
            images,
            **STATS,
            batch_size=4,
            shard_rows=8,
            start=2,
            device="cpu",
            progress=False,
        )
    )
    assert [len(part) for part in parts] == [8, 8, 8, 4]
    np.testing.assert_allclose(
        np.concatenate([part.features for part in parts]), whole.features[2:], rtol=1e-5
    )


def test_another_architecture_with_the_same_weights_is_another_bank(tmp_path):
    def net(activation):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), activation, nn.Linear(5, 2))

    data = [(torch.randn(4, 3, 2, 2), torch.zeros(4).long())]
    banks = [
        extract(net(activation), data, cache=tmp_path, fingerprint="x", device="cpu")
        for activation in (nn.ReLU(), nn.Tanh(), nn.ReLU())
    ]
    assert banks[0].meta["weights"] == banks[1].meta["weights"] and banks[0].meta == banks[2].meta
    assert not np.allclose(banks[0].features, banks[1].features)
