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
from oodlib.apply.inputs import UNREADABLE, FeatureFile, Images
from oodlib.files import write_json
from oodlib.scores import Detector

__all__ = ["write_scores"]


def write_scores(
    source: Images | FeatureFile,
    detector: Detector,
    limit: float | None,
    output: str | Path,
    *,
    identity: str,
) -> tuple[int, Counter[str]]:
    """Score the rows of ``source`` shard by shard into a CSV file: path, score, decision.

    An image that does not decode has no score and the decision "unreadable".

    Memory holds one shard, whatever the number of images (and their paths). The rows go to
    ``<output>.part`` with a record of how many are safe beside it; the finished file takes the name
    ``output``. Interrupted, the same call goes on behind the safe rows, unless ``identity`` (what
    identifies network and detector), the threshold or an image that was scored has changed: then it
    starts again.

    Returns
    -------
    (rows, how many of each decision)
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part, record = (
        output.with_name(f"{output.name}.part"),
        output.with_name(f"{output.name}.part.json"),
    )
    start, size, counts, key = _resume(
        source, part, record, f"{identity} {source.identity} {limit}"
    )
    try:
        with open(part, "r+b" if start else "wb") as file:
            file.truncate(size)
            file.seek(size)
            if not start:
                file.write(b"path,score,decision\n")
            for bank in source.banks(start, inputs.SHARD):
                stop = start + len(bank)
                read = (
                    np.full(len(bank), True) if bank.labels is None else bank.labels != UNREADABLE
                )
                rows = [
                    (score, "" if limit is None else "OOD" if score > limit else "ID")
                    if ok
                    else ("", "unreadable")
                    for score, ok in zip(detector.score(bank).tolist(), read, strict=True)
                ]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(
                    (name, *row) for name, row in zip(source.names(start, stop), rows, strict=True)
                )
                file.write(_bytes(text.getvalue()))
                file.flush()
                os.fsync(file.fileno())
                key.update(_bytes(source.stamp(start, stop)))
                start = stop
                counts.update(decision for _, decision in rows)
                write_json(
                    record,
                    {"rows": stop, "bytes": file.tell(), "counts": counts, "key": key.hexdigest()},
                )
    finally:
        if not start:  # no row is safe: there is nothing to go on from
            part.unlink(missing_ok=True)
    os.replace(part, output)
    record.unlink(missing_ok=True)
    return start, counts


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # file names need not be UTF-8


def _resume(
    source: Images | FeatureFile, part: Path, record: Path, identity: str
) -> tuple[int, int, Counter[str], Any]:
    """Rows and bytes that are safe, their decisions counted, and the running hash of what they
    depend on.
    """
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
        pass  # there is nothing to go on from
    return 0, 0, Counter(), hashlib.sha256(_bytes(identity))
