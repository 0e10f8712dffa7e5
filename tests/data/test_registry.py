"""The registry of public sets: every entry is complete, and agrees with torchvision."""

import inspect
import re

import pytest

from oodlib.data.public.registry import SETS


@pytest.mark.parametrize("info", SETS.values(), ids=SETS)
def test_registry_entry_is_complete(info):
    assert info.terms and re.search(r"\b(19|20)\d\d\b", info.citation) and info.folders
    assert (
        info.torchvision
        or info.archive
        or all(split.archive for split in info.splits.values())
        or info.note.startswith("from a mirror only")
    )
    for split in info.splits.values():
        assert split.count > 0 and (
            split.checksum is None or re.fullmatch("[0-9a-f]{64}", split.checksum)
        )
        assert (
            split.torchvision
            or info.archive
            or split.archive
            or split.idx
            or info.note.startswith("from a mirror only")
        )  # Parquet shards


def test_registry_s_torchvision_classes_and_files_exist():
    datasets = pytest.importorskip("torchvision").datasets
    for info in SETS.values():
        if info.torchvision:
            kind = getattr(datasets, info.torchvision)
            known = {
                **dict(getattr(kind, "resources", [])),
                getattr(kind, "filename", ""): getattr(kind, "tgz_md5", ""),
                **{row[1]: row[2] for row in getattr(kind, "split_list", {}).values()},
                **{row[2]: row[1] for row in getattr(kind, "file_list", [])},
                "dtd-r1.0.1.tar.gz": getattr(kind, "_MD5", ""),
            }
            if info.name == "gtsrb":  # its files are literals of a method
                source = inspect.getsource(kind.download)
                known = {
                    file: md5
                    for file, md5 in info.raw_md5.items()
                    if file in source and md5 in source
                }
            assert info.raw_md5.items() <= known.items()


def test_omniglot_s_archives_are_those_of_torchvision():
    kind = pytest.importorskip("torchvision").datasets.Omniglot
    for split, entry in SETS["omniglot"].splits.items():
        stem = f"images_{split}"
        assert entry.archive == (f"{kind.download_url_prefix}/{stem}.zip", kind.zips_md5[stem])
        assert entry.zips[0] == f"{stem}.zip"
