"""The generated parts of README.md and docs/: findings, verdicts, costs, methods, image sets."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pandas as pd
import yaml

from oodlib.claims.judge import VERDICTS, show
from oodlib.claims.tables import markdown_table
from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.suite.report import Entry, verdict_rows
from oodlib.workspace import PROFILES, root

NOTHING = "No reference results are committed yet."
UNTESTED = "not testable here"
FINDINGS: list[dict[str, str]] = yaml.safe_load(
    resources.files(__package__).joinpath("findings.yaml").read_text(encoding="utf-8")
)


def update_pages() -> list[str]:
    """Bring the generated blocks of every page up to date; returns the pages that changed."""
    changed = []
    for page in PAGES:
        path = root() / page
        old = path.read_text(encoding="utf-8")
        new = page_text(page, old)
        if new != old:
            write_text(path, new)
            changed.append(page)
    return changed


def page_text(page: str, text: str) -> str:
    """``text`` of a page with each block ``<!-- name:begin --> ... <!-- name:end -->`` regenerated.

    Raises
    ------
    OodlibError : a block is missing, or a finding no longer fits the results
    """
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise OodlibError(
                f"{page} must hold {begin} and {end} once each, for the generated text between "
                "them."
            )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return markdown_table(pd.DataFrame(rows, columns=list(head))).strip()


def network_names(text: str, weights: Iterable[str]) -> list[str]:
    """The networks that a claim's ``network`` names, where ``weights`` are those of the run.

    "a:0, b" and "a:0,1" name two each; a recipe without its seed stands for every seed of it in
    ``weights``, but not for the epochs of one training.
    """
    names = []
    weights = [name for name in weights if ":epoch" not in name]
    for part in text.split(", ") if text else ():
        recipe, _, seeds = part.partition(":")
        if seeds:
            names += [f"{recipe}:{seed}" for seed in seeds.split(",")]
        else:
            names += [name for name in weights if name.partition(":")[0] == part] or [part]
    return names


def network_cell(text: str, weights: Iterable[str]) -> str:
    """One or two networks by name, more as "8 networks (4 recipes)": those of one recipe differ in
    their seed.
    """
    names = network_names(text, weights)
    if len(names) < 3:
        return text
    return f"{len(names)} networks ({len({name.partition(':')[0] for name in names})} recipes)"


def _references() -> list[Entry]:
    base = root() / "figures" / "reference"
    return [
        Entry(path.parent.name, profile, path.parent, True)
        for profile in PROFILES
        for path in sorted((base / profile).glob("*/claims.json"))
    ]


def _costs() -> list[dict[str, Any]]:
    """The provenance of every committed run, with minutes and GiB; a run whose results lie in two
    folders counts once.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in _references():
        if facts := entry.load("provenance.json", {}):
            facts = {"notebook": entry.notebook, **facts, "profile": entry.profile}
            costs = {
                "minutes": facts["wall_seconds"] / 60,
                "memory": facts["peak_memory_mib"] / 1024,
            }
            found.setdefault((facts["notebook"], entry.profile), facts | costs)
    return list(found.values())


def _cost() -> str:
    parts = []
    for profile in PROFILES:
        if runs := [facts for facts in _costs() if facts["profile"] == profile]:
            minutes, memory = (
                sum(facts["minutes"] for facts in runs),
                max(facts["memory"] for facts in runs),
            )
            parts.append(f"`{profile}` {minutes:.0f} minutes and {memory:.1f} GiB")
    return f"Time and peak memory of the committed runs: {', '.join(parts)}." if parts else NOTHING


@dataclass(frozen=True)
class _Cell:
    """A claim's record, printed by ``less``, ``more``, ``value``, ``networks`` or ``n``."""

    record: Mapping[str, Any]
    weights: Iterable[str]

    def __format__(self, what: str) -> str:
        record, unit = self.record, self.record["unit"]
        if what in ("n", "value"):
            return str(record["n"]) if what == "n" else show(record["measured"], unit)
        if what == "networks":
            return network_cell(record["network"], self.weights)
        sign = {"less": -1, "more": 1}[what]
        if record["measured"] is None or sign * record["measured"] <= 0:
            raise OodlibError(
                f"A finding of README.md says that {record['id']} is {what} than zero, but it is "
                f"{record['measured']}. Rewrite its sentence in oodlib/suite/findings.yaml."
            )
        low, high = sorted(sign * record[end] for end in ("low", "high"))
        return f"{show(sign * record['measured'], unit)} [{show(low, unit)}, {show(high, unit)}]"


@dataclass(frozen=True)
class _Count:
    """How many claims of a paper have the verdict that the field names, and of how many."""

    words: Counter[str]

    def __format__(self, what: str) -> str:
        return f"{self.words[what]} of {self.words.total()}"


def _findings() -> str:
    entries = _references()
    if not entries:
        return NOTHING
    lines = []
    for finding in FINDINGS:
        title, paper = finding["title"], finding["paper"]
        fields: dict[str, _Cell | _Count] = {}
        for entry in entries:
            weights = entry.load("provenance.json", {}).get("weights", {})
            found = [r for r in entry.load("claims.json", []) if r["id"].startswith(f"{paper}/")]
            if found:
                fields[entry.profile] = _Count(Counter(record["verdict"] for record in found))
            for record in found:
                claim = record["id"].partition("/")[2]
                fields[f"{entry.profile}/{claim}"] = _Cell(record, weights)
        try:
            text = finding["sentence"].format_map(fields)
        except KeyError as error:
            raise OodlibError(
                f"The finding {title!r} of README.md needs the result {error}, which "
                "figures/reference does not hold. Rewrite its sentence in "
                "oodlib/suite/findings.yaml."
            ) from error
        lines += textwrap.wrap(
            f"- **[{title}](docs/verdicts.md#{paper})**: {text}",
            140,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


Rows = dict[str, dict[str, str]]  # profile -> row


def _verdicts() -> str:
    entries = _references()
    if not entries:
        return NOTHING
    profiles = [name for name in PROFILES if any(entry.profile == name for entry in entries)]

    # the row of each claim in each profile, and the claims of each paper
    claims: dict[str, Rows] = {}
    for entry in entries:
        weights = entry.load("provenance.json", {}).get("weights", {})
        records = {record["id"]: record for record in entry.load("claims.json", [])}
        for row in verdict_rows([entry]):
            record = records[row["claim"]]
            network = network_cell(record["network"], weights)
            extended = {**row, "network": network, "why": record["reason"]}
            claims.setdefault(row["claim"], {})[entry.profile] = extended
    papers: dict[str, dict[str, Rows]] = {}
    for name, rows in claims.items():
        paper, _, short = name.partition("/")
        papers.setdefault(paper, {})[short] = rows

    # how many claims have which verdict
    overview = []
    for paper, found in papers.items():
        cells = []
        for profile in profiles:
            words = Counter(rows[profile]["verdict"] for rows in found.values() if profile in rows)
            cells.append("<br>".join(f"{words[w]} {w}" for w in VERDICTS if words[w]) or "–")
        overview.append([f"[{paper}](#{paper})", *cells])
    texts = [table(["claims of", *profiles], overview)]

    # each paper's claims, those that nothing could test folded
    for paper, found in papers.items():
        tested, rest = [], []
        for short, rows in found.items():
            first, last = next(iter(rows.values())), [*rows.values()][-1]
            published = f"<br>Published: {first['published']}" if first["published"] else ""
            begin = [short, f"{first['statement']} [{first['read in']}]{published}"]
            if all(row["verdict"] == UNTESTED for row in rows.values()):
                rest.append([*begin, last["why"]])
            else:
                cells = [_verdict(rows.get(profile)) for profile in profiles]
                tested.append([*begin, first["holds if"], *cells])
        head = ["claim", "statement [read in]", "holds if", *profiles]
        texts += [f"## {paper}", table(head, tested)]
        if rest:
            body = table(["claim", "statement [read in]", "why"], rest)
            title = f"{len(rest)} that no committed run can test"
            texts.append(f"<details><summary>{title}</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(texts)


def _verdict(row: Mapping[str, str] | None) -> str:
    if row is None or row["verdict"] == UNTESTED:
        return "–"
    return "<br>".join(filter(None, (f"**{row['verdict']}**", row["measured"], row["network"])))


def _compute() -> str:
    runs = [
        [
            *(facts[key] for key in ("notebook", "profile", "seed", "device", "platform")),
            f"{facts['minutes']:.1f}",
            f"{facts['memory']:.1f}",
            ", ".join(facts["weights"])
            if len(facts["weights"]) < 9
            else f"{len(facts['weights'])}, named in its provenance.json",
        ]
        for facts in _costs()
    ]
    checkpoints = root() / "data" / "checkpoints"
    networks = []
    for path in sorted(checkpoints.glob("*_s*[0-9].json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        minutes = sum(epoch["seconds"] for epoch in facts["history"]) / 60
        threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
        accuracy = f"{100 * facts['accuracy']:.2f} % of {facts['n_test']}"
        cost = f"{minutes:.1f} ({facts['device']}, {threads})"
        networks.append([facts["name"], facts["seed"], accuracy, cost])
    flows = []
    for path in sorted(checkpoints.glob("*_s*[0-9]/run.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        last = facts["history"][-1]
        steps = f"{last['step']} ({last['epoch']:.1f} epochs)"
        costs = [f"{last['validation_bpd']:.2f}", f"{last['seconds'] / 60:.1f}"]
        flows.append([facts["flow"], facts["seed"], steps, *costs])

    where = ["notebook", "profile", "seed", "device", "platform"]
    run_head = [*where, "minutes", "peak memory (GiB)", "networks"]
    network_head = ["network", "training seed", "test accuracy", "minutes of training"]
    flow_head = ["flow", "training seed", "steps", "validation bits/dim", "minutes of training"]
    parts = (
        ("Reference runs", run_head, runs),
        ("Shipped classifiers", network_head, networks),
        ("Shipped flows", flow_head, flows),
    )
    texts = [f"## {title}\n\n{table(head, rows)}" for title, head, rows in parts if rows]
    return "\n\n".join(texts) or NOTHING


def _methods() -> str:
    from oodlib.scores import names

    learns = {
        "none": "nothing",
        "features": "training features",
        "labels": "training features and labels",
    }
    rows = [
        [
            f"`{key}`",
            f"{info.authors}: [{info.title}]({info.link}), {info.year}",
            learns[info.needs],
            "<br>".join(info.deviations),
        ]
        for key, info in names().items()
    ]
    return table(["name", "paper", "learns from", "where ours differs"], rows)


def _builtin() -> str:
    from oodlib.data.builtin.sets import EMBEDDED

    rows = [
        [
            f"`{info.name}`",
            info.kind.replace("_", " "),
            info.title,
            " / ".join(str(info.default_n[split]) for split in ("train", "val", "test")),
            info.licence + (f"<br>{info.citation}" if info.citation else ""),
        ]
        for info in EMBEDDED.values()
        if info.title != "synthetic unit test"  # `unit_tests` holds all 17
    ]
    return table(["set", "role", "what it shows", "train / val / test images", "terms"], rows)


def _public() -> str:
    from oodlib.data.public.registry import SETS

    rows = []
    for info in SETS.values():
        source = "mirror only"
        if info.torchvision:
            source = f"mirror or torchvision's `{info.torchvision}`"
        elif info.archive or any(split.archive for split in info.splits.values()):
            source = "mirror or its archive"
        smaller = f"a smaller copy is accepted as `{info.name}-incomplete`" if info.partial else ""
        rows.append(
            [
                f"`{info.name}`<br>{info.title}",
                "<br>".join(f"{name}: {split.count}" for name, split in info.splits.items()),
                "x".join(map(str, info.size)),
                source,
                info.terms,
                info.citation,
                "; ".join(filter(None, (info.note, smaller))),
            ]
        )
    return table(["set", "images", "prepared as", "from", "terms", "reference", "notes"], rows)


def _imagenet() -> str:
    from oodlib.data.imagenet import PAPER_SETS

    rows = [
        [
            f"`{info.name}`<br>{info.title}",
            info.role,
            info.source,
            info.terms,
            f"`{info.tree}`",
            "<br>".join(f"{who}: {count}" for who, count in info.counts.items()),
        ]
        for info in PAPER_SETS.values()
    ]
    head = ["set", "role", "source", "terms", "folder below the data root", "images"]
    return table(head, rows)


PAGES: dict[str, dict[str, Callable[[], str]]] = {  # page -> block -> what writes it
    "README.md": {"cost": _cost, "findings": _findings},
    "docs/verdicts.md": {"verdicts": _verdicts},
    "docs/methods.md": {"methods": _methods},
    "docs/compute.md": {"compute": _compute},
    "docs/data.md": {"builtin": _builtin, "public": _public, "imagenet": _imagenet},
}
