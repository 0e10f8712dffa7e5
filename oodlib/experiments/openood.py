"""A run beside OpenOOD v1.5: its near and far averages, the published ones, the departures."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from oodlib.data import published
from oodlib.experiments.testbed import Testbed
from oodlib.metrics import METRICS, Board

# the OOD sets of its CIFAR protocols, with the images that it tests; unknown where not of CIFAR-10
_SETS = {
    "cifar100": 9000,
    "cifar10": None,
    "tiny-imagenet": 7793,
    "mnist": 70000,
    "svhn": 26032,
    "dtd": 5640,
    "places365": 35195,
}


def openood_sets(bed: Testbed) -> list[str]:
    """OOD sets of a test bed that OpenOOD averages over; all of them where ID is not CIFAR."""
    return [
        name
        for name in bed.ood
        if name.startswith(tuple(_SETS)) or not bed.id_name.startswith("cifar")
    ]


def near_and_far(board: Board, beds: Mapping[str, Testbed], methods: Sequence[str]) -> pd.DataFrame:
    """Averages (%) over OpenOOD's near and far sets; several training seeds: mean ± population std.

    Networks whose names differ after the colon are seeds of one network.
    """
    sets = openood_sets(next(iter(beds.values())))
    averages = {
        f"{group} {metric}": 100 * board.only(*sets, group=group).each(metric)
        for metric in METRICS
        for group in ("near", "far")
    }
    families: dict[str, list[str]] = {}
    for network in board.networks:
        families.setdefault(network.split(":")[0], []).append(network)
    rows = []
    for method in methods:
        for family, seeds in families.items():
            row = {"method": method, "network": family, "seeds": len(seeds)}
            for column, values in averages.items():
                found = values.loc[seeds, method].to_numpy()
                spread = f" ± {np.std(found):.2f}" if len(seeds) > 1 else ""
                row[column] = f"{np.mean(found):.2f}{spread}"
            rows.append(row)
    return pd.DataFrame(rows)


def openood_published(beds: Mapping[str, Testbed], methods: Sequence[str]) -> pd.DataFrame:
    """Rows of OpenOOD's leaderboard on the ID sets of the test beds (else CIFAR-10), near and far.

    methods : in its spelling, "MSP", "EBO" ...
    """
    names = {bed.id_name.replace("net-", "net") for bed in beds.values()}
    ids = {name if "imagenet" in name else "cifar10" for name in names}
    rows = published("openood_v15")
    rows = rows[rows.id_dataset.isin(ids) & rows.group.isin(["near", "far"])]
    rows = rows[rows.method.isin(methods)]
    cells = [
        f"{mean:.2f}" + (f" ± {std:.2f}" if std >= 0 else "")
        for mean, std in zip(rows["mean"], rows["std"], strict=True)
    ]
    column = rows.group + " " + rows.metric.replace("FPR@95", "FPR95(OOD+)")
    table = rows.assign(cell=cells, column=column).pivot(
        index=["id_dataset", "backbone", "method"], columns="column", values="cell"
    )
    return table.reset_index().rename_axis(columns=None)


def openood_departures(beds: Mapping[str, Testbed]) -> list[tuple[str, str, str]]:
    """What, here, in OpenOOD v1.5: networks, accuracies, images of each set, what is missing."""
    bed = next(iter(beds.values()))
    rows = []
    if bed.id_name == "cifar10":
        accuracy = ", ".join(f"{100 * b.test.accuracy:.1f} %" for b in beds.values())
        outliers = ", ".join(k for k in bed.clean_val if k != "patch_shuffled")
        missing = [k for k in ("svhn", "dtd", "places365") if not _found(k, bed)]
        averaged = openood_sets(bed)
        rows += [
            ("network", ", ".join(beds), "ResNet-18, 100 epochs, three checkpoints"),
            ("ID accuracy", accuracy, "95.06 ± 0.30 %: not comparable below 94.3 %"),
            ("real outliers", outliers or "none", "Tiny-ImageNet's validation part"),
            (
                "not available",
                ", ".join(missing) or "none",
                "svhn, textures (dtd), places365 are far-OOD",
            ),
        ]
        for name, bank in bed.ood.items():
            theirs = next((n for known, n in _SETS.items() if n and name.startswith(known)), None)
            there = f"{theirs:,}" if theirs else "not tested"
            rows.append((f"images of {name}", f"{len(bank):,}", there))
        extra = ", ".join(name for name in bed.ood if name not in averaged)
        rows.append(("tested, but not in the averages", extra or "none", "not one of its sets"))
    elif "imagenet" not in bed.id_name:
        here = f"ID {bed.id_name}, embedded data: not OpenOOD"
        rows.append(("everything else", here, "CIFAR and ImageNet"))
    notes = {name: note for b in beds.values() for name, note in b.notes.items()}
    return rows + [(f"note on {name}", note, "") for name, note in notes.items()]


def _found(name: str, bed: Testbed) -> bool:
    return any(ood.startswith(name) for ood in bed.ood)
