"""Where a run departs from the protocol of OpenOOD v1.5: rows of a table beside its results."""

from collections.abc import Mapping

from oodlib.experiments.testbed import Testbed

__all__ = ["openood_departures", "openood_sets"]

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
