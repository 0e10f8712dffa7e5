"""What the documents promise exists: commands, files, snippets, tables, docstrings, records,
references.
"""

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
from oodlib.suite import readme
from oodlib.suite.docs import build_docs, module_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    "data/published/README.md",
    "data/pools/README.md",
    "benchmarks/README.md",
]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def block(name: str, text: str) -> str:
    """The generated text between the marks."""
    return text.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


def code_of(text: str) -> str:
    """Code blocks and code spans, one a line."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans])


def links_of(name: str) -> list[tuple[Path, str]]:
    """(file, anchor) of every link that stays in the repository."""
    here, found = ROOT / name, []
    for link in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            found.append((here.parent / path if path else here, anchor))
    return found


def anchors_of(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("name", PAGES)
def test_every_make_command_is_a_target(name: str) -> None:
    commands = re.findall(r"(?:^|&& )(make [^#&\n]*)", code_of(page(name)), re.MULTILINE)
    for command in commands:
        if "<" not in command:
            done = subprocess.run(
                [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True
            )
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
    assert not [str(path) for path, _ in links_of(name) if not path.exists()]


@pytest.mark.parametrize("name", PAGES)
def test_every_anchor_is_a_heading(name: str) -> None:
    assert not [
        f"{path.name}#{anchor}"
        for path, anchor in links_of(name)
        if anchor and anchor not in anchors_of(path)
    ]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), ["README.md"]
    while todo:
        name = todo.pop()
        reached.add(name)
        near = {
            path.resolve().relative_to(ROOT).as_posix()
            for path, _ in links_of(name)
            if path.suffix == ".md"
        }
        todo += [other for other in near if other in PAGES and other not in reached]
    assert reached == set(PAGES)


def test_the_readme_has_at_most_130_lines() -> None:
    assert len(page("README.md").splitlines()) <= 130


def test_the_readme_has_at_most_8_kilobytes() -> None:
    assert len(page("README.md").encode()) <= 8192


def test_the_alternative_text_of_the_picture_agrees_with_the_ranks() -> None:
    ((alternative, picture),) = re.findall(r"!\[([^\]]+)\]\((\S+)\)", page("README.md"))
    ranks = (ROOT / picture).with_suffix(".md").read_text(encoding="utf-8")
    order = re.findall(r"^\| (\w+) \| \d", ranks, re.MULTILINE)
    assert order[:3] == ["energy", "gen", "dice"] and order[-1] == "mahalanobis"
    text = " ".join(alternative.split())
    assert "Energy is first, then GEN and DICE" in text and "Mahalanobis is last" in text
    assert f"{len(order)} OOD detectors" in text
    assert all(
        len(order) // 4 < order.index(name) < 3 * len(order) // 4
        for name in ("grood", "opnp", "gradnorm")
    )


@pytest.mark.parametrize("name", readme.PAGES)
def test_the_generated_text_is_current(name: str) -> None:
    assert readme.page_text(name, page(name)) == page(name), "run `make docs`"


def test_every_interval_of_the_findings_stands_in_the_committed_results() -> None:
    known = set()
    for path in (ROOT / "figures" / "reference").glob("*/*/claims.json"):
        for record in json.loads(path.read_text(encoding="utf-8")):
            if record["unit"] == "points" and record["low"] is not None:
                size, *ends = (abs(100 * record[key]) for key in ("measured", "low", "high"))
                known.add((f"{size:.2f}", f"{min(ends):.2f}", f"{max(ends):.2f}"))
    stated = re.findall(
        r"([\d.]+) \[([\d.]+), ([\d.]+)\]", " ".join(block("findings", page("README.md")).split())
    )
    assert len(stated) >= 6 and set(stated) <= known


def test_the_stated_minutes_are_those_of_the_reference_runs() -> None:
    for profile, minutes in re.findall(r"`(\w+)` (\d+) minutes", block("cost", page("README.md"))):
        paths = (ROOT / "figures" / "reference" / profile).glob("*/provenance.json")
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        seconds = {run["notebook"]: run["wall_seconds"] for run in runs}
        assert abs(int(minutes) - sum(seconds.values()) / 60) <= 0.5, profile


def test_networks_are_counted_not_commas() -> None:
    flows = ["a_glow:0", "a_glow:1", "b_glow:0", "c_glow:live", "other:0"]
    assert readme.network_names("a_glow, c_glow", flows) == ["a_glow:0", "a_glow:1", "c_glow:live"]
    assert readme.network_names("a_glow:0,1, resnet20", flows) == [
        "a_glow:0",
        "a_glow:1",
        "resnet20",
    ]
    assert readme.network_names("", flows) == []
    assert readme.network_cell("a_glow, b_glow", flows) == "3 networks (2 recipes)"
    assert readme.network_cell("a_glow:0, b_glow:0", flows) == "a_glow:0, b_glow:0"
    assert (
        readme.network_cell("20 ViTs of the pool cifar", ["20 ViTs of cifar"])
        == "20 ViTs of the pool cifar"
    )


def test_the_verdicts_on_the_flows_count_every_seed() -> None:
    folder = ROOT / "figures" / "reference" / "benchmark" / "05b_immature_glow"
    flows = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["weights"]
    section = page("docs/verdicts.md").split("\n## immature_glow\n")[1].split("\n## ")[0]
    counts = re.findall(r"(\d+) networks \((\d+) recipes\) \|$", section, re.MULTILINE)
    assert set(counts) == {(str(len(flows)), str(len({name.partition(":")[0] for name in flows})))}


CLAIM = {
    "id": "toy/C1",
    "statement": "a | b",
    "source": "abs",
    "unit": "points",
    "published": {"value": 0.5, "source": "x"},
    "kind": "trend",
    "direction": "above",
    "margin": 0.0,
    "verdict": "trend holds",
    "measured": 0.125,
    "low": 0.1,
    "high": 0.15,
    "n": 7,
    "reason": "",
    "detail": "",
    "network": "net",
}
UNTESTED = {
    **CLAIM,
    "id": "toy/C2",
    "verdict": "not testable here",
    "measured": None,
    "low": None,
    "high": None,
    "published": None,
    "reason": "judged at paper",
}


def toy_root(root: Path, *claims: dict[str, object]) -> Path:
    """A project with two reference runs of one notebook, and pages with stale generated text."""
    for name, blocks in readme.PAGES.items():
        (root / name).parent.mkdir(exist_ok=True)
        stale = [f"<!-- {x}:begin -->\nstale\n<!-- {x}:end -->\nprose\n" for x in blocks]
        (root / name).write_text("".join(["Top\n", *stale]))
    for profile in ("laptop", "benchmark"):
        folder = root / "figures" / "reference" / profile / "01_toy"
        folder.mkdir(parents=True)
        (folder / "claims.json").write_text(json.dumps(claims))
        (folder / "provenance.json").write_text(
            json.dumps(
                {
                    "seed": 3,
                    "device": "cpu",
                    "platform": "Linux",
                    "wall_seconds": 90.0,
                    "peak_memory_mib": 512.0,
                    "weights": {"net": "3f9c"},
                }
            )
        )
    return root


def finding(sentence: str) -> dict[str, str]:
    return {"title": "Toy", "paper": "toy", "sentence": sentence}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    sentence = "gains {laptop/C1:more} ({laptop:trend holds}) on {laptop/C1:networks}"
    monkeypatch.setattr(readme, "FINDINGS", [finding(sentence)])
    return toy_root(tmp_path, CLAIM, UNTESTED)


def test_only_stale_pages_are_written(toy: Path) -> None:
    assert readme.update_pages() == list(readme.PAGES)
    assert readme.update_pages() == []


def test_text_outside_the_marks_is_kept(toy: Path) -> None:
    readme.update_pages()
    for name, blocks in readme.PAGES.items():
        text = (toy / name).read_text()
        assert (
            text.startswith("Top\n") and text.count("prose") == len(blocks) and "stale" not in text
        ), name


def test_a_finding_is_written_from_the_results(toy: Path) -> None:
    readme.update_pages()
    assert block("findings", (toy / "README.md").read_text()) == (
        "- **[Toy](docs/verdicts.md#toy)**: gains 12.50 [10.00, 15.00] (1 of 2) on net"
    )


@pytest.mark.parametrize(
    "sentence, match",
    [
        ("behind by {laptop/C1:less}", "toy/C1 is less than zero, but it is 0.125"),
        ("gains {laptop/C2:more}", "toy/C2 is more than zero, but it is None"),
        ("gains {laptop/C9:more}", "laptop/C9"),
    ],
)
def test_a_finding_that_the_results_contradict_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch, sentence: str, match: str
) -> None:
    monkeypatch.setattr(readme, "FINDINGS", [finding(sentence)])
    with pytest.raises(OodlibError, match=match):
        readme.update_pages()


def test_the_verdicts_show_each_profile_and_the_published_value(toy: Path) -> None:
    readme.update_pages()
    text = (toy / "docs" / "verdicts.md").read_text()
    both = "1 trend holds<br>1 not testable here"
    assert f"| [toy](#toy) | {both} | {both} |" in text
    cell = "**trend holds**<br>12.50 [10.00, 15.00]<br>net"
    assert (
        f"| C1 | a \\| b [abs]<br>Published: 50.00 (x) | > 0.00 points | {cell} | {cell} |" in text
    )


def test_claims_that_no_run_can_test_are_folded(toy: Path) -> None:
    readme.update_pages()
    text = (toy / "docs" / "verdicts.md").read_text()
    table, folded = text.split("<details><summary>1 that no committed run can test</summary>")
    assert "| C2 |" not in table
    assert "| C2 | a \\| b [abs] | judged at paper |" in folded


def test_the_costs_are_those_of_the_provenance(toy: Path) -> None:
    readme.update_pages()
    assert (
        "| 01_toy | benchmark | 3 | cpu | Linux | 1.5 | 0.5 | net |"
        in (toy / "docs" / "compute.md").read_text()
    )
    assert (
        "`laptop` 2 minutes and 0.5 GiB, `benchmark` 2 minutes" in (toy / "README.md").read_text()
    )


def test_a_run_whose_results_stand_in_two_folders_costs_once(toy: Path) -> None:
    base = toy / "figures" / "reference" / "laptop"
    facts = json.loads((base / "01_toy" / "provenance.json").read_text())
    (base / "01b_toy").mkdir()
    (base / "01b_toy" / "claims.json").write_text("[]")
    (base / "01b_toy" / "provenance.json").write_text(json.dumps({**facts, "notebook": "01_toy"}))
    readme.update_pages()
    assert "`laptop` 2 minutes" in (toy / "README.md").read_text()


def test_without_reference_results_the_pages_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OODLIB_ROOT", str(tmp_path))
    toy_root(tmp_path)
    shutil.rmtree(tmp_path / "figures")
    readme.update_pages()
    for file, name in (
        ("README.md", "cost"),
        ("README.md", "findings"),
        ("docs/verdicts.md", "verdicts"),
        ("docs/compute.md", "compute"),
    ):
        assert block(name, (tmp_path / file).read_text()) == readme.NOTHING, name


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(OodlibError, match=r"docs/verdicts\.md must hold <!-- verdicts:begin -->"):
        readme.page_text("docs/verdicts.md", "no mark")


@pytest.fixture
def space() -> dict[str, object]:
    """What the snippets of the pages take for granted."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    images = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = model(images).argmax(1)
    pictures = {
        name: rng.integers(0, 256, (n, 1, 28, 28), np.uint8)
        for name, n in (("id_images", 12), ("new_images", 4))
    }
    return {
        "weight": np.eye(3, 5),
        "bias": np.zeros(3),
        "labels": np.arange(60) % 3,
        "model": model,
        "train_features": rng.normal(size=(60, 5)),
        "new_features": rng.normal(size=(7, 5)),
        "test_loader": [(images, answers)],
        "other_loader": [(2 * images, answers)],
        **pictures,
    }


@pytest.mark.parametrize(
    "name, snippets, rows", [("README.md", 2, 7), ("docs/your-own-model.md", 2, 4)]
)
def test_the_snippets_run(
    name: str,
    snippets: int,
    rows: int,
    space: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    for snippet in found:
        exec(snippet, space)
    assert len(found) == snippets and np.shape(space["scores"]) == (rows,)
    assert re.fullmatch(r"(0\.\d+|1\.0)\n", capsys.readouterr().out)


def test_every_snippet_is_run() -> None:
    assert {name for name in PAGES if "```python" in page(name)} == {
        "README.md",
        "docs/your-own-model.md",
    }


def public_names() -> list[tuple[str, str]]:
    return [
        (module, name)
        for module in module_names()
        if module != "oodlib.__main__"
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module
    ]


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = []
    for module, name in public_names():
        thing = getattr(importlib.import_module(module), name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            text = inspect.getdoc(thing) or ""
            if not text or text.startswith(
                f"{name}("
            ):  # the latter is what a dataclass writes itself
                bare.append(f"{module}.{name}")
    assert not bare


@pytest.mark.slow
def test_the_api_reference_has_a_page_for_every_module(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        index = build_docs(tmp_path)
    assert index.is_file()
    missing = [
        name
        for name in module_names()
        if not (tmp_path / f"{name.replace('.', '/')}.html").is_file()
    ]
    assert not missing
    assert "from_arrays" in (tmp_path / "oodlib" / "features" / "feature_bank.html").read_text(
        encoding="utf-8"
    )


def test_every_detector_has_a_complete_record_a_reference_and_a_test() -> None:
    tests = "\n".join(
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.name != Path(__file__).name
    )
    entries = dict(re.findall(r"@\w+\{(\w+),(.*?)\n\}", page("docs/papers.bib"), re.DOTALL))
    for key, info in oodlib.names().items():
        assert info.key == key and info.title and info.authors
        assert info.url or re.fullmatch(r"\d{4}\.\d{4,5}", info.arxiv), key
        assert re.search(rf"\b{key}\b", tests), f"no test mentions {key}"
        entry = entries[key]
        assert f"{{{info.arxiv or info.url}}}" in entry and f"{{{info.year}}}" in entry, key
        field = re.search(r"author\s*= \{(.*)\},\n", entry)
        assert field and [
            name.split(",")[0] for name in field[1].split(" and ")
        ] == info.authors.split(", "), key
        title = re.search(r"title\s*= \{(.*)\},\n", entry)
        assert title and re.sub("[{}]", "", title[1]) == info.title, key


def test_the_five_papers_are_cited() -> None:
    for arxiv in ("2110.00218", "2402.10062", "2312.14427", "2405.17447", "2502.00820"):
        assert f"{{{arxiv}}}" in page("docs/papers.bib") and arxiv in page("docs/sources.md")


def test_every_paper_that_the_vit_study_names_is_in_the_bibliography() -> None:
    files = [
        *sorted((ROOT / "oodlib" / "vits").glob("*.py")),
        ROOT / "data" / "pools" / "README.md",
    ]
    cited = {
        found
        for file in files
        for found in re.findall(r"\b\d{4}\.\d{5}\b", file.read_text(encoding="utf-8"))
    }
    assert cited and not {
        number for number in cited if f"{{{number}}}" not in page("docs/papers.bib")
    }


def test_no_tracked_file_names_a_machine() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    folder = re.compile(r"(?<![\w.])/(?:" + "|".join(("work", "root", "home", "Users")) + r")/\w")
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix not in (".png", ".safetensors", ".npy", ".parquet") and path.is_file():
            found = folder.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"
