"""Saved states of training: both forms are read, and a damaged file is one clear error."""

import io

import pytest
import torch

from oodlib import OodlibError
from oodlib.models.training.state import load_state, save_state

STATE = {"key": {"seed": 0}, "model": {"weight": torch.arange(2000.0)}, "step": 3, "losses": [0.5]}


@pytest.mark.parametrize("checksum", [False, True])
def test_a_state_is_read_again(tmp_path, checksum):
    save_state(tmp_path / "a.pt", STATE, checksum=checksum)
    found = load_state(tmp_path / "a.pt")
    assert torch.equal(found.pop("model")["weight"], STATE["model"]["weight"])
    assert found == {name: value for name, value in STATE.items() if name != "model"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_file_of_torch_alone_is_a_state(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt")["step"] == 3


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def of(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: d[:40],
        lambda d: b"",
        lambda d: b"PK" + d,
        lambda d: of([1]),
        lambda d: of({"step": 3}),
    ],
    ids=["flipped", "one byte short", "half", "40 bytes", "empty", "foreign", "list", "no key"],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, checksum, damage):
    path = tmp_path / "a.pt"
    save_state(path, STATE, checksum=checksum)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        OodlibError, match=r"a\.pt is damaged \(\w+: .*Delete it; the training then starts afresh"
    ):
        load_state(path)
