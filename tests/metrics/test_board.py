"""The board gives the very numbers of a bootstrap that goes through its resamples one by one."""

import numpy as np
import one_by_one as old
import pytest

from oodlib import OodlibError
from oodlib.metrics import METRICS, Board, auroc
from oodlib.metrics import board as module

# nine sets: averages of more than eight numbers depend on the order in which they are added
SIZES = {"id": 120, **{f"set{i}": 60 + 5 * i for i in range(8)}, "small": 7}
GROUP = {name: "near" if i % 2 else "far" for i, name in enumerate(SIZES) if name != "id"}
METHODS = ("msp", "energy", "knn", "ties")
SEED, N_BOOT = 3, 60


def one(rng, method):
    values = {
        k: rng.normal(0.0 if k == "id" else 0.7, 1.0, size).astype(np.float32)
        for k, size in SIZES.items()
    }
    if method == "ties":
        return {k: v.round(1) for k, v in values.items()}
    return values


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return {net: {m: one(rng, m) for m in METHODS} for net in ("a:0", "a:1", "b")}


@pytest.fixture
def board(scores):
    options = {"n_boot": N_BOOT, "seed": SEED, "smallest_n": 60}
    return Board(scores=scores, group=dict.fromkeys(scores, GROUP), **options)


def large(scores, least=60):
    return {n: {m: old.judged(v, least) for m, v in s.items()} for n, s in scores.items()}


@pytest.mark.parametrize("metric", METRICS)
def test_a_gain_is_the_interval_of_the_best_average(board, scores, metric):
    over, methods = ("energy", "knn", "ties"), large(scores)

    def statistic(m):
        if metric == "AUROC":
            return m["msp"] - np.max([m[k] for k in over], axis=0)
        return np.min([m[k] for k in over], axis=0) - m["msp"]

    options = {"metric": metric, "n_boot": N_BOOT, "seed": SEED}
    found = board.gain("msp", over=over, metric=metric)
    assert found == old.interval(methods, statistic, **options)
    assert dict(found.each) == {
        n: old.interval({n: m}, statistic, **options) for n, m in methods.items()
    }
    assert found.n == 60 and {e.n for e in found.each.values()} == {60}


def test_fewer_resamples_are_the_first_of_many(board, scores):
    board.auroc("msp")  # all of them, from which the next takes a part
    expected = old.interval(large(scores), lambda m: m["msp"], n_boot=20, seed=SEED)
    assert board.resampled(20).auroc("msp") == expected
    assert Board(scores=scores, n_boot=20, seed=SEED, smallest_n=60).auroc("msp") == expected


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_results(board, scores, metric):
    rows = board.results([metric])
    columns = ["method", "metric", "positive", "ood", "value", "low", "high"]
    for net, methods in scores.items():
        found = rows[rows.model == net]
        expected = old.record(net, methods, which=[metric], n_boot=N_BOOT, seed=SEED)
        assert list(found[columns].itertuples(index=False, name=None)) == expected
    assert set(rows.n_id) == {120} and rows[rows.ood == "average"].n_ood.isna().all()


def test_smallest_and_largest_over_networks_and_judged_sets(board):
    rows = board.results(["AUROC"]).query("method == 'knn' and n_ood >= 60")
    for name in ("smallest", "largest"):
        bounds = rows[["value", "low", "high"]].agg("min" if name == "smallest" else "max")
        found = getattr(board, name)("knn")
        assert tuple(found) == tuple(bounds) and found.n == 60
    assert len(board.pairs()) == len(rows) == 24


def test_a_part_of_the_sets_is_resampled_alone(board, scores):
    near = {
        n: {m: {k: v[k] for k in v if k == "id" or GROUP[k] == "near"} for m, v in s.items()}
        for n, s in large(scores).items()
    }
    expected = old.interval(near, lambda m: m["knn"], n_boot=N_BOOT, seed=SEED)
    assert board.only(group="near").auroc("knn") == expected
    one_set = old.interval(
        {
            n: {m: {k: v[k] for k in ("id", "small")} for m, v in s.items()}
            for n, s in scores.items()
        },
        lambda m: m["knn"],
        n_boot=N_BOOT,
        seed=SEED,
    )
    assert board.only("small").auroc("knn") == one_set  # where nothing is large, all is judged


def test_a_part_of_the_sets_may_keep_the_resamples_of_all(scores):
    board = Board(
        scores=scores,
        group=dict.fromkeys(scores, GROUP),
        n_boot=N_BOOT,
        seed=SEED,
        redraw=False,
    )
    pairs = {
        n: {m: (v["id"], [v[k] for k in SIZES if k != "id"]) for m, v in s.items()}
        for n, s in scores.items()
    }
    drawn = {n: old.replicates_by_set(auroc, p, n=N_BOOT, seed=SEED) for n, p in pairs.items()}
    for group in ("near", "far", None):
        keep = np.array([group in (None, g) for g in GROUP.values()])
        value = np.mean([drawn[n]["msp"][0][keep].mean() for n in drawn], axis=0)
        draws = np.mean([drawn[n]["msp"][1][:, keep].mean(1) for n in drawn], axis=0)
        part = board.only(group=group) if group else board
        found = part.averages()["msp"]
        assert found[0] == value
        np.testing.assert_array_equal(found[1], draws)
    for n, methods in board.by_set().items():
        for m, (values, draws) in methods.items():
            np.testing.assert_array_equal(values, drawn[n][m][0])
            np.testing.assert_array_equal(draws, drawn[n][m][1])


def test_nothing_is_resampled_twice(board, monkeypatch):
    board.results()
    calls = []

    def counted(metric, methods, **options):
        calls.append(list(methods))
        return replicates(metric, methods, **options)

    replicates = module.replicates_by_set
    monkeypatch.setattr(module, "replicates_by_set", counted)
    board.results()
    board.smallest("msp")
    board.whole.resampled(10).gain("msp", over="energy", metric="FPR95(ID+)")
    board.whole.on("a:*").auroc("knn")
    (board | board.on("b")).on("a:0")
    assert not calls
    board.auroc("msp")  # without the small set: other resamples
    assert calls == [["msp"]] * 3


def test_methods_of_two_boards(board, scores):
    both = board.on("b") | Board(scores={"b": {"new": scores["b"]["msp"]}}, seed=SEED)
    assert both.methods == [*METHODS, "new"] and both.networks == ["b"]
    assert both.gain("new", over="msp") == (0, 0, 0)


def test_values_without_interval(board, scores):
    expected = np.mean(
        [np.mean([auroc(s["knn"]["id"], s["knn"][k]) for k in GROUP]) for s in scores.values()]
    )
    assert board.value("knn") == expected
    assert board.each()["knn"].mean() == pytest.approx(expected)
    order = board.hardest_first("knn", "b")
    assert auroc(scores["b"]["knn"]["id"], scores["b"]["knn"][order[0]]) == min(
        auroc(scores["b"]["knn"]["id"], scores["b"]["knn"][k]) for k in GROUP
    )


def test_refusals(board, scores):
    assert not board.on("c*") and board.on("a:*").networks == ["a:0", "a:1"]
    with pytest.raises(OodlibError, match="no network to measure"):
        board.on("c*").auroc("msp")
    with pytest.raises(OodlibError, match='positive must be "id" or "ood"'):
        board.fpr95("msp", positive="OOD")
    short = {**scores["b"]["msp"], "set0": np.zeros(3)}
    with pytest.raises(OodlibError, match="same images"):
        Board(scores={"b": {"msp": scores["b"]["msp"], "short": short}})
