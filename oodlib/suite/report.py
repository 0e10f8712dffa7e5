"""REPORT.md and a self-contained report.html from the folders that notebook runs left behind."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from oodlib.claims.judge import cite, condition, show
from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.workspace import PROFILES, STAMP, check_profile, root

_CLASS = {
    "reproduced": "reproduced",
    "not reproduced": "not",
    "trend holds": "holds",
    "trend absent": "absent",
    "inconclusive": "inconclusive",
    "not testable here": "untestable",
}
_HEAD = ("claim", "statement", "profile", "verdict", "measured", "published", "read in", "reason")


@dataclass(frozen=True)
class Entry:
    """One run of one notebook: its folder, and whether it is a committed reference."""

    notebook: str
    profile: str
    folder: Path
    reference: bool

    def load(self, name: str, default: Any) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def collect(profile: str | None = None, output: Path | None = None) -> list[Entry]:
    """Finished runs, of one profile or of all; a committed reference stands in for a run that is
    not there.
    """
    figures = output or root() / "figures"
    found: dict[tuple[str, str], Entry] = {}
    for name in PROFILES if profile is None else (check_profile(profile),):
        for base, reference in ((root() / "figures" / "reference", True), (figures, False)):
            for path in sorted((base / name).glob("*/claims.json")):
                if path.parent.name.startswith(".") or not (
                    reference or (path.parent / STAMP).exists()
                ):
                    continue
                found[name, path.parent.name] = Entry(
                    path.parent.name, name, path.parent, reference
                )
    order = {name: at for at, name in enumerate(PROFILES)}
    return sorted(found.values(), key=lambda entry: (entry.notebook, order[entry.profile]))


def verdict_rows(entries: list[Entry]) -> list[dict[str, str]]:
    """One row per claim and profile, in the order of the claims."""
    rows = []
    for entry in entries:
        for record in entry.load("claims.json", []):
            unit = record["unit"]
            measured = show(record["measured"], unit)
            if record["verdict"] == "not testable here":
                measured = ""  # a number that judges nothing stays in results.csv
            elif record["low"] is not None and record["low"] != record["high"]:
                measured += f" [{show(record['low'], unit)}, {show(record['high'], unit)}]"
            rows.append(
                {
                    "claim": record["id"],
                    "statement": record["statement"],
                    "holds if": condition(
                        *(record[key] for key in ("kind", "direction", "margin", "unit"))
                    ),
                    "profile": entry.profile + (" (reference)" if entry.reference else ""),
                    "verdict": record["verdict"],
                    "measured": measured,
                    "published": cite(record["published"], unit),
                    "read in": record["source"],
                    "reason": "; ".join(
                        part
                        for part in (record["reason"], record["detail"], record["network"])
                        if part
                    ),
                }
            )
    return sorted(rows, key=lambda row: _claim_order(row["claim"]))


def _claim_order(claim: str) -> tuple[Any, ...]:
    paper, _, name = claim.partition("/")
    parts = re.findall(r"\d+|\D+", name)
    return (paper, *[(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts])


def verdict_lines(entries: list[Entry]) -> list[str]:
    """The verdicts as aligned text: claim, verdict, measured [low, high], published value."""
    rows = [("claim", "verdict", "measured [low, high]", "published")]
    for row in verdict_rows(entries):
        published = row["published"].partition(" (")[0]
        rows.append((row["claim"], row["verdict"], row["measured"], published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def build_report(profile: str, output: Path | None = None) -> Path:
    """Write figures/<profile>/REPORT.md and report.html; returns the path of the latter.

    Raises
    ------
    OodlibError : no notebook of this profile has been run
    """
    entries = [entry for entry in collect(profile, output) if not entry.reference]
    if not entries:
        raise OodlibError(
            f"No finished run under figures/{check_profile(profile)}/. "
            f"Run `make reproduce PROFILE={profile}`."
        )
    folder = (output or root() / "figures") / profile
    rows = verdict_rows(collect(output=output))
    write_text(folder / "REPORT.md", _markdown(profile, entries, rows))
    write_text(folder / "report.html", _html(profile, entries, rows))
    return folder / "report.html"


def _intro(profile: str) -> str:
    return (
        f'Runs of the {profile} profile. "Reproduced" and "not reproduced" are kept for identities '
        "and for the paper's own data, network and protocol; elsewhere the verdict is about the "
        "trend. Per-cent values where the statistic is a rate. An empty published cell means that "
        "the number could not be read in the source."
    )


def _provenance(entry: Entry) -> str:
    return json.dumps(entry.load("provenance.json", {}), indent=1, sort_keys=True)


def _markdown(profile: str, entries: list[Entry], rows: list[dict[str, str]]) -> str:
    import pandas as pd

    from oodlib.claims.tables import markdown_table

    verdicts = markdown_table(pd.DataFrame(rows, columns=list(_HEAD)))
    parts = [f"# Report: {profile}", _intro(profile), "## Verdicts", verdicts.strip()]
    for entry in entries:
        parts.append(f"## {entry.notebook}")
        for item in entry.load("contents.json", []):
            name, caption = item["name"], item["caption"]
            if item["kind"] == "figure":
                parts.append(f"![{name}]({entry.notebook}/{name}.png)\n\n{caption}")
            else:
                table = (entry.folder / f"{name}.md").read_text(encoding="utf-8")
                parts.append(f"**{caption or name}**\n\n{table.strip()}")
        parts.append(f"Provenance\n\n```json\n{_provenance(entry)}\n```")
    return "\n\n".join(parts) + "\n"


def _html(profile: str, entries: list[Entry], rows: list[dict[str, str]]) -> str:
    from jinja2 import Template

    template = (
        resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    runs = [
        {
            "name": entry.notebook,
            "contents": [_content(entry, item) for item in entry.load("contents.json", [])],
            "provenance": _provenance(entry),
        }
        for entry in entries
    ]
    return Template(template, autoescape=True, keep_trailing_newline=True).render(
        profile=profile,
        intro=_intro(profile),
        head=_HEAD,
        verdicts=[[row[key] for key in _HEAD] for row in rows],
        runs=runs,
        css=_CLASS,
    )


def _content(entry: Entry, item: dict[str, str]) -> dict[str, Any]:
    """What the template shows of a figure, or of a table that ``Run.table`` wrote."""
    path = entry.folder / item["name"]
    if item["kind"] == "figure":
        return {**item, "png": base64.b64encode(path.with_suffix(".png").read_bytes()).decode()}
    lines = path.with_suffix(".md").read_text(encoding="utf-8").strip().splitlines()
    head, marks, *rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines
    ]
    right = [at for at, mark in enumerate(marks) if mark.endswith(":")]
    return {**item, "head": head, "rows": rows, "right": right}
