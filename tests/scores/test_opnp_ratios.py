"""The sweep of pruning ratios equals pruning one pair at a time; the choice uses validation sets
that are clean.
"""

import dataclasses
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import oodlib
from oodlib import FeatureBank, OodlibError, metrics, scores
from oodlib.data import ImageSet
from oodlib.experiments.testbed import validation_banks
from oodlib.scores import opnp_neurons, opnp_sensitivity
from oodlib.scores.opnp_ratios import HIGH, LOW, Choice, Sweep, choose, choose_both, kept, sweep

testbeds = importlib.import_module("oodlib.experiments.testbed")

GRID = {"low": (0.0, 0.3, 0.6), "high": (0.0, 0.1, 0.5)}


@pytest.fixture
def parts(blobs):
    train, test, ood = blobs
    m = opnp_sensitivity(train.features, train.logits)
    return (
        {"id": test, "weak": ood},
        m,
        opnp_neurons(train.features, train.logits, train.head.weight),
    )


@pytest.mark.parametrize("kind", ["weights", "neurons"])
@pytest.mark.parametrize("score", [scores.energy, scores.max_logit])
def test_every_pair_equals_pruning_it_alone(parts, kind, score):
    banks, m, neurons = parts
    values = m if kind == "weights" else neurons
    found = sweep(banks, values, **GRID, score=score)
    for i, low in enumerate(GRID["low"]):
        for j, high in enumerate(GRID["high"]):
            if low + high >= 1:
                assert np.isnan(found.scores["id"][i, j]).all() and np.isnan(found.accuracy[i, j])
                continue
            for name, bank in banks.items():
                z = (bank.head.masked(np.broadcast_to(kept(values, low=low, high=high), m.shape)))(
                    bank.features
                )
                np.testing.assert_allclose(found.scores[name][i, j], score(z), rtol=1e-4, atol=1e-5)
                if (
                    name == "id" and high < 0.5
                ):  # beyond, all evidence is gone and exact ties decide
                    assert found.accuracy[i, j] == (z.argmax(1) == bank.labels).mean()


@pytest.mark.filterwarnings("error")
def test_no_pruning_is_energy_on_read_only_arrays_as_of_a_bank_on_disk(parts, tmp_path):
    banks, m, _ = parts
    for name, bank in banks.items():
        FeatureBank.from_arrays(
            bank.features, weight=np.float32(bank.head.weight), bias=np.float32(bank.head.bias)
        ).save(tmp_path / name)
    banks = {name: FeatureBank.load(tmp_path / name) for name in banks}
    for array in (banks["id"].head.weight, banks["id"].head.bias):
        array.setflags(write=False)
    found = sweep(banks, m, low=[0], high=[0])
    np.testing.assert_allclose(
        found.scores["weak"][0, 0], scores.energy(banks["weak"].logits), rtol=1e-5
    )


def test_blocks_scope_and_what_was_removed_before(parts, monkeypatch):
    banks, m, neurons = parts
    keep = kept(neurons, low=0.25)
    whole = sweep(banks, m, **GRID, scope="class", keep=keep)
    mask = keep & kept(m, low=0.3, high=0.1, scope="class")
    z = banks["id"].head.masked(mask)(banks["id"].features)
    np.testing.assert_allclose(whole.scores["id"][1, 1], scores.energy(z), rtol=1e-4)
    monkeypatch.setattr("oodlib.arrays.BLOCK", 32 * 7)
    chunked = sweep(banks, m, **GRID, scope="class", keep=keep)
    np.testing.assert_allclose(chunked.scores["weak"], whole.scores["weak"], rtol=1e-5)
    np.testing.assert_array_equal(chunked.accuracy, whole.accuracy)


def test_metric_is_of_every_pair(parts):
    banks, m, _ = parts
    found = sweep(banks, m, **GRID)
    area = found.metric()["weak"]
    assert np.isnan(area[2, 2]) and area[1, 2] == metrics.auroc(
        found.scores["id"][1, 2], found.scores["weak"][1, 2]
    )


def near(grid, value):
    return [x for i, x in enumerate(grid) if abs(i - grid.index(value)) <= 1]


def made(areas, accuracy, low=(0.0, 0.1), high=(0.0, 0.2)):
    """A sweep whose sets have the given AUROCs: ID scores 0 .. 999, one OOD image between two of
    them.
    """
    found = {"id": np.broadcast_to(np.arange(1000.0), (2, 2, 1000))}
    found |= {name: 1000 * np.array(area)[..., None] - 0.5 for name, area in areas.items()}
    return Sweep(np.array(low), np.array(high), found, np.array(accuracy))


def test_the_best_pair_that_keeps_the_accuracy_is_chosen():
    found = made(
        {"a": [[0.6, 0.7], [0.8, 0.9]], "b": [[0.6, 0.7], [0.6, 0.9]]},
        [[0.95, 0.945], [0.94, 0.93]],
    )
    choice = choose(found)
    assert choice.ratios == {"weight_low": 0.1, "weight_high": 0.0} and choice.index == (
        1,
        0,
    )  # 93 % is too little
    assert (choice.auroc, choice.accuracy, *choice.unpruned) == pytest.approx(
        (0.7, 0.94, 0.6, 0.95)
    )
    assert choice.by_set == pytest.approx({"a": 0.8, "b": 0.6}) and choice.dropped == {}
    assert choose(found, tolerance=0.02).index == (1, 1)
    assert choose(found, "neuron").ratios == {"neuron_low": 0.1, "neuron_high": 0.0}


def test_ties_go_to_less_pruning():
    assert choose(made({"a": [[0.6, 0.8], [0.8, 0.8]]}, np.ones((2, 2)))).index == (1, 0)
    assert choose(made({"a": np.full((2, 2), 0.6)}, np.ones((2, 2)))).index == (0, 0)


def test_a_set_that_is_solved_cannot_rank_ratios_and_is_dropped():
    choice = choose(
        made(
            {"easy": [[0.999, 0.5], [0.9, 0.5]], "hard": [[0.6, 0.7], [0.6, 0.6]]}, np.ones((2, 2))
        )
    )
    assert choice.index == (0, 1) and choice.dropped == pytest.approx({"easy": 0.999})
    assert choose(made({"easy": [[0.999, 0.5], [0.9, 0.5]]}, np.ones((2, 2)))).index == (
        0,
        0,
    )  # the only one is kept


@pytest.fixture
def noisy():
    """Train, ID and OOD banks of a network with stray weights, half of whose neurons are quiet on
    ID images alone.
    """
    rng = np.random.default_rng(3)
    centres = np.pad(np.kron(np.eye(4), np.full(4, 3.0)), ((0, 0), (0, 16)))
    evidence = np.arange(32) < 16
    weight = centres / 8 + rng.normal(size=(4, 32)) * np.where(evidence, 0.2, 0.6)

    def bank(n, strength, loudness):
        labels = np.arange(n) % 4
        h = np.abs(strength * centres[labels] + rng.normal(size=(n, 32))) * np.where(
            evidence, 1, loudness
        )
        return FeatureBank.from_arrays(
            h.astype(np.float32), weight=weight.astype(np.float32), labels=labels
        )

    return bank(800, 1, 0.3), bank(400, 1, 0.3), bank(400, 0.75, 1)


@pytest.mark.parametrize("tolerance", [0.01, -0.04])  # the second forbids what the first chooses
def test_both_are_the_best_of_the_single_choices_and_their_neighbours(noisy, tolerance):
    train, test, ood = noisy
    banks, grid = {"id": test, "ood": ood}, {"low": (0.0, 0.1, 0.3, 0.6), "high": (0.0, 0.05)}
    m, neurons = (
        opnp_sensitivity(train.features, train.logits),
        opnp_neurons(train.features, train.logits, train.head.weight),
    )
    weight, neuron = (
        choose(sweep(banks, m, **grid)),
        choose(sweep(banks, neurons, **grid), "neuron"),
    )
    both = choose_both(banks, m, neurons, weight, neuron, **grid, tolerance=tolerance)
    found = {}
    for pair in itertools.product(
        *(
            near(grid["low" if "low" in key else "high"], value)
            for key, value in {**weight.ratios, **neuron.ratios}.items()
        )
    ):
        ratios = dict(zip((*weight.ratios, *neuron.ratios), pair, strict=True))
        if pair[2] + pair[3] < 1:
            detector = oodlib.create("opnp", **ratios).fit(train)
            if (detector.shape(test).logits.argmax(1) == test.labels).mean() >= weight.unpruned[
                1
            ] - tolerance:
                found[pair] = metrics.auroc(detector.score(test), detector.score(ood))
    assert both.auroc == pytest.approx(max(found.values()), abs=1e-4)
    assert both.auroc == pytest.approx(found[tuple(both.ratios.values())], abs=1e-4)
    assert both.auroc > max(weight.auroc, neuron.auroc)


def test_the_grids_of_the_note_hold_the_unpruned_network():
    assert LOW[0] == HIGH[0] == 0 and max(LOW) < 1 and sorted(HIGH) == list(HIGH)


@pytest.fixture
def bed(blobs):
    """A test bed of blobs with invented images, one clean validation set and one that leaks."""
    train, test, ood = blobs
    banks = {
        "fit": train,
        "val": test.subset(slice(0, 100)),
        "test": test.subset(slice(100, 400)),
        "weak": ood,
        "shuffled": ood.subset(slice(0, 50)),
        "weak-val": ood.subset(slice(50, 100)),
    }
    rng = np.random.default_rng(0)
    images = {
        name: ImageSet(
            name,
            "x",
            rng.integers(0, 256, (len(bank), 3, 4, 4), dtype=np.uint8),
            np.zeros(len(bank), np.int64),
        )
        for name, bank in banks.items()
    }
    return testbeds.Testbed(
        network="blobs",
        id_name="four blobs",
        model=None,
        mean=(),
        std=(),
        fit=train,
        val=banks["val"],
        test=banks["test"],
        ood={"weak": ood},
        group={"weak": "near"},
        ood_val={k: banks[k] for k in ("shuffled", "weak-val")},
        leaks={"weak-val": "weak"},
        images=images,
        fingerprints={},
        provenance={},
    )


def test_clean_validation_sets_are_handed_over(bed):
    assert list(validation_banks(bed)) == ["id", "shuffled"]
    assert validation_banks(bed)["id"] is bed.val


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["weak"], "weak is a test set of blobs"),
        (["weak-val"], "weak-val comes from the source of weak, which is tested. Use shuffled"),
        (["arabic"], "has no validation set 'arabic'. It has shuffled, weak-val"),
        ([], "no OOD validation set whose source is not tested"),
    ],
)
def test_a_set_that_is_tested_or_leaks_is_refused(bed, names, message):
    with pytest.raises(OodlibError, match=message):
        validation_banks(bed, names)


def test_splits_that_share_an_image_are_refused(bed):
    images = {**bed.images, "shuffled": bed.images["test"].subset(slice(0, 50))}
    with pytest.raises(OodlibError, match=r"50 images of .* are also"):
        validation_banks(dataclasses.replace(bed, images=images))


def test_image_lists_that_share_a_file_are_refused(bed):
    loaders = {
        name: SimpleNamespace(dataset=SimpleNamespace(root=Path("data"), paths=[f"{name}.jpg"]))
        for name in ("val", "test", "weak", "shuffled")
    }
    assert len(validation_banks(dataclasses.replace(bed, images={}, loaders=loaders))) == 2
    loaders["test"].dataset.paths.append("val.jpg")
    with pytest.raises(OodlibError, match=r"val.jpg is in val and in test of blobs"):
        validation_banks(dataclasses.replace(bed, images={}, loaders=loaders))


def other_network(bank):
    return FeatureBank.from_arrays(bank.features, weight=2 * bank.head.weight, bias=bank.head.bias)


def chosen(prefix):
    return Choice(
        ratios={f"{prefix}_low": 0.3, f"{prefix}_high": 0.0},
        index=(1, 0),
        auroc=0.9,
        accuracy=1.0,
        unpruned=(0.8, 1.0),
        by_set={"a": 0.9},
        dropped={},
    )


def unlabelled(bank):
    return FeatureBank.from_arrays(bank.features, weight=bank.head.weight, bias=bank.head.bias)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, m: sweep({"a": b}, m), "banks need an ID set called 'id', got a"),
        (
            lambda b, m: sweep({"id": b}, m.T),
            r"sensitivity must be \(C, D\) = \(4, 16\) or \(D,\), got \(16, 4\)",
        ),
        (
            lambda b, m: sweep({"id": b}, m, low=[0, 1.0]),
            r"sweep: low must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda b, m: choose(sweep({"id": b, "a": b}, m, low=[0.1], high=[0])),
            "both grids need the ratio 0",
        ),
        (
            lambda b, m: choose(sweep({"id": unlabelled(b), "a": b}, m, **GRID)),
            "has no labels",
        ),
        (lambda b, m: choose(sweep({"id": b}, m, **GRID)), "no OOD validation set in this sweep"),
        (
            lambda b, m: sweep({"id": b, "a": other_network(b)}, m),
            "the bank of a has another head than the ID set",
        ),
        (lambda b, m: sweep({"id": b, "a": b.subset([])}, m), "the bank of a is empty"),
        (
            lambda b, m: sweep({"id": b}, m, keep=np.ones(3)),
            r"keep must be \(C, D\) = \(4, 16\) or \(D,\), got \(3,\)",
        ),
        (lambda b, m: choose(sweep({"id": b, "a": b}, m, **GRID), "neurons"), "prefix must be"),
        (
            lambda b, m: choose_both(
                {"id": b, "a": b}, m, m[0], chosen("weight"), chosen("neuron"), low=[0, 0.1]
            ),
            "chosen ratio 0.3 is not in the grid",
        ),
    ],
)
def test_refusals(blobs, call, message):
    bank = blobs[1]
    with pytest.raises(OodlibError, match=message):
        call(bank, opnp_sensitivity(bank.features, bank.logits))
