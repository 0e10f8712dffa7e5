"""The hash of the code behind a cached result: which files it follows, and what changes it."""

import pytest

from oodlib import OodlibError, workspace
from oodlib.workspace import code_closure, code_hash, imported_modules

FILES = {
    "__init__.py": "from oodlib.errors import Wrong",
    "errors.py": "class Wrong(Exception): pass",
    "images.py": "import numpy\nfrom oodlib.errors import Wrong",
    "nets/__init__.py": "from oodlib.nets.small import Small",
    "nets/small.py": "import torch",
    "nets/large.py": "def f():\n    from oodlib.images import load",
    "whole.py": "import oodlib\nx = oodlib.nets.large.f()",
    "apart.py": "y = 1",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of ours; gives its folder."""
    for name, text in FILES.items():
        path = tmp_path / "oodlib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(workspace, "_PACKAGE", tmp_path / "oodlib")
    code_hash.cache_clear()
    yield tmp_path / "oodlib"
    code_hash.cache_clear()


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import numpy, torch.nn", set()),
        ("import oodlib.images", {"oodlib.images"}),
        ("from oodlib.images import load, save", {"oodlib.images"}),
        ("from oodlib import images", {"oodlib.images"}),
        ("from oodlib import images as x, Wrong", {"oodlib.images", "oodlib"}),
        ("from oodlib.nets import large", {"oodlib.nets.large"}),
        ("from oodlib.nets import Small", {"oodlib.nets"}),
        (
            "import oodlib\nx = oodlib.nets.large.f(1)",
            {"oodlib", "oodlib.nets", "oodlib.nets.large"},
        ),
        ("import oodlib\nx = oodlib.nets.Small", {"oodlib", "oodlib.nets"}),
        ("def f():\n    if True:\n        from oodlib.images import load", {"oodlib.images"}),
        ("import oodlibrary\nother.oodlib.images.x", set()),
        ("import oodlib.nowhere.deeper", {"oodlib"}),
    ],
)
def test_modules_are_found_in_every_form_of_import(package, source, modules):
    assert imported_modules(source) == modules


def test_a_relative_import_is_refused(package):
    with pytest.raises(OodlibError, match="line 2 holds a relative import"):
        imported_modules("import numpy\nfrom . import images")


@pytest.mark.parametrize(
    ("module", "reached"),
    [
        ("apart", {"apart"}),
        ("nets", {"nets", "nets.small"}),
        ("nets.large", {"nets.large", "images", "errors"}),
        ("whole", {"", "errors", "whole", "nets", "nets.small", "nets.large", "images"}),
    ],
)
def test_the_closure_is_all_that_is_reached(package, module, reached):
    found = code_closure(f"oodlib.{module}")
    assert set(found) == {f"oodlib.{name}".rstrip(".") for name in reached}
    assert all(path.is_file() for path in found.values()) and list(found) == sorted(found)


def test_the_closure_of_several_modules_is_theirs_together(package):
    assert set(code_closure("oodlib.apart", "oodlib.nets")) == {
        "oodlib.apart",
        "oodlib.nets",
        "oodlib.nets.small",
    }
    with pytest.raises(OodlibError, match=r"no module 'oodlib\.nowhere'"):
        code_closure("oodlib.apart", "oodlib.nowhere")


def hashes(*modules):
    code_hash.cache_clear()
    return [code_hash(f"oodlib.{module}") for module in modules]


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("errors.py", {"images", "nets.large", "whole"}),
        ("nets/small.py", {"nets", "whole"}),
        ("apart.py", {"apart"}),
        ("nets/large.py", {"nets.large", "whole"}),
        ("nets/__init__.py", {"nets", "whole"}),
    ],
)
def test_the_hash_changes_with_the_files_that_are_reached(package, file, changed):
    modules = ("apart", "images", "nets", "nets.large", "whole")
    before = hashes(*modules)
    assert len(set(before)) == len(modules) and hashes(*modules) == before
    with open(package / file, "a") as text:
        text.write("\n# edited")
    after = hashes(*modules)
    assert {name for name, a, b in zip(modules, before, after, strict=True) if a != b} == changed


def test_an_import_that_is_added_is_followed(package):
    (before,) = hashes("apart")
    (package / "apart.py").write_text("y = 1\nfrom oodlib.nets import Small")
    assert set(code_closure("oodlib.apart")) == {"oodlib.apart", "oodlib.nets", "oodlib.nets.small"}
    assert hashes("apart") != [before]


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm"])
def test_the_hash_changes_with_the_version_of_a_library(package, monkeypatch, library):
    whole, before = workspace.version, hashes("apart")
    monkeypatch.setattr(
        workspace, "version", lambda name: "0.0" if name == library else whole(name)
    )
    assert hashes("apart") != before

    def absent(name):
        raise workspace.PackageNotFoundError(name)

    other = hashes("apart")
    monkeypatch.setattr(workspace, "version", absent)
    assert hashes("apart") not in (before, other)


@pytest.mark.parametrize(
    ("module", "reached", "apart"),
    [
        (
            "features.extract",
            {"models.hooks", "models.training.augment", "data.images", "files"},
            {"scores.knn", "claims"},
        ),
        (
            "studies.vits.trained",
            {"scores.moments", "data.builtin.render", "models.training.vit"},
            {"studies.flows.runs"},
        ),
        (
            "studies.flows.runs",
            {"scores.complexity", "studies.flows.specs", "data.images"},
            {"studies.vits.trained"},
        ),
        (
            "models.shipped",
            {"models.fast_convnet", "data.builtin.sets", "data.public.prepare"},
            {"scores.knn"},
        ),
    ],
)
def test_what_is_cached_rests_on_what_it_reaches(module, reached, apart):
    found = {name.removeprefix("oodlib.") for name in code_closure(f"oodlib.{module}")}
    assert reached <= found and not apart & found


def test_records_in_yaml_belong_to_the_code_of_their_module(package):
    before = code_hash("oodlib.apart")
    (package / "apart.yaml").write_text("a: {size: 3}\n")
    code_hash.cache_clear()
    assert code_hash("oodlib.apart") != before
