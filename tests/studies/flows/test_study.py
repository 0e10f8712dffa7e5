"""Several flows side by side: pairs, seeds, differences, and what is measured along a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from oodlib import metrics
from oodlib.errors import OodlibError
from oodlib.metrics.estimate import percentile_interval
from oodlib.metrics.statistics import magnitude, overlap, shared_half, spearman_along
from oodlib.studies import flows
from oodlib.studies.flows.maturity import Pairs, Study
from oodlib.studies.flows.runs import FlowRun
from oodlib.studies.flows.specs import FLOWS

STEPS = (0, 10, 40)


def made_run(flow: str, seed: int, sets: tuple[str, ...], n: int = 40) -> FlowRun:
    """Scores that separate better at each step, by a different amount for each OOD set."""
    rng, rows = np.random.default_rng(seed), []
    for step, size in ((step, size) for step in STEPS for size in (1, 5)):
        for k, name in enumerate(("id", *sets)):
            values = rng.normal(loc=k * STEPS.index(step), size=n // size)
            rows.append(
                pd.DataFrame(
                    {
                        "step": step,
                        "group_size": size,
                        "set": name,
                        "index": np.arange(n // size),
                        "density": values,
                        "nll": values + 5,
                    }
                )
            )
    history = [
        {"step": s, "epoch": s / 10, "validation_bpd": 8.0 - s / 10, "seconds": s} for s in STEPS
    ]
    return FlowRun(
        name=f"{flow}:{seed}",
        spec=replace(FLOWS[flow], id_set=flow),
        seed=seed,
        record={"history": history},
        scores=pd.concat(rows),
        folder=Path("nowhere"),
    )


@pytest.fixture(scope="module")
def study() -> Study:
    runs = [
        *(made_run("latin_glow", seed, ("a", "b")) for seed in (0, 1)),
        made_run("textures_glow", 0, ("c",)),
    ]
    return Study(runs, ["density", "nll"], n_boot=30)


def test_pairs_average_seeds_first_and_then_count_alike(study: Study) -> None:
    pairs = study.pairs("density", "last")
    assert pairs.labels == ["latin_glow → a", "latin_glow → b", "textures_glow → c"]
    of = {name: study.aurocs[name, 1].values[40, "density"] for name in study.runs}
    expected = [*np.mean([of["latin_glow:0"], of["latin_glow:1"]], axis=0), *of["textures_glow:0"]]
    np.testing.assert_allclose(pairs.values, expected)
    assert pairs.draws.shape == (30, 3) and pairs.mean[0] == pytest.approx(np.mean(expected))


def test_only_sets_that_all_seeds_have_are_averaged() -> None:
    some = Study(
        [made_run("latin_glow", 0, ("a", "b")), made_run("latin_glow", 1, ("a", "c"))],
        ["density"],
        n_boot=5,
    )
    assert some.pairs("density", "last").labels == ["latin_glow → a"]
    assert all(found.sets == ["a"] for found in some.aurocs.values())


def test_seeds_without_a_common_set_are_refused() -> None:
    with pytest.raises(OodlibError, match=r"no OOD set is left of id, a without .*a.*Provide one"):
        Study(
            [made_run("latin_glow", 0, ("a",)), made_run("latin_glow", 1, ("b",))],
            ["density"],
            n_boot=5,
        )


def test_an_auroc_is_that_of_the_scores(study: Study) -> None:
    part = study.at(study.runs["textures_glow:0"], "last", 5)
    ids, ood = (part.density[part["set"] == name] for name in ("id", "c"))
    assert study.pairs("density", "last", 5).values[-1] == metrics.auroc(
        ids.to_numpy(), ood.to_numpy()
    )


def test_moments_are_kept_steps(study: Study) -> None:
    run = study.runs["latin_glow:0"]
    assert [study.step(run, moment) for moment in ("one epoch", "ten epochs", "last")] == [
        10,
        40,
        40,
    ]


def test_a_difference_is_paired_and_needs_the_same_pairs(study: Study) -> None:
    change = study.pairs("density", "last") - study.pairs("density", "one epoch")
    assert (change.values > 0).all()
    assert (
        (study.pairs("density", "last") - study.pairs("nll", "last")).draws == 0
    ).all()  # the same ranking
    with pytest.raises(OodlibError, match="same pairs"):
        change - Pairs(change.values[:1], change.draws[:, :1], change.labels[:1])


def test_only_the_chosen_runs_count(study: Study) -> None:
    chosen = study.pairs("density", "last", runs=[study.runs["latin_glow:1"]])
    np.testing.assert_array_equal(
        chosen.values, study.aurocs["latin_glow:1", 1].values[40, "density"]
    )


def test_n_is_the_smallest_set(study: Study) -> None:
    assert (study.n(1), study.n(5)) == (40, 8)


def test_steps_to_best_is_the_first_step_near_the_best(study: Study) -> None:
    share, draws = study.steps_to_best(study.runs["latin_glow:0"], within=0.01)
    assert share == 1.0 and draws.shape == (30,)
    assert study.steps_to_best(study.runs["latin_glow:0"], within=1.0)[0] == 0.0


def test_overlaps_are_those_of_the_likelihoods(study: Study) -> None:
    run = study.runs["textures_glow:0"]
    steps, values, draws = study.overlaps(run, n_boot=7)
    part = study.at(run, "last")
    expected = overlap(part.nll[part["set"] == "id"], part.nll[part["set"] == "c"])
    assert steps == [10, 40] and draws.shape == (2, 7, 1)
    assert values[-1, 0] == pytest.approx(expected)


def test_spearman_along_is_scipys() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 6, 4))
    np.testing.assert_allclose(
        spearman_along(a, b), [spearmanr(a[:, i], b[:, i]).statistic for i in range(4)]
    )


def test_spearman_of_a_constant_is_zero() -> None:
    assert spearman_along(np.ones((4, 1)), np.arange(4.0)[:, None]) == 0


def test_shared_half_is_one_for_agreement_zero_for_the_opposite_and_a_half_by_chance() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    assert shared_half(values, 2 * values)[0] == 1
    assert shared_half(values, -values)[0] == 0
    found, draws = shared_half(values, np.random.default_rng(1).normal(size=1000), n_boot=200)
    assert found == pytest.approx(0.5, abs=0.06) and np.quantile(draws, 0.01) < found < np.quantile(
        draws, 0.99
    )


def test_a_flow_beats_chance_where_the_interval_of_its_mean_does(study: Study) -> None:
    assert study.beats_chance("latin_glow")
    run = study.runs["latin_glow:0"]
    upside_down = replace(run, scores=run.scores.assign(density=-run.scores.density))
    assert not Study([upside_down], ["density"], n_boot=30).beats_chance("latin_glow")


def test_maturity_is_judged_on_the_mean_of_the_seeds(study: Study) -> None:
    first, second = (study.runs[f"latin_glow:{seed}"] for seed in (0, 1))
    assert not study.mature("latin_glow")[0]  # 8, 7, 4 bits/dim: 1.5 per doubling
    flat = [
        {**row, "validation_bpd": 7.0 + 0.001 * (row["step"] == 10)}
        for row in first.record["history"]
    ]
    runs = [replace(run, record={"history": flat}) for run in (first, second)]
    assert Study(runs, ["density"], n_boot=5).mature("latin_glow")[0]
    assert not Study([runs[0], second], ["density"], n_boot=5).mature("latin_glow")[0]


def test_a_magnitude_reaches_zero_where_the_signed_interval_holds_it() -> None:
    draws = np.linspace(-1, 3, 401)
    value, (low, high) = magnitude(-0.2, draws)
    assert (value, low) == (0.2, 0.0) and high == pytest.approx(2.9)
    assert magnitude(-2.0, -draws - 2)[1] == pytest.approx([1.1, 4.9])


def test_a_study_needs_a_flow() -> None:
    with pytest.raises(OodlibError, match="at least one flow"):
        Study([], ["density"])


# --- what the notebook shows


@pytest.fixture(scope="module")
def whole() -> Study:
    made = [(flow, seed) for flow in ("latin_glow", "textures_glow") for seed in (0, 1)]
    runs = [made_run(flow, seed, ("a", "b")) for flow, seed in made]
    for run in runs:
        run.record["n_train"] = 400
        for row in run.record["history"]:
            row["train_bpd"] = 7.0
    return Study(runs, ["density", "nll"], n_boot=30)


def test_an_estimate_of_pairs_is_their_mean_or_any_statistic(whole):
    pairs = whole.pairs("density", "last")
    mean, share = pairs.estimate(), pairs.estimate(lambda auroc: (auroc > 0.9).mean(-1))
    assert mean == (pairs.values.mean(), *percentile_interval(pairs.draws.mean(1)))
    assert share.value == (pairs.values > 0.9).mean() and mean.n == whole.n() == 40
    few = pairs.only(pairs.values > np.median(pairs.values))
    assert len(few.labels) == few.draws.shape[1] == 2 and few.estimate().value > mean.value


def test_the_smallest_of_many_pairs_has_a_wider_interval(whole):
    pairs = whole.pairs("density", "one epoch")
    label, smallest = pairs.smallest()
    at = pairs.labels.index(label)
    assert smallest.value == pairs.values.min()
    assert tuple(smallest)[1:] == percentile_interval(pairs.draws[:, at], level=0.05 / 4)
    assert pairs.intervals.iloc[at].low >= smallest.low


def test_tables_hold_every_run(whole):
    table, history = flows.flow_table(whole), flows.history(whole)
    assert list(table.flow) == list(whole.runs) and set(table.mature) == {"no"}
    assert len(history) == len(STEPS) * len(whole.runs)
    rows = list(flows.results(whole))
    bits = [row for row in rows if row["metric"] == "bits per dim"]
    assert [row["value"] for row in bits] == history.validation_bpd.tolist()
    assert len(rows) - len(bits) == 4 * 2 * len(STEPS) * 2 * 2  # runs, sizes, steps, scores, sets


def test_curves_are_in_per_cent_with_intervals(whole):
    curves = flows.curves(whole, ["density"])
    assert set(curves.score) == {"density"} and len(curves) == 4 * len(STEPS) * 2
    assert (curves.low <= curves.high).all() and curves.value.max() > 90
    assert curves[curves.main].groupby("flow").seed.nunique().eq(1).all()


def test_overlap_along_is_the_correlation_of_overlap_and_auroc(whole):
    table, rho = flows.overlap_along(whole, n_boot=5)
    assert rho.draws.shape == (5, 4) and len(table) == 4 * 2 * 2  # runs, steps after 0, sets
    pair = table[(table.flow.str.startswith("latin")) & (table.OOD == "a")]
    of_seeds = [spearmanr(t.overlap, t["AUROC density"])[0] for _, t in pair.groupby("flow")]
    assert rho.values[0] == pytest.approx(np.mean(of_seeds))


def test_figures_draw_every_pair(whole):
    curves = flows.curves(whole, ["density", "nll"])
    pairs = whole.pairs("nll", "last").labels
    figure = flows.draw_curves(curves, {pair: flows.short(pair) for pair in pairs})
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == pairs
    table, rho = flows.overlap_along(whole, n_boot=2)
    lines = table.assign(pair=np.resize(rho.labels, len(table)))
    figure, axes = plt.subplots(1, 2)
    flows.draw_overlap(axes[0], lines, "density", rho.intervals.set_index("pair").value)
    flows.draw_bits(axes[1], whole, whole.runs["latin_glow:0"], "last")
    assert len(axes[1].get_legend().get_texts()) == 3
    plt.close("all")
