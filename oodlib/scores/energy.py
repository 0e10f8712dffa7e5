"""Free energy of the logits."""

from typing import Any

from oodlib.arrays import Array, by_rows, check_temperature
from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, register


def energy(logits: Array, *, temperature: float = 1.0) -> Array:
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

    Examples
    --------
    >>> energy(np.log([[3.0, 1.0], [6.0, 2.0]])).round(4)
    array([-1.3863, -2.0794])
    """
    check_temperature("energy", temperature)
    return by_rows("energy", lambda z: -temperature * (z / temperature).logsumexp(1), logits)


@register(
    key="energy",
    title="Energy-based Out-of-distribution Detection",
    authors="Liu, Wang, Owens, Li",
    year=2020,
    arxiv="2010.03759",
)
class Energy(Detector):
    """Detector of `energy`."""

    temperature: float = 1.0

    def _score(self, bank: FeatureBank) -> Any:
        return energy(bank.logits, temperature=self.temperature)
