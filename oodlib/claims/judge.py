"""Claims of the papers, fixed in data/claims/ before any run, and the rule that turns a measurement
into a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from oodlib.errors import OodlibError
from oodlib.workspace import PROFILES, root

__all__ = [
    "VERDICTS",
    "Claim",
    "Verdict",
    "cite",
    "condition",
    "judge",
    "load_claims",
    "read_claims",
    "show",
]

VERDICTS = (
    "reproduced",
    "not reproduced",
    "trend holds",
    "trend absent",
    "inconclusive",
    "not testable here",
)
PER_CENT = ("percent", "points")  # printed times 100; points are differences of percentages


def show(value: float | None, unit: str) -> str:
    """A value of a claim as tables print it; "" for None."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if unit in PER_CENT else f"{value:.4g}"


def cite(published: Mapping[str, Any] | None, unit: str) -> str:
    """A published value with source, table and cell; "" where none is known."""
    given = published or {}
    where = ", ".join(str(given[key]) for key in ("source", "table", "cell") if given.get(key))
    return show(given.get("value"), unit) + (f" ({where})" if where else "")


def condition(kind: str, direction: str | None, margin: float, unit: str) -> str:
    """What must be true of the whole interval for a claim to hold, as tables print it."""
    what = "within " if kind == "exact" else "> " if direction == "above" else "<= "
    return f"{what}{show(margin, unit)} {unit}{' of it' if kind == 'exact' else ''}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, as data/claims/<paper>.yaml states it.

    Attributes
    ----------
    id : "gradnorm/C1"
    statement : the claim in our words
    source : where it was read: abs, image, 2nd, code, derived; "ours" for our own hypothesis
    statistic : what is measured, in words
    kind : "trend" (an inequality), "identity" (true at any scale) or "exact" (equals the published
        number)
    direction : on which side of ``margin`` the claim puts the statistic; "exact" has none
    margin : boundary of a trend or identity; of an "exact" claim the largest distance from the
        published value
    unit : "percent" or, of differences, "points" (a fraction, printed times 100), or any other word
        (printed as it is)
    counted, smallest_n : what n counts, and below which n nothing is concluded
    profiles, paper_setting : profiles that can judge the claim; those that can be the paper's own
        data, network and protocol
    published : {value, source, table, cell} or None where no published number could be read
    notebook : the notebook that judges it
    """

    id: str
    statement: str
    source: str
    statistic: str
    kind: str
    margin: float
    unit: str
    counted: str
    smallest_n: int
    profiles: tuple[str, ...]
    paper_setting: tuple[str, ...]
    published: dict[str, Any] | None
    notebook: str
    direction: str | None = None

    def __post_init__(self) -> None:
        wrong = sorted({*self.profiles, *self.paper_setting} - set(PROFILES))
        if wrong:
            raise OodlibError(
                f"claim {self.id}: unknown profile {', '.join(wrong)}; known: "
                f"{', '.join(PROFILES)}."
            )
        if self.kind not in ("trend", "identity", "exact"):
            raise OodlibError(
                f"claim {self.id}: kind must be trend, identity or exact, got {self.kind!r}."
            )
        if self.kind == "exact":
            if self.published is None or self.published.get("value") is None:
                raise OodlibError(
                    f"claim {self.id}: kind exact needs a published value with its source."
                )
        elif self.direction not in ("above", "below"):
            raise OodlibError(
                f"claim {self.id}: direction must be above or below, got {self.direction!r}."
            )

    @property
    def short(self) -> str:
        """The id without the paper: "C1"."""
        return self.id.split("/")[-1]

    @property
    def judged_at(self) -> str:
        """Which profiles judge it, in words."""
        return f"judged at {', '.join(self.profiles) or 'no profile yet'}"

    def show(self, value: float | None) -> str:
        """``value`` as tables print it."""
        return show(value, self.unit)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one run says about one claim; ``measured``, ``low`` and ``high`` are None where nothing
    was measured.
    """

    claim: Claim
    profile: str
    verdict: str
    reason: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    detail: str = ""
    network: str = ""

    def record(self) -> dict[str, Any]:
        """The verdict as claims.json holds it."""
        content = asdict(self)
        claim = content.pop("claim")
        for key in ("counted", "smallest_n", "profiles", "paper_setting"):
            del claim[key]
        return {**claim, **content}

    @property
    def measurement(self) -> str:
        """Value and interval as tables print them; "" where nothing was measured."""
        show = self.claim.show
        alone = self.measured is None or self.claim.kind == "identity"
        return show(self.measured) + ("" if alone else f" [{show(self.low)}, {show(self.high)}]")

    def _ipython_display_(self) -> None:
        """Show nothing as a cell's last value: `Run.judge` has printed the verdict."""

    def __str__(self) -> str:
        number = f": {self.measurement} {self.claim.unit}" if self.measurement else ""
        return f"{self.claim.short}{number}  ->  {self.verdict}"


def read_claims(path: Path) -> dict[str, Claim]:
    """All claims of one file, by id."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        claims = {}
        for entry in content["claims"]:
            values = {"notebook": content["notebook"], "published": None, **entry}
            values["id"] = f"{content['paper']}/{entry['id']}"
            values["profiles"], values["paper_setting"] = (
                tuple(values["profiles"]),
                tuple(values["paper_setting"]),
            )
            if values["id"] in claims:
                raise OodlibError(f"{path.name}: two claims called {values['id']}.")
            claims[values["id"]] = Claim(**values)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise OodlibError(
            f"{path.name}: not a claims file ({error}). See help(oodlib.claims.Claim)."
        ) from error
    return claims


def load_claims(notebook: str | None = None) -> dict[str, Claim]:
    """Every claim under data/claims/, or those that one notebook judges, by id."""
    every: dict[str, Claim] = {}
    for path in sorted((root() / "data" / "claims").glob("*.yaml")):
        every.update(read_claims(path))
    return {
        key: claim for key, claim in every.items() if notebook is None or claim.notebook == notebook
    }


def judge(
    claim: Claim,
    profile: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
    *,
    detail: str = "",
    network: str = "",
    paper_setting: bool = False,
    doubt: str = "",
) -> Verdict:
    """Verdict of one measurement, by the rule fixed in the claim.

    The whole interval must lie on one side of the margin, otherwise "inconclusive"; an identity is
    judged by its value. "reproduced" and "not reproduced" are kept for identities and for the
    paper's own setting.

    Parameters
    ----------
    value, low, high : in the unit that the metrics return (fractions, not per cent)
    n : number of what ``claim.counted`` says
    paper_setting : this run, of a profile that can be the paper's own setting, used the paper's
        network, weights and images
    doubt : a reason found in the run why nothing can be concluded; the verdict is "inconclusive"

    Raises
    ------
    OodlibError : not finite, interval missing or reversed, per cent instead of a fraction, no n
    """
    given = [value] if low is None and high is None else [value, low, high]
    numbers = [number for number in given if number is not None and math.isfinite(number)]
    if len(numbers) < len(given):
        raise OodlibError(
            f"claim {claim.id}: value, low and high must be finite, got {value}, {low}, {high}."
        )
    if claim.unit in PER_CENT and max(abs(number) for number in numbers) > 2:
        raise OodlibError(f"claim {claim.id}: give fractions, not per cent; got {value}.")
    if claim.kind != "identity" and len(numbers) == 1:
        raise OodlibError(
            f"claim {claim.id}: low and high are needed; see oodlib.metrics.bootstrap."
        )
    if claim.smallest_n and n is None:
        raise OodlibError(f"claim {claim.id}: n (number of {claim.counted}) is needed.")
    low, high = (
        (float(value), float(value)) if low is None or high is None else (float(low), float(high))
    )
    if low > high:
        raise OodlibError(f"claim {claim.id}: the interval [{low}, {high}] is reversed.")

    word, reason = _decide(claim, profile, float(value), low, high, n, paper_setting)
    if doubt and word != "not testable here":
        word, reason = "inconclusive", doubt
    return Verdict(
        claim=claim,
        profile=profile,
        verdict=word,
        reason=reason,
        measured=float(value),
        low=low,
        high=high,
        n=n,
        detail=detail,
        network=network,
    )


def _decide(
    claim: Claim,
    profile: str,
    value: float,
    low: float,
    high: float,
    n: int | None,
    paper_setting: bool,
) -> tuple[str, str]:
    if profile not in claim.profiles:
        return "not testable here", claim.judged_at
    if n is not None and n < claim.smallest_n:
        return "inconclusive", f"n = {n} {claim.counted}, at least {claim.smallest_n} are needed"
    if claim.kind == "identity":
        low = high = value
    where = (
        f"the interval [{claim.show(low)}, {claim.show(high)}]"
        if low != high
        else f"the value {claim.show(value)}"
    )
    if claim.kind == "exact":
        assert claim.published is not None
        target = float(claim.published["value"])
        inside = low >= target - claim.margin and high <= target + claim.margin
        outside = high < target - claim.margin or low > target + claim.margin
        what = f"{claim.show(target)} ± {claim.show(claim.margin)}"
        lies = "within" if inside else "outside" if outside else "across the edge of"
        reason = f"{where} lies {lies} {what}"
    else:
        above, not_above = low > claim.margin, high <= claim.margin
        inside, outside = (above, not_above) if claim.direction == "above" else (not_above, above)
        side = "above" if above else "not above" if not_above else "on both sides of"
        reason = f"{where} lies {side} {claim.show(claim.margin)}"
    if not inside and not outside:
        return "inconclusive", reason
    if claim.kind == "identity" or (paper_setting and profile in claim.paper_setting):
        return ("reproduced" if inside else "not reproduced"), reason
    return ("trend holds" if inside else "trend absent"), reason
