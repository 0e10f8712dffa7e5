"""Scores written shard by shard into a CSV file that an interruption does not lose."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from oodlib.apply import inputs
from oodlib.apply.inputs import UNREADABLE, Inputs
from oodlib.features.feature_bank import FeatureBank
from oodlib.files import write_json
from oodlib.scores import Detector


def write_scores(
    source: Inputs,
    detector: Detector,
    limit: float | None,
    output: str | Path,
    *,
    identity: str,
) -> tuple[int, Counter[str]]:
    """Score the rows of ``source`` shard by shard into a CSV file: path, score, decision.

    An image that does not decode has no score and the decision "unreadable". Memory holds one
    shard and the paths. The rows go to ``<output>.part``, beside a record of how many are safe; the
    finished file takes the name ``output``. After an interruption the same call resumes behind the
    safe rows, unless ``identity`` (of network and detector), the threshold or a scored image has
    changed: then it starts again.

    Returns
    -------
    (rows, how many of each decision)
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part")
    record = part.with_name(f"{part.name}.json")
    identity = f"{identity} {source.identity} {limit}"
    start, size, counts, key = _resume(source, part, record, identity)
    try:
        with open(part, "r+b" if start else "wb") as file:
            file.truncate(size)
            file.seek(size)
            if not start:
                file.write(b"path,score,decision\n")
            for bank in source.banks(start, inputs.SHARD):
                stop = start + len(bank)
                rows = _rows(bank, detector, limit)
                names = source.names(start, stop)
                text = io.StringIO()
                lines = ((name, *row) for name, row in zip(names, rows, strict=True))
                csv.writer(text, lineterminator="\n").writerows(lines)
                file.write(_bytes(text.getvalue()))
                file.flush()
                os.fsync(file.fileno())
                # the rows are safe from here on
                key.update(_bytes(source.stamp(start, stop)))
                start = stop
                counts.update(decision for _, decision in rows)
                safe = {"rows": stop, "bytes": file.tell(), "counts": counts}
                write_json(record, {**safe, "key": key.hexdigest()})
    finally:
        if not start:  # no row is safe, so there is nothing to resume
            part.unlink(missing_ok=True)
    os.replace(part, output)
    record.unlink(missing_ok=True)
    return start, counts


def _rows(
    bank: FeatureBank, detector: Detector, limit: float | None
) -> list[tuple[float | str, str]]:
    """(score, decision) of each row."""
    labels = np.zeros(len(bank)) if bank.labels is None else bank.labels
    rows: list[tuple[float | str, str]] = []
    for score, label in zip(detector.score(bank).tolist(), labels, strict=True):
        decision = "" if limit is None else "OOD" if score > limit else "ID"
        rows.append(("", "unreadable") if label == UNREADABLE else (score, decision))
    return rows


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # file names need not be UTF-8


def _resume(
    source: Inputs, part: Path, record: Path, identity: str
) -> tuple[int, int, Counter[str], Any]:
    """Rows and bytes that are safe, their decisions counted, and the hash of what they rest on."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        rows, size, counts, expected = (known[name] for name in ("rows", "bytes", "counts", "key"))
        if rows <= len(source) and part.stat().st_size >= size:
            key = hashlib.sha256(_bytes(identity))
            for start in range(0, rows, inputs.SHARD):
                key.update(_bytes(source.stamp(start, min(start + inputs.SHARD, rows))))
            if key.hexdigest() == expected:
                print(f"Resuming after the {rows} rows already in {part}.")
                return rows, size, Counter(counts), key
    except (OSError, KeyError, json.JSONDecodeError):
        pass  # there is nothing to resume
    return 0, 0, Counter(), hashlib.sha256(_bytes(identity))
