"""What a notebook run leaves behind: results, claims with verdicts, figures, and the report made of them."""

from oodlib.report.claims import VERDICTS, Claim, Verdict, judge, load_claims
from oodlib.report.figures import COLOURS, METHOD_COLOURS, savefig, use_style
from oodlib.report.results import Run

__all__ = ["COLOURS", "METHOD_COLOURS", "VERDICTS", "Claim", "Run", "Verdict", "judge", "load_claims", "savefig",
           "use_style"]
