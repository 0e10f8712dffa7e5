"""Small ViTs, the pools' image sets, and the work of a pool: what is trained, what is not trained
again, soups.
"""

import json
import math
import os
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from oodlib import workspace
from oodlib.data import EMBEDDED, ImageSet
from oodlib.errors import OodlibError
from oodlib.features.extract import extract
from oodlib.models.hooks import find_head
from oodlib.models.small_vit import NETWORKS, small_vit
from oodlib.models.training import vit as training
from oodlib.studies.vits import image_sets, recipes, scored_sets, trained
from oodlib.studies.vits.image_sets import assert_never_trained_on, pool_sets, training_images
from oodlib.studies.vits.pool_table import PoolRow, write_pool
from oodlib.studies.vits.recipes import Budget, made_folder, pretrained_path
from oodlib.studies.vits.score_table import SCORES
from oodlib.studies.vits.soups import fill_greedily
from oodlib.studies.vits.stored import pool_models, ranked
from oodlib.studies.vits.sweep import train_pool
from oodlib.studies.vits.trained import load_row, train_row

needs_mirror = pytest.mark.skipif(
    "OODLIB_MIRROR" not in os.environ, reason="OODLIB_MIRROR is not set"
)
NEAR = ("greek", "cyrillic", "armenian", "georgian", "hebrew", "math")


# --- networks


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("head", ["raw", "unit"])
def test_a_small_vit_ends_in_a_linear_head_that_is_found(name, head):
    model = small_vit(name, 7, head=head).eval()
    images = ImageSet("noise", "test", noise(6, seed=0), np.arange(6))
    assert find_head(model, torch.zeros(1, 3, 32, 32)) == "head"
    bank = extract(model, images, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu", progress=False)
    assert bank.logits.shape == (6, 7) and bank.features.shape == (6, NETWORKS[name][0])
    norms = np.linalg.norm(bank.features, axis=1) / NETWORKS[name][0] ** 0.5
    assert (np.ptp(norms) < 1e-5) == (head == "unit")
    if head == "unit":
        np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (small_vit("vit_conv_48", 5, seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_and_stochastic_depth_reach_the_network():
    model = small_vit("vit_conv_48", 5, dropout=0.2, stochastic_depth=0.1)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} >= {0.2}
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"name": "vit_huge"}, {"head": "cosine"}])
def test_an_unknown_network_or_head_is_refused(wrong):
    with pytest.raises(OodlibError, match=f"small_vit: .*got .*{next(iter(wrong.values()))}"):
        small_vit(**{"name": "vit_conv_48", "num_classes": 5, **wrong})


# --- image sets


def assert_unit_tests(images, n):
    assert len(images.class_names) == 17 and images.labels.tolist() == [
        i for i in range(17) for _ in range(n)
    ]
    flat = {
        name: images.images[images.labels == i].reshape(n, -1)
        for i, name in enumerate(images.class_names)
    }
    assert (
        flat["white"].min() == 255
        and flat["black"].max() == 0
        and (np.ptp(flat["grey"], axis=1) == 0).all()
    )


def test_the_embedded_sets_are_what_they_say_and_were_never_trained_on(monkeypatch):
    for name, n in (
        ("latin", 400),
        ("unicode", 800),
    ):  # the first images of the sets that are trained on
        monkeypatch.setitem(EMBEDDED[name].default_n, "train", n)
    found = pool_sets("embedded", n_fit=52, n_test=60, n_ood=2, n_unit=3)
    assert list(found) == ["fit", "val", "id", "ood_val", *NEAR, "unit_tests"]
    assert [len(found[name]) for name in ("fit", "val", "id", "ood_val")] == [
        52,
        image_sets.N_VAL,
        60,
        image_sets.N_VAL,
    ]
    for name in NEAR:
        assert (np.bincount(found[name].labels) == 2).all() and len(
            found[name].class_names
        ) == EMBEDDED[name].classes
    assert {images.images.shape[1:] for images in found.values()} == {(3, 32, 32)}
    assert_unit_tests(found["unit_tests"], 3)
    assert_never_trained_on("embedded", found)
    assert not set(training_images("embedded", "unicode").class_names) & {
        c for name in NEAR for c in found[name].class_names
    }


def test_a_training_image_among_the_test_images_is_found(monkeypatch):
    images = ImageSet("toy", "train", noise(4, seed=1), np.arange(4))
    other = ImageSet("toy", "test", noise(3, seed=2), np.arange(3))
    monkeypatch.setattr(
        image_sets,
        "training_images",
        lambda pool, name: images if name == "latin" else other.subset([0]),
    )
    assert_never_trained_on("embedded", {"id": other.subset([1]), "fit": images})
    with pytest.raises(
        OodlibError, match=r"1 images of toy/train are also in latin, which .* trained on"
    ):
        assert_never_trained_on("embedded", {"id": other.subset([1]), "greek": images.subset([2])})
    with pytest.raises(OodlibError, match=r"1 images of .* also in toy/test"):
        assert_never_trained_on("embedded", {"id": other.subset([1]), "greek": other.subset([1])})


def leaky(monkeypatch, name):
    """Let the images to be scored hold one that the models of the pool cifar are trained on."""
    monkeypatch.setattr(trained, "_sets", whole_sets)
    training = {
        name: pictures(name, 182, 10, seed=seed)
        for seed, name in ((8, "cifar10"), (9, "tiny-imagenet"))
    }
    for module in (trained, scored_sets):
        monkeypatch.setattr(module, "training_images", lambda pool, name: training[name])
    monkeypatch.setattr(
        scored_sets,
        "pool_sets",
        lambda pool, **n: {
            "fit": training["cifar10"],
            "id": pictures("id", 52, 10, seed=1),
            "near": training[name].subset([5]),
        },
    )
    return training


whole_sets = trained._sets


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_nothing_is_trained_whose_training_images_are_scored(small, monkeypatch, name):
    leaky(monkeypatch, name)
    row = replace(CELL, pretraining="tiny-imagenet")
    for _ in range(2):  # a second call must not get by
        with pytest.raises(
            OodlibError, match=rf"1 images of .* are also in {name}, which the models of the cifar"
        ):
            train_row(row)
    assert not small and not made_folder(row).exists()


def test_the_hashes_of_the_pretraining_images_lie_beside_the_checkpoint(small, monkeypatch):
    """What counts is what the checkpoint has seen, not what would be drawn today."""
    row = replace(CELL, pretraining="tiny-imagenet")
    training = leaky(monkeypatch, "cifar10")
    monkeypatch.setattr(
        scored_sets, "pool_sets", lambda pool, **n: {"id": pictures("id", 52, 10, seed=1)}
    )
    (path,) = trained.pretrain(row).parent.glob("seen_*.safetensors")
    assert path.stem == f"seen_tiny-imagenet-{training['tiny-imagenet'].fingerprint[:16]}"
    assert len(load_file(path)["hashes"]) == 182
    sets = {"near": training["tiny-imagenet"].subset([5])}
    training["tiny-imagenet"] = pictures("tiny-imagenet", 10, 10, seed=7)
    with pytest.raises(
        OodlibError, match=r"1 images of tiny-imagenet/test are also in tiny-imagenet"
    ):
        scored_sets.check_test_images("cifar", sets)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OodlibError, match=r"tiny-imagenet-\w+\.safetensors is damaged"):
        scored_sets.check_test_images("cifar", sets)


@pytest.mark.slow
def test_the_shipped_hashes_are_those_of_the_set_that_the_checkpoints_saw():
    (path,) = recipes.shipped_folder("embedded").glob("seen_unicode-*.safetensors")
    images = training_images("embedded", "unicode")
    assert path.stem == f"seen_unicode-{images.fingerprint[:16]}"
    assert load_file(path)["hashes"].numpy().view(np.uint64).tolist() == sorted(
        int(digest[:16], 16) for digest in images.image_hashes()
    )
    for record in path.parent.glob("*-unicode-*.json"):
        assert json.loads(record.read_text())["fingerprint"] == images.fingerprint


@needs_mirror
def test_the_cifar_sets_are_what_they_say_and_were_never_trained_on():
    # the very images that are scored: not all would do, one "cattle" of CIFAR-100 is a "dog" of
    # CIFAR-10's training set
    n_test, n_ood = recipes.BUDGETS["cifar"].n_test, recipes.BUDGETS["cifar"].n_ood
    found = pool_sets("cifar", n_fit=100, n_test=n_test, n_ood=n_ood, n_unit=3)
    assert list(found) == [
        "fit",
        "val",
        "id",
        "ood_val",
        "cifar100-seen",
        "cifar100-unseen",
        "unit_tests",
    ]
    near = [found["cifar100-seen"], found["cifar100-unseen"]]
    names = [{images.class_names[label] for label in images.labels} for images in near]
    assert len(names[0]) + len(names[1]) == len(names[0] | names[1]) == 98
    assert not (names[0] | names[1]) & {"bus", "pickup_truck"}
    assert all(set(np.bincount(images.labels)) == {0, n_ood} for images in near)
    assert (np.bincount(found["id"].labels) == n_test // 10).all() and (
        np.bincount(found["fit"].labels) == 10
    ).all()
    assert_unit_tests(found["unit_tests"], 3)
    assert_never_trained_on("cifar", found)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pool_sets("imagenet", n_fit=1, n_test=1, n_ood=1),
        lambda: training_images("imagenet", "latin"),
        lambda: training_images("embedded", "cifar10"),
    ],
)
def test_an_unknown_pool_or_training_set_is_refused(call):
    with pytest.raises(
        OodlibError, match=r"no small pool 'imagenet'|trains on latin or unicode, not on cifar10"
    ):
        call()


# --- trained rows

CELL = PoolRow(
    name="cell",
    network="tiny",
    weights="",
    pretraining="cifar10",
    objective="sigmoid",
    aug="none",
    weight_decay=0.1,
    dropout=0.0,
    stochastic_depth=0.0,
    ft_lr=0.1,
    resolution=32,
)
START = replace(CELL, name="start", ft_lr=None, role="pretrained")
MEMBERS = tuple(
    replace(CELL, name=f"member{i}", ft_lr=lr, role="member")
    for i, lr in enumerate((0.05, 0.1, 0.4))
)
UNIFORM, GREEDY = (
    replace(CELL, name=role, ft_lr=None, role=role) for role in ("soup-uniform", "soup-greedy")
)
LIVE = replace(CELL, pretraining="latin")


def noise(n, *, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def pictures(name, n, classes, *, seed):
    """Noise with a bright row that says the class."""
    images, labels = noise(n, seed=seed) // 2, np.arange(n) % classes
    for image, label in zip(images, labels, strict=True):
        image[:, label % 32] = 255
    return ImageSet(name, "test", images, labels, tuple(map(str, range(classes))))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of its own, tiny networks, budgets and images; gives the titles of the runs that are
    trained.
    """
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    monkeypatch.setitem(NETWORKS, "tiny", (16, 1, 2, (8, 16), (4, 4)))
    monkeypatch.setattr(trained, "HELD_OUT", 52)
    classes = {"cifar": 10, "embedded": 26}
    for pool in classes:
        monkeypatch.setitem(
            recipes.BUDGETS,
            pool,
            Budget(pretraining=256, finetuning=192, member=96, n_fit=0, n_test=0, n_ood=0),
        )
    tested = {
        pool: {
            name: pictures(name, n, count, seed=i)
            for i, (name, n) in enumerate(
                {"fit": 130, "val": 52, "id": 52, "unit_tests": 34}.items()
            )
        }
        for pool, count in classes.items()
    }
    monkeypatch.setattr(trained, "_sets", tested.__getitem__)
    monkeypatch.setattr(
        trained, "training_images", lambda pool, name: pictures(name, 182, classes[pool], seed=9)
    )
    titles, whole = [], trained.fit_vit

    def fit_vit(*arguments, **options):
        titles.append(options["title"])
        return whole(*arguments, **{**options, "progress": False})

    monkeypatch.setattr(trained, "fit_vit", fit_vit)
    return titles


def record(row):
    return json.loads((made_folder(row) / "run.json").read_text())


def weights(row):
    return load_file(made_folder(row) / "model.safetensors")


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_a_row_is_pretrained_finetuned_scored_and_loaded(small):
    folder = train_row(CELL)
    assert small == [CELL.checkpoint, "cell"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "run.json",
        "scores.parquet",
    ]
    assert not [
        path for path in folder.parent.rglob("*") if "resume" in path.name and path.is_file()
    ]
    found = record(CELL)
    assert (
        found["recipe"]["samples"] == 192
        and found["moved"] > 0
        and set(found["norm_correlation"]) == set(SCORES)
    )
    assert found["sets"].keys() == {"fit", "val", "id", "unit_tests"}
    loaded = load_row(CELL)
    assert loaded.provenance == found and not loaded.model.training
    images = trained._sets("cifar")["id"]
    x = (
        torch.from_numpy(images.images) / 255 - torch.tensor(loaded.mean)[:, None, None]
    ) / torch.tensor(loaded.std)[:, None, None]
    with torch.no_grad():
        hits = loaded.model(x).argmax(1).numpy() == images.labels
    assert found["accuracy"] == pytest.approx(hits.mean())


def test_pretraining_starts_with_every_class_at_its_frequency(small, monkeypatch):
    def look(model, *arguments, **options):
        raise StopIteration(model.head.bias.detach())

    monkeypatch.setattr(trained, "fit_vit", look)
    for row, bias in ((CELL, -math.log(10)), (replace(CELL, objective="softmax"), 0.0)):
        with pytest.raises(StopIteration) as stopped:
            train_row(row)
        torch.testing.assert_close(stopped.value.value, torch.full((10,), bias))


def test_what_is_finished_is_left_alone_and_checkpoints_are_shared(small, tmp_path):
    train_row(CELL)
    before = stamps(tmp_path)
    train_row(CELL)
    assert stamps(tmp_path) == before and len(small) == 2
    train_row(replace(CELL, name="low", ft_lr=0.03))
    assert small[2:] == ["low"]


def test_a_row_killed_before_its_scores_were_stored_is_not_trained_again(small, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trained, "score_row", kill)
        train_row(CELL)
    assert not made_folder(CELL).exists()
    monkeypatch.setattr(training, "_loss", kill)
    train_row(CELL)
    assert record(CELL)["history"][-1]["step"] == 6


def test_another_recipe_trains_again(small, monkeypatch):
    train_row(CELL)
    first = weights(CELL)["head.bias"]
    monkeypatch.setitem(recipes.BUDGETS, "cifar", replace(recipes.BUDGETS["cifar"], finetuning=128))
    with pytest.raises(
        OodlibError, match=r"cell is not trained yet: .*train-vit --pool cifar --models cell"
    ):
        load_row(CELL)
    train_row(CELL)
    train_row(replace(CELL, ft_lr=0.2))
    assert small == [CELL.checkpoint, "cell", "cell", "cell"]
    assert record(CELL)["recipe"]["lr"] == 0.2 and not torch.equal(
        weights(CELL)["head.bias"], first
    )


def test_what_was_trained_at_length_outlives_an_edit_but_not_another_recipe(small, monkeypatch):
    """Only what is finetuned on the spot is keyed by its code; elsewhere the code is on record."""
    train_row(CELL)
    load_row(LIVE)
    code = workspace.code_hash("oodlib.studies.vits.trained")
    checkpoint = json.loads(pretrained_path(CELL).with_suffix(".json").read_text())
    assert record(CELL)["code"] == checkpoint["code"] == load_row(LIVE).provenance["code"] == code
    assert len(small) == 4
    monkeypatch.setattr(trained, "code_hash", lambda *_: "edited")
    train_row(CELL)
    assert record(CELL)["code"] == code and len(small) == 4
    assert load_row(LIVE).provenance["code"] == "edited" and small[4:] == ["cell"]
    monkeypatch.setitem(
        recipes.BUDGETS, "cifar", replace(recipes.BUDGETS["cifar"], pretraining=128)
    )
    with pytest.raises(
        OodlibError, match=r"s0\.safetensors was pretrained by another recipe, .*256.*128"
    ):
        train_row(replace(CELL, name="low", ft_lr=0.03))


def test_cells_see_the_images_in_one_order_and_members_in_their_own(small, monkeypatch):
    seeds, whole = {}, trained.fit_vit
    monkeypatch.setattr(
        trained, "fit_vit", lambda *a, **k: seeds.update({k["title"]: k["seed"]}) or whole(*a, **k)
    )
    for row in (CELL, replace(CELL, name="low", ft_lr=0.03), *MEMBERS[:2]):
        train_row(row)
    assert (
        seeds["cell"] == seeds["low"]
        and len({seeds["cell"], seeds["member0"], seeds["member1"]}) == 3
    )


def test_a_row_without_finetuning_is_its_checkpoint_with_a_zero_head(small):
    train_row(START)
    assert small == [START.checkpoint] and record(START)["moved"] == 0
    state, start = weights(START), load_file(pretrained_path(START))
    assert not state["head.weight"].any() and not state["head.bias"].any()
    assert all(
        torch.equal(state[name], value.to(state[name].dtype)) for name, value in start.items()
    )
    assert {name for name, rho in record(START)["norm_correlation"].items() if rho is None} == {
        "msp",
        "max_logit",
        "energy",
        "vim",
    }


@pytest.mark.parametrize("row", [CELL, LIVE])
def test_damaged_weights_are_refused(small, tmp_path, row):
    load_row(row) if row is LIVE else train_row(row)
    path = next(path for path in tmp_path.rglob("model.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\1")
    with pytest.raises(OodlibError, match=r"model\.safetensors is damaged.*--models cell"):
        load_row(row)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\1\1"), lambda path: path.unlink()],
)
def test_a_damaged_checkpoint_is_refused(small, damage):
    train_row(CELL)
    damage(pretrained_path(CELL))
    with pytest.raises(
        OodlibError, match=r"s0\.safetensors is (missing|damaged).* Restore both files"
    ):
        train_row(replace(CELL, name="low", ft_lr=0.03))


def test_the_embedded_pool_is_finetuned_live_and_once(small, tmp_path):
    first = load_row(LIVE)
    assert small == [LIVE.checkpoint, "cell"] and not made_folder(LIVE).exists()
    again = load_row(LIVE)
    assert len(small) == 2 and again.provenance == first.provenance
    load_row(replace(LIVE, ft_lr=0.05))
    assert small[2:] == ["cell"]


def test_models_finetuned_on_the_spot_stand_beside_those_that_were_stored(small):
    other = replace(LIVE, name="other", seed=1)
    folder = train_row(other)
    live, stored = pool_models("embedded", rows=[LIVE, other], progress=False)
    assert (
        small == [other.checkpoint, "other", LIVE.checkpoint, "cell"]
        and not made_folder(LIVE).exists()
    )
    assert (live.record["pretraining"]["checkpoint"], live.record["row"]) == (
        LIVE.checkpoint,
        asdict(LIVE),
    )
    assert len(live.table) == 52 + 52 + 34 and np.ptp(live.table["msp"]) <= 1
    pd.testing.assert_frame_equal(stored.table, ranked(pd.read_parquet(folder / "scores.parquet")))


@pytest.mark.parametrize("row", [replace(CELL, pretraining="in21k"), replace(CELL, ft_lr=None)])
def test_a_row_that_cannot_be_trained_here_is_refused(small, row):
    with pytest.raises(OodlibError, match=r"in21k pretraining is not done here|needs ft_lr"):
        train_row(row)


# --- soups


def test_soups_are_means_of_their_members(small):
    rows = (*MEMBERS, UNIFORM, GREEDY, replace(MEMBERS[0], name="stranger", seed=1))
    with pytest.raises(
        OodlibError, match="soup-uniform: its members member0, member1, member2 are not trained yet"
    ):
        train_row(UNIFORM, rows=rows)
    with pytest.raises(OodlibError, match="soup-uniform: a soup needs rows of role member"):
        train_row(UNIFORM, rows=[CELL, UNIFORM])
    for row in rows[:5]:
        train_row(row, rows=rows)
    states = {row.name: weights(row) for row in MEMBERS}
    for soup in (UNIFORM, GREEDY):
        chosen = record(soup)["members"]
        for name, value in weights(soup).items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    value, sum(states[member][name] for member in chosen) / len(chosen)
                )
    assert sorted(record(UNIFORM)["members"]) == ["member0", "member1", "member2"]
    assert record(GREEDY)["held_out_accuracy"] >= max(
        record(row)["held_out_accuracy"] for row in MEMBERS
    )


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({("b", "a"): 0.8, ("b", "a", "c"): 0.7}, ["b", "a"]),
        ({("b", "a"): 0.69, ("b", "c"): 0.7}, ["b", "c"]),
        ({("b", "a"): 0.6, ("b", "c"): 0.6}, ["b"]),
    ],
)
def test_a_greedy_soup_keeps_members_that_do_not_harm(found, chosen):
    states = {name: {"weight": torch.tensor([[float(2**i)]])} for i, name in enumerate("abc")}
    of_mean = {
        sum(2.0 ** "abc".index(n) for n in names) / len(names): value
        for names, value in found.items()
    }
    model = torch.nn.Linear(1, 1, bias=False)
    kept = fill_greedily(
        model,
        states,
        {"a": 0.65, "b": 0.7, "c": 0.5},
        lambda m: next(v for k, v in of_mean.items() if k == pytest.approx(m.weight.item())),
    )
    assert kept == chosen
    assert model.weight.item() == pytest.approx(
        sum(2.0 ** "abc".index(n) for n in chosen) / len(chosen)
    )


# --- a whole pool


def test_two_workers_share_a_pool_and_do_nothing_twice(small, tmp_path, monkeypatch):
    rows = (UNIFORM, CELL, START, *MEMBERS)
    table = tmp_path / "data" / "pools" / "cifar.csv"
    write_pool(table, rows)
    whole, threads = trained.fit_vit, torch.get_num_threads()

    def slow(*arguments, **options):
        time.sleep(0.05)
        return whole(*arguments, **options)

    monkeypatch.setattr(trained, "fit_vit", slow)
    done = {}
    pair = [
        threading.Thread(target=lambda i=i: done.update({i: train_pool.train_pool("cifar")}))
        for i in range(2)
    ]
    try:
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
    finally:
        torch.set_num_threads(threads)
    assert done[0] == done[1] == [row.name for row in rows]
    assert sorted(small) == sorted([CELL.checkpoint, "cell", "member0", "member1", "member2"])
    assert all((made_folder(row) / "run.json").exists() for row in rows)


def test_a_soup_brings_its_members_and_an_unknown_name_the_known_ones(small, tmp_path):
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", (UNIFORM, CELL, *MEMBERS))
    threads = torch.get_num_threads()
    try:
        assert train_pool.train_pool("cifar", models="soup-*") == [
            "soup-uniform",
            "member0",
            "member1",
            "member2",
        ]
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(
        OodlibError, match=r"no row of the pool cifar matches 'bread'\. It has soup-uniform, cell"
    ):
        train_pool.train_pool("cifar", models="bread")


@pytest.mark.parametrize("codes", [(0, 0), (0, 3), (-9, 0)])
def test_processes_have_one_thread_each_and_a_failure_is_reported(
    small, tmp_path, monkeypatch, codes
):
    write_pool(tmp_path / "data" / "pools" / "cifar.csv", (CELL,))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(tasks, work, ended, *, at_once):
        assert os.environ["OMP_NUM_THREADS"] == "1" and at_once == 2
        assert work.keywords["chosen"] == [CELL] and work.keywords["device"] == "cpu"
        for task, code in zip(tasks, codes, strict=True):
            ended(task, code)

    monkeypatch.setattr(train_pool, "run_processes", run)
    if any(codes):
        with pytest.raises(OodlibError, match="1 of 2 processes failed"):
            train_pool.train_pool("cifar", models="c*", jobs=2, device="cpu")
    else:
        assert train_pool.train_pool("cifar", models="c*", jobs=2, device="cpu") == ["cell"]
    assert "OMP_NUM_THREADS" not in os.environ
