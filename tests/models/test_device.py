"""Random states: seeded inside, given back outside, on the CPU and on the device in use."""

import pytest
import torch

from oodlib.models.device import random_state
from oodlib.models.small_vit import small_vit


@pytest.fixture
def cards(monkeypatch):
    """Generators that stand for those of two CUDA devices, the second being the current one."""
    generators = tuple(torch.Generator().manual_seed(number) for number in (1, 2))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return generators


@pytest.mark.parametrize(
    ("device", "used"), [("cpu", ()), ("cuda", (1,)), ("cuda:0", (0,)), ("cuda:1", (1,))]
)
def test_the_device_in_use_is_seeded_and_given_back(cards, device, used):
    generators = (torch.default_generator, *cards)
    before = [generator.get_state() for generator in generators]
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    with pytest.raises(KeyboardInterrupt), random_state(device) as seed_torch:
        seed_torch(7)
        drawn = [torch.rand(3, generator=generator) for generator in generators]
        raise KeyboardInterrupt
    assert [torch.equal(values, expected) for values in drawn] == [True, 0 in used, 1 in used]
    inside = {0, *(number + 1 for number in used)}
    for number, (generator, state) in enumerate(zip(generators, before, strict=True)):
        assert torch.equal(generator.get_state(), state) == (
            number in inside
        )  # drawn from, and not given back


def test_seeded_weights_leave_the_devices_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    small_vit("vit_conv_48", 5)
    assert not seeded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_of_a_cuda_device_are_given_back():
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(0)
    with random_state("cuda") as seed_torch:
        seed_torch(1)
        first = torch.rand(3, device="cuda")
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
