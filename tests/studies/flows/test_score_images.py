"""Scores of a flow: each equals its definition, the same for the same set and seed, overflow ranks
last, bad input.
"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from oodlib import OodlibError
from oodlib.data import ImageSet
from oodlib.gradients import layer_gradient_norms
from oodlib.metrics import auroc
from oodlib.metrics.statistics import overlap
from oodlib.models.glow import Glow, bits_per_dim, dequantise, quantise
from oodlib.scores.complexity import compressed_bits
from oodlib.scores.layerwise import LayerwiseDensity
from oodlib.studies.flows.maturity import auroc_along
from oodlib.studies.flows.score_images import SCORES, VARIANTS, dequantised, score_flow

SHAPE, DIMS = (1, 8, 8), 64


def pictures(
    name: str, n: int, *, contrast: int = 20, seed: int = 0, shape=SHAPE, split: str = "test"
) -> ImageSet:
    """Random pixels around grey; the contrast says how far from grey."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(128 - contrast, 128 + contrast, (n, *shape), dtype=np.uint8)
    return ImageSet(name, split, pixels, np.full(n, -1))


SETS = {
    "fit": pictures("id", 22, split="fit"),
    "id": pictures("id", 22, seed=1),
    "ood": pictures("far", 12, contrast=120),
}


def network(seed: int = 0) -> Glow:
    """An initialised flow whose couplings and priors do something."""
    generator = torch.Generator().manual_seed(seed)
    model = Glow(SHAPE, steps=1, levels=2, hidden=4, generator=generator)
    model.initialise(dequantise(pictures("train", 256, seed=2).images, generator=generator))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv3" in name or "split" in name or "top" in name:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def table(model):
    return score_flow(model, SETS, variants=True, progress=False)


def column(table, name, of="id", size=1):
    rows = table[(table["set"] == of) & (table.group_size == size)]
    assert rows["index"].tolist() == list(range(len(rows)))
    return rows[name].to_numpy(dtype=np.float64)


def grouped(values, size):
    return np.asarray(values)[: len(values) // size * size].reshape(-1, size)


def nats(model, images):
    """-log p (n,), one image at a time."""
    with torch.no_grad():
        return np.array([-model.log_prob(x[None]).item() for x in dequantised(images)])


def norms(model, name, size, objective="log_prob"):
    x = dequantised(SETS[name])
    return layer_gradient_norms(
        model, x[: len(x) // size * size], group_size=size, objective=objective
    ).numpy()


# --- what is computed


def test_the_table_has_every_score_of_every_image_and_group(table):
    counts = table.groupby(["set", "group_size"]).size().to_dict()
    assert counts == {("id", 1): 22, ("id", 5): 4, ("ood", 1): 12, ("ood", 5): 2}
    assert list(table) == ["group_size", "set", "index", *SCORES, *VARIANTS]
    values = table[[*SCORES, *VARIANTS]].to_numpy()
    assert np.isfinite(values).all() and values.dtype == np.float32


@pytest.mark.parametrize("name", ["id", "ood"])
def test_nll_is_the_mean_of_bits_per_dim(model, table, name):
    expected = bits_per_dim(-nats(model, SETS[name]), SHAPE)
    np.testing.assert_allclose(column(table, "nll", name), expected, rtol=1e-5)
    np.testing.assert_allclose(
        column(table, "nll", name, 5), grouped(expected, 5).mean(1), rtol=1e-5
    )


@pytest.mark.parametrize("size", [1, 5])
def test_typicality_is_the_distance_of_a_groups_bits_from_those_of_the_fit_groups(
    model, table, size
):
    bits, fit = (
        grouped(nats(model, SETS[name]) / math.log(2), size).sum(1) for name in ("ood", "fit")
    )
    np.testing.assert_allclose(
        column(table, "typicality", "ood", size), abs(bits - fit.mean()), rtol=1e-4
    )


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("codec", ["png", "jpeg2000"])
def test_complexity_subtracts_the_length_of_the_files(model, table, codec, size):
    bits = nats(model, SETS["ood"]) / math.log(2) - compressed_bits(SETS["ood"].images, codec)
    np.testing.assert_allclose(
        column(table, f"complexity_{codec}", "ood", size), grouped(bits, size).sum(1), atol=0.01
    )


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    ("score", "objective", "leaky", "epsilon"),
    [
        ("density", "log_prob", False, 0.0),
        ("density_leaky", "log_prob", True, 0.0),
        ("density_sum_z", "sum_z", False, 0.0),
        ("density_sum_z_leaky", "sum_z", True, 0.0),
        ("density_released", "sum_z", True, 1e-10),
    ],
)
def test_density_is_that_of_the_gradient_norms(
    model, table, score, objective, leaky, epsilon, size
):
    fit = [norms(model, name, size, objective) for name in (("fit", "id") if leaky else ("fit",))]
    density = LayerwiseDensity(epsilon=epsilon).fit(np.concatenate(fit))
    expected = density.score(norms(model, "ood", size, objective))
    np.testing.assert_allclose(column(table, score, "ood", size), expected, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 5])
def test_naive_norm_is_that_of_the_groups_gradient(model, table, size):
    np.testing.assert_allclose(
        column(table, "naive_norm", "ood", size),
        np.log(norms(model, "ood", size).sum(1)),
        rtol=1e-4,
    )


def test_without_variants_the_other_scores_are_the_same(model, table):
    plain = score_flow(model, SETS, progress=False)
    assert list(plain) == [name for name in table if name not in VARIANTS]
    np.testing.assert_allclose(plain[list(SCORES)], table[list(SCORES)], rtol=1e-6)


# --- the same numbers again


def test_noise_follows_from_the_set_alone():
    first = dequantised(SETS["id"])
    torch.rand(3)
    assert (
        torch.equal(dequantised(SETS["id"]), first)
        and (quantise(first).numpy() == SETS["id"].images).all()
    )
    noise = first - dequantise(SETS["id"].images, generator=torch.Generator().manual_seed(0))
    assert noise.abs().max() > 1e-3  # not that of a seed that all sets share


def test_sets_and_splits_have_noise_of_their_own():
    grey = pictures("a", 4, contrast=1)
    other = [
        dequantised(ImageSet(name, split, grey.images, grey.labels))
        for name, split in (("a", "test"), ("b", "test"), ("a", "fit"))
    ]
    assert not torch.equal(other[0], other[1]) and not torch.equal(other[0], other[2])


def test_images_are_dequantised_alike_for_every_flow(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Glow, "log_prob", lambda self, x, real=Glow.log_prob: (seen.append(x), real(self, x))[1]
    )
    for seed in (0, 1):
        score_flow(network(seed), SETS, group_sizes=(1,), progress=False)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_same_seed_same_table(table):
    assert score_flow(network(), SETS, variants=True, progress=False).equals(table)


def test_weights_that_were_saved_and_loaded_give_the_same_table(model, table, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = Glow(SHAPE, steps=1, levels=2, hidden=4)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert score_flow(other.eval(), SETS, variants=True, progress=False).equals(table)


def test_scoring_changes_neither_weights_nor_mode(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_flow(model.train(), SETS, progress=False)
    assert model.training and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    assert all(p.grad is None for p in model.eval().parameters())


# --- overflow


def sure_network(sure: float) -> Glow:
    """A flow whose prior is so sure of some latents that images of high contrast overflow, ID
    images do not.
    """
    model = network()
    with torch.no_grad():
        model.levels[0].split.conv.weight[1::2, :, 1, 1] = sure
    return model


@pytest.fixture(scope="module")
def overflowing():
    return score_flow(sure_network(4), SETS, variants=True, progress=False)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("score", [*SCORES, "density_leaky"])
def test_an_overflow_ranks_as_most_ood(overflowing, score, size):
    known, far = (column(overflowing, score, name, size) for name in ("id", "ood"))
    assert np.isfinite(known).all() and (far == np.inf).any() and not np.isnan(far).any()
    assert auroc(known, far) >= np.mean(far == np.inf)


def test_an_overflow_is_counted_and_breaks_no_statistic(overflowing):
    found = auroc_along(overflowing.assign(step=7), ["nll", "density"], n_boot=5)
    for score in ("nll", "density"):
        assert found.infinite[7, score] == (column(overflowing, score, "ood") == np.inf).sum() > 0
        assert np.isfinite(found.draws[7, score]).all()
    assert 0 <= overlap(column(overflowing, "nll"), column(overflowing, "nll", "ood")) < 1


def test_fit_images_that_overflow_are_left_out(overflowing):
    far = pictures("id", 22, contrast=120, split="fit")
    mixed = ImageSet("id", "fit", np.concatenate([SETS["fit"].images, far.images]), np.full(44, -1))
    found = score_flow(sure_network(4), {**SETS, "fit": mixed}, group_sizes=(1,), progress=False)
    assert (
        np.isfinite(column(found, "density")).all()
        and np.isfinite(column(found, "typicality")).all()
    )
    assert (column(found, "density", "ood") == np.inf).sum() == (
        column(overflowing, "density", "ood") == np.inf
    ).sum()


# --- bad input


@pytest.mark.parametrize("missing", ["fit", "id"])
def test_fit_and_id_images_are_needed(model, missing):
    with pytest.raises(OodlibError, match='needs the sets "fit" and "id"'):
        score_flow(model, {name: images for name, images in SETS.items() if name != missing})


def test_no_set_at_all_is_refused(model):
    with pytest.raises(OodlibError, match="got none"):
        score_flow(model, {})


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 8)], ids=["size", "channels"])
@pytest.mark.parametrize("name", ["fit", "id", "ood"])
def test_images_of_another_shape_are_refused(model, name, shape):
    with pytest.raises(
        OodlibError, match=rf"{name} must hold at least 5 images \(1, 8, 8\), got \(9, {shape[0]}"
    ):
        score_flow(model, {**SETS, name: pictures("wrong", 9, shape=shape)})


@pytest.mark.parametrize("name", ["fit", "id", "ood"])
def test_fewer_images_than_a_group_are_refused(model, name):
    with pytest.raises(OodlibError, match=f"{name} must hold at least 5 images"):
        score_flow(model, {**SETS, name: pictures("few", 4)})


def test_an_empty_set_is_refused():
    with pytest.raises(OodlibError, match="the set is empty"):
        pictures("none", 0)


def test_a_flow_that_overflows_on_its_own_images_is_refused():
    with pytest.raises(OodlibError, match="at least 2 rows of finite norms"):
        score_flow(sure_network(1e6), SETS, progress=False)
