"""Free energy of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oodlib.arrays import by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, Info, register


def energy(logits: Any, *, temperature: float = 1.0) -> Any:
    r"""Free energy; larger = more OOD.

    E = -T log sum_c exp(z_c / T)

    Parameters
    ----------
    logits : (N, C)
    temperature : T > 0

    Returns
    -------
    (N,) float64, in the unit of the logits

    References
    ----------
    Liu, Wang, Owens, Li, NeurIPS 2020, arXiv 2010.03759. The paper's score is -E, larger = ID.
    """
    check_temperature("energy", temperature)
    return by_rows("energy", lambda z: -temperature * (z / temperature).logsumexp(1), logits)


@register(
    Info(
        key="energy",
        title="Energy-based Out-of-distribution Detection",
        authors="Liu, Wang, Owens, Li",
        year=2020,
        arxiv="2010.03759",
        paper_larger_means="id",
    )
)
@dataclass(kw_only=True, eq=False)
class Energy(Detector):
    """Detector of `energy`."""

    temperature: float = 1.0

    def _score(self, bank: FeatureBank) -> Any:
        return energy(bank.logits, temperature=self.temperature)
