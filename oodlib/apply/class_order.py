"""Are the labels of a user's images the model's classes, in its order?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oodlib.features.feature_bank import FeatureBank


@dataclass(frozen=True, kw_only=True)
class ClassCheck:
    """Are the labels the model's classes, in its order?

    Attributes
    ----------
    n : images whose label is known
    accuracy : share of images whose label is the model's answer
    chance : share of the most frequent label, what a blind guess would get
    best : accuracy if the labels were renamed one to one as well as possible
    order : (C,), ``order[label]`` is the model's class that the images of this label mostly get
    unknown : images without a known label, which count nowhere
    """

    n: int
    accuracy: float
    chance: float
    best: float
    order: NDArray[np.int64]
    unknown: int = 0

    @property
    def hint(self) -> str:
        """What is probably wrong, or nothing."""
        from scipy.stats import binom

        def beyond(share: float, expected: float) -> float:
            return float(binom.sf(round(share * self.n) - 1, self.n, expected))

        if (
            self.n >= 10 * len(self.order)
            and self.best >= max(0.5, self.accuracy + 0.1)
            and beyond(self.best, max(self.accuracy, self.chance)) < 1e-6
        ):
            wrong = int(np.flatnonzero(self.order != np.arange(len(self.order)))[0])
            return (
                f"accuracy is {self.accuracy:.1%}, but {self.best:.1%} with the labels in another "
                f"order: images of label {wrong} are called class {self.order[wrong]}. Name the "
                "folders so that they sort in the model's order, for example 00_cat, 01_dog."
            )
        if beyond(self.accuracy, self.chance) > 1e-3:
            return (
                f"accuracy {self.accuracy:.1%} on {self.n} images is near chance "
                f"({self.chance:.1%}): wrong weights, transform (size, mean and std, colour order) "
                "or class order. OOD scores are meaningless until this is fixed."
            )
        return ""


def check_classes(bank: FeatureBank) -> ClassCheck | None:
    """Compare labels and answers; None unless the known labels (not -1) are all of 0 .. C-1."""
    from scipy.optimize import linear_sum_assignment

    classes = bank.head.num_classes
    if bank.labels is None:
        return None
    known = bank.labels >= 0
    labels = bank.labels[known]
    if not np.array_equal(np.unique(labels), np.arange(classes)):
        return None
    counts = np.zeros((classes, classes), dtype=np.int64)  # label by answer
    np.add.at(counts, (labels, bank.logits[known].argmax(1)), 1)
    rows, order = linear_sum_assignment(-counts)
    n = len(labels)
    return ClassCheck(
        n=n,
        accuracy=float(np.trace(counts) / n),
        chance=float(counts.sum(1).max() / n),
        best=float(counts[rows, order].sum() / n),
        order=order,
        unknown=bank.unknown,
    )
