"""Scores of networks, methods and image sets, compared on shared resamples of the images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from oodlib.errors import OodlibError
from oodlib.metrics.detection import Positive, auroc
from oodlib.metrics.estimate import Estimate, percentile_interval
from oodlib.metrics.resample import replicates_by_set
from oodlib.metrics.wide import AVERAGE, METRICS, wide_table

Scores = Mapping[str, NDArray[np.float64]]  # "id" and each OOD set -> (n,)
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Board:
    """Scores by network, method and set; every statistic is an `Estimate` on shared resamples.

    Images are resampled, the same ones for every method. An average is unweighted, over the OOD
    sets, then over the networks. Nothing is computed twice: boards made from one another (`on`,
    `only`, `resampled`, `|`) share what has been resampled.

    Attributes
    ----------
    scores : network -> method -> "id" and each OOD set -> (n,), larger = more OOD
    group : network -> OOD set -> "near" or "far"; may be empty
    id_name : network -> name of its ID set, for tables
    n_boot, seed : number of resamples, and their seed
    smallest_n : OOD sets with fewer images are in tables but in no estimate; where no set of a
        network is large enough, its largest are
    redraw : whether a part of the sets (see `only`) has resamples of its own; False keeps those of
        all sets

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> scores = {m: {"id": rng.normal(size=200), "greek": rng.normal(d, 1, 200)}
    ...           for m, d in {"msp": 1, "energy": 2}.items()}
    >>> board = Board(scores={"net": scores}, n_boot=50)
    >>> print(board.auroc("msp"))
    0.736 [0.694, 0.791]
    >>> gain = board.gain("energy", over="msp")
    >>> round(gain.value, 3), gain.n, gain.low > 0
    (0.18, 200, True)
    """

    scores: Mapping[str, Mapping[str, Scores]]
    group: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    id_name: Mapping[str, str] = field(default_factory=dict)
    n_boot: int = 1000
    seed: int = 0
    smallest_n: int = 0
    redraw: bool = True
    chosen: Mapping[str, tuple[str, ...]] | None = field(default=None, repr=False)
    _cache: dict[tuple[Any, ...], tuple[Floats, Floats]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for network, methods in self.scores.items():
            sizes = {m: {k: len(v) for k, v in sets.items()} for m, sets in methods.items()}
            first = next(iter(sizes.values()), {})
            unlike = [m for m, size in sizes.items() if size != first]
            if unlike or "id" not in first or len(first) < 2:
                raise OodlibError(
                    f"Board: every method of {network} needs scores of the same images, an ID set "
                    f'"id" and OOD sets; got {first}'
                    + (f", but of {unlike[0]} {sizes[unlike[0]]}." if unlike else ".")
                    + " Score the same banks with each method."
                )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def networks(self) -> list[str]:
        return list(self.scores)

    @property
    def methods(self) -> list[str]:
        """Methods that every network has, in the order of the first."""
        first, *others = self.scores.values()
        return [m for m in first if all(m in other for other in others)]

    # Views

    def on(self, *networks: str) -> Self:
        """The board of some networks, by name or pattern (``"*resnet20*"``); empty if none fits."""
        scores = {
            name: methods
            for name, methods in self.scores.items()
            if any(name == pattern or fnmatch(name, pattern) for pattern in networks)
        }
        return replace(self, scores=scores)

    def only(self, *sets: str, group: str | None = None) -> Self:
        """The board of some OOD sets, by name or by group ("near", "far").

        Of a group whose sets are all smaller than ``smallest_n``, all are judged.
        """
        chosen = {
            network: tuple(
                ood
                for ood in self.all_sets(network)
                if (not sets or ood in sets)
                and (group is None or self.group.get(network, {}).get(ood) == group)
            )
            for network in self.scores
        }
        return replace(self, chosen=chosen)

    def resampled(self, n_boot: int) -> Self:
        """The board with at most so many resamples: the first ones of the same sequence."""
        return replace(self, n_boot=min(n_boot, self.n_boot))

    @property
    def whole(self) -> Self:
        """The board that judges small sets too."""
        return replace(self, smallest_n=0)

    def __or__(self, other: Board) -> Self:
        """The networks that both boards have, with the methods of both; the right one wins."""
        scores = {n: {**s, **other.scores[n]} for n, s in self.scores.items() if n in other.scores}
        cache = {k: v for k, v in self._cache.items() if k[1] not in other.scores.get(k[0], {})}
        if other.seed == self.seed:
            cache |= other._cache
        return replace(self, scores=scores, _cache=cache)

    # Sets and sizes

    def all_sets(self, network: str) -> tuple[str, ...]:
        """OOD sets of a network that `only` has left, small ones too."""
        if self.chosen is not None:
            return self.chosen[network]
        return tuple(k for k in next(iter(self.scores[network].values())) if k != "id")

    def judged_sets(self, network: str) -> tuple[str, ...]:
        """OOD sets of a network that estimates average over."""
        sizes, every = self.sizes(network), self.all_sets(network)
        least = min(self.smallest_n, max((sizes[ood] for ood in self._drawn(network)), default=0))
        return tuple(ood for ood in every if sizes[ood] >= least) or every

    def pairs(self) -> list[tuple[str, str]]:
        """Network and judged OOD set, all of them."""
        return [(network, ood) for network in self.scores for ood in self.judged_sets(network)]

    def sizes(self, network: str) -> dict[str, int]:
        """Images of each set, "id" among them."""
        return {k: len(v) for k, v in next(iter(self.scores[network].values())).items()}

    @property
    def n(self) -> int:
        """Images of the smallest judged set, ID sets among them."""
        sizes = {network: self.sizes(network) for network in self._some()}
        return min(
            size[k] for network, size in sizes.items() for k in ("id", *self.judged_sets(network))
        )

    def hardest_first(self, method: str, network: str | None = None) -> list[str]:
        """OOD sets of a network (the first), by AUROC, small sets too."""
        network = network or next(iter(self._some()))
        scores = self.scores[network][method]
        return sorted(self.all_sets(network), key=lambda ood: auroc(scores["id"], scores[ood]))

    # Estimates

    def value(self, method: str, metric: str = "AUROC") -> float:
        """Average of a metric over all OOD sets (small ones too) and networks, no interval."""
        function = METRICS[metric][2]
        of_networks = [
            np.mean([function(methods[method]["id"], methods[method][k]) for k in self.all_sets(n)])
            for n, methods in self._some().items()
        ]
        return float(np.mean(of_networks))

    def each(self, metric: str = "AUROC") -> pd.DataFrame:
        """`value` of each network (rows) and method (columns): fractions."""
        rows = [
            {method: self.on(network).value(method, metric) for method in self.scores[network]}
            for network in self.scores
        ]
        return pd.DataFrame(rows, index=pd.Index(self.networks, name="network"))

    def auroc(self, method: str) -> Estimate:
        """Average AUROC of a method."""
        return self.statistic(lambda m: m[method], methods=[method])

    def fpr95(self, method: str, *, positive: Positive) -> Estimate:
        """Average FPR at 95 % TPR; ``positive`` as in `oodlib.metrics.fpr_at_tpr`."""
        label = {"id": "FPR95(ID+)", "ood": "FPR95(OOD+)"}.get(positive)
        if label is None:
            raise OodlibError(f'Board.fpr95: positive must be "id" or "ood", got {positive!r}.')
        return self.statistic(lambda m: m[method], label, methods=[method])

    def gain(
        self, method: str, *, over: str | Sequence[str], metric: str = "AUROC", **more: Any
    ) -> Estimate:
        """How much better a method is than another, or than the best of several: same images.

        Positive = better: a larger AUROC, or a smaller FPR95. The best is taken of the averages.
        """
        others = [over] if isinstance(over, str) else list(over)
        if not others:
            raise OodlibError("Board.gain: over names no method to compare with.")

        def gain(m: Mapping[str, Any]) -> Any:
            rivals = [m[other] for other in others]
            if metric == "AUROC":
                return m[method] - np.max(rivals, axis=0)
            return np.min(rivals, axis=0) - m[method]

        return self.statistic(gain, metric, methods=[method, *others], **more)

    def statistic(
        self,
        function: Callable[[dict[str, Any]], Any],
        metric: str = "AUROC",
        *,
        methods: Iterable[str] | None = None,
        n: int | None = None,
    ) -> Estimate:
        """Any function of ``{method: average metric}``; floats or (n_boot,) arrays in and out.

        methods : those that the function reads; by default all
        n : what the claim counts, where it is not the images of the smallest set
        """
        names = list(methods if methods is not None else self.methods)
        of_network = {net: self.on(net).averages(metric, names) for net in self._some()}
        pooled = self._average(of_network, names)
        each = {
            network: self._estimate(function, found, n or self.on(network).n, {})
            for network, found in of_network.items()
        }
        return self._estimate(function, pooled, n or self.n, each)

    def averages(
        self, metric: str = "AUROC", methods: Iterable[str] | None = None
    ) -> dict[str, tuple[float, Floats]]:
        """Method -> average over judged sets and networks, and its (n_boot,) resamples."""
        names = list(methods if methods is not None else self.methods)
        of_network = {}
        for network in self._some():
            judged = self.judged_sets(network)
            found = self._resample(
                network, judged if self.redraw else self._drawn(network), metric, names
            )
            if not self.redraw:
                keep = np.array([ood in judged for ood in self._drawn(network)])
                found = {m: (values[keep], draws[:, keep]) for m, (values, draws) in found.items()}
            of_network[network] = {m: (float(v.mean()), d.mean(1)) for m, (v, d) in found.items()}
        return self._average(of_network, names)

    def by_set(self, metric: str = "AUROC") -> dict[str, dict[str, tuple[Floats, Floats]]]:
        """Network -> method -> metric of each of `all_sets` (k,), and its resamples (n_boot, k)."""
        return {
            network: self._resample(network, self.all_sets(network), metric, list(methods))
            for network, methods in self._some().items()
        }

    def smallest(self, method: str, metric: str = "AUROC") -> Estimate:
        """Smallest value, lower and upper end over networks and judged sets."""
        return self._extreme(np.min, method, metric)

    def largest(self, method: str, metric: str = "AUROC") -> Estimate:
        """Largest value, lower and upper end over networks and judged sets."""
        return self._extreme(np.max, method, metric)

    # Tables

    def results(
        self,
        metrics: Collection[str] = tuple(METRICS),
        *,
        variants: Mapping[str, str] | None = None,
    ) -> pd.DataFrame:
        """Rows of results.csv (`oodlib.claims.Run.result`): each OOD set, and their average.

        variants : method -> variant column, for settings of one method; its name is then the first
            word
        """
        rows = []
        for network, methods in self.scores.items():
            sets, sizes, group = (
                self.all_sets(network),
                self.sizes(network),
                self.group.get(network, {}),
            )
            for label in metrics:
                name, positive, _ = METRICS[label]
                for method, (values, draws) in self._resample(
                    network, sets, label, list(methods)
                ).items():
                    columns = [
                        *zip(sets, values, draws.T, strict=True),
                        (AVERAGE, values.mean(), draws.mean(1)),
                    ]
                    for ood, value, resampled in columns:
                        low, high = percentile_interval(resampled)
                        rows.append(
                            {
                                "model": network,
                                "id": self.id_name.get(network, "id"),
                                "ood": ood,
                                "group": group.get(ood, ""),
                                "method": method if variants is None else method.split(" ")[0],
                                "variant": "" if variants is None else variants[method],
                                "metric": name,
                                "positive": positive,
                                "value": float(value),
                                "low": low,
                                "high": high,
                                "n_id": sizes["id"],
                                "n_ood": sizes.get(ood),
                            }
                        )
        return pd.DataFrame(rows).astype({"n_id": "Int64", "n_ood": "Int64"})

    def table(self, network: str, metric: str = "AUROC", **options: Any) -> pd.DataFrame:
        """`wide_table` of one network: ``value [low, high]`` in per cent, methods by OOD sets."""
        return wide_table(
            self.on(network).results([metric]), model=network, metric=metric, **options
        )

    # What the methods above are made of

    def _some(self) -> Mapping[str, Mapping[str, Scores]]:
        if not self.scores:
            raise OodlibError(
                "Board: there is no network to measure. Check the names given to `on`; a board "
                "without a network is false."
            )
        return self.scores

    def _drawn(self, network: str) -> tuple[str, ...]:
        """All OOD sets of a network, whatever `only` has chosen."""
        return replace(self, chosen=None).all_sets(network)

    def _resample(
        self, network: str, sets: Sequence[str], metric: str, methods: Sequence[str]
    ) -> dict[str, tuple[Floats, Floats]]:
        """Method -> values (k,) and draws (n_boot, k), from the cache where they are known."""
        keys = {m: (network, m, metric, tuple(sets)) for m in methods}
        missing = {
            m: (self.scores[network][m]["id"], [self.scores[network][m][k] for k in sets])
            for m, key in keys.items()
            if key not in self._cache or len(self._cache[key][1]) < self.n_boot
        }
        if missing:
            found = replicates_by_set(METRICS[metric][2], missing, n=self.n_boot, seed=self.seed)
            self._cache.update({keys[m]: both for m, both in found.items()})
        return {
            m: (self._cache[key][0], self._cache[key][1][: self.n_boot]) for m, key in keys.items()
        }

    def _average(
        self, of_network: Mapping[str, Mapping[str, tuple[float, Floats]]], names: Iterable[str]
    ) -> dict[str, tuple[float, Floats]]:
        found = list(of_network.values())
        return {
            m: (float(np.mean([f[m][0] for f in found])), np.mean([f[m][1] for f in found], axis=0))
            for m in names
        }

    def _estimate(
        self,
        function: Callable[[dict[str, Any]], Any],
        found: Mapping[str, tuple[float, Floats]],
        n: int,
        each: Mapping[str, Estimate],
    ) -> Estimate:
        value, draws = (function({m: both[i] for m, both in found.items()}) for i in (0, 1))
        return Estimate.of(value, draws, n=n, each=each)

    def _extreme(self, how: Callable[..., Any], method: str, metric: str) -> Estimate:
        each = {}
        for network in self._some():
            sets, judged = self.all_sets(network), self.judged_sets(network)
            values, draws = self._resample(network, sets, metric, [method])[method]
            of_set = {
                ood: Estimate.of(v, d, n=self.on(network).n)
                for ood, v, d in zip(sets, values, draws.T, strict=True)
                if ood in judged
            }
            each[network] = replace(Estimate.combined(of_set, how), each={})
        return Estimate.combined(each, how)
