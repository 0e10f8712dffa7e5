"""The one training loop: its saved states, and weights of all recipes that stay what they are."""

import io

import pytest
import torch
from torch import nn

from oodlib import OodlibError
from oodlib.models.training import loop
from oodlib.models.training.loop import TrainingRun, load_state, pack_state, save_state

STATE = {"key": {"seed": 0}, "model": {"weight": torch.arange(2000.0)}, "step": 3, "losses": [0.5]}


def test_a_state_is_read_again(tmp_path):
    save_state(tmp_path / "a.pt", pack_state(STATE))
    state = load_state(tmp_path / "a.pt")
    assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])
    assert state == {name: value for name, value in STATE.items() if name != "model"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def former(data: bytes) -> bytes:
    """A state as earlier versions wrote it: torch's file alone."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: d[:32],
        lambda d: b"",
        lambda d: b"PK" + d,
        former,
    ],
    ids=["flipped", "one byte short", "half", "checksum alone", "empty", "foreign", "former"],
)
def test_a_damaged_or_former_file_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / "a.pt"
    save_state(path, pack_state(STATE))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        OodlibError,
        match=r"a\.pt is damaged, or an earlier version .* Delete it; the training then starts",
    ):
        load_state(path)


def test_a_state_is_written_only_once_its_loss_is_known_to_be_finite(tmp_path, monkeypatch):
    """Batch normalisation moves with every forward pass, so the state is that before the pass."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x, states = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), {}

    def loss(step):
        states[step] = {name: value.clone() for name, value in model.state_dict().items()}
        return model(x).square().mean() * (float("nan") if step == 3 else 1.0)

    run = TrainingRun("train", model, optimiser, key=0, path=tmp_path / "a.pt")
    with pytest.raises(OodlibError, match=r"train: step 4 \(loss nan.*no usable weights"):
        run.run_steps(loss, rate=lambda step: 0.1, rows=[9], progress=False)
    state = load_state(tmp_path / "a.pt")
    assert state["step"] == 2
    assert all(torch.equal(v, states[2][name]) for name, v in state["parts"]["model"].items())
