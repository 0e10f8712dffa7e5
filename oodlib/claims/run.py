"""``Run``: what a notebook hands its results, figures, tables and claims to.

The folder of a run holds figures (PNG, PDF), tables (.md, .tex), ``results.csv``,
``scores.parquet``, ``claims.json``, ``contents.json`` (order and captions) and ``provenance.json``;
the same calls write the same bytes, but for the last.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from oodlib.claims.judge import VERDICTS, Verdict, cite, condition, judge, load_claims
from oodlib.claims.style import savefig, use_style
from oodlib.errors import OodlibError
from oodlib.files import atomic_path, write_json, write_text
from oodlib.workspace import STAMP, check_profile, root

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["RESULT_COLUMNS", "RESULT_KEY", "Run", "markdown_table"]

RESULT_KEY = (
    "model",
    "seed",
    "id",
    "ood",
    "group",
    "method",
    "variant",
    "metric",
    "positive",
)  # one row each
RESULT_COLUMNS = (*RESULT_KEY, "value", "low", "high", "n_id", "n_ood")
_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "torch",
    "torchvision",
    "timm",
    "faiss-cpu",
)


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
    >>> run = Run("01b_gradnorm", profile="laptop", seed=0)                                         # doctest: +SKIP
    >>> run.result(model="cnn", id="latin", ood="greek", group="near", method="msp", metric="auroc", value=0.93)
    ...                                                                                             # doctest: +SKIP
    >>> run.claim("gradnorm/C1", value=0.75, low=0.73, high=0.77, n=2000)                           # doctest: +SKIP
    >>> run.finish(weights={"cnn": "3f9c..."}, data={"latin": "a1b2..."})                           # doctest: +SKIP
    """

    def __init__(self, notebook: str, *, profile: str, seed: int, device: str = "cpu") -> None:
        self.notebook, self.profile, self.seed, self.device = (
            notebook,
            check_profile(profile),
            int(seed),
            str(device),
        )
        output = os.environ.get("OODLIB_OUTPUT")
        self.folder = Path(output) if output else root() / "figures" / profile / notebook
        self.folder.mkdir(parents=True, exist_ok=True)
        self._by_hand = not output
        if (
            self._by_hand
        ):  # such a run changes the folder, so the headless run's mark no longer holds
            (self.folder / STAMP).unlink(missing_ok=True)
        self.claims = load_claims(notebook)
        self.verdicts: dict[str, Verdict] = {}
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
        styler = table.style.format(precision=decimals, escape="latex", na_rep="").hide(
            axis="index"
        )
        styler = styler.format_index(escape="latex", axis="columns")
        write_text(
            self.folder / f"{name}.tex",
            styler.to_latex(hrules=True, caption=_latex(caption) or None),
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
        OodlibError : the value is not finite, or a row with the same ``RESULT_KEY`` is there already
        """
        if not np.isfinite(value):
            raise OodlibError(
                f"Run.result: value must be finite, got {value} for {method} {metric} on "
                f"{id}/{ood}."
            )
        row = {
            "model": model,
            "seed": self.seed if seed is None else seed,
            "id": id,
            "ood": ood,
            "group": group,
            "method": method,
            "variant": variant,
            "metric": metric,
            "positive": positive,
            "value": value,
            "low": low,
            "high": high,
            "n_id": n_id,
            "n_ood": n_ood,
        }
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
        """Collect per-image scores (n,), larger = more OOD; scores.parquet holds one row per image."""
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

    def claim(
        self,
        claim: str,
        *,
        value: float,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        detail: str = "",
        network: str = "",
        own: bool = True,
        doubt: str = "",
    ) -> Verdict:
        """Judge one claim; see :func:`oodlib.claims.judge`. ``detail`` says what was measured,
        ``network`` on what.

        ``own=False`` where a run of the paper's profile is not on its own network, weights and
        images; ``doubt`` is a reason why it can conclude nothing.
        """
        if claim not in self.claims:
            raise OodlibError(
                f"Run.claim: {self.notebook} has no claim {claim!r}. Known: "
                f"{', '.join(self.claims)}."
            )
        verdict = judge(
            self.claims[claim],
            self.profile,
            value,
            low,
            high,
            n,
            detail=detail,
            network=network,
            own=own,
            doubt=doubt,
        )
        self.verdicts[claim] = verdict
        return verdict

    def untestable(self, claim: str, reason: str) -> Verdict:
        """The verdict "not testable here" on a claim that this profile could judge, for a reason
        found in the run.
        """
        if claim not in self.claims:
            raise OodlibError(
                f"Run.untestable: {self.notebook} has no claim {claim!r}. Known: "
                f"{', '.join(self.claims)}."
            )
        self.verdicts[claim] = Verdict(
            claim=self.claims[claim],
            profile=self.profile,
            verdict="not testable here",
            reason=reason,
        )
        return self.verdicts[claim]

    def claim_table(self) -> pd.DataFrame:
        """Claims of this notebook: statistic, verdict, measurement, interval, published value,
        where each was read.

        ``.style`` shows the texts whole in a notebook.
        """
        rows = []
        for key, claim in self.claims.items():
            verdict = self.verdicts.get(key) or self._untested(key)
            interval = (
                ""
                if verdict.low is None
                else f"[{claim.show(verdict.low)}, {claim.show(verdict.high)}]"
            )
            rows.append(
                {
                    "claim": key.split("/")[-1],
                    "statement": claim.statement,
                    "statistic": claim.statistic,
                    "holds if": condition(claim.kind, claim.direction, claim.margin, claim.unit),
                    "verdict": verdict.verdict,
                    "measured": claim.show(verdict.measured),
                    "interval": interval,
                    "unit": claim.unit,
                    "published": cite(claim.published, claim.unit),
                    "read in": claim.source,
                    "detail": verdict.detail,
                    "reason": verdict.reason,
                }
            )
        return pd.DataFrame(rows)

    def finish(
        self, *, weights: Mapping[str, str] | None = None, data: Mapping[str, str] | None = None
    ) -> None:
        """Write results.csv, claims.json, contents.json, provenance.json and, where there are
        scores, scores.parquet.

        ``weights`` and ``data`` map each network and image set to its hash. Claims without a
        verdict become "not testable here" where this profile does not judge them. One that it must
        judge and that no cell judged is an OodlibError in a headless run; by hand, where cells may
        be left out, the reason says so.
        """
        verdicts = [self.verdicts.get(key) or self._untested(key) for key in self.claims]
        forgotten = [verdict.claim.id for verdict in verdicts if verdict.verdict not in VERDICTS]
        if forgotten:
            raise OodlibError(
                f"Run.finish: {', '.join(forgotten)} must be judged at {self.profile}, but "
                f"run.claim was not called. Add the call, or take {self.profile} out of profiles."
            )
        from oodlib.models.device import pick_device  # late: it imports torch

        with atomic_path(self.folder / "results.csv") as path:
            self.results().to_csv(path, index=False, float_format="%.10g", lineterminator="\n")
        if self._scores:
            with atomic_path(self.folder / "scores.parquet") as path:
                pd.concat(self._scores, ignore_index=True).to_parquet(path, index=False)
        write_json(self.folder / "claims.json", [verdict.record() for verdict in verdicts])
        write_json(self.folder / "contents.json", self._contents)
        write_json(
            self.folder / "provenance.json",
            {
                "notebook": self.notebook,
                "profile": self.profile,
                "seed": self.seed,
                "device": str(pick_device(self.device)),
                "weights": dict(weights or {}),
                "data": dict(data or {}),
                **environment(),
                "wall_seconds": round(time.time() - self._start, 2),
                "peak_memory_mib": _peak_memory(),
            },
        )

    def _untested(self, key: str) -> Verdict:
        claim = self.claims[key]
        if self.profile in claim.profiles:
            word = "not testable here" if self._by_hand else "not judged yet"
            return Verdict(
                claim=claim,
                profile=self.profile,
                verdict=word,
                reason="the cell that judges it was not run",
            )
        return Verdict(
            claim=claim,
            profile=self.profile,
            verdict="not testable here",
            reason=f"judged at {', '.join(claim.profiles) or 'no profile yet'}",
        )

    def _add(self, kind: str, name: str, caption: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise OodlibError(
                f"Run.{kind}: a name of letters, digits, - and _ is needed, got {name!r}."
            )
        self._contents = [
            entry for entry in self._contents if (entry["kind"], entry["name"]) != (kind, name)
        ]
        self._contents.append({"kind": kind, "name": name, "caption": caption})


def markdown_table(table: pd.DataFrame, *, decimals: int = 2) -> str:
    """A data frame as a Markdown table: floats with ``decimals`` places, missing values empty,
    pipes escaped.
    """

    def show(value: Any) -> str:
        if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
            return ""
        if isinstance(value, float | np.floating):
            return f"{value:.{decimals}f}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    lines = [
        "| " + " | ".join(show(column) for column in table.columns) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    for row in table.itertuples(index=False, name=None):
        lines.append("| " + " | ".join(show(value) for value in row) + " |")
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    """Python, library versions, platform and commit (None outside git), for provenance.json."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=root(),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": versions,
        "commit": commit,
    }


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def _peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
