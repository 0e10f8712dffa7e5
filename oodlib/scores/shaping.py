"""What react, ash and dice share: they turn a bank into a shaped bank and hand it to another detector."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from oodlib.bank import FeatureBank, Head
from oodlib.scores.base import Detector, create


@dataclass(kw_only=True, eq=False)
class Shaper(Detector):
    """A detector that changes features or head and scores the result with ``then``.

    A new one defines ``_shape(bank) -> FeatureBank`` and, where it learns, ``_learn(bank)``.
    """

    then: str | Detector = "energy"

    def _detector(self) -> Detector:
        return create(self.then) if isinstance(self.then, str) else copy.deepcopy(self.then)

    @property
    def needs_fit(self) -> bool:
        return self.info.needs != "none" or self._detector().needs_fit

    def _fit(self, bank: FeatureBank) -> None:
        self._learn(bank)
        self.then_ = self._detector()
        self.then_.fit(self._shape(bank) if self.then_.needs_fit else bank)

    def _score(self, bank: FeatureBank) -> Any:
        then = getattr(self, "then_", None) or self._detector()
        return np.concatenate([then.score(self._shape(bank.subset(slice(i, i + 8192))))
                               for i in range(0, len(bank), 8192)])

    def _learn(self, bank: FeatureBank) -> None:
        """Learn values named ``..._``; by default nothing."""

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        raise NotImplementedError


def shaped_bank(bank: FeatureBank, features: Any, weight: Any = None) -> FeatureBank:
    """The bank with other features, or another weight of the head, and the logits that follow."""
    head = bank.head if weight is None else Head(weight, bank.head.bias)
    return FeatureBank(features, head(features), bank.labels, head, meta=bank.meta)
