"""The test beds of a run: loaded in one call, scored once by every detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from oodlib.claims import Run
from oodlib.errors import OodlibError
from oodlib.experiments.testbed import Testbed, testbed
from oodlib.metrics import Board, Scores
from oodlib.scores import Detector, create

__all__ = ["Beds", "load", "score"]

Detectors = Sequence[str] | Mapping[str, Detector]


class Beds(dict[str, Testbed]):
    """Network -> test bed, in the order in which they were asked for; see `load`."""

    seed: int = 0

    @property
    def first(self) -> Testbed:
        """The test bed of the first network: the one that figures show."""
        if not self:
            raise OodlibError("Beds: there is no test bed. Name at least one network.")
        return next(iter(self.values()))

    def score(self, detectors: Detectors | Callable[[Testbed], Detectors], **options: Any) -> Board:
        """Fit and score detectors on every test bed (see `score`): a `Board`.

        detectors : names, or name -> detector, or a function of the test bed that gives either
        options : n_boot, smallest_n, redraw of the `Board`
        """
        scores = {
            name: score(bed, detectors(bed) if callable(detectors) else detectors)
            for name, bed in self.items()
        }
        return self.board(scores, **options)

    def board(self, scores: Mapping[str, Mapping[str, Scores]], **options: Any) -> Board:
        """Scores that were made by hand, network -> method -> set -> (n,), as a `Board`.

        A name that is no network of the test beds, such as a setting of the first, takes groups and
        ID set of the first.
        """
        beds = {name: self.get(name, self.first) for name in scores}
        return Board(
            scores=scores,
            group={name: bed.group for name, bed in beds.items()},
            id_name={name: bed.id_name for name, bed in beds.items()},
            **{"seed": self.seed, **options},
        )


def load(run: Run, networks: Sequence[str], **options: Any) -> Beds:
    """The test bed of each network; prints accuracies, sets and notes, gives the run the hashes.

    options : n_fit, n_test, n_ood, imagenet, layers ... of `testbed`; seed and device are the run's
    """
    beds = Beds()
    beds.seed = run.seed
    for name in networks:
        bed = beds[name] = testbed(name, **{"seed": run.seed, "device": run.device, **options})
        fitted = f"{len(bed.fit)} training images" if bed.fit is not None else "no training images"
        print(
            f"{name:28s} ID {bed.id_name}: accuracy {bed.test.accuracy:.1%} on {len(bed.test)} "
            f"test images, {fitted}, D = {bed.test.features.shape[1]}, "
            f"C = {bed.test.head.num_classes}"
        )
        weights = bed.provenance.get("sha256", bed.provenance.get("weights", ""))
        hashes = {f"{name}/{key}": value for key, value in bed.fingerprints.items()}
        run.uses(weights={name: str(weights)}, data=hashes)

    # Networks of one ID set have the same OOD sets
    sets: dict[str, list[str]] = {}
    for name, bed in beds.items():
        text = ", ".join(f"{k} ({bed.group[k]}, {len(bank)})" for k, bank in bed.ood.items())
        sets.setdefault(text, []).append(name)
    for text, names in sets.items():
        print(f"OOD sets{'' if len(sets) == 1 else ' of ' + ', '.join(names)}: {text}")
    for name, note in {k: v for bed in beds.values() for k, v in bed.notes.items()}.items():
        print(f"note on {name}: {note}")
    return beds


def score(bed: Testbed, detectors: Detectors) -> dict[str, dict[str, np.ndarray]]:
    """Method -> "id" (the ID test set) and each OOD set -> scores (n,), from the same banks.

    Each detector is fitted on ``bed.fit`` first. Where the bed has no training images (ImageNet),
    detectors that learn are left out, and their names printed.

    detectors : names, or name -> detector with its own parameters
    """
    made = (
        detectors if isinstance(detectors, Mapping) else {name: create(name) for name in detectors}
    )
    left_out = [name for name, detector in made.items() if detector.needs_fit and bed.fit is None]
    if left_out:
        print(
            f"{bed.network}: left out {', '.join(left_out)}: they learn from ID training images, "
            "and this test bed has none (ImageNetFiles(train=True) gathers them)."
        )
    out = {}
    for name, detector in made.items():
        if name in left_out:
            continue
        if bed.fit is not None and detector.needs_fit:
            detector.fit(bed.fit)
        out[name] = {key: detector.score(bank) for key, bank in bed.tested.items()}
    return out
