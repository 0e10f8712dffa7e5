"""The public image sets: their source, terms, and what a correct copy looks like.

A new set is one more record in ``registry.yaml``; nothing else needs to change as long as it comes
as Parquet, as IDX files, as zips with one folder per class, or through a torchvision class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oodlib.data.records import read_records
from oodlib.errors import OodlibError


@dataclass(frozen=True)
class Split:
    """One official split.

    Attributes
    ----------
    count : images in the official split
    checksum : `prepare.pixel_checksum` of the complete official split; None where none was hashed
    idx : names of the IDX image and label file, where the set comes in that form
    torchvision : keyword arguments of the torchvision class, one mapping per concatenated part
    mirror : file prefix in a mirror, where it differs from the split's name
    zips : zips with one folder per class, where the set comes in that form; a mirror may hold any
        of them, and a file found in two of them counts once
    archive : address and MD5 of the one of ``zips`` that holds the whole split
    """

    count: int
    checksum: str | None = None
    idx: tuple[str, str] | None = None
    torchvision: tuple[Mapping[str, Any], ...] = ()
    mirror: str | None = None
    zips: tuple[str, ...] = ()
    archive: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One set; docs/data.md and ``oodlib doctor`` list these facts.

    Attributes
    ----------
    size : (c, h, w) of the prepared images; other sizes are resized to it, bilinearly
    crop : which part of a picture is resized: "centre" (shorter side to the size, then the centre),
        "whole" (both sides to the size, so the aspect ratio changes), or a box (left, upper, right,
        lower) in pixels
    folders : names under which a mirror may hold the set; the first that exists wins
    torchvision : class name in ``torchvision.datasets``, "" if there is none
    raw_md5 : of the publisher's files, as torchvision checks them
    archive : address and MD5 of an archive that torchvision does not know
    partial : a smaller copy is accepted, and named ``<name>-incomplete`` wherever it is used
    """

    name: str
    title: str
    terms: str
    citation: str
    size: tuple[int, int, int]
    splits: Mapping[str, Split]
    folders: tuple[str, ...]
    crop: Literal["centre", "whole"] | tuple[int, int, int, int] = "centre"
    class_names: tuple[str, ...] = ()
    torchvision: str = ""
    raw_md5: Mapping[str, str] = field(default_factory=dict)
    archive: tuple[str, str] | None = None
    partial: bool = False
    note: str = ""

    def split(self, split: str) -> Split:
        """The entry of one split, or an OodlibError that names the splits there are."""
        if split not in self.splits:
            raise OodlibError(
                f"{self.name}: there is no split {split!r}. Choose one of {', '.join(self.splits)}."
            )
        return self.splits[split]


SETS: dict[str, SetInfo] = read_records(__name__, SetInfo, splits=Split)


def set_info(name: str) -> SetInfo:
    """The registry's entry, or an OodlibError that names the known sets."""
    if name not in SETS:
        raise OodlibError(f"There is no image set {name!r}. Known sets: {', '.join(SETS)}.")
    return SETS[name]
