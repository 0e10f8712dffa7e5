"""The generated parts of README.md and docs/: findings, verdicts, costs, methods, image sets."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oodlib.claims.judge import VERDICTS, show
from oodlib.errors import OodlibError
from oodlib.files import write_text
from oodlib.suite.report import Entry, verdict_rows
from oodlib.workspace import PROFILES, root

__all__ = ["PAGES", "page_text", "update_pages"]

NOTHING = "No reference results are committed yet."
UNTESTED = "not testable here"

# One finding per paper: title, section of docs/verdicts.md, sentence. A field is `profile/claim` of
# that paper. `less` and `more` print the size of a difference and refuse one of the other sign, so
# that no number contradicts its sentence; `{profile:verdict}` counts claims.
FINDINGS = (
    (
        "GradNorm",
        "gradnorm",
        "at its own temperature of 1 it is {benchmark/C8:less} points behind the better of MSP and "
        "Energy on a CIFAR-10 ResNet-20; a temperature chosen on validation data is worth "
        "{benchmark/C6:more} points, the mean over {benchmark/C6:networks}.",
    ),
    (
        "OPNP",
        "opnp",
        "in our reading (its code is not public), pruning costs the Energy score "
        "{benchmark/C1-energy:less} points, the mean over {benchmark/C1-energy:networks}.",
    ),
    (
        "GROOD",
        "grood",
        "with the OOD prototype that its text describes it is {benchmark/C1-synthetic:less} points "
        "behind the best of seven baselines, the mean over {benchmark/C1-synthetic:networks}.",
    ),
    (
        "ViT training study",
        "vit_study",
        "open: {benchmark:inconclusive} claims stay inconclusive, most because our small ViTs are "
        "not accurate enough. In published tables, not a run of ours, pretraining on ImageNet-21k "
        "lowers the FPR95 of Mahalanobis on NINCO by {benchmark/P1:more} points (mean and interval "
        "over {benchmark/P1:n} pairs of models).",
    ),
    (
        "Immature Glow",
        "immature_glow",
        "a flow's likelihood can find OOD images more normal than its own, down to an AUROC of "
        "{benchmark/C1:value} %. Layer-wise gradient norms beat the typicality test by "
        "{benchmark/C2:more} points, the mean over {benchmark/C2:networks}, and lose to it by "
        "{laptop/C2:less} on the laptop's small flows. Whether training may stop early stays open: "
        "only the flow {benchmark/C3:networks} could judge that.",
    ),
    (
        "Scoreboard",
        "scoreboard",
        "at their defaults all three detectors trail the best one of an earlier year: GradNorm by "
        "{benchmark/S1:less} points, OPNP by {benchmark/S2:less}, GROOD by {benchmark/S3:less}, "
        "the mean over {benchmark/S1:networks}.",
    ),
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
    """``text`` of a page with every block ``<!-- name:begin --> ... <!-- name:end -->`` made anew.

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


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def network_names(text: str, weights: Iterable[str]) -> list[str]:
    """The networks that a claim's ``network`` names, where ``weights`` are those of the run.

    "a:0, b" and "a:0,1" name two each; a recipe without its seed stands for every seed of it in
    ``weights``.
    """
    names = []
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


def _weights(entry: Entry) -> list[str]:
    return list(entry.load("provenance.json", {}).get("weights", {}))


def _runs() -> list[dict[str, Any]]:
    """Provenance of every committed run; one run whose results stand in two folders counts once."""
    found = {}
    for entry in _references():
        if facts := entry.load("provenance.json", {}):
            facts = {"notebook": entry.notebook, **facts, "profile": entry.profile}
            found.setdefault((facts["notebook"], entry.profile), facts)
    return list(found.values())


def _cost() -> str:
    parts = []
    for profile in PROFILES:
        runs = [facts for facts in _runs() if facts["profile"] == profile]
        if runs:
            minutes = sum(facts["wall_seconds"] for facts in runs) / 60
            memory = max(facts["peak_memory_mib"] for facts in runs) / 1024
            parts.append(f"`{profile}` {minutes:.0f} minutes and {memory:.1f} GiB")
    return f"Time and peak memory of the committed runs: {', '.join(parts)}." if parts else NOTHING


@dataclass(frozen=True)
class _Cell:
    """A claim's record, printed by ``less``, ``more``, ``value``, ``networks`` or ``n``."""

    record: Mapping[str, Any]
    weights: list[str]

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
                f"{record['measured']}. Rewrite its sentence in FINDINGS."
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
    for title, paper, sentence in FINDINGS:
        fields: dict[str, _Cell | _Count] = {}
        for entry in entries:
            found = [r for r in entry.load("claims.json", []) if r["id"].startswith(f"{paper}/")]
            if found:
                fields[entry.profile] = _Count(Counter(record["verdict"] for record in found))
            for record in found:
                fields[f"{entry.profile}/{record['id'].partition('/')[2]}"] = _Cell(
                    record, _weights(entry)
                )
        try:
            text = sentence.format_map(fields)
        except KeyError as error:
            raise OodlibError(
                f"The finding {title!r} of README.md needs the result {error}, which "
                "figures/reference does not hold. Rewrite its sentence in FINDINGS."
            ) from error
        lines += textwrap.wrap(
            f"- **[{title}](docs/verdicts.md#{paper})**: {text}",
            140,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _verdicts() -> str:
    entries = _references()
    if not entries:
        return NOTHING
    profiles = [name for name in PROFILES if any(entry.profile == name for entry in entries)]
    rows: dict[str, dict[str, dict[str, str]]] = {}  # claim -> profile -> row
    for entry in entries:
        weights = _weights(entry)
        records = {record["id"]: record for record in entry.load("claims.json", [])}
        for row in verdict_rows([entry]):
            record = records[row["claim"]]
            rows.setdefault(row["claim"], {})[entry.profile] = {
                **row,
                "network": network_cell(record["network"], weights),
                "why": record["reason"],
            }
    papers: dict[str, list[str]] = {}
    for claim in rows:
        papers.setdefault(claim.partition("/")[0], []).append(claim)

    def counts(claims: list[str], profile: str) -> str:
        words = Counter(
            rows[claim][profile]["verdict"] for claim in claims if profile in rows[claim]
        )
        return "<br>".join(f"{words[word]} {word}" for word in VERDICTS if words[word]) or "–"

    texts = [
        table(
            ["claims of", *profiles],
            [
                [f"[{paper}](#{paper})", *(counts(claims, profile) for profile in profiles)]
                for paper, claims in papers.items()
            ],
        )
    ]
    for paper, claims in papers.items():
        tested = [
            claim
            for claim in claims
            if any(row["verdict"] != UNTESTED for row in rows[claim].values())
        ]
        texts += [
            f"## {paper}",
            table(
                ["claim", "statement [read in]", "holds if", *profiles],
                [
                    [
                        _short(claim),
                        _statement(rows[claim]),
                        next(iter(rows[claim].values()))["holds if"],
                        *(_verdict(rows[claim].get(profile)) for profile in profiles),
                    ]
                    for claim in tested
                ],
            ),
        ]
        if rest := [claim for claim in claims if claim not in tested]:
            body = table(
                ["claim", "statement [read in]", "why"],
                [
                    [_short(claim), _statement(rows[claim]), [*rows[claim].values()][-1]["why"]]
                    for claim in rest
                ],
            )
            title = f"{len(rest)} that no committed run can test"
            texts.append(f"<details><summary>{title}</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(texts)


def _short(claim: str) -> str:
    return claim.partition("/")[2]


def _statement(row: Mapping[str, Mapping[str, str]]) -> str:
    facts = next(iter(row.values()))
    published = f"<br>Published: {facts['published']}" if facts["published"] else ""
    return f"{facts['statement']} [{facts['read in']}]{published}"


def _verdict(row: Mapping[str, str] | None) -> str:
    if row is None or row["verdict"] == UNTESTED:
        return "–"
    return "<br>".join(
        part for part in (f"**{row['verdict']}**", row["measured"], row["network"]) if part
    )


def _compute() -> str:
    runs = []
    for facts in _runs():
        names = list(facts["weights"])
        runs.append(
            [
                facts["notebook"],
                facts["profile"],
                facts["seed"],
                facts["device"],
                facts["platform"],
                f"{facts['wall_seconds'] / 60:.1f}",
                f"{facts['peak_memory_mib'] / 1024:.1f}",
                ", ".join(names)
                if len(names) < 9
                else f"{len(names)}, named in its provenance.json",
            ]
        )
    nets = []
    for path in sorted((root() / "data" / "checkpoints").glob("*_s*[0-9].json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        minutes = sum(epoch["seconds"] for epoch in facts["history"]) / 60
        nets.append(
            [
                facts["name"],
                facts["seed"],
                f"{100 * facts['accuracy']:.2f} % of {facts['n_test']}",
                f"{minutes:.1f} ({facts['device']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)})",
            ]
        )
    flows = []
    for path in sorted((root() / "data" / "checkpoints").glob("*_s*[0-9]/run.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        last = facts["history"][-1]
        flows.append(
            [
                facts["flow"],
                facts["seed"],
                f"{last['step']} ({last['epoch']:.1f} epochs)",
                f"{last['validation_bpd']:.2f}",
                f"{last['seconds'] / 60:.1f}",
            ]
        )
    parts = (
        (
            "Reference runs",
            [
                "notebook",
                "profile",
                "seed",
                "device",
                "platform",
                "minutes",
                "peak memory (GiB)",
                "networks",
            ],
            runs,
        ),
        (
            "Shipped classifiers",
            ["network", "training seed", "test accuracy", "minutes of training"],
            nets,
        ),
        (
            "Shipped flows",
            ["flow", "training seed", "steps", "validation bits/dim", "minutes of training"],
            flows,
        ),
    )
    return (
        "\n\n".join(f"## {title}\n\n{table(head, rows)}" for title, head, rows in parts if rows)
        or NOTHING
    )


def _methods() -> str:
    from oodlib.scores import names

    learns = {
        "none": "nothing",
        "features": "training features",
        "labels": "training features and labels",
    }
    return table(
        ["name", "paper", "learns from", "where ours differs"],
        [
            [
                f"`{key}`",
                f"{info.authors}: [{info.title}]({info.link}), {info.year}",
                learns[info.needs],
                "<br>".join(info.deviations),
            ]
            for key, info in names().items()
        ],
    )


def _builtin() -> str:
    from oodlib.data.builtin.sets import EMBEDDED

    named = [
        info for info in EMBEDDED.values() if info.title != "synthetic unit test"
    ]  # `unit_tests` holds all 17
    return table(
        ["set", "role", "what it shows", "train / val / test images", "terms"],
        [
            [
                f"`{info.name}`",
                info.kind.replace("_", " "),
                info.title,
                " / ".join(str(info.default_n[split]) for split in ("train", "val", "test")),
                info.licence + (f"<br>{info.citation}" if info.citation else ""),
            ]
            for info in named
        ],
    )


def _public() -> str:
    from oodlib.data.public.registry import SETS

    def source(info: Any) -> str:
        if info.torchvision:
            return f"mirror or torchvision's `{info.torchvision}`"
        archived = info.archive or any(split.archive for split in info.splits.values())
        return "mirror or its archive" if archived else "mirror only"

    return table(
        ["set", "images", "prepared as", "from", "terms", "reference", "notes"],
        [
            [
                f"`{info.name}`<br>{info.title}",
                "<br>".join(f"{name}: {split.count}" for name, split in info.splits.items()),
                "x".join(map(str, info.size)),
                source(info),
                info.terms,
                info.citation,
                "; ".join(
                    part
                    for part in (
                        info.note,
                        "a smaller copy is accepted as `" + info.name + "-incomplete`"
                        if info.partial
                        else "",
                    )
                    if part
                ),
            ]
            for info in SETS.values()
        ],
    )


def _imagenet() -> str:
    from oodlib.data.imagenet import PAPER_SETS

    return table(
        ["set", "role", "source", "terms", "folder below the data root", "images"],
        [
            [
                f"`{info.name}`<br>{info.title}",
                info.role,
                info.source,
                info.terms,
                f"`{info.tree}`",
                "<br>".join(f"{who}: {count}" for who, count in info.counts.items()),
            ]
            for info in PAPER_SETS.values()
        ],
    )


PAGES: dict[str, dict[str, Callable[[], str]]] = {  # page -> block -> what writes it
    "README.md": {"cost": _cost, "findings": _findings},
    "docs/verdicts.md": {"verdicts": _verdicts},
    "docs/methods.md": {"methods": _methods},
    "docs/compute.md": {"compute": _compute},
    "docs/data.md": {"builtin": _builtin, "public": _public, "imagenet": _imagenet},
}
