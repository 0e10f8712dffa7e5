"""The API reference, made from the docstrings by pdoc."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path


def module_names() -> list[str]:
    """Every module of the package that a user may import, in alphabetical order."""
    package = sys.modules["oodlib"]
    found = [module.name for module in pkgutil.walk_packages(package.__path__, "oodlib.")]
    return [
        "oodlib",
        *sorted(name for name in found if not name.rpartition(".")[2].startswith("_")),
    ]


def build_docs(target: Path) -> Path:
    """Write one page per module below ``target``; returns the index page."""
    import pdoc

    package = sys.modules["oodlib"]
    for name in package.__all__:  # loaded on first use, and pdoc sees loaded names only
        setattr(package, name, getattr(package, name))
    pdoc.render.configure(docformat="numpy", search=True, show_source=True)
    with warnings.catch_warnings():
        # a module named like its function, and annotations inherited from another module
        for harmless in (
            "The module specification .* has already been added",
            "Error parsing type annotation",
        ):
            warnings.filterwarnings("ignore", harmless, UserWarning)
        pdoc.pdoc(*module_names(), output_directory=target)
    return target / "index.html"
