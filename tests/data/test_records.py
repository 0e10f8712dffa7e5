"""Records from YAML: what arrives, and which file and record an error names."""

from dataclasses import dataclass

import pytest
from helpers import refuses

from oodlib.data.records import read_records


@dataclass(frozen=True, kw_only=True)
class Part:
    count: int


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    size: tuple[int, ...] = ()
    parts: dict[str, Part]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a text as the records of a module of a package."""
    package = f"facts_{tmp_path.name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def run(text):
        (tmp_path / package / "x.yaml").write_text(text)
        return read_records(f"{package}.x", Record, parts=Part)

    return run


def test_lists_are_tuples_and_inner_records_have_their_class(read):
    found = read("a: {size: [3, 4], parts: {test: {count: 5}}}\n")
    assert found == {"a": Record(name="a", size=(3, 4), parts={"test": Part(count=5)})}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ("{size: [3]}", "parts"),
        ("{parts: {test: {}}}", "count"),
        ("{parts: {}, colour: red}", "colour"),
        ("3", "int"),
    ],
)
def test_record_that_does_not_fit(read, fields, word):
    with refuses("x.yaml: the record a", word, "Correct its fields"):
        read(f"a: {fields}\n")
