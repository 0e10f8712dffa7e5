"""The README's tables, generated: verdicts, what the runs behind them cost, and the methods there are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from oodlib.claims.judge import VERDICTS
from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.suite.report import Entry, verdict_rows
from oodlib.workspace import PROFILES, root

__all__ = ["readme_text", "update_readme"]


def update_readme() -> bool:
    """Bring the tables of README.md up to date; True where that changed the file."""
    path = root() / "README.md"
    old = path.read_text(encoding="utf-8")
    new = readme_text(old)
    if new != old:
        write_text(path, new)
    return new != old


def readme_text(text: str) -> str:
    """``text`` with every block ``<!-- name:begin --> ... <!-- name:end -->`` made anew from the committed files.

    Raises
    ------
    OodlibError : a block is missing
    """
    for name, make in _BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise OodlibError(f"README.md must hold {begin} and {end} once each, for the generated table between them.")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def _references() -> list[Entry]:
    base = root() / "figures" / "reference"
    return [Entry(path.parent.name, profile, path.parent, True) for profile in PROFILES
            for path in sorted((base / profile).glob("*/claims.json"))]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _verdicts() -> str:
    entries = _references()
    if not entries:
        return "No reference results are committed yet."
    profiles = [name for name in PROFILES if any(entry.profile == name for entry in entries)]
    cells: dict[str, dict[str, str]] = {}
    facts: dict[str, list[str]] = {}
    words: dict[str, dict[str, Counter[str]]] = {}            # paper -> profile -> verdict -> how many
    for entry in entries:
        networks = {record["id"]: record["network"] for record in entry.load("claims.json", [])}
        for row in verdict_rows([entry]):
            claim, paper = row["claim"], row["claim"].partition("/")[0]
            facts[claim] = [row["statement"], row["read in"], row["holds if"], row["published"] or "none known"]
            words.setdefault(paper, {}).setdefault(entry.profile, Counter())[row["verdict"]] += 1
            network, count = networks[claim], networks[claim].count(",") + 1
            parts = [f"**{row['verdict']}**", row["measured"], network if count < 3 else f"{count} networks"]
            cells.setdefault(claim, {})[entry.profile] = (
                "–" if row["verdict"] == "not testable here" else "<br>".join(part for part in parts if part))
    texts = [_table(["claims of", *profiles], [
        [paper, *["<br>".join(f"{found[word]} {word}" for word in VERDICTS if (found := of.get(name, Counter()))[word])
                  or "–" for name in profiles]] for paper, of in words.items()])]
    for paper in words:
        rows = [[claim.replace("/", " "), f"{what} [{read}]", rule, *(cells[claim].get(p, "–") for p in profiles), seen]
                for claim, (what, read, rule, seen) in facts.items() if claim.startswith(f"{paper}/")]
        table = _table(["claim", "statement [read in]", "holds if", *profiles, "published"], rows)
        texts.append(f"<details><summary>{paper}: every claim, with measurement and interval</summary>\n\n{table}\n\n"
                     "</details>")
    return "\n\n".join(texts)


def _compute() -> str:
    rows = []
    for entry in _references():
        facts = entry.load("provenance.json", {})
        if facts:
            rows.append([entry.notebook, entry.profile, str(facts["seed"]), facts["device"], facts["platform"],
                         f"{facts['wall_seconds'] / 60:.1f}", f"{facts['peak_memory_mib'] / 1024:.1f}",
                         ", ".join(facts["weights"])])
    head = ["notebook", "profile", "seed", "device", "platform", "minutes", "peak memory (GiB)", "networks"]
    nets = []
    for path in sorted((root() / "data" / "checkpoints").glob("*_s*[0-9].json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        minutes = sum(epoch["seconds"] for epoch in facts["history"]) / 60
        nets.append([facts["name"], str(facts["seed"]), f"{100 * facts['accuracy']:.2f} % of {facts['n_test']}",
                     f"{minutes:.1f} ({facts['device']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)})"])
    flows = []
    for path in sorted((root() / "data" / "checkpoints").glob("*_s*[0-9]/run.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        last = facts["history"][-1]
        flows.append([facts["flow"], str(facts["seed"]), f"{last['step']} ({last['epoch']:.1f} epochs)",
                      f"{last['validation_bpd']:.2f}", f"{last['seconds'] / 60:.1f}"])
    tables = [_table(names, body) for names, body in (
        (head, rows), (["trained network", "training seed", "test accuracy", "minutes of training"], nets),
        (["flow", "training seed", "steps", "validation bits/dim", "minutes of training"], flows)) if body]
    return "\n\n".join(tables) or "No reference results are committed yet."


def _methods() -> str:
    from oodlib.scores import names

    learns = {"none": "nothing", "features": "training features", "labels": "training features and labels"}
    rows = [[f"`{key}`", f"{info.authors}: [{info.title}]({info.link}), {info.year}",
             learns[info.needs], "<br>".join(info.deviations)] for key, info in names().items()]
    return _table(["name", "paper", "learns from", "where ours differs"], rows)


_BLOCKS: dict[str, Callable[[], str]] = {"verdicts": _verdicts, "compute": _compute, "methods": _methods}

