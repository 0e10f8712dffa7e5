"""The state that an interrupted training run goes on from: a file written whole, read only if it is
undamaged.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from oodlib.errors import OodlibError
from oodlib.files import atomic_path

__all__ = ["load_state", "save_state"]


def save_state(path: str | Path, state: dict[str, Any], *, checksum: bool = False) -> None:
    """Write a state (tensors, numbers, texts and containers of them) with `torch.save`, whole or
    not at all.

    checksum : put the file's own SHA-256 in front of it
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if checksum:
            file.write(hashlib.sha256(payload).digest())
        file.write(payload)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, its tensors on the CPU.

    OodlibError : the file is cut, changed, or no state
    """
    data = Path(path).read_bytes()
    try:
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            data = data[32:]
        elif not data.startswith(b"PK"):  # torch's files are zip archives
            raise zipfile.BadZipFile("its checksum does not match")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch itself compares no checksum
            if archive.testzip():
                raise zipfile.BadZipFile(f"{archive.testzip()} was changed")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {**state, "key": state["key"]}
    except Exception as error:  # zip, pickle, runtime and key errors
        raise OodlibError(
            f"{path} is damaged ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:100]}). Delete it; the training then starts "
            "afresh."
        ) from error
