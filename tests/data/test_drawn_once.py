"""Built-in sets on disk: the same arrays as drawn, and never a damaged file."""

from pathlib import Path

import numpy as np
import pytest

from oodlib.data import embedded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OODLIB_DATA", str(tmp_path))
    return tmp_path / "cache" / "embedded"


def same(a, b) -> bool:
    return (
        np.array_equal(a.images, b.images)
        and np.array_equal(a.labels, b.labels)
        and (a.name, a.split, a.class_names) == (b.name, b.split, b.class_names)
        and a.meta.keys() == b.meta.keys()
        and all(np.array_equal(a.meta[key], b.meta[key]) for key in a.meta)
    )


@pytest.mark.parametrize("name", ["greek", "digits", "textures", "unit_tests"])
def test_what_is_read_is_what_is_drawn(cache: Path, name: str) -> None:
    drawn = embedded(name, n=120, seed=3)
    (path,) = cache.iterdir()
    assert same(embedded(name, n=120, seed=3), drawn) and list(cache.iterdir()) == [path]
    assert same(embedded.__wrapped__(name, n=120, seed=3), drawn)


def test_other_arguments_have_files_of_their_own(cache: Path) -> None:
    first, second = embedded("digits", n=120, seed=0), embedded("digits", n=120, seed=1)
    assert len(list(cache.iterdir())) == 2 and not same(first, second)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_drawn_anew(cache: Path, content: bytes) -> None:
    drawn = embedded("digits", n=120)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert same(embedded("digits", n=120), drawn) and path.stat().st_size > 1000


def test_a_small_set_is_not_kept_and_a_full_disk_does_not_matter(cache: Path) -> None:
    assert len(embedded("digits", n=20)) == 20 and not cache.exists()
    cache.parent.mkdir()
    cache.write_text("no folder")
    assert len(embedded("digits", n=120)) == 120
