"""Squared gradient norms per tensor: equal to a loop of backward passes, for flows, other networks
and awkward ones.
"""

import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oodlib import OodlibError
from oodlib.gradients import layer_gradient_norms, per_image
from oodlib.models import Glow, dequantise

close = torch.testing.assert_close


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(model, x, value, group_size=1):
    """The plain way: one backward pass per group, read from .grad."""
    rows = []
    for group in x.split(group_size):
        model.zero_grad()
        value(model, group).sum().backward()
        rows.append(
            [
                0.0 if p.grad is None else p.grad.double().square().sum().item()
                for p in model.parameters()
            ]
        )
    model.zero_grad()
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(found, expected):
    positive = expected > 0
    assert torch.equal(found[~positive], expected[~positive])
    return ((found - expected).abs() / expected)[positive]


def moved(model, by=0.05):
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=seeded(1), dtype=p.dtype)
    return model.eval()


@pytest.fixture(scope="module")
def glow():
    model = moved(Glow((3, 8, 8), steps=2, levels=2, hidden=16, generator=seeded()))
    x = dequantise(
        torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8, generator=seeded()), generator=seeded()
    )
    return model, x


OBJECTIVES = {
    "log_prob": lambda model, x: model.log_prob(x),
    "sum_z": lambda model, x: model(x)[0][-1],
}


def ways(monkeypatch):
    """Names of the ways that really ran, in order."""
    ran = []
    for name in ("_by_layer", "_by_vmap", "_by_loop"):
        way = getattr(per_image, name)
        monkeypatch.setattr(
            per_image, name, lambda *a, way=way, name=name: ran.append(name) or way(*a)
        )
    return ran


# --- flows


@pytest.mark.oracle
@pytest.mark.parametrize("objective", ["log_prob", "sum_z"])
@pytest.mark.parametrize("group_size", [1, 5])
def test_glow_equals_the_loop(glow, objective, group_size, monkeypatch):
    model, x = glow
    ran = ways(monkeypatch)
    found = layer_gradient_norms(model, x, group_size=group_size, objective=objective, chunk_size=1)
    assert set(ran) == {"_by_layer"}
    assert (
        found.shape == (10 // group_size, len(list(model.parameters())))
        and found.dtype == torch.float64
    )
    error = relative_error(found, loop(model, x, OBJECTIVES[objective], group_size))
    assert error.median() < 1e-5 and error.max() < 1e-3


@pytest.mark.oracle
def test_three_ways_agree_in_double_precision(glow):
    model, x = (
        Glow((1, 8, 8), steps=1, levels=2, hidden=8, generator=seeded()).double(),
        glow[1][:4, :1].double(),
    )
    target = per_image._Target(moved(model), "log_prob")
    by_loop = per_image._by_loop(target, x, 2)
    for way in (per_image._by_layer, per_image._by_vmap):
        value, norms = way(target, x, 2)
        close(norms, by_loop[1], rtol=1e-9, atol=1e-12)
        close(value, model.log_prob(x).detach().view(2, 2).sum(1))


@pytest.mark.parametrize(("objective", "never"), [("log_prob", 1), ("sum_z", 3 * (2 - 1) + 3)])
def test_tensors_that_the_objective_does_not_use_are_zero(glow, objective, never):
    """log p: the top prior's weight, which sees zeros. sum z: both priors, and the last coupling
    before the split.
    """
    model, x = glow
    zero = (layer_gradient_norms(model, x, objective=objective) == 0).all(0)
    names = [n for (n, _), z in zip(model.named_parameters(), zero, strict=True) if z]
    last_coupling = [n for n in names if n.startswith("levels.0.steps.1.coupling")]
    assert len(names) == never + len(last_coupling)
    assert len(last_coupling) == (9 if objective == "sum_z" else 0)
    assert "top.conv.weight" in names


@pytest.mark.parametrize("objective", ["log_prob", "sum_z"])
def test_zero_gradients_at_the_start(objective):
    """Zero convolutions pass no gradient down: 7 tensors of every coupling are dead after actnorm
    initialisation.
    """
    steps, levels = 3, 2
    model = Glow((3, 8, 8), steps=steps, levels=levels, hidden=8, generator=seeded())
    x = dequantise(
        torch.randint(256, (256, 3, 8, 8), dtype=torch.uint8, generator=seeded()),
        generator=seeded(),
    )
    model.initialise(x)
    zero = (layer_gradient_norms(model, x[:8], objective=objective) == 0).all(0).sum()
    priors = levels - 1 + 2 if objective == "log_prob" else 5 * (levels - 1) + 3
    assert zero == 7 * steps * levels + priors


def test_a_group_of_copies_is_the_square_of_their_number(glow):
    model, x = glow
    single = layer_gradient_norms(model, x[:1])
    group = layer_gradient_norms(model, x[:1].expand(5, -1, -1, -1), group_size=5)
    close(group, 25 * single, rtol=1e-3, atol=1e-6)


def test_chunks_do_not_matter(glow):
    model, x = glow
    whole = layer_gradient_norms(model, x)
    for size in (1, 3, 10):
        close(
            layer_gradient_norms(model, x, chunk_size=size),
            whole,
            rtol=1e-3,
            atol=1e-8 * whole.max(),
        )


# --- any other module


class Net(nn.Module):
    """Every kind of layer with weights that a small vision network may hold; in-place activations
    in between.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.GroupNorm(3, 12),
            nn.Conv2d(12, 8, (3, 1), padding=(1, 0), groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 3, padding=2, dilation=2),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(6, 6, 3, padding="same"),
            nn.Conv2d(6, 5, 2),
            nn.ConvTranspose2d(5, 5, 2),
            nn.PReLU(5),
            nn.Flatten(2),
        )
        self.sequence = nn.Conv1d(5, 7, 3, stride=2, padding=1)
        self.norm, self.mlp, self.head = nn.LayerNorm(7), nn.Linear(7, 9), nn.Linear(9, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        tokens = self.norm(self.sequence(self.features(x)).mT)
        return self.head(F.gelu(self.mlp(tokens))).mean(1)


def cross_entropy(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)) % 4, reduction="none")


def uniform(model, x):
    return -model(x).log_softmax(1).mean(1)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        model = moved(Net())
    return model, torch.randn(6, 3, 9, 9, generator=seeded())


@pytest.mark.oracle
@pytest.mark.parametrize("group_size", [1, 3])
def test_a_network_that_is_no_flow_equals_the_loop(net, group_size, monkeypatch):
    model, x = net
    ran = ways(monkeypatch)
    found = layer_gradient_norms(model, x, group_size=group_size, objective=uniform)
    assert set(ran) == {"_by_layer"}
    error = relative_error(found, loop(model, x, uniform, group_size))
    assert error.median() < 1e-5 and error.max() < 1e-3
    assert (found[:, -2:] == 0).all() and (found[:, :-2] > 0).all()


def test_an_objective_may_return_the_sum(net):
    model, x = net
    summed = layer_gradient_norms(model, x, objective=lambda model, x: uniform(model, x).sum())
    close(summed, layer_gradient_norms(model, x, objective=uniform))


@pytest.mark.oracle
def test_integer_inputs(monkeypatch):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.table(x).flatten(1))

    with torch.random.fork_rng():
        model = moved(Words())
    x, ran = torch.randint(7, (5, 3), generator=seeded()), ways(monkeypatch)
    error = relative_error(
        layer_gradient_norms(model, x, objective=uniform), loop(model, x, uniform)
    )
    assert set(ran) == {"_by_layer"} and error.max() < 1e-4


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).tanh()).tanh())


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Direct(nn.Module):
    """A weight used without calling its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return F.linear(self.a(x).tanh(), self.b.weight)


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its output layer itself."""

    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x):
        return self.a(x[:, None], x[:, None] ** 2, x[:, None].exp(), need_weights=False)[0][:, 0]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [Twice, Tied, Direct, Attention])
def test_what_layers_cannot_follow_falls_back_and_is_right(kind, monkeypatch):
    with torch.random.fork_rng():
        model = moved(kind(), by=0.3)
    x, ran = torch.randn(6, 5, generator=seeded()), ways(monkeypatch)
    found = layer_gradient_norms(model, x, objective=uniform, chunk_size=4)
    assert (
        ran[0] == "_by_layer"
        and ran[-1] in ("_by_vmap", "_by_loop")
        and ran.count("_by_layer") == 1
    )
    error = relative_error(found, loop(model, x, uniform))
    assert error.max() < 1e-4


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_an_overflow_in_the_first_images_hides_no_disagreement(chunk_size):
    def objective(model, x):
        return uniform(model, x) / x.any(1)

    with torch.random.fork_rng():
        model = moved(Direct(), by=0.3)
    x = torch.randn(6, 5, generator=seeded())
    x[:2] = 0
    found = layer_gradient_norms(model, x, objective=objective, chunk_size=chunk_size)
    assert (found[:2, :3] == math.inf).all()
    assert relative_error(found[2:], loop(model, x[2:], objective)).max() < 1e-4


def test_the_loop_is_the_last_resort_and_says_so(monkeypatch):
    class Branches(Twice):
        def forward(self, x):
            return super().forward(
                x if float(x.detach().sum()) > 0 else 2 * x
            )  # vmap cannot read a value

    with torch.random.fork_rng():
        model = Branches().eval()
    x, ran = torch.randn(4, 5, generator=seeded()), ways(monkeypatch)
    with pytest.warns(
        RuntimeWarning,
        match=r"Branches needs one backward .* slow \(layer by layer: Linear is called "
        r"twice; vmap of the whole model: .*item",
    ):
        found = layer_gradient_norms(model, x, objective=uniform)
    assert set(ran) == {"_by_layer", "_by_vmap", "_by_loop"}
    assert relative_error(found, loop(model, x, uniform)).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (Twice, "vmap of the whole model; not layer by layer: Linear is called twice"),
        (
            Tied,
            "vmap of the whole model; not layer by layer: Linear shares a weight with another "
            "layer",
        ),
        (
            Direct,
            "vmap of the whole model; not layer by layer: differs from plain autograd by more "
            "than 0.1 %",
        ),
    ],
)
def test_the_way_that_was_taken_is_logged(kind, way, caplog):
    with torch.random.fork_rng():
        model = moved(kind(), by=0.3)
    with caplog.at_level(logging.INFO, logger="oodlib"):
        layer_gradient_norms(model, torch.randn(4, 5, generator=seeded()), objective=uniform)
        layer_gradient_norms(nn.Linear(5, 3), torch.ones(2, 5), objective=uniform)
    assert caplog.messages == [
        f"layer_gradient_norms of {kind.__name__}: {way}",
        "layer_gradient_norms of Linear: layer by layer",
    ]


@pytest.mark.parametrize("error", [TypeError, NameError, IndexError, OodlibError])
def test_a_programming_error_is_not_taken_for_a_limit_of_a_way(net, error):
    def objective(model, x):
        if len(x) > 1:
            raise error("in a batch")
        return uniform(model, x)

    with pytest.raises(error, match="in a batch"):
        layer_gradient_norms(*net, objective=objective)


def test_half_a_per_cent_is_a_disagreement(net, monkeypatch):
    by_layer = per_image._by_layer
    monkeypatch.setattr(
        per_image,
        "_by_layer",
        lambda *a: (lambda value, norms: (value, 1.005 * norms))(*by_layer(*a)),
    )
    ran = ways(monkeypatch)
    found = layer_gradient_norms(*net, objective=uniform)
    assert ran[-1] == "_by_vmap" and relative_error(found, loop(*net, uniform)).max() < 1e-3


# --- overflow


@pytest.mark.filterwarnings("ignore:layer_gradient_norms")  # all three slots hold the one way
@pytest.mark.parametrize("way", ["_by_layer", "_by_vmap", "_by_loop"])
def test_an_overflow_is_infinite_for_its_image_alone(way, monkeypatch):
    x = dequantise(
        torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=seeded()), generator=seeded()
    )
    x[2] *= 1e-10
    model = Glow((3, 8, 8), steps=1, levels=2, hidden=8, generator=seeded())
    with torch.no_grad():
        model.levels[0].steps[0].actnorm.logs.fill_(
            45.0
        )  # e^90 is too much for float32, 1e-20 e^90 is not
    for name in {"_by_layer", "_by_vmap", "_by_loop"} - {way}:
        monkeypatch.setattr(per_image, name, getattr(per_image, way))
    f = layer_gradient_norms(model, x)
    assert (f[[0, 1, 3]] == math.inf).all() and f[2].isfinite().all() and f[2].max() > 1e50
    close(
        f[2],
        per_image._by_loop(per_image._Target(model, "log_prob"), x[2:3], 1)[1][0],
        rtol=1e-3,
        atol=0,
    )


def test_an_overflow_in_the_first_image_does_not_slow_the_others(glow, monkeypatch):
    model, x = glow[0], glow[1].clone()
    ran = ways(monkeypatch)
    first = layer_gradient_norms(
        model, x, objective=lambda model, x: model.log_prob(x) / (x != x[0]).any((1, 2, 3))
    )
    assert set(ran) == {"_by_layer"} and (first[0, :5] == math.inf).all()
    close(first[1:], layer_gradient_norms(model, x)[1:], rtol=1e-3, atol=1e-6)


def test_an_infinite_gradient_is_infinite_for_its_tensor_alone():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return (x * self.a).abs().sqrt().sum(1) + (x * self.b).sum(1)

    f = layer_gradient_norms(Root(), torch.ones(3, 2), objective=lambda model, x: model(x))
    close(f, torch.tensor([[math.inf, 2.0]] * 3, dtype=torch.float64))


# --- manners


def test_the_model_is_left_as_it_was(net):
    model, x = net
    model.train()
    model.features[4].eval()
    model.head.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        f = layer_gradient_norms(model, x, objective=uniform)
        assert not torch.is_grad_enabled()
    assert model.training and not model.features[4].training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    names = [n for n, _ in model.named_parameters()]
    assert (f[:, names.index("head.bias")] > 0).all()  # frozen tensors are measured too
    model.head.bias.requires_grad_(True)
    model.eval()


def test_hooks_go_when_the_model_fails(net):
    model, x = net

    def fails(model, x):
        model(x)
        if len(x) > 1:
            raise RuntimeError("only for one")
        return uniform(model, x)

    close(
        layer_gradient_norms(model, x, objective=fails),
        layer_gradient_norms(model, x, objective=uniform),
        rtol=1e-3,
        atol=1e-9,
    )
    assert not any(m._forward_hooks for m in model.modules())


def test_chunks_follow_the_free_memory(monkeypatch):
    x = torch.zeros(1)
    memory = type("memory", (), {"available": 2**30})
    monkeypatch.setattr(per_image.psutil, "virtual_memory", lambda: memory)
    assert per_image._chunk_size(x, 2**23, 1) == 2**30 // (4 * 2**23 + 4)
    assert per_image._chunk_size(x, 2**40, 1) == 1
    assert per_image._chunk_size(x, 0, 1) == 64 and per_image._chunk_size(x, 0, 5) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 4}, "multiple of group_size=4 images, got 10: 2 left over"),
        ({"group_size": 0}, "at least 1"),
        ({"chunk_size": 0}, "at least 1"),
        ({"objective": "nll"}, "got 'nll'"),
        ({"objective": lambda model, x: model(x)[0][-1]}, r"\(N,\) or a sum, got \(1, 24, 2, 2\)"),
    ],
)
def test_refusals(glow, options, message):
    with pytest.raises(OodlibError, match=message):
        layer_gradient_norms(*glow, **options)


def test_no_image_and_no_likelihood_are_refused(glow, net):
    with pytest.raises(OodlibError, match="positive multiple"):
        layer_gradient_norms(glow[0], glow[1][:0])
    with pytest.raises(OodlibError, match=r"Net has no log_prob"):
        layer_gradient_norms(*net)
