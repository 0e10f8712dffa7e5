"""What a notebook run records: results, claims with verdicts, figures and tables."""

from oodlib.claims.judge import VERDICTS, Claim, Verdict, judge, load_claims
from oodlib.claims.run import Run
from oodlib.claims.style import COLOURS, METHOD_COLOURS, savefig, use_style

__all__ = [
    "COLOURS",
    "METHOD_COLOURS",
    "VERDICTS",
    "Claim",
    "Run",
    "Verdict",
    "judge",
    "load_claims",
    "savefig",
    "use_style",
]
