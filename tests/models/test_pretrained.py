"""Public checkpoints, OpenOOD's ResNet-18 and timm models with a user's weights; toy files."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import refuses
from PIL import Image
from torch import nn

from oodlib.data.folders import ImageList, image_loader
from oodlib.data.images import ImageSet
from oodlib.models import cifar_nets, pretrained
from oodlib.models.cifar_nets import DenseNetBC, ResNetA
from oodlib.models.pretrained import (
    PUBLIC,
    ModelInfo,
    assert_accuracy,
    paper_model,
    public_model,
    resnet18_32x32,
)

needs_mirror = pytest.mark.skipif(
    "OODLIB_MIRROR" not in os.environ, reason="OODLIB_MIRROR is not set"
)


def last_module(model):
    return list(model.modules())[-1]


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A registered checkpoint of a small ResNet, saved like akamaster's files, and its network."""
    torch.manual_seed(0)
    model = ResNetA(1)
    path = tmp_path / "mirror" / "weights" / "toy.th"
    path.parent.mkdir(parents=True)
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
            "best_prec1": 10.0,
        },
        path,
    )
    info = ModelInfo(
        name="toy",
        num_classes=10,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        address=path.as_uri(),
        licence="none",
        measured_accuracy=(0.1, 1),
        id_set="cifar10",
        file="toy.th",
    )
    monkeypatch.setitem(PUBLIC, "toy", (info, lambda: ResNetA(1)))
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    return path, model.eval()


def test_checkpoint_from_the_mirror(toy):
    model, info = public_model("toy")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), toy[1](x))
    assert (
        not model.training and info.num_classes == 10 and isinstance(last_module(model), nn.Linear)
    )


def test_wrong_hash(toy):
    toy[0].write_bytes(toy[0].read_bytes() + b"x")
    with refuses(toy[0], "SHA-256 is", "Delete it"):
        public_model("toy")


def test_download_is_checked_and_kept(toy, tmp_path, monkeypatch):
    import pooch

    monkeypatch.delenv("OODLIB_MIRROR")

    def retrieve(url, known_hash, fname, path):
        assert url == toy[0].as_uri() and known_hash.startswith("sha256:")
        path.mkdir(parents=True)
        return str((path / fname).write_bytes(toy[0].read_bytes()) and path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    public_model("toy")
    monkeypatch.delattr(pooch, "retrieve")  # the second time needs no download
    public_model("toy", download=True)


def test_no_file_and_no_download(toy):
    toy[0].unlink()
    with refuses("toy.th is not available", "downloads are off", "OODLIB_MIRROR"):
        public_model("toy", download=False)


def test_unknown_name():
    with refuses("public_model: name must be one of resnet20_cifar10", "got 'vgg'"):
        public_model("vgg")


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_code_is_never_run(toy, tmp_path):
    toy[0].write_bytes(pickle.dumps({"state_dict": Evil(str(tmp_path / "made"))}, protocol=2))
    with refuses(toy[0], "weights_only=True"):
        resnet18_32x32(toy[0])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "model, features, parameters",
    [(ResNetA(3), 64, 269_722), (ResNetA(9), 64, 853_018), (DenseNetBC(10), 342, 769_162)],
)
def test_networks_have_the_published_size(model, features, parameters):
    assert last_module(model).in_features == features
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_option_a_shortcut_subsamples_and_pads_evenly():
    block = cifar_nets._BasicBlock(2, 4, 2)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 2, 4, 4)
    out = block.eval()(x)
    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_openood_resnet18_reads_its_checkpoint(tmp_path):
    model = resnet18_32x32(num_classes=7)
    state = {k.replace(".downsample.", ".shortcut."): v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "best.ckpt")
    again = resnet18_32x32(tmp_path / "best.ckpt", num_classes=7)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))
    assert last_module(again).in_features == 512
    with refuses("best.ckpt", "do not fit"):
        resnet18_32x32(tmp_path / "best.ckpt", num_classes=10)


def test_accuracy_is_asserted():
    class Bright(nn.Module):
        def forward(self, x):
            return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)

    labels = np.arange(10) % 2
    images = np.broadcast_to((labels * 255).astype(np.uint8)[:, None, None, None], (10, 3, 4, 4))
    labels = labels.copy()
    labels[0] = 1
    data = ImageSet("x", "test", images, labels)
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert assert_accuracy(Bright(), data, expected=0.9, tolerance=0.01, **settings) == 0.9
    with refuses("x/test gives 0.9000 on 10 images", "0.9500 +- 0.0100"):
        assert_accuracy(Bright(), data, expected=0.95, tolerance=0.01, **settings)


# timm models of the paper profile


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_paper_path_on_a_miniature_tree(timm, tmp_path):
    for i in range(3):
        Image.new("RGB", (70, 50), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    model, transform = paper_model("test_resnet", pretrained=False)
    x, _ = next(iter(image_loader(ImageList(tmp_path, transform=transform), workers=0)))
    assert model(x).shape == (3, 1000)


def test_paper_model_with_a_user_s_file(timm, tmp_path):
    source, _ = paper_model("test_resnet", pretrained=False)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}},
        tmp_path / "w.pth.tar",
    )
    model, _ = paper_model("test_resnet", tmp_path / "w.pth.tar")
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(model(x), source(x))


def test_paper_model_with_a_safetensors_file(timm, tmp_path):
    from safetensors.torch import save_file

    source, _ = paper_model("test_resnet.r160_in1k", pretrained=False)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model, _ = paper_model("test_resnet.r160_in1k", tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(model(x), source(x))


def test_torchvision_model_comes_with_its_own_transform():
    model, transform = paper_model("torchvision/resnet18", pretrained=False)
    assert transform(Image.new("RGB", (300, 400))).shape == (3, 224, 224) and not model.training
    with refuses("no torchvision classifier 'resnet1'"):
        paper_model("torchvision/resnet1")


def test_gradnorm_preprocessing_is_480_without_crop(timm):
    _, transform = paper_model("test_resnet", pretrained=False, preprocessing="gradnorm")
    x = transform(Image.new("RGB", (30, 90), (255, 0, 255)))
    assert x.shape == (3, 480, 480) and x.amin((1, 2)).tolist() == [1, -1, 1]


def test_gradnorm_checkpoint_names_cover_timm_s_bit():
    """Names as the paper's code builds them (root, body.blockB.unitUU, before_head, head) give
    exactly timm's.
    """
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        wanted = set(timm.create_model("resnetv2_101x1_bit").state_dict())
    names = [
        "root.conv.weight",
        "before_head.gn.weight",
        "before_head.gn.bias",
        "head.conv.weight",
        "head.conv.bias",
    ]
    for block, units in enumerate((3, 4, 23, 3), 1):
        names.append(f"body.block{block}.unit01.downsample.weight")
        for unit in range(1, units + 1):
            prefix = f"body.block{block}.unit{unit:02d}."
            names += [prefix + f"conv{i}.weight" for i in (1, 2, 3)]
            names += [prefix + f"gn{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert {pretrained._bit_name(name) for name in names} == wanted


def test_missing_weights_and_unknown_model(timm, tmp_path):
    with refuses(tmp_path / "none.npz", "missing"):
        paper_model("test_resnet", tmp_path / "none.npz")
    with refuses("cannot build no_such_model"):
        paper_model("no_such_model", pretrained=False)


def test_weights_of_another_network(timm, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with refuses("w.pth", "do not fit"):
        paper_model("test_resnet", tmp_path / "w.pth")


# The real mirror


@pytest.mark.mirror
@pytest.mark.slow
@needs_mirror
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_accuracy_on_the_mirror(name, tmp_path):
    from oodlib.data.public.prepare import load

    model, info = public_model(name, download=False)
    images = load(info.id_set, "test", download=False, data_dir=tmp_path).subset(slice(0, 200))
    assert_accuracy(
        model,
        images,
        expected=info.measured_accuracy[0],
        tolerance=0.08,
        mean=info.mean,
        std=info.std,
    )
