"""Models of a pool by timm tag or by file: what is loaded is what the file holds, and every wrong
row is refused.
"""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import refuses
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from oodlib import OodlibError, extract
from oodlib.models.hooks import find_head
from oodlib.models.pretrained import paper_model
from oodlib.models.timm_checks import check_timm_name
from oodlib.studies.vits.imagenet_models import find_weights, load_tagged
from oodlib.studies.vits.pool_table import PoolRow

TAGGED = PoolRow(name="small", network="test_vit.r160_in1k", resolution=160)
AUGREG = PoolRow(name="B16-toy", network="test_vit", weights="augreg/toy.npz", resolution=160)
SOUP = PoolRow(
    name="soup",
    network="vit_xsmall_patch16_clip_224",
    weights="model-soups/model_0.pt",
    head="unit",
    resolution=224,
)


@pytest.fixture(scope="module")
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=1000).eval()


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8))


def write(path, save, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    save(value, path)
    return path


def save_npz(arrays, path):
    np.savez(path, **arrays)


def google_layout(model):
    """The parameters of a timm ViT under the names and in the shapes of AugReg's files."""
    heads = model.blocks[0].attn.num_heads
    arrays = {
        "cls": model.cls_token,
        "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias,
    }

    def dense(name, weight, bias):
        arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = weight.T, bias

    def norm(name, module):
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = module.weight, module.bias

    for i, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{i}/"
        norm(prefix + "LayerNorm_0", block.norm1)
        norm(prefix + "LayerNorm_2", block.norm2)
        attention = prefix + "MultiHeadDotProductAttention_1/"
        qkv = zip(
            ("query", "key", "value"),
            block.attn.qkv.weight.chunk(3),
            block.attn.qkv.bias.chunk(3),
            strict=True,
        )
        for name, weight, bias in qkv:
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(weight.shape[1], heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[attention + "out/kernel"] = block.attn.proj.weight.T.reshape(
            heads, -1, block.attn.proj.out_features
        )
        arrays[attention + "out/bias"] = block.attn.proj.bias
        dense(prefix + "MlpBlock_3/Dense_0", block.mlp.fc1.weight, block.mlp.fc1.bias)
        dense(prefix + "MlpBlock_3/Dense_1", block.mlp.fc2.weight, block.mlp.fc2.bias)
    norm("Transformer/encoder_norm", model.norm)
    dense("head", model.head.weight, model.head.bias)
    return {name: value.detach().numpy() for name, value in arrays.items()}


class OpenAiBlock(nn.Module):
    """One residual block of CLIP's image tower, with its names (Radford et al. 2021, arXiv
    2103.00020).
    """

    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Soup(nn.Module):
    """What a file of model-soups is the state dict of, with parts of CLIP's text side that it also
    holds.
    """

    def __init__(self, width=256, depth=10, patch=16, tokens=197, embedding=512, classes=1000):
        super().__init__()
        visual = self.visual = nn.Module()
        visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        visual.class_embedding = nn.Parameter(torch.randn(width))
        visual.positional_embedding = nn.Parameter(torch.randn(tokens, width))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        visual.transformer = nn.Module()
        visual.transformer.resblocks = nn.Sequential(*(OpenAiBlock(width) for _ in range(depth)))
        visual.proj = nn.Parameter(torch.randn(width, embedding) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(77, width))
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.head = nn.Linear(embedding, classes)

    def state(self):
        model = {f"model.{k}": v for k, v in self.state_dict().items() if not k.startswith("head.")}
        return model | {f"classification_head.{k}": v for k, v in self.head.state_dict().items()}

    def embedding(self, x):
        v = self.visual
        x = v.conv1(x).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        return v.ln_post(v.transformer.resblocks(v.ln_pre(x))[:, 0]) @ v.proj


@pytest.fixture(scope="module")
def soup():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Soup().eval()


# What is loaded


def test_tag_with_random_weights(picture):
    model, transform = load_tagged(TAGGED, pretrained=False)
    x = transform(picture)[None]
    assert not model.training and x.shape == (1, 3, 160, 160) and model(x).shape == (1, 1000)


def test_safetensors_file(small, tmp_path, picture):
    write(tmp_path / "own/w.safetensors", save_file, small.state_dict())
    model, transform = load_tagged(replace(TAGGED, weights="own/w.safetensors"), weights=tmp_path)
    x = transform(picture)[None]
    torch.testing.assert_close(model(x), small(x))


def test_augreg_file_gives_its_network_and_augreg_s_transform(small, tmp_path):
    write(tmp_path / AUGREG.weights, save_npz, google_layout(small))
    model, transform = load_tagged(AUGREG, weights=tmp_path)
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), small(x))
    white = transform(Image.new("RGB", (200, 300), (255, 255, 255)))
    torch.testing.assert_close(white, torch.ones(3, 160, 160))  # mean and std 0.5
    assert transform.transforms[0].size == int(160 / 0.9)


def test_augreg_transform_at_384_takes_the_whole_side():
    transform = load_tagged(
        replace(AUGREG, network="vit_tiny_patch16_384", resolution=384), pretrained=False
    )[1]
    assert transform.transforms[0].size == 384


def test_soup_file_gives_a_head_on_unit_embeddings(soup, tmp_path, picture):
    write(tmp_path / SOUP.weights, torch.save, soup.state())
    model, transform = load_tagged(SOUP, weights=tmp_path)
    x = transform(picture)[None]
    with torch.no_grad():
        raw = soup.embedding(x)
        unit = raw / raw.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(model(x), soup.head(unit), rtol=1e-3, atol=1e-5)
    bank = extract(model, [(x, torch.zeros(1))], layers=["tower"], device="cpu", progress=False)
    np.testing.assert_allclose(bank.features, unit, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(bank.layers["tower"], raw, rtol=1e-3, atol=1e-4)


def test_soup_transform_is_openai_s(picture):
    transform = load_tagged(SOUP, pretrained=False)[1]
    grey = transform(Image.new("RGB", (300, 300), (255, 0, 0)))[:, 0, 0]
    torch.testing.assert_close(
        grey,
        torch.tensor(
            [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
        ),
    )
    assert transform.transforms[0].size == 224  # the whole shorter side


# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "vit_base_patch16_225.augreg_in21k_ft_in1k",
            ("no such model", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
        ),
        ("deit3_base", ("no such model", "deit3_base_patch16_224.fb_in22k_ft_in1k")),
        ("xyzzy", ("no such model", "nothing")),
        (
            "vit_base_patch16_224.augreg",
            ("vit_base_patch16_224 has no tag 'augreg'", "augreg2_in21k_ft_in1k, augreg_in1k"),
        ),
        (
            "vit_base_patch16_224",
            (
                "names no weights",
                "vit_base_patch16_224.augreg2_in21k_ft_in1k",
                "orig_in21k_ft_in1k",
            ),
        ),
        ("samvit_base_patch16_224", ("has no weights of samvit_base_patch16_224",)),
    ],
)
def test_wrong_names(name, parts):
    with refuses("a-row", *parts):
        load_tagged(PoolRow(name="a-row", network=name), pretrained=False)


def test_bare_name_is_refused_everywhere_unless_weights_come_from_elsewhere(small, tmp_path):
    with refuses("test_vit names no weights", "test_vit.r160_in1k"):
        paper_model("test_vit")
    write(tmp_path / "w.pth", torch.save, small.state_dict())
    paper_model("test_vit", tmp_path / "w.pth")
    paper_model("test_vit", pretrained=False)


def test_names_with_a_source_are_left_to_timm():
    check_timm_name("hf-hub:owner/model", tag_needed=True)


# Files


@pytest.mark.parametrize(
    ("weights", "address"),
    [
        ("augreg/B_16-x.npz", "https://storage.googleapis.com/vit_models/augreg/B_16-x.npz"),
        (
            "model-soups/model_7.pt",
            "https://github.com/mlfoundations/model-soups/releases/download/v0.0.2/model_7.pt",
        ),
    ],
)
def test_missing_file_is_named_with_its_address(tmp_path, weights, address):
    with refuses("B16-toy", weights, "missing below", tmp_path, address):
        load_tagged(replace(AUGREG, weights=weights), weights=tmp_path)


def test_missing_file_of_unknown_origin(tmp_path):
    with pytest.raises(OodlibError, match=r"missing below \S+\. Put the file there"):
        find_weights(replace(AUGREG, weights="own/w.pth"), tmp_path)


def test_file_is_looked_for_in_the_mirror_and_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OODLIB_MIRROR", str(tmp_path / "mirror"))
    for place in ("data", "mirror"):
        path = write(tmp_path / place / "weights" / AUGREG.weights, save_npz, {})
        assert find_weights(AUGREG) == path


def test_augreg_file_of_other_classes(tmp_path):
    write(
        tmp_path / AUGREG.weights,
        save_npz,
        google_layout(timm.create_model("test_vit", num_classes=10)),
    )
    with refuses(
        "B16-toy", "toy.npz", "no fitting values for head.weight, head.bias", "1000 classes"
    ):
        load_tagged(AUGREG, weights=tmp_path)


def test_augreg_file_of_another_resolution(tmp_path):
    write(
        tmp_path / AUGREG.weights,
        save_npz,
        google_layout(timm.create_model("test_vit", img_size=224)),
    )
    with refuses("toy.npz", "197 tokens", "101", "another resolution"):
        load_tagged(AUGREG, weights=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel"),
        lambda arrays: arrays.update({"embedding/bias": np.zeros(7, np.float32)}),
    ],
    ids=["missing", "shape"],
)
def test_augreg_file_of_another_architecture(small, tmp_path, change):
    arrays = google_layout(small)
    change(arrays)
    write(tmp_path / AUGREG.weights, save_npz, arrays)
    with refuses("toy.npz", "cannot be read as weights of VisionTransformer"):
        load_tagged(AUGREG, weights=tmp_path)


def test_damaged_npz(tmp_path):
    write(tmp_path / AUGREG.weights, lambda value, path: path.write_bytes(value), b"PK")
    with refuses("toy.npz", "cannot be read"):
        load_tagged(AUGREG, weights=tmp_path)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_classes": 10}, "head.weight"),
        ({"img_size": 224}, "197 tokens"),
        ({"depth": 5}, "Missing key"),
    ],
)
def test_safetensors_file_of_another_network(tmp_path, options, part):
    write(
        tmp_path / "own/w.safetensors",
        save_file,
        timm.create_model("test_vit", **options).state_dict(),
    )
    with refuses("small", "w.safetensors", part):
        load_tagged(replace(TAGGED, weights="own/w.safetensors"), weights=tmp_path)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"classes": 10}, ("do not fit Linear",)),
        ({"tokens": 50}, ("50 tokens", "197")),
        ({"embedding": 256}, ("do not fit VisionTransformer", "head.weight")),
        ({"depth": 9}, ("Missing key", "blocks.9")),
    ],
)
def test_soup_file_of_another_network(tmp_path, options, parts):
    write(tmp_path / SOUP.weights, torch.save, Soup(**options).state())
    with refuses("soup", "model_0.pt", *parts):
        load_tagged(SOUP, weights=tmp_path)


def test_file_that_is_no_soup(small, tmp_path):
    write(tmp_path / SOUP.weights, torch.save, small.state_dict())
    with refuses("model_0.pt", "not a file of model-soups", "model.visual", "cls_token"):
        load_tagged(SOUP, weights=tmp_path)


def test_unit_head_needs_a_file():
    with refuses('"unit" features needs a file'):
        load_tagged(replace(TAGGED, head="unit"), pretrained=False)


# Heads and sizes


def test_distilled_network_is_refused_by_name_and_with_a_remedy():
    row = PoolRow(name="distilled", network="deit_tiny_distilled_patch16_224.fb_in1k")
    with refuses(
        "distilled", "VisionTransformerDistilled (deit_tiny_distilled_patch16_224)", "undistilled"
    ):
        load_tagged(row, pretrained=False)


def test_levit_is_refused():
    model = timm.create_model("levit_128s").eval()
    with refuses("LevitDistilled (levit_128s)", "one linear head"):
        find_head(model, torch.rand(1, 3, 224, 224))


def test_resolution_of_the_row_must_be_the_network_s():
    with refuses("small", "3 x 160 x 160", "takes 3 x 160 x 160", "resolution of 384"):
        load_tagged(replace(TAGGED, resolution=384), pretrained=False)


def test_transform_of_another_size_is_refused(monkeypatch):
    from oodlib.studies.vits import imagenet_models

    model, transform = paper_model("test_resnet", pretrained=False, preprocessing="gradnorm")
    monkeypatch.setattr(imagenet_models, "paper_model", lambda *_, **__: (model, transform))
    with refuses("gives pictures of 3 x 480 x 480", "takes 3 x 160 x 160"):
        load_tagged(replace(TAGGED, resolution=None), pretrained=False)


# Without a connection


def test_hub_out_of_reach_is_one_question_and_one_error(monkeypatch, tmp_path, caplog):
    from huggingface_hub import constants

    questions = []

    def session():
        questions.append(1)
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refuses("test_vit.r160_in1k", "the hub does not answer", "give a file"):
        load_tagged(TAGGED)
    assert questions == [1] and not constants.HF_HUB_OFFLINE and "Retrying" not in caplog.text
