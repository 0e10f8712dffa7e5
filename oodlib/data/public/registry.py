"""The public image sets: their source, terms, and what a correct copy looks like.

A new set is one more record in ``registry.yaml``; nothing else needs to change as long as it comes
as Parquet, as IDX files, as zips with one folder per class, or through a torchvision class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oodlib.data.records import read_records
from oodlib.errors import one_of


@dataclass(frozen=True)
class Split:
    """One official split."""

    count: int
    checksum: str | None = None  # prepare.pixel_checksum of all its images; None: never hashed
    idx: tuple[str, str] | None = None  # names of IDX image and label file
    torchvision: tuple[Mapping[str, Any], ...] = ()  # arguments of its class, per part
    mirror: str | None = None  # file prefix in a mirror, where it is not the split's name
    zips: tuple[str, ...] = ()  # with a folder per class; what is in two of them counts once
    archive: tuple[str, str] | None = None  # address and MD5 of the zip with the whole split


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One set; docs/data.md and ``oodlib doctor`` list these facts.

    ``crop`` says which part of a picture is resized to ``size``, bilinearly: "centre" (shorter side
    to the size, then the centre), "whole" (both sides, so the aspect ratio changes), or a box
    (left, upper, right, lower) in pixels.
    """

    name: str
    title: str
    terms: str
    citation: str
    size: tuple[int, int, int]  # (c, h, w) of the prepared images
    splits: Mapping[str, Split]
    folders: tuple[str, ...]  # names in a mirror; the first that exists wins
    crop: Literal["centre", "whole"] | tuple[int, int, int, int] = "centre"
    class_names: tuple[str, ...] = ()
    torchvision: str = ""  # class name in torchvision.datasets
    raw_md5: Mapping[str, str] = field(default_factory=dict)  # of the publisher's files
    archive: tuple[str, str] | None = None  # address and MD5, where torchvision has none
    partial: bool = False  # a smaller copy is accepted, and named <name>-incomplete
    note: str = ""

    def split(self, split: str) -> Split:
        """The entry of one split, or an OodlibError that names the splits there are."""
        one_of(f"{self.name}: split", split, self.splits)
        return self.splits[split]


SETS: dict[str, SetInfo] = read_records(__name__, SetInfo, splits=Split)


def set_info(name: str) -> SetInfo:
    """The registry's entry, or an OodlibError that names the known sets."""
    one_of("image set", name, SETS)
    return SETS[name]
