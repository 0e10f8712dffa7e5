"""Records that only list facts: a YAML file beside the module that reads it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

import yaml

from oodlib.errors import OodlibError

Record = TypeVar("Record")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast


def read_records(
    module: str, kind: Callable[..., Record], **inner: Callable[..., Any]
) -> dict[str, Record]:
    """The records of a module: name -> ``kind(name=name, **fields)``, in the order of the file.

    Parameters
    ----------
    module : ``__name__`` of ``x.py``; the records lie beside it in ``x.yaml``
    kind : class of the records; a list arrives as a tuple
    inner : field that holds a mapping of records without names -> their class

    Raises
    ------
    OodlibError : a record lacks a field or has one that its class does not know
    """
    package, _, stem = module.rpartition(".")
    path = resources.files(package) / f"{stem}.yaml"
    records = {}
    for name, fields in yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER).items():
        try:
            fields = {key: _frozen(value) for key, value in fields.items()}
            for key, part in inner.items():
                fields[key] = {of: part(**values) for of, values in fields[key].items()}
            records[name] = kind(name=name, **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise OodlibError(
                f"{path}: the record {name} does not fit ({error}). Correct its fields."
            ) from error
    return records


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
