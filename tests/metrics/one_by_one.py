"""The bootstrap, one resample at a time, and what notebooks made of it: what must not move."""

from functools import partial

import numpy as np

from oodlib import metrics

FUNCTIONS = {
    "AUROC": ("auroc", "", metrics.auroc),
    "FPR95(ID+)": ("fpr95", "id", partial(metrics.fpr_at_tpr, positive="id")),
    "FPR95(OOD+)": ("fpr95", "ood", partial(metrics.fpr_at_tpr, positive="ood")),
}


def replicates_by_set(metric, methods, *, n=1000, seed=0):
    scores = {
        name: (np.asarray(ids), [np.asarray(o) for o in oods])
        for name, (ids, oods) in methods.items()
    }
    (size,) = {(len(ids), *map(len, oods)) for ids, oods in scores.values()}
    evaluators = {
        name: [_evaluator(metric, ids, ood) for ood in oods] for name, (ids, oods) in scores.items()
    }

    def evaluate(index):
        return [
            [on_set(index[0], i) for on_set, i in zip(sets, index[1:], strict=True)]
            for sets in evaluators.values()
        ]

    values = np.array(evaluate([np.arange(m) for m in size]))
    rng = np.random.default_rng(seed)
    draws = np.array([evaluate([rng.integers(0, m, m) for m in size]) for _ in range(n)])
    return {name: (values[i], draws[:, i]) for i, name in enumerate(evaluators)}


def replicates(metric, methods, *, n=1000, seed=0):
    return {
        name: (float(values.mean()), draws.mean(1))
        for name, (values, draws) in replicates_by_set(metric, methods, n=n, seed=seed).items()
    }


def _auroc(ids, oods):
    below = np.cumsum(ids)
    return float((oods * (2 * below - ids)).sum() / (2 * int(below[-1]) * int(oods.sum())))


def _oriented(ids, oods, positive):
    """Cumulative counts of positives and negatives, the most positive score first."""
    hits, misses = (ids, oods) if positive == "id" else (oods[::-1], ids[::-1])
    return np.cumsum(hits), np.cumsum(misses)


def _fpr_at_tpr(ids, oods, *, tpr=0.95, positive):
    hits, misses = _oriented(ids, oods, positive)
    return float(misses[np.argmax(hits / hits[-1] >= tpr)] / misses[-1])


def _aupr(ids, oods, *, positive):
    hits, misses = _oriented(ids, oods, positive)
    gained = np.diff(hits, prepend=0)
    return float((gained * (hits / np.maximum(hits + misses, 1))).sum() / hits[-1])


_ON_COUNTS = {
    metrics.auroc: _auroc,
    metrics.fpr_at_tpr: _fpr_at_tpr,
    metrics.aupr: _aupr,
}


def _evaluator(metric, ids, oods):
    """The metric as a function of the chosen image indices."""
    function, options = metric, {}
    if isinstance(metric, partial) and not metric.args:
        function, options = metric.func, metric.keywords
    if function not in _ON_COUNTS:
        return lambda i, o: metric(ids[i], oods[o])
    metric(ids, oods)  # refuses bad options before the fast path
    id_rank, ood_rank, levels = _ranks(ids, oods)
    return lambda i, o: _ON_COUNTS[function](
        np.bincount(id_rank[i], minlength=levels),
        np.bincount(ood_rank[o], minlength=levels),
        **options,
    )


def _ranks(ids, oods):
    values, rank = np.unique(np.concatenate([ids, oods]), return_inverse=True)
    return rank[: len(ids)], rank[len(ids) :], len(values)


def judged(values, smallest_n):
    return {k: v for k, v in values.items() if k == "id" or len(v) >= smallest_n}


def interval(methods, statistic, *, metric="AUROC", n_boot=1000, seed=0):
    function = FUNCTIONS[metric][2]
    per_network = []
    for scores in methods.values():
        pairs = {m: (v["id"], [v[k] for k in v if k != "id"]) for m, v in scores.items()}
        per_network.append(replicates(function, pairs, n=n_boot, seed=seed))
    names = per_network[0]
    value = statistic({m: float(np.mean([r[m][0] for r in per_network])) for m in names})
    draws = statistic({m: np.mean([r[m][1] for r in per_network], axis=0) for m in names})
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(value), float(low), float(high)


def record(network, scores, *, which, n_boot, seed):
    """(method, metric, positive, ood, value, low, high), in the order of results.csv."""
    sets = [k for k in next(iter(scores.values())) if k != "id"]
    pairs = {name: (values["id"], [values[k] for k in sets]) for name, values in scores.items()}
    rows = []
    for label in which:
        metric, positive, function = FUNCTIONS[label]
        for name, (found, draws) in replicates_by_set(function, pairs, n=n_boot, seed=seed).items():
            columns = [
                *zip(sets, found, draws.T, strict=True),
                ("average", found.mean(), draws.mean(1)),
            ]
            for ood, value, resampled in columns:
                low, high = np.quantile(resampled, [0.025, 0.975])
                rows.append((name, metric, positive, ood, float(value), float(low), float(high)))
    return rows
