"""REPORT.md and a self-contained report.html from the folders that notebook runs left behind."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodlib.claims.judge import cite, condition, show
from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.workspace import PROFILES, STAMP, check_profile, root

__all__ = ["Entry", "build_report", "collect", "verdict_lines", "verdict_rows"]

_CSS = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #e3e3e3; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f5f5f5; } td.right { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #444; font-size: .92rem; }
.reproduced, .holds { color: #00603f; font-weight: 600; } .not, .absent { color: #a33c00; font-weight: 600; }
.inconclusive { color: #6b5900; } .untestable { color: #777; } code { font-size: .85em; }
"""
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
    """One run of one notebook: its folder, what it holds, and whether it is a committed reference."""

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
            if (
                record["verdict"] == "not testable here"
            ):  # a number that judges nothing stays in results.csv
                measured = ""
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
    head = {
        "claim": "claim",
        "verdict": "verdict",
        "measured": "measured [low, high]",
        "published": "published",
    }
    rows = [
        head,
        *[{key: row[key].partition(" (")[0] for key in head} for row in verdict_rows(entries)],
    ]
    width = {key: max(len(row[key]) for row in rows) for key in head}
    return ["  ".join(row[key].ljust(width[key]) for key in head).rstrip() for row in rows]


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
        f'Runs of the {profile} profile. "Reproduced" and "not reproduced" are kept for identities and for the '
        "paper's own data, network and protocol; elsewhere the verdict is about the trend. "
        "Per-cent values where the statistic is a rate. An empty published cell means that the "
        "number could not be read in the source."
    )


def _markdown(profile: str, entries: list[Entry], rows: list[dict[str, str]]) -> str:
    parts = [f"# Report: {profile}", _intro(profile), "## Verdicts", _markdown_rows(rows)]
    for entry in entries:
        parts.append(f"## {entry.notebook}")
        for item in entry.load("contents.json", []):
            if item["kind"] == "figure":
                parts.append(
                    f"![{item['name']}]({entry.notebook}/{item['name']}.png)\n\n{item['caption']}"
                )
            else:
                table = (entry.folder / f"{item['name']}.md").read_text(encoding="utf-8")
                parts.append(f"**{item['caption'] or item['name']}**\n\n{table.strip()}")
        parts.append(
            "Provenance\n\n```json\n"
            + json.dumps(entry.load("provenance.json", {}), indent=1, sort_keys=True)
            + "\n```"
        )
    return "\n\n".join(parts) + "\n"


def _markdown_rows(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += [
        "| " + " | ".join(row[key].replace("|", "\\|") for key in _HEAD) + " |" for row in rows
    ]
    return "\n".join(lines)


def _html(profile: str, entries: list[Entry], rows: list[dict[str, str]]) -> str:
    escape = html.escape
    body = [f"<h1>Report: {profile}</h1><p>{escape(_intro(profile))}</p>", "<nav><ul>"]
    body += [f'<li><a href="#{entry.notebook}">{entry.notebook}</a></li>' for entry in entries]
    body += ["</ul></nav>", "<h2>Verdicts</h2>", "<table><thead><tr>"]
    body += [f"<th>{key}</th>" for key in _HEAD]
    body.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for key in _HEAD:
            style = f' class="{_CLASS[row[key]]}"' if key == "verdict" else ""
            cells.append(f"<td{style}>{escape(row[key])}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    body.append("</tbody></table>")
    for entry in entries:
        body.append(f'<h2 id="{entry.notebook}">{entry.notebook}</h2>')
        for item in entry.load("contents.json", []):
            caption = escape(item["caption"])
            if item["kind"] == "figure":
                data = base64.b64encode(
                    (entry.folder / f"{item['name']}.png").read_bytes()
                ).decode()
                body.append(
                    f'<figure><img alt="{caption or item["name"]}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
            else:
                table = _html_table(
                    (entry.folder / f"{item['name']}.md").read_text(encoding="utf-8")
                )
                body.append(
                    f"<figure><figcaption><b>{caption or item['name']}</b></figcaption>{table}</figure>"
                )
        provenance = json.dumps(entry.load("provenance.json", {}), indent=1, sort_keys=True)
        body.append(
            f"<details><summary>Provenance</summary><pre><code>{escape(provenance)}</code></pre></details>"
        )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Report: {profile}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(markdown: str) -> str:
    """HTML of a table that ``Run.table`` wrote."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in markdown.strip().splitlines()]
    right = [cell.strip().endswith(":") for cell in lines[1]]
    out = [
        "<table><thead><tr>",
        *[f"<th>{_cell(cell)}</th>" for cell in lines[0]],
        "</tr></thead><tbody>",
    ]
    for line in lines[2:]:
        out.append(
            "<tr>"
            + "".join(
                f"<td{' class=right' if flag else ''}>{_cell(cell)}</td>"
                for cell, flag in zip(line, right, strict=True)
            )
            + "</tr>"
        )
    return "".join([*out, "</tbody></table>"])


def _cell(text: str) -> str:
    return html.escape(text.strip().replace("\\|", "|"))
