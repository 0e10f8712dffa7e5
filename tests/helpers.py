"""What several test modules share and no fixture gives."""

import re
from typing import Any

import pytest

from oodlib.errors import OodlibError


def refuses(*parts: object) -> Any:
    """Expect an OodlibError that names all of these, in this order."""
    return pytest.raises(
        OodlibError, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts)
    )
