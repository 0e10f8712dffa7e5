"""The verdict rule, case by case, and the committed claims."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oodlib.claims.judge import VERDICTS, Claim, judge, load_claims, read_claims
from oodlib.errors import OodlibError
from oodlib.workspace import PROFILES

TREND = Claim(
    id="p/C1",
    statement="s",
    source="abs",
    statistic="AUROC",
    kind="trend",
    direction="above",
    margin=0.5,
    unit="percent",
    counted="images per side",
    smallest_n=1000,
    profiles=("laptop", "benchmark", "paper"),
    paper_setting=("paper",),
    published=None,
    notebook="01_p",
)
BELOW = replace(TREND, direction="below")
IDENTITY = replace(
    TREND,
    kind="identity",
    direction="below",
    margin=1e-10,
    unit="relative difference",
    smallest_n=1,
    profiles=PROFILES,
)
EXACT = replace(
    TREND,
    kind="exact",
    direction=None,
    margin=0.01,
    published={"value": 0.1633, "source": "abstract"},
)


@pytest.mark.parametrize(
    ("claim", "profile", "interval", "n", "verdict"),
    [
        (TREND, "laptop", (0.6, 0.55, 0.65), 1000, "trend holds"),
        (TREND, "laptop", (0.4, 0.35, 0.45), 1000, "trend absent"),
        (TREND, "laptop", (0.6, 0.45, 0.65), 1000, "inconclusive"),
        (
            TREND,
            "laptop",
            (0.6, 0.5, 0.65),
            1000,
            "inconclusive",
        ),  # the margin itself is not above the margin
        (TREND, "laptop", (0.5, 0.5, 0.5), 1000, "trend absent"),
        (TREND, "laptop", (0.6, 0.55, 0.65), 999, "inconclusive"),
        (TREND, "smoke", (0.6, 0.55, 0.65), 1000, "not testable here"),
        (TREND, "smoke", (0.6, 0.55, 0.65), 10, "not testable here"),
        (TREND, "paper", (0.6, 0.55, 0.65), 1000, "reproduced"),
        (TREND, "paper", (0.4, 0.35, 0.45), 1000, "not reproduced"),
        (TREND, "paper", (0.6, 0.45, 0.65), 1000, "inconclusive"),
        (BELOW, "laptop", (0.4, 0.35, 0.45), 1000, "trend holds"),
        (BELOW, "laptop", (0.6, 0.55, 0.65), 1000, "trend absent"),
        (BELOW, "laptop", (0.5, 0.45, 0.5), 1000, "trend holds"),
        (IDENTITY, "smoke", (1e-13, None, None), 10, "reproduced"),
        (IDENTITY, "laptop", (1e-3, None, None), 10, "not reproduced"),
        (EXACT, "paper", (0.163, 0.16, 0.166), 1000, "reproduced"),
        (EXACT, "paper", (0.10, 0.09, 0.11), 1000, "not reproduced"),
        (EXACT, "paper", (0.163, 0.14, 0.18), 1000, "inconclusive"),
        (EXACT, "laptop", (0.163, 0.16, 0.166), 1000, "trend holds"),
    ],
)
def test_verdict(
    claim: Claim, profile: str, interval: tuple[Any, Any, Any], n: int, verdict: str
) -> None:
    found = judge(claim, profile, *interval, n, paper_setting=True)
    assert found.verdict == verdict
    assert verdict in VERDICTS
    assert found.reason


def test_too_small_a_sample_says_so() -> None:
    verdict = judge(TREND, "laptop", 0.6, 0.5, 0.7, 10)
    assert "n = 10 images per side, at least 1000" in verdict.reason


@pytest.mark.parametrize(
    ("values", "n", "message"),
    [
        ((0.6, None, None), 1000, "low and high are needed"),
        ((0.6, 0.7, 0.5), 1000, "reversed"),
        ((float("nan"), 0.1, 0.2), 1000, "finite"),
        ((0.6, 0.5, None), 1000, "finite"),
        ((60.0, 55.0, 65.0), 1000, "fractions, not per cent"),
        ((0.6, 0.5, 0.7), None, r"n \(number of images per side\)"),
    ],
)
def test_bad_measurement(values: tuple[Any, Any, Any], n: int | None, message: str) -> None:
    with pytest.raises(OodlibError, match=message):
        judge(TREND, "laptop", *values, n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "kind must be"),
        ({"direction": "left"}, "direction must be"),
        ({"profiles": ("desktop",)}, "unknown profile desktop"),
        ({"kind": "exact"}, "needs a published value"),
    ],
)
def test_bad_claim(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OodlibError, match=message):
        replace(TREND, **change)


def test_a_claims_file_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "paper: p\nnotebook: 01_p\nclaims:\n- {id: C1, profiles: [], paper_setting: [], colour: "
        "red}\n"
    )
    with pytest.raises(OodlibError, match=r"p\.yaml.*colour"):
        read_claims(path)


def test_the_committed_claims() -> None:
    claims = load_claims("01b_gradnorm")
    ids = {key.split("/")[1] for key in claims}
    assert {*(f"C{i}" for i in range(1, 11)), "H1", "H2"} <= ids
    published = claims["gradnorm/C3"].published
    assert (
        published is not None and published["value"] == 0.1633 and "abstract" in published["source"]
    )
    for claim in load_claims().values():
        assert set(claim.paper_setting) <= set(claim.profiles) or not claim.profiles
        assert claim.published is None or claim.published["source"]


def test_a_doubt_found_in_the_run_leaves_the_numbers_and_takes_the_verdict() -> None:
    verdict = judge(TREND, "laptop", 0.6, 0.55, 0.65, 1000, doubt="the models are weak")
    assert (verdict.verdict, verdict.reason, verdict.measured) == (
        "inconclusive",
        "the models are weak",
        0.6,
    )
    assert (
        judge(TREND, "smoke", 0.6, 0.55, 0.65, 1000, doubt="the models are weak").verdict
        == "not testable here"
    )
