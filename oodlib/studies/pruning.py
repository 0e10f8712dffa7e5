"""Pruning measured: the ratios of every method, masks of equal count, and what pruning does to a
network. Notebook 02b judges what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from oodlib.errors import one_of
from oodlib.features.feature_bank import FeatureBank, Head
from oodlib.metrics import fit_temperature
from oodlib.scores import Detector, create, energy, max_logit, msp, odin, opnp_sensitivity
from oodlib.scores.opnp import kept
from oodlib.scores.opnp_ratios import Choice, Sweep, choose, choose_both, sweep

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Banks = Mapping[str, FeatureBank]

RATIOS = ("weight_low", "weight_high", "neuron_low", "neuron_high")
# X of "X alone and behind OPNP", and the scores among them that read logits only
OTHERS = ("msp", "max_logit", "odin", "gradnorm", "knn", "react", "ash", "dice")
OF_LOGITS: dict[str, Any] = {"msp": msp, "max_logit": max_logit, "odin": odin}


def sample(bank: FeatureBank, rows: int, *, seed: int = 0) -> FeatureBank:
    """At most so many rows, drawn at random: the order of a bank may follow the classes."""
    if len(bank) <= rows:
        return bank
    return bank.subset(np.sort(np.random.default_rng(seed).permutation(len(bank))[:rows]))


# Choices of ratios


def choose_all(
    banks: Banks, sensitivity: Floats, neurons: Mapping[str, Floats], *, score: Any = energy
) -> tuple[dict[str, Choice], dict[str, Sweep]]:
    """The ratios of OPP, and of ONP and OPNP for each definition of a neuron's sensitivity.

    Parameters
    ----------
    banks : "id" and OOD validation sets
    sensitivity : (C, D), of weights
    neurons : definition -> (D,), of neurons
    score : logits (n, C) -> (n,), larger = more OOD

    Returns
    -------
    the choices "opp", "onp (outgoing)", "opnp (outgoing)" ..., and the sweeps of OPP and of ONP
    """
    sweeps = {"opp": sweep(banks, sensitivity, score=score)}
    found = {"opp": choose(sweeps["opp"])}
    for definition, values in neurons.items():
        onp, opnp = f"onp ({definition})", f"opnp ({definition})"
        sweeps[onp] = sweep(banks, values, score=score)
        found[onp] = choose(sweeps[onp], "neuron")
        found[opnp] = choose_both(banks, sensitivity, values, found["opp"], found[onp], score=score)
    return found, sweeps


def pruner(choice: Choice | Mapping[str, float], name: str = "", **options: Any) -> Detector:
    """The detector "opnp" at the ratios of a choice; ratios it does not name are 0.

    name : of the choice; its neurons are ranked by "activation" if it says so, else "outgoing"
    options : other parameters of "opnp"
    """
    ratios = choice.ratios if isinstance(choice, Choice) else choice
    definition = "activation" if "activation" in name else "outgoing"
    return create("opnp", **{**dict.fromkeys(RATIOS, 0.0), **ratios}, neurons=definition, **options)


def best_tail(found: Sweep, choice: Choice, sensitivity: Floats, end: str) -> float:
    """Ratio of one tail alone: best on the validation sets among those that remove a weight.

    found, choice : the sweep over weights and what was chosen from it (it drops easy sets)
    end : "low" or "high"; ties go to less pruning
    """
    one_of("best_tail: end", end, ("low", "high"))
    area = found.mean(without=choice.dropped)
    ratios, area = (found.low, area[:, 0]) if end == "low" else (found.high, area[0])
    removing = [k for k, r in enumerate(ratios) if not _without(end, sensitivity, r).all()]
    return float(ratios[max(removing, key=lambda k: (area[k], -k))])


def combine(
    method: str,
    fit: FeatureBank,
    banks: Banks,
    sensitivity: Floats,
    neurons: Floats,
    *,
    seed: int = 0,
) -> tuple[Detector, Detector]:
    """A detector alone and with OPNP, the ratios chosen anew for it.

    Order: ReAct or ASH, neuron mask, weight mask (times DICE's), score. kNN reads features only, so
    only neurons are pruned for it; for GradNorm only weights are, on a coarse grid too.

    Parameters
    ----------
    method : one of OTHERS
    fit : ID training images; those with a nearest neighbour to find or a gradient use 2,000 of them
    banks : "id" and OOD validation sets
    sensitivity, neurons : (C, D) and (D,), of unshaped features
    """
    one_of("combine: method", method, OTHERS)
    few = sample(fit, 2000, seed=seed)
    alone = create(method, **({"k": min(50, len(few))} if method == "knn" else {}))
    if method in ("gradnorm", "knn"):
        kind = "neuron" if method == "knn" else "weight"
        choice = choose(_slow_sweep(few, banks, alone, kind), kind)
        return alone, pruner(choice, then=alone)
    if method not in OF_LOGITS:
        fitted: Any = alone.fit(fit)
        banks = {k: fitted.shape(bank) for k, bank in banks.items()}
    of_neurons, score = {"outgoing": neurons}, OF_LOGITS.get(method, energy)
    both = choose_all(banks, sensitivity, of_neurons, score=score)[0]["opnp (outgoing)"]
    if method in OF_LOGITS:
        return alone, pruner(both, then=method)
    return alone, create(method, then=pruner(both))


def _slow_sweep(fit: FeatureBank, banks: Banks, then: Detector, kind: str) -> Sweep:
    """A sweep for a detector that needs more than logits: fitted at each pair of a coarse grid."""
    low, high = np.array([0.0, 0.1, 0.5]), np.array([0.0, 0.01, 0.05])
    scores = {k: np.full((len(low), len(high), len(bank)), np.nan) for k, bank in banks.items()}
    accuracy = np.full((len(low), len(high)), np.nan)
    for i, j in np.ndindex(accuracy.shape):
        ratios = {f"{kind}_low": float(low[i]), f"{kind}_high": float(high[j])}
        detector: Any = pruner(ratios, then=then).fit(fit)
        for k, bank in banks.items():
            scores[k][i, j] = detector.score(bank)
        accuracy[i, j] = detector.shape(banks["id"]).accuracy
    return Sweep(low, high, scores, accuracy)


# Controls and samples


def control_masks(
    fit: FeatureBank, sensitivity: Floats, ratios: Mapping[str, float], *, n_random: int, seed: int
) -> dict[str, Mask]:
    """Each tail of M alone, and masks of the same count that ignore it; True = the weight is kept.

    "low", "high" : the tails of M; "|W| low" ... : of the size of the weight; "DICE low" ... :
    smallest contributions ``W mean(h)``; "random low 0" ... : drawn

    ratios : of each tail, "low" and "high"
    """
    weight, mean_h = fit.head.weight, fit.features.mean(0, dtype=np.float64)
    found = {"unpruned": np.ones(weight.shape, bool)}
    for end, ratio in ratios.items():
        found[end] = _without(end, sensitivity, ratio)
        found[f"|W| {end}"] = _without(end, np.abs(weight), ratio)
        found[f"DICE {end}"] = kept(weight * mean_h, low=ratio)
        for draw in range(n_random):
            noise = np.random.default_rng([seed, draw, end == "low"]).random(weight.shape)
            found[f"random {end} {draw}"] = kept(noise, low=ratio)
    return found


def _without(end: str, values: Floats, ratio: float) -> Mask:
    """What is left without one tail, "low" or "high"."""
    return kept(values, low=ratio) if end == "low" else kept(values, high=ratio)


def split_halves(fit: FeatureBank, *, splits: int = 20, seed: int = 0) -> list[float]:
    """Spearman correlations of M between two halves of the training images, for random splits.

    Shards of M add: one pass over 20 shards, and any ten of them are a half.
    """
    count = min(20, len(fit) // 2 * 2)
    rng, sums, found = np.random.default_rng(seed), [], []
    for drawn in np.array_split(rng.permutation(len(fit)), count):
        part = fit.subset(np.sort(drawn))
        sums.append(len(part) * opnp_sensitivity(part.features, part.logits))
    for _ in range(splits):
        order = rng.permutation(count)
        one, two = (
            np.sum([sums[i] for i in half], axis=0)
            for half in (order[: count // 2], order[count // 2 :])
        )
        found.append(float(spearmanr(one.ravel(), two.ravel())[0]))
    return found


# What pruning does to a network


def boundary_distance(features: Floats, head: Head) -> Floats:
    """Distance of each feature vector to the nearest boundary of its class, over its norm: (n,).

    ``min_j (z_top - z_j) / (||w_top - w_j|| ||h||)``
    """
    w, z = head.weight.astype(np.float64), head(features)
    top, squares = z.argmax(1), (w**2).sum(1)
    # ||w_top - w_j||
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * w @ w.T, 1e-12))[top]
    gap = (z.max(1, keepdims=True) - z) / apart
    gap[np.arange(len(z)), top] = np.inf
    return np.asarray(gap.min(1) / np.maximum(np.linalg.norm(features, axis=1), 1e-12))


def reaction(features: Floats, head: Head, size: float, *, draws: int = 4, seed: int = 0) -> Floats:
    """Mean change of the energy when each h moves by ``size`` of its norm at random: (n,)."""
    rng, before = np.random.default_rng(seed), energy(head(features))
    moved = np.zeros(len(features))
    for _ in range(draws):
        step = rng.normal(size=features.shape)
        step *= (
            size
            * np.linalg.norm(features, axis=1, keepdims=True)
            / np.linalg.norm(step, axis=1, keepdims=True)
        )
        moved = moved + np.abs(energy(head(features + step)) - before) / draws
    return moved


def image_nll(logits: Any, labels: Any, temperature: float) -> Floats:
    """Negative log-likelihood of each image's label, in nats: (n,)."""
    log_p = (torch.from_numpy(np.asarray(logits, dtype=np.float64)) / temperature).log_softmax(1)
    rows, columns = torch.arange(len(labels)), torch.from_numpy(np.array(labels))
    return np.asarray(-log_p[rows, columns].numpy())


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What the authors say pruning changes, of one network, image by image.

    temperature : fitted on ID validation images
    accuracy_gap, energy_gap : of training and test images; of the energy in standard deviations
    loss : NLL at that temperature of test images and of training images
    energy, reaction, distance : of test images; `reaction` to changes of 5 %, `boundary_distance`
    """

    temperature: float
    accuracy_gap: float
    energy_gap: float
    loss: tuple[Floats, Floats]
    energy: Floats
    reaction: Floats
    distance: Floats

    def row(self) -> dict[str, float]:
        """The table's columns."""
        return {
            "T on val": self.temperature,
            "accuracy gap": 100 * self.accuracy_gap,
            "NLL gap": float(self.loss[0].mean() - self.loss[1].mean()),
            "energy gap / sd": self.energy_gap,
            "reaction / sd": float(self.reaction.mean() / self.energy.std()),
            "boundary distance": float(np.median(self.distance)),
        }


def mechanism(
    fit: FeatureBank, val: FeatureBank, test: FeatureBank, pruned: Any = None, *, seed: int = 0
) -> Mechanism:
    """Measure a network, or what a fitted pruner makes of it.

    The gaps take at most 10,000 training images, the features the first 5,000 test images.
    """
    h = np.asarray(test.features[:5000], dtype=np.float64)
    fit = sample(fit, 10000, seed=seed)
    if pruned is not None:
        fit, val, test = (pruned.shape(bank) for bank in (fit, val, test))
    temperature, spread = fit_temperature(val.logits, val.labels), energy(test.head(h))
    loss = [image_nll(bank.logits, bank.labels, temperature) for bank in (test, fit)]
    return Mechanism(
        temperature=temperature,
        accuracy_gap=fit.accuracy - test.accuracy,
        energy_gap=float((energy(test.logits).mean() - energy(fit.logits).mean()) / spread.std()),
        loss=(loss[0], loss[1]),
        energy=spread,
        reaction=reaction(h, test.head, 0.05, seed=seed),
        distance=boundary_distance(h, test.head),
    )


def mechanism_draws(
    pruned: Mechanism, unpruned: Mechanism, *, n_boot: int, seed: int = 0
) -> dict[str, tuple[float, Floats]]:
    """M1, M2 and M3 of one network: the value, and its draws over resampled images.

    M1 : change of the NLL gap between test and training images
    M2 : relative change of the reaction, in standard deviations of the energy
    M3 : relative change of the median distance to the nearest boundary
    """
    a, b, rng, found = pruned, unpruned, np.random.default_rng(seed), []
    test, fit = a.loss[0] - b.loss[0], a.loss[1] - b.loss[1]
    for draw in range(1 + n_boot):
        i, j, k = (
            rng.integers(0, n, n) if draw else np.arange(n)
            for n in (len(test), len(fit), len(a.energy))
        )
        flat = (a.reaction[k].mean() / a.energy[k].std()) / (
            b.reaction[k].mean() / b.energy[k].std()
        ) - 1
        far = np.median(a.distance[k]) / np.median(b.distance[k]) - 1
        found.append([test[i].mean() - fit[j].mean(), flat, far])
    columns = np.array(found).T
    return {name: (float(c[0]), c[1:]) for name, c in zip(("M1", "M2", "M3"), columns, strict=True)}
