"""What notebook 02b measures about pruning, on a small network."""

import numpy as np
import pytest

from oodlib import OodlibError, metrics
from oodlib.scores import opnp_neurons, opnp_sensitivity
from oodlib.studies import pruning


@pytest.fixture
def bank(blobs):
    return blobs[0]


@pytest.fixture
def banks(blobs):
    _, test, ood = blobs
    return {"id": test, "weak": ood}


@pytest.fixture
def m(bank):
    return opnp_sensitivity(bank.features, bank.logits)


@pytest.fixture
def neurons(bank):
    return {
        d: opnp_neurons(bank.features, bank.logits, bank.head.weight, definition=d)
        for d in ("outgoing", "activation")
    }


def test_a_sample_keeps_the_order_and_a_small_bank_stays_whole(bank):
    assert pruning.sample(bank, len(bank)) is bank
    some = pruning.sample(bank, 5)
    rows = [np.flatnonzero((bank.features == h).all(1))[0] for h in some.features]
    assert len(some) == 5 and rows == sorted(rows)


def test_every_method_has_a_choice_and_its_pruner(bank, banks, m, neurons):
    choices, sweeps = pruning.choose_all(banks, m, neurons)
    assert list(sweeps) == ["opp", "onp (outgoing)", "onp (activation)"]
    assert set(choices) == {*sweeps, "opnp (outgoing)", "opnp (activation)"}
    for name, choice in choices.items():
        detector = pruning.pruner(choice, name).fit(bank)
        assert detector.neurons in name or name == "opp"
        areas = [metrics.auroc(*map(detector.score, banks.values()))]
        np.testing.assert_allclose(areas, choice.auroc, atol=1e-3)


def test_a_tail_removes_a_weight_and_its_controls_as_many(bank, banks, m, neurons):
    choices, sweeps = pruning.choose_all(banks, m, {})
    ratios = {
        end: pruning.best_tail(sweeps["opp"], choices["opp"], m, end) for end in ("low", "high")
    }
    masks = pruning.control_masks(bank, m, ratios, n_random=2, seed=0)
    assert masks["unpruned"].all() and len(masks) == 1 + 2 * 5
    for end in ("low", "high"):
        counts = {(~mask).sum() for name, mask in masks.items() if end in name}
        assert len(counts) == 1 and counts.pop() > 0
    with pytest.raises(OodlibError, match="low, high"):
        pruning.best_tail(sweeps["opp"], choices["opp"], m, "middle")


@pytest.mark.parametrize("method", pruning.OTHERS)
def test_a_detector_is_combined_with_a_pruner(method, bank, banks, m, neurons):
    alone, both = pruning.combine(method, bank, banks, m, neurons["outgoing"])
    for detector in (alone, both):
        assert np.isfinite(detector.fit(bank).score(banks["weak"])).all()
    keys = {both.info.key, getattr(both.then_, "info", both.info).key}
    assert "opnp" in keys and method in {*keys, alone.info.key}


def test_halves_of_many_images_agree(bank):
    found = pruning.split_halves(bank, splits=3)
    assert len(found) == 3 and min(found) > 0


def test_a_boundary_is_where_two_logits_are_equal(bank):
    head, h = bank.head, bank.features[:20].astype(np.float64)
    z = head(h)
    order = np.argsort(z, axis=1)
    distance = pruning.boundary_distance(h, head) * np.linalg.norm(h, axis=1)
    for row in range(len(h)):
        w = head.weight.astype(np.float64)
        gaps = [
            (z[row, order[row, -1]] - z[row, j]) / np.linalg.norm(w[order[row, -1]] - w[j])
            for j in order[row, :-1]
        ]
        np.testing.assert_allclose(distance[row], min(gaps), rtol=1e-6)


def test_the_energy_reacts_more_to_a_larger_change(bank):
    h = bank.features[:50].astype(np.float64)
    small, large = (pruning.reaction(h, bank.head, size).mean() for size in (0.01, 0.1))
    assert 0 < small < large and (pruning.reaction(h, bank.head, 0.0) == 0).all()


def test_image_nll_has_the_mean_of_nll(bank):
    found = pruning.image_nll(bank.logits, bank.labels, 2.0).mean()
    np.testing.assert_allclose(
        found, metrics.nll(bank.logits, bank.labels, temperature=2.0), rtol=1e-9
    )


def test_a_pruner_that_removes_nothing_changes_nothing(bank, banks):
    whole = pruning.mechanism(bank, bank, banks["id"])
    same = pruning.mechanism(bank, bank, banks["id"], pruning.pruner({}).fit(bank))
    draws = pruning.mechanism_draws(same, whole, n_boot=5)
    assert list(draws) == ["M1", "M2", "M3"]
    for value, resampled in draws.values():
        assert resampled.shape == (5,)
        np.testing.assert_allclose([value, *resampled], 0, atol=1e-9)
    assert whole.row()["T on val"] == whole.temperature


def test_what_is_measured_once_is_not_measured_again(bank, banks, m):
    found, calls = pruning.choose_all(banks, m, {})[1]["opp"], []

    def count(ids, oods):
        calls.append(1)
        return float(oods.mean() - ids.mean())

    first, again = found.metric(count), found.metric(count)
    assert calls and len(calls) == np.isfinite(first["weak"]).sum()
    np.testing.assert_array_equal(first["weak"], again["weak"])
    np.testing.assert_array_equal(found.mean(), found.metric()["weak"])
