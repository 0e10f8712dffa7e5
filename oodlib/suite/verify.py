"""Compare a fresh run with the committed reference results, by the tolerances committed beside
them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from oodlib.claims.run import RESULT_KEY
from oodlib.errors import OodlibError
from oodlib.files import atomic_folder
from oodlib.workspace import STAMP, check_profile, root

LIMIT_MB = 14.0  # of all references together
_LARGEST_STEP, _MEAN_STEP = 16, 1.5  # of 255: what no eye sees
_KEPT = ("results.csv", "claims.json", "contents.json", "provenance.json")


def reference_folder() -> Path:
    """Where the committed results of a profile lie."""
    return root() / "figures" / "reference"


def referenced(profile: str) -> list[str]:
    """Notebooks with reference results in this profile; an OodlibError where there is none."""
    found = sorted(
        path.parent.name
        for path in (reference_folder() / check_profile(profile)).glob("*/results.csv")
    )
    if not found:
        raise OodlibError(
            f"No reference results under figures/reference/{profile}/. After `make reproduce "
            f"PROFILE={profile}`, `python -m oodlib verify --update --profile {profile}` makes "
            "them."
        )
    return found


def compare_runs(profile: str, fresh: Path, names: list[str]) -> list[str]:
    """Differences of every notebook in ``names`` that has a reference; one sentence each."""
    base = reference_folder() / profile
    known = [name for name in referenced(profile) if name in names]
    tolerances = yaml.safe_load(
        (reference_folder() / "tolerances.yaml").read_text(encoding="utf-8")
    )
    return [
        f"{name}: {text}"
        for name in known
        for text in compare(base / name, fresh / name, tolerances)
    ]


def compare(reference: Path, fresh: Path, tolerances: dict[str, float]) -> list[str]:
    """Differences between two run folders, row for row; one sentence each.

    Reported are: another number of rows, missing or extra rows, a key in several rows on either
    side, values or ends of intervals apart by more than the metric's tolerance, and other verdicts.
    ``tolerances`` maps a metric to an absolute tolerance, with a ``default``.
    """
    old, new = _rows(reference / "results.csv"), _rows(fresh / "results.csv")
    found = [] if len(new) == len(old) else [f"{len(new)} rows, reference {len(old)}"]
    for where, rows in (("the reference", old), ("the run", new)):
        counts = rows.groupby(list(RESULT_KEY), sort=False).size()
        found += [
            f"{count} rows of {where} have one key: {_name(key)}"
            for key, count in counts[counts > 1].items()
        ]

    # the n-th row of a key is compared with the n-th one; another number of them is reported above
    columns = [*RESULT_KEY, "copy"]
    both = old.merge(new, "left", columns, suffixes=("", " now"), indicator=True)
    extra = new.merge(old[columns], "left", columns, indicator=True)
    for text, table in (("missing", both), ("not in the reference", extra)):
        first = table[(table["_merge"] == "left_only") & (table["copy"] == 0)]
        found += [f"row {text}: {_name(key)}" for key in first[list(RESULT_KEY)].to_numpy()]
    for _, row in both[both["_merge"] == "both"].iterrows():
        allowed = float(tolerances.get(row["metric"], tolerances["default"]))
        for column in ("value", "low", "high"):
            before, after = row[column], row[f"{column} now"]
            no_interval = column != "value" and pd.isna(before) and pd.isna(after)
            if no_interval or abs(after - before) <= allowed:
                continue
            name = _name([*row[list(RESULT_KEY)], column if column != "value" else ""])
            found.append(f"{name}: {after:.4f}, reference {before:.4f}, tolerance {allowed:g}")

    verdicts, now = _verdicts(reference), _verdicts(fresh)
    return found + [
        f"verdict of {claim}: {now.get(claim, 'none')}, reference {verdicts.get(claim, 'none')}"
        for claim in sorted({*verdicts, *now})
        if verdicts.get(claim) != now.get(claim)
    ]


def _rows(path: Path) -> pd.DataFrame:
    """The rows of a results.csv as text, three numbers, and a count of the rows of one key."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in ("value", "low", "high"):
        rows[column] = rows[column].replace("", "nan").astype(float)
    return rows.assign(copy=rows.groupby(list(RESULT_KEY)).cumcount())


def _name(key: Any) -> str:
    return " ".join(part for part in key if part)


def _verdicts(folder: Path) -> dict[str, str]:
    records: list[dict[str, Any]] = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    return {record["id"]: record["verdict"] for record in records}


def update_reference(profile: str) -> list[str]:
    """Copy the finished runs of a profile to figures/reference/; returns the names of the
    notebooks.

    Raises
    ------
    OodlibError : nothing to copy, or the references would exceed ``LIMIT_MB``
    """
    base, target = root() / "figures" / check_profile(profile), reference_folder()
    folders = [
        path.parent
        for path in sorted(base.glob(f"*/{STAMP}"))
        if (path.parent / "results.csv").exists()
    ]
    if not folders:
        raise OodlibError(
            f"No finished run under figures/{profile}/. Run `make reproduce PROFILE={profile}` "
            "first."
        )
    files = {
        folder.name: [
            path
            for path in sorted(folder.iterdir())
            if path.name in _KEPT or path.suffix in (".md", ".png")
        ]
        for folder in folders
    }
    others = sum(
        path.stat().st_size
        for path in target.rglob("*")
        if path.is_file() and not (path.parent.parent.name == profile and path.parent.name in files)
    )
    content = {path: _content(path) for kept in files.values() for path in kept}
    size = (others + sum(map(len, content.values()))) / 1e6
    if size > LIMIT_MB:
        raise OodlibError(
            f"The references would take {size:.1f} MB, the limit is {LIMIT_MB:g}. "
            "Save fewer or smaller figures."
        )
    for name, kept in files.items():
        with atomic_folder(target / profile / name) as folder:
            for path in kept:
                (folder / path.name).write_bytes(content[path])
    return list(files)


def _content(path: Path) -> bytes:
    """The file's bytes; a PNG is reduced to 256 colours, less than half the size, where the
    difference is invisible.

    Invisible: no channel of any pixel changes by more than ``_LARGEST_STEP`` of 255, and none by
    more than ``_MEAN_STEP`` on average. Other pictures, such as photographs, keep all their
    colours.
    """
    if path.suffix != ".png":
        return path.read_bytes()
    from PIL import Image, ImageChops, ImageStat

    out = io.BytesIO()
    with Image.open(path) as picture:
        full = picture.convert("RGB")
    reduced = full.quantize(
        256, method=Image.Quantize.MAXCOVERAGE, kmeans=3
    )  # its largest step is the smallest
    step = ImageStat.Stat(ImageChops.difference(full, reduced.convert("RGB")))
    invisible = (
        max(largest for _, largest in step.extrema) <= _LARGEST_STEP
        and max(step.mean) <= _MEAN_STEP
    )
    (reduced if invisible else full).save(out, "PNG", optimize=True)
    return out.getvalue()
