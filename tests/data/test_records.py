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


def test_lists_are_tuples_and_inner_records_have_their_class(tmp_path):
    (tmp_path / "x.yaml").write_text("a: {size: [3, 4], parts: {test: {count: 5}}}\n")
    found = read_records(str(tmp_path / "x.py"), Record, parts=Part)
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
def test_record_that_does_not_fit(tmp_path, fields, word):
    (tmp_path / "x.yaml").write_text(f"a: {fields}\n")
    with refuses("x.yaml: the record a", word, "Correct its fields"):
        read_records(str(tmp_path / "x.py"), Record, parts=Part)
