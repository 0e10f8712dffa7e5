"""Training of flows: what is computed, exact resume after a kill, damaged or foreign states,
overflow, bad input.
"""

import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from oodlib import OodlibError
from oodlib import files as files_module
from oodlib.files import sha256
from oodlib.models.glow import Glow, quantise
from oodlib.models.training import flow as flow_training
from oodlib.models.training import loop
from oodlib.models.training.augment import hash_seed
from oodlib.models.training.flow import FlowRecipe, mean_bits_per_dim, snapshot_path, train_flow
from oodlib.models.training.loop import load_state

STEPS = (0, 4, 13)  # 10 steps are an epoch
RECIPE = {
    "snapshots": STEPS,
    "batch_size": 32,
    "lr": 0.01,
    "warmup": 4,
    "n_initialise": 256,
    "flip": "random",
    "shift": 1,
}
NO_CLIP = 1e30


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(*numbers))


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Slopes of random brightness with a little noise, (n, 1, 8, 8) uint8."""
    base = torch.randint(0, 100, (n, 1, 1, 1), generator=seeded(seed, 0)) + 12 * torch.arange(8)
    return (base + torch.randint(0, 20, (n, 1, 8, 8), generator=seeded(seed, 1))).to(torch.uint8)


IMAGES, VALIDATION = pictures(320), pictures(40, seed=1)


def network(**options) -> Glow:
    return Glow(
        (1, 8, 8), **{"steps": 2, "levels": 2, "hidden": 8, "generator": seeded(0)} | options
    )


def run(folder, *, model=None, images=IMAGES, validation=VALIDATION, seed=0, **recipe):
    model = model or network()
    history = train_flow(
        model,
        images,
        validation,
        FlowRecipe(**RECIPE | recipe),
        seed=seed,
        folder=folder,
        progress=False,
    )
    return model, history


def untimed(history) -> str:
    """As text, where NaN equals NaN."""
    return repr(
        [{name: value for name, value in row.items() if name != "seconds"} for row in history]
    )


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in files(folder).items() if name.endswith(".safetensors")}


def assert_equal(model: Glow, state) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@contextmanager
def before_each_step(hook):
    """Call ``hook(number, optimiser)`` before every step of an optimiser, numbers from 1."""
    count = iter(range(1, 10**6))
    handle = register_optimizer_step_pre_hook(
        lambda optimiser, args, kwargs: hook(next(count), optimiser)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder, model and history of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(whole[0], tmp_path / "finished"))


# --- what is computed


def test_it_learns(tmp_path):
    _, (start, end) = run(tmp_path, snapshots=(0, 40))
    assert end["validation_bpd"] < start["validation_bpd"] - 0.2
    assert end["epoch"] == 4 and end["step"] == 40 and math.isnan(start["train_bpd"])


@pytest.mark.oracle
@pytest.mark.parametrize("bits", [8, 3])
def test_losses_and_first_step_follow_the_definition(tmp_path, bits):
    """Couplings and priors start at constants, so log p is a standard normal's; Adamax's first step
    is lr sign(g).
    """
    model, history = run(
        tmp_path,
        model=network(bits=bits),
        snapshots=(0, 1),
        flip="none",
        shift=0,
        warmup=0,
        clip=NO_CLIP,
        weight_decay=0.0,
    )
    start = network()
    start.load_state_dict(load_file(snapshot_path(tmp_path, 0)))

    def loss(images, generator):
        x = ((images >> (8 - bits)) + torch.rand(images.shape, generator=generator)) / 2**bits - 0.5
        latents, log_det = start(x)
        z = torch.cat([z.flatten(1) for z in latents], 1)
        log_p = torch.distributions.Normal(0, 1).log_prob(z).sum(1) + log_det
        return (bits - log_p / (64 * math.log(2))).mean()

    assert history[0]["validation_bpd"] == pytest.approx(
        loss(VALIDATION, seeded(0, 2, 0)).item(), rel=1e-5
    )
    first = loss(IMAGES[torch.randperm(320, generator=seeded(0, 0, 0))[:32]], seeded(0, 3, 0))
    assert history[1]["train_bpd"] == pytest.approx(first.item(), rel=1e-5)
    first.backward()
    p, moved = start.levels[0].steps[0].actnorm.logs, model.levels[0].steps[0].actnorm.logs
    torch.testing.assert_close(
        moved.detach(), (p - 0.01 * p.grad.sign()).detach(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("augmented", [False, True])
def test_every_step_draws_noise_and_augmentation_anew(tmp_path, monkeypatch, augmented):
    seen, log_prob = [], Glow.log_prob
    monkeypatch.setattr(Glow, "log_prob", lambda model, x: seen.append(x) or log_prob(model, x))
    same = IMAGES[:1].expand(320, -1, -1, -1)
    run(
        tmp_path,
        images=same,
        snapshots=(0, 3),
        **({} if augmented else {"flip": "none", "shift": 0}),
    )
    batches = [x for x in seen if len(x) == 32]
    pixels = [quantise(x) for x in batches]
    drawn = pixels if augmented else batches
    assert len(batches) == 3 and not any(torch.equal(a, b) for a, b in combinations(drawn, 2))
    assert augmented or all(torch.equal(p, same[:32]) for p in pixels)


def test_warm_up_goes_step_by_step(tmp_path):
    rates = []
    with before_each_step(lambda _, optimiser: rates.append(optimiser.param_groups[0]["lr"])):
        run(tmp_path, snapshots=(0, 6))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_cosine_decay_ends_near_zero_and_a_longer_run_is_another(tmp_path):
    rates = []
    with before_each_step(lambda _, optimiser: rates.append(optimiser.param_groups[0]["lr"])):
        run(tmp_path, snapshots=(0, 4), warmup=2, decay="cosine")
    assert rates == pytest.approx(
        [0.005, 0.01 * (1 + 0.5**0.5) / 2, 0.005, 0.01 * (1 - 0.5**0.5) / 2]
    )
    with pytest.raises(OodlibError, match="belongs to another run"):
        run(tmp_path, snapshots=(0, 4, 8), warmup=2, decay="cosine")


def test_gradients_are_clipped(tmp_path):
    norms = {}

    def measure(number, optimiser):
        grads = [
            p.grad.flatten()
            for group in optimiser.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norms[clip] = torch.cat(grads).norm().item()

    for clip in (0.01, NO_CLIP):
        with before_each_step(measure):
            run(tmp_path / str(clip), snapshots=(0, 1), clip=clip)
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3) and norms[NO_CLIP] > 0.02


def test_validation_does_not_depend_on_the_batch_size_but_on_the_seed(whole):
    value = mean_bits_per_dim(whole[1], VALIDATION, seed=5)
    assert mean_bits_per_dim(whole[1], VALIDATION, seed=5, batch_size=7) == pytest.approx(
        value, rel=1e-6
    )
    assert mean_bits_per_dim(whole[1], VALIDATION, seed=6) != pytest.approx(value, rel=1e-5)


def test_every_snapshot_has_a_record_and_is_the_state_of_its_step(whole):
    folder, model, history = whole
    assert sorted(files(folder)) == sorted(
        ["resume.pt", *(f"step_{s:07d}.{kind}" for s in STEPS for kind in ("json", "safetensors"))]
    )
    for row in history:
        path = snapshot_path(folder, row["step"])
        record = json.loads(path.with_suffix(".json").read_text())
        assert (
            record["sha256"] == sha256(path) and record["validation_bpd"] == row["validation_bpd"]
        )
        at = network()
        at.load_state_dict(load_file(path))
        assert mean_bits_per_dim(at, VALIDATION, seed=0) == row["validation_bpd"]
    assert_equal(model, load_file(snapshot_path(folder, STEPS[-1])))
    assert not model.training


def test_seed_decides_the_result_and_the_global_generator_is_left_alone(whole, tmp_path):
    before = torch.random.get_rng_state()
    torch.manual_seed(123)
    run(tmp_path / "again")
    drawn = torch.rand(1)
    run(tmp_path / "other", seed=1)
    torch.manual_seed(123)
    assert torch.equal(torch.rand(1), drawn)
    torch.random.set_rng_state(before)
    again, other, first = (weights(f) for f in (tmp_path / "again", tmp_path / "other", whole[0]))
    assert again == first and not set(other.values()) & set(first.values())


# --- resume


def test_a_finished_run_trains_nothing_and_gives_the_same(whole, finished):
    before, steps = files(finished), []
    with before_each_step(lambda number, _: steps.append(number)):
        model, history = run(finished, model=network(generator=seeded(9)))
    assert not steps and files(finished) == before
    assert history == whole[2] or repr(history) == repr(whole[2])
    assert_equal(model, whole[1].state_dict())


def test_a_finished_run_made_longer_equals_a_long_one(whole, tmp_path):
    run(tmp_path, snapshots=STEPS[:2])
    _, history = run(tmp_path)
    assert weights(tmp_path) == weights(whole[0]) and untimed(history) == untimed(whole[2])
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)


def test_a_shorter_run_in_the_folder_of_a_longer_one_ends_where_asked(whole, finished):
    model, history = run(finished, snapshots=STEPS[:2])
    assert untimed(history) == untimed(whole[2][:2])
    assert_equal(model, load_file(snapshot_path(finished, STEPS[1])))
    snapshot_path(finished, STEPS[1]).write_bytes(b"damaged")
    with pytest.raises(OodlibError, match=r"step_0000004\.safetensors is missing or damaged"):
        run(finished, snapshots=STEPS[:2])


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place", [(flow_training, "save_file"), (loop, "save_state"), (files_module, "write_json")]
)
def test_an_interruption_while_a_snapshot_is_written_does_no_harm(
    whole, tmp_path, monkeypatch, place
):
    run(tmp_path, snapshots=STEPS[:2])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*place, interrupt)
        run(tmp_path)
    _, history = run(tmp_path)
    assert weights(tmp_path) == weights(whole[0]) and untimed(history) == untimed(whole[2])


def test_a_run_stopped_before_its_first_state_starts_again(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_state", interrupt)
        run(tmp_path)
    assert sorted(weights(tmp_path)) == ["step_0000000.safetensors"]
    run(tmp_path)
    assert weights(tmp_path) == weights(whole[0])


def run_until_killed(folder: str, step: int) -> None:
    """What the process below does."""
    loop.SAVE_EVERY = -1.0  # a state before every step
    with before_each_step(
        lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == step else None
    ):
        run(Path(folder))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_to_the_same_weights(whole, tmp_path, killed_process):
    killed_process("test_training_flow", f"run_until_killed({str(tmp_path)!r}, 7)")
    assert load_state(tmp_path / "resume.pt")["step"] == 6
    steps = []
    with before_each_step(lambda number, _: steps.append(number)):
        model, history = run(tmp_path)
    assert len(steps) == STEPS[-1] - 6
    assert weights(tmp_path) == weights(whole[0]) and untimed(history) == untimed(whole[2])
    assert_equal(model, whole[1].state_dict())


def flipped(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda d: d[:-1], lambda d: d[:32], lambda d: d[:10], lambda d: b""],
    ids=["flipped", "truncated", "checksum only", "10 bytes", "empty"],
)
def test_a_damaged_state_is_named_and_nothing_changed(finished, damage):
    resume = finished / "resume.pt"
    resume.write_bytes(damage(resume.read_bytes()))
    before = files(finished)
    with pytest.raises(OodlibError, match=r"resume\.pt is damaged"):
        run(finished)
    assert files(finished) == before


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.02}, {"seed": 1}, {"model": network(hidden=12)}, {"images": pictures(320, 7)}],
    ids=["recipe", "seed", "network", "images"],
)
def test_the_state_of_another_run_is_refused(finished, change):
    before = files(finished)
    with pytest.raises(OodlibError, match=r"resume\.pt belongs to another run"):
        run(finished, **change)
    assert files(finished) == before


@pytest.mark.parametrize("snapshots", [(0, 5), (0, 5, 13), (0, 4, 20), (0, 13), (0, 4, 10, 13)])
def test_other_snapshots_than_those_kept_are_refused(finished, snapshots):
    with pytest.raises(
        OodlibError, match=r"run 13 steps and saved \[0, 4.*Ask for those saved and later ones"
    ):
        run(finished, snapshots=snapshots)


# --- overflow


@pytest.mark.parametrize(
    ("snapshots", "message"),
    [
        ((0, 5), r"step 2 \(loss inf, gradient norm nan\) overflowed"),
        ((0, 1, 5), "validation images after step 1, inf, overflowed"),
    ],
)
def test_an_overflow_stops_the_run_and_keeps_what_was_good(
    tmp_path, monkeypatch, snapshots, message
):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    with pytest.raises(
        OodlibError, match=rf"{message}.*Lower lr.*last good weights are those after step 0"
    ):
        run(tmp_path, snapshots=snapshots, lr=1e3, warmup=0, clip=NO_CLIP)
    assert sorted(files(tmp_path)) == ["resume.pt", "step_0000000.json", "step_0000000.safetensors"]
    for state in (
        load_file(snapshot_path(tmp_path, 0)),
        load_state(tmp_path / "resume.pt")["parts"]["model"],
    ):
        model = network()
        model.load_state_dict(state)
        assert math.isfinite(mean_bits_per_dim(model, VALIDATION, seed=0))


def test_an_overflow_before_anything_was_kept_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(flow_training, "mean_bits_per_dim", lambda *a, **k: math.inf)
    with pytest.raises(OodlibError, match=r"after step 0.*no usable weights"):
        run(tmp_path)
    assert not files(tmp_path)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": IMAGES[:31]}, "at least 32 images, got 31"),
        ({"validation": VALIDATION[:0]}, "at least 1 validation, got 0"),
        (
            {"images": IMAGES[..., :6]},
            r"images must be uint8 \(n, 1, 8, 8\) .* got Tensor \(320, 1, 8, 6\)",
        ),
        ({"images": IMAGES.repeat(1, 3, 1, 1)}, r"got Tensor \(320, 3, 8, 8\)"),
        ({"images": IMAGES[:, 0]}, r"got Tensor \(320, 8, 8\)"),
        (
            {"images": IMAGES / 255},
            r"images must .* got Tensor \(320, 1, 8, 8\) torch.float32 on cpu.*255 \* x",
        ),
        ({"images": IMAGES.numpy()}, "must be uint8 .* got ndarray"),
        ({"validation": VALIDATION / 255}, "validation must .* torch.float32"),
        ({"validation": VALIDATION[..., :6]}, "validation must"),
        ({"images": torch.full_like(IMAGES, 7)}, "needs images that vary"),
        ({"shift": 8}, r"shift must lie in \[0, 8\).*got 8"),
        ({"shift": -1}, r"shift must lie in \[0, 8\).*got -1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(OodlibError, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("snapshots", [(), (0,), (5, 10), (0, 5, 5), (0, 9, 4), (-1, 0, 5)])
def test_snapshots_must_rise_from_zero(snapshots):
    with pytest.raises(OodlibError, match="snapshots must rise from 0"):
        FlowRecipe(snapshots)


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 0},
        {"n_initialise": 0},
        {"lr": 0.0},
        {"clip": math.inf},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"flip": "alternating"},
    ],
)
def test_a_recipe_out_of_range_is_refused(option):
    with pytest.raises(OodlibError, match=next(iter(option))):
        FlowRecipe(STEPS, **option)
