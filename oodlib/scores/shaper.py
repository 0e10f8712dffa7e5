"""What react, ash, dice and opnp share: they hand a shaped bank to another detector."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from oodlib.features.feature_bank import FeatureBank
from oodlib.scores.detector import Detector, create


@dataclass(kw_only=True, eq=False)
class Shaper(Detector):
    """A detector that changes features or head and scores the result with ``then``.

    In a chain each shaper learns from the unshaped bank, as its authors do; the detector at the end
    is fitted on the shaped bank. A new shaper defines ``_shape(bank) -> FeatureBank`` and, where it
    learns, ``_learn(bank)``.
    """

    then: str | Detector = "energy"

    def _detector(self) -> Detector:
        return create(self.then) if isinstance(self.then, str) else copy.deepcopy(self.then)

    @property
    def needs_fit(self) -> bool:
        return self.info.needs != "none" or self._detector().needs_fit

    def _fit(self, bank: FeatureBank) -> None:
        self._fit_chain(bank, bank)

    def _fit_chain(self, bank: FeatureBank, shaped: FeatureBank) -> None:
        """``shaped`` is the bank as the shapers before this one leave it."""
        self._learn(bank)
        self.then_ = then = self._detector()
        self.num_features_, self.num_classes_ = bank.features.shape[1], bank.head.num_classes
        if isinstance(then, Shaper):
            then._fit_chain(bank, self._shape(shaped) if then._end_needs_fit else shaped)
        else:
            then.fit(self._shape(shaped) if then.needs_fit else bank)

    @property
    def _end_needs_fit(self) -> bool:
        """Whether the detector at the end learns, so that the whole bank must be shaped for it."""
        then = self._detector()
        return then._end_needs_fit if isinstance(then, Shaper) else then.needs_fit

    def shape(self, bank: FeatureBank) -> FeatureBank:
        """The bank (features, logits, head) as the last detector of a fitted chain sees it."""
        shaped = self._shape(bank)
        then = getattr(self, "then_", None) or self._detector()
        return then.shape(shaped) if isinstance(then, Shaper) else shaped

    def _score(self, bank: FeatureBank) -> Any:
        then = getattr(self, "then_", None) or self._detector()
        parts = (bank.subset(slice(i, i + 8192)) for i in range(0, len(bank), 8192))
        return np.concatenate([then.score(self._shape(part)) for part in parts])

    def _learn(self, bank: FeatureBank) -> None:
        """Learn values named ``..._``; by default nothing."""

    def _shape(self, bank: FeatureBank) -> FeatureBank:
        raise NotImplementedError


def shaped_bank(bank: FeatureBank, features: Any, mask: Any = None) -> FeatureBank:
    """The bank with other features, a head without the weights outside ``mask``, and its logits."""
    head = bank.head if mask is None else bank.head.masked(mask)
    return FeatureBank(features, head(features), bank.labels, head, meta=bank.meta)
