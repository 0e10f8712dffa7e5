"""What a notebook run records: results, claims with verdicts, figures and tables."""

from oodlib.claims.judge import VERDICTS, Claim, Verdict, judge, load_claims
from oodlib.claims.run import Run
from oodlib.claims.style import COLOURS, METHOD_COLOURS, savefig, use_style
from oodlib.claims.tables import file_stem, markdown_table

__all__ = [
    "COLOURS",
    "METHOD_COLOURS",
    "VERDICTS",
    "Claim",
    "Run",
    "Verdict",
    "file_stem",
    "judge",
    "load_claims",
    "markdown_table",
    "savefig",
    "use_style",
]
