"""``Run``: what a notebook hands its results, figures, tables and claims to.

The folder of a run holds figures (PNG, PDF), tables (.md, .tex), ``results.csv``,
``scores.parquet``, ``claims.json``, ``contents.json`` (order and captions) and ``provenance.json``;
the same calls write the same bytes, but for the last.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from oodlib.claims.environment import environment, peak_memory
from oodlib.claims.judge import VERDICTS, Claim, Verdict, judge, load_claims
from oodlib.claims.style import savefig, use_style
from oodlib.claims.tables import claim_table, file_stem, latex_table, markdown_table
from oodlib.errors import OodlibError
from oodlib.files import atomic_path, write_json, write_text
from oodlib.metrics import AVERAGE, METRICS, Board, Estimate
from oodlib.workspace import STAMP, check_profile, root

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


# one row of results.csv each
RESULT_KEY = ("model", "seed", "id", "ood", "group", "method", "variant", "metric", "positive")
RESULT_COLUMNS = (*RESULT_KEY, "value", "low", "high", "n_id", "n_ood")


class Run:
    """Collector of one notebook run.

    Making one sets matplotlib's style. Outside a headless run it also removes the stamp of the last
    headless run, whose files it is about to replace.

    Parameters
    ----------
    notebook : name of the notebook, "01b_gradnorm"
    profile : smoke, laptop, benchmark or paper
    seed : seed of the run, written into the rows of the results that name none
    device : where the networks ran, for the provenance; "auto" is written as what it stands for

    Raises
    ------
    OodlibError : unknown profile, or a claims file that cannot be read

    Examples
    --------
    >>> run = Run("01b_gradnorm", profile="laptop", seed=0)  # doctest: +SKIP
    >>> beds = load(run, ["latin_fast:live"])  # doctest: +SKIP
    >>> board = beds.score(["gradnorm", "msp"])  # doctest: +SKIP
    >>> run.show(board)  # doctest: +SKIP
    >>> run.judge("C1", board.smallest("gradnorm"))  # doctest: +SKIP
    C1: 74.92 [72.80, 76.90] percent  ->  trend holds
    >>> run.finish()  # doctest: +SKIP
    """

    def __init__(self, notebook: str, *, profile: str, seed: int, device: str = "cpu") -> None:
        self.notebook, self.profile = notebook, check_profile(profile)
        self.seed, self.device = int(seed), str(device)
        output = os.environ.get("OODLIB_OUTPUT")
        self.folder = Path(output) if output else root() / "figures" / profile / notebook
        self.folder.mkdir(parents=True, exist_ok=True)
        self._by_hand = not output
        if self._by_hand:  # it changes the folder, so the headless run's mark no longer holds
            (self.folder / STAMP).unlink(missing_ok=True)
        self.claims = load_claims(notebook)
        self.verdicts: dict[str, Verdict] = {}
        self._networks: list[Verdict] = []  # of single networks
        self._inputs: dict[str, dict[str, str]] = {"weights": {}, "data": {}}
        self._rows: list[dict[str, Any]] = []
        self._keys: set[tuple[str, ...]] = set()
        self._scores: list[pd.DataFrame] = []
        self._contents: list[dict[str, str]] = []
        self._start = time.time()
        use_style()

    def figure(self, figure: Figure, name: str, *, caption: str = "") -> None:
        """Save a figure as PNG and PDF; the report shows it with its caption, in the order of the
        calls.
        """
        self._add("figure", name, caption)
        savefig(figure, self.folder / name)

    def table(
        self, table: pd.DataFrame, name: str, *, caption: str = "", decimals: int = 2
    ) -> None:
        """Save a table as Markdown and LaTeX; floats with ``decimals`` places, missing values
        empty.
        """
        self._add("table", name, caption)
        write_text(self.folder / f"{name}.md", markdown_table(table, decimals=decimals))
        write_text(
            self.folder / f"{name}.tex", latex_table(table, caption=caption, decimals=decimals)
        )

    def result(
        self,
        *,
        model: str,
        id: str,
        ood: str,
        method: str,
        metric: str,
        value: float,
        group: str = "",
        variant: str = "",
        positive: str = "",
        low: float | None = None,
        high: float | None = None,
        n_id: int | None = None,
        n_ood: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Append one row to results.csv; the arguments are its columns, so ``id`` and ``ood`` name
        image sets.

        Values are in the units in which they were measured; AUROC, FPR and accuracy are fractions.

        Raises
        ------
        OodlibError : the value is not finite, or a row has the same ``RESULT_KEY``
        """
        if not np.isfinite(value):
            raise OodlibError(
                f"Run.result: value must be finite, got {value} for {method} {metric} on "
                f"{id}/{ood}."
            )
        seed = self.seed if seed is None else seed
        names = (model, seed, id, ood, group, method, variant, metric, positive)
        row = dict(zip(RESULT_COLUMNS, (*names, value, low, high, n_id, n_ood), strict=True))
        key = tuple(str(row[column]) for column in RESULT_KEY)
        if key in self._keys:
            shown = ", ".join(
                f"{column} {text!r}" for column, text in zip(RESULT_KEY, key, strict=True) if text
            )
            raise OodlibError(
                f"Run.result: there is a result of {shown} already. Give another measurement its "
                "own variant; to measure again, make a new Run."
            )
        self._keys.add(key)
        self._rows.append(row)

    def results(self) -> pd.DataFrame:
        """The rows so far, one column per name in ``RESULT_COLUMNS``."""
        return pd.DataFrame(self._rows, columns=list(RESULT_COLUMNS)).astype(
            {"n_id": "Int64", "n_ood": "Int64"}
        )

    def scores(
        self, *, model: str, set: str, split: str, method: str, values: ArrayLike, variant: str = ""
    ) -> None:
        """Per-image scores (n,), larger = more OOD, for scores.parquet: one row per image."""
        flat = np.asarray(values, dtype=np.float64)
        if flat.ndim != 1:
            raise OodlibError(
                f"Run.scores: one score per image expected, shape (n,); got {flat.shape}."
            )
        self._scores.append(
            pd.DataFrame(
                {
                    "model": model,
                    "seed": self.seed,
                    "set": set,
                    "split": split,
                    "method": method,
                    "variant": variant,
                    "index": np.arange(len(flat)),
                    "score": flat,
                }
            )
        )

    def show(
        self,
        board: Board,
        *,
        metrics: Collection[str] = tuple(METRICS),
        tables: Collection[str] = ("AUROC", "FPR95(ID+)"),
        variants: Mapping[str, str] | None = None,
        beside: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        caption: str = "",
        scores: bool = True,
    ) -> None:
        """Write a board: its rows of results.csv, one wide table per network, per-image scores.

        Parameters
        ----------
        metrics, tables : which `oodlib.metrics.METRICS` become results, and which of them tables
        variants : as in `oodlib.metrics.Board.results`
        beside : column -> network -> one cell per method, shown after the method's name
        caption : sentence to add to the captions
        """
        for network, methods in board.scores.items():
            part = board.on(network)
            rows: list[dict[str, Any]] = part.results(metrics, variants=variants).to_dict("records")
            for row in rows:
                columns: Any = {k: None if v is pd.NA else v for k, v in row.items()}
                self.result(**columns)
            id_name = board.id_name.get(network, "id")
            for metric in tables:
                table = part.table(network, metric)
                for column, cells in reversed(list((beside or {}).items())):
                    table.insert(1, column, cells[network])
                text = (
                    f"{metric} in per cent, {network}, ID {id_name} ({part.sizes(network)['id']} "
                    f"images). Interval: 95 %. {caption}"
                )
                self.table(table, file_stem(metric, network), caption=text.strip())
            if scores:
                for method, sets in methods.items():
                    for name, values in sets.items():
                        self.scores(
                            model=network,
                            set=id_name if name == "id" else name,
                            split="test",
                            method=method,
                            values=values,
                        )

    def averages(self, board: Board, *, method: str, metric: str = "AUROC") -> pd.DataFrame:
        """Write the averages of a board over all its OOD sets, without intervals: settings of one
        method, whose names become the column ``variant``. Returns network x setting in per cent.
        """
        found, (name, positive, _) = board.each(metric), METRICS[metric]
        for network, settings in found.iterrows():
            for setting, value in settings.dropna().items():
                self.result(
                    model=str(network),
                    id=board.id_name.get(str(network), "id"),
                    ood=AVERAGE,
                    method=method,
                    variant=str(setting),
                    metric=name,
                    positive=positive,
                    value=value,
                )
        return 100 * found

    def rule(self, claim: str) -> Claim:
        """A claim of this notebook by its id, with or without the paper: "C1", "gradnorm/C1"."""
        found = [c for key, c in self.claims.items() if claim in (key, c.short)]
        if len(found) != 1:
            raise OodlibError(
                f"Run: {self.notebook} has {len(found) or 'no'} claim{'s' * bool(found)} "
                f"{claim!r}. Known: {', '.join(self.claims) or 'none'}."
            )
        return found[0]

    def judges(self, claim: str) -> bool:
        """Whether the profile of this run can judge a claim."""
        return self.profile in self.rule(claim).profiles

    def judge(
        self,
        claim: str,
        estimate: Estimate | float,
        *,
        n: int | None = None,
        detail: str = "",
        network: str | None = None,
        doubt: str = "",
        paper_setting: bool = False,
    ) -> Verdict:
        """Judge a claim, each network of the estimate by the same rule too, and print one line.

        Where the profile cannot judge the claim, the measurement is written as "not testable here".

        Parameters
        ----------
        claim : "C1", or "gradnorm/C1"
        estimate : an `Estimate`; a bare number for identities
        n : what the claim counts, where it is not ``estimate.n``; too few conclude nothing
        detail, network : what was measured, and on what; by default the networks of the estimate
        doubt : a reason found in the run why it can conclude nothing
        paper_setting : whether the run has the paper's own network, weights and images; only then
            (and of identities) the verdict may be "reproduced"
        """
        rule, each = self.rule(claim), estimate.each if isinstance(estimate, Estimate) else {}
        if isinstance(estimate, Estimate) and n is None:
            n = estimate.n
        network = ", ".join(each) if network is None else network

        def decide(found: Estimate | float, network: str, detail: str = "") -> Verdict:
            value, low, high = found if isinstance(found, Estimate) else (found, None, None)
            return judge(
                rule,
                self.profile,
                value,
                low,
                high,
                n,
                detail=detail,
                network=network,
                paper_setting=paper_setting,
                doubt=doubt,
            )

        verdict = self.verdicts[rule.id] = decide(estimate, network, detail)
        print(verdict if self.judges(claim) else f"{verdict} ({verdict.reason})")
        self._networks += [decide(found, name) for name, found in each.items()]
        return verdict

    def absent(self, claim: str, reason: str) -> None:
        """Verdict "not testable here" for a reason found in the run."""
        rule = self.rule(claim)
        if not self.judges(claim):
            print(f"{rule.short}: {rule.judged_at}")
            return
        self.verdicts[rule.id] = self._untested(rule, reason)
        print(f"{self.verdicts[rule.id]} ({reason})")

    def judged_networks(self) -> pd.DataFrame:
        """Claims judged on each network alone: claim, network, measured, unit, verdict."""
        rows = [
            (v.claim.short, v.network, v.measurement, v.claim.unit, v.verdict)
            for v in self._networks
        ]
        return pd.DataFrame(rows, columns=["claim", "network", "measured", "unit", "verdict"])

    def claim_table(self) -> pd.DataFrame:
        """Claims of this notebook: statistic, verdict, measurement, published value.

        ``.style`` shows the texts whole in a notebook.
        """
        return claim_table(self._all_verdicts())

    def uses(self, *, weights: Mapping[str, str], data: Mapping[str, str]) -> None:
        """Note the hash of each network and of each image set, for provenance.json."""
        self._inputs["weights"] |= weights
        self._inputs["data"] |= data

    def finish(self) -> None:
        """Write results.csv, claims.json, contents.json, provenance.json and any scores.parquet.

        Claims without a verdict become "not testable here" where this profile does not judge them.
        One that it must judge and that no cell judged is an OodlibError in a headless run; by hand,
        where cells may be left out, the reason says so.
        """
        verdicts = self._all_verdicts()
        forgotten = [verdict.claim.id for verdict in verdicts if verdict.verdict not in VERDICTS]
        if forgotten:
            raise OodlibError(
                f"Run.finish: {', '.join(forgotten)} must be judged at {self.profile}, but "
                f"run.judge was not called. Add the call, or take {self.profile} out of profiles."
            )
        from oodlib.models.device import pick_device  # late: it imports torch

        with atomic_path(self.folder / "results.csv") as path:
            self.results().to_csv(path, index=False, float_format="%.10g", lineterminator="\n")
        if self._scores:
            with atomic_path(self.folder / "scores.parquet") as path:
                pd.concat(self._scores, ignore_index=True).to_parquet(path, index=False)
        write_json(self.folder / "claims.json", [verdict.record() for verdict in verdicts])
        write_json(self.folder / "contents.json", self._contents)
        provenance = {
            "notebook": self.notebook,
            "profile": self.profile,
            "seed": self.seed,
            "device": str(pick_device(self.device)),
            **self._inputs,
            **environment(),
            "wall_seconds": round(time.time() - self._start, 2),
            "peak_memory_mib": peak_memory(),
        }
        write_json(self.folder / "provenance.json", provenance)

    def _all_verdicts(self) -> list[Verdict]:
        word = "not testable here" if self._by_hand else "not judged yet"
        verdicts = []
        for key, rule in self.claims.items():
            if not self.judges(key):
                unmade = self._untested(rule, rule.judged_at)
            else:
                unmade = self._untested(rule, "the cell that judges it was not run", word)
            verdicts.append(self.verdicts.get(key) or unmade)
        return verdicts

    def _untested(self, rule: Claim, reason: str, word: str = "not testable here") -> Verdict:
        return Verdict(claim=rule, profile=self.profile, verdict=word, reason=reason)

    def _add(self, kind: str, name: str, caption: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise OodlibError(
                f"Run.{kind}: a name of letters, digits, - and _ is needed, got {name!r}."
            )
        self._contents = [
            entry for entry in self._contents if (entry["kind"], entry["name"]) != (kind, name)
        ]
        self._contents.append({"kind": kind, "name": name, "caption": caption})
