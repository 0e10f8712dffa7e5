"""What the documents promise exists: commands, files, snippets, tables, docstrings, records, references."""

import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import oodlib
from oodlib.__main__ import _parser
from oodlib.errors import OodlibError
from oodlib.suite.docs import build_docs, module_names
from oodlib.suite.readme import readme_text, update_readme

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "data/published/README.md", "data/pools/README.md"]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(text: str) -> str:
    """Code blocks and code spans, one a line."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("name", PAGES)
def test_every_make_command_is_a_target(name: str) -> None:
    commands = re.findall(r"(?:^|&& )(make [^#&\n]*)", code_of(page(name)), re.MULTILINE)
    for command in commands:
        if "<" not in command:
            done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {command}: {done.stderr}"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_is_understood(name: str) -> None:
    from oodlib.apply.command import _parser as score_parser

    for command in re.findall(r"python -m oodlib ([a-z][^#\n]*)", code_of(page(name))):
        first, *rest = shlex.split(command)
        if first == "score":
            score_parser().parse_args(rest)
        else:
            _parser().parse_args([first, *rest])


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page(name))
    missing = [link for link in links if not re.match(r"https?://|#", link)
               and not (ROOT / name).parent.joinpath(link.partition("#")[0]).exists()]
    assert not missing


def test_the_readme_tables_are_current() -> None:
    assert readme_text(page("README.md")) == page("README.md"), "run `make docs`"


def test_the_readme_tables_follow_the_reference_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    blank = "Top\n" + "".join(f"<!-- {name}:begin -->\nstale\n<!-- {name}:end -->\nprose\n"
                              for name in ("verdicts", "methods", "compute"))
    (tmp_path / "README.md").write_text(blank)
    claim = {"id": "toy/C1", "statement": "a | b", "source": "abs", "unit": "percent", "published": {"value": 0.5},
             "kind": "trend", "direction": "above", "margin": 0.5,
             "verdict": "trend holds", "measured": 0.75, "low": 0.7, "high": 0.8, "reason": "", "detail": "",
             "network": "net"}
    untested = {**claim, "id": "toy/C2", "verdict": "not testable here", "measured": None, "low": None, "high": None,
                "published": None}
    for profile in ("laptop", "benchmark"):
        folder = tmp_path / "figures" / "reference" / profile / "01_toy"
        folder.mkdir(parents=True)
        (folder / "claims.json").write_text(json.dumps([claim, untested]))
        (folder / "provenance.json").write_text(json.dumps({
            "seed": 3, "device": "cpu", "platform": "Linux", "wall_seconds": 90.0, "peak_memory_mib": 512.0,
            "weights": {"net": "3f9c"}}))
    assert update_readme() and not update_readme()
    text = (tmp_path / "README.md").read_text()
    assert "| claim | statement [read in] | holds if | laptop | benchmark | published |" in text
    both = "1 trend holds<br>1 not testable here"
    assert f"| toy | {both} | {both} |" in text
    cell = "**trend holds**<br>75.00 [70.00, 80.00]<br>net"
    assert f"| toy C1 | a \\| b [abs] | > 50.00 percent | {cell} | {cell} | 50.00 |" in text
    assert "| toy C2 | a \\| b [abs] | > 50.00 percent | – | – | none known |" in text
    assert "| 01_toy | benchmark | 3 | cpu | Linux | 1.5 | 0.5 | net |" in text
    assert text.startswith("Top\n") and text.count("prose") == 3 and "stale" not in text


def test_a_readme_without_its_marks_is_refused() -> None:
    with pytest.raises(OodlibError, match="verdicts:begin"):
        readme_text("no mark")


def test_the_readme_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    space = {"weight": np.eye(3, 5), "bias": np.zeros(3), "labels": labels,
             "train_features": rng.normal(size=(60, 5)), "new_features": rng.normal(size=(7, 5))}
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    images = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = model(images).argmax(1)
    space |= {"model": model, "test_loader": [(images, answers)], "other_loader": [(2 * images, answers)]}
    space |= {name: rng.integers(0, 256, (n, 1, 28, 28), np.uint8)
              for name, n in (("id_images", 12), ("new_images", 4))}
    snippets = re.findall(r"```python\n(.*?)```", page("README.md"), re.DOTALL)
    shapes = []
    for snippet in snippets:
        exec(snippet, space)
        shapes.append(space["scores"].shape)
    assert shapes == [(7,), (7,), (4,)]                  # the second snippet makes none
    assert len(re.findall(r"0\.\d+|1\.0", capsys.readouterr().out)) == 2


def public_names() -> list[tuple[str, str]]:
    return [(module, name) for module in module_names() if module != "oodlib.__main__"
            for name in getattr(importlib.import_module(module), "__all__", [])]


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = []
    for module, name in public_names():
        thing = getattr(importlib.import_module(module), name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            text = inspect.getdoc(thing) or ""
            if not text or text.startswith(f"{name}("):         # the latter is what a dataclass writes itself
                bare.append(f"{module}.{name}")
    assert not bare


@pytest.mark.slow
def test_the_api_reference_has_a_page_for_every_module(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        index = build_docs(tmp_path)
    assert index.is_file()
    missing = [name for name in module_names() if not (tmp_path / f"{name.replace('.', '/')}.html").is_file()]
    assert not missing
    assert "from_arrays" in (tmp_path / "oodlib" / "bank.html").read_text(encoding="utf-8")


def test_every_detector_has_a_complete_record_a_reference_and_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))
                      if path.name != Path(__file__).name)
    entries = dict(re.findall(r"@\w+\{(\w+),(.*?)\n\}", page("docs/papers.bib"), re.DOTALL))
    for key, info in oodlib.names().items():
        assert info.key == key and info.title and info.authors
        assert info.url or re.fullmatch(r"\d{4}\.\d{4,5}", info.arxiv), key
        assert re.search(rf"\b{key}\b", tests), f"no test mentions {key}"
        entry = entries[key]
        assert f"{{{info.arxiv or info.url}}}" in entry and f"{{{info.year}}}" in entry, key
        field = re.search(r"author\s*= \{(.*)\},\n", entry)
        assert field and [name.split(",")[0] for name in field[1].split(" and ")] == info.authors.split(", "), key
        title = re.search(r"title\s*= \{(.*)\},\n", entry)
        assert title and re.sub("[{}]", "", title[1]) == info.title, key


def test_the_five_papers_are_cited() -> None:
    for arxiv in ("2110.00218", "2402.10062", "2312.14427", "2405.17447", "2502.00820"):
        assert f"{{{arxiv}}}" in page("docs/papers.bib") and arxiv in page("README.md")


def test_every_paper_that_the_vit_study_names_is_in_the_bibliography() -> None:
    files = [*sorted((ROOT / "oodlib" / "vits").glob("*.py")), ROOT / "data" / "pools" / "README.md"]
    cited = {found for file in files for found in re.findall(r"\b\d{4}\.\d{5}\b", file.read_text(encoding="utf-8"))}
    assert cited and not {number for number in cited if f"{{{number}}}" not in page("docs/papers.bib")}


def test_no_tracked_file_names_a_machine() -> None:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    folder = re.compile(r"(?<![\w.])/(?:" + "|".join(("work", "root", "home", "Users")) + r")/\w")
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix not in (".png", ".safetensors", ".npy", ".parquet") and path.is_file():
            found = folder.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"
