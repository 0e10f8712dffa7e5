"""Where the layer-wise density comes from."""

import numpy as np
import pytest
from scipy.stats import kstest

from oodlib import metrics
from oodlib.scores import LayerwiseDensity
from oodlib.studies import flows
from oodlib.studies.flows import Anatomy


@pytest.fixture(scope="module")
def part() -> Anatomy:
    rng = np.random.default_rng(0)
    tensors = np.array(["levels.0.steps.0.actnorm.bias", "levels.1.steps.0.mix.lower", "top.bias"])
    norms = {k: np.exp(rng.normal(size=(200, 3))) for k in ("fit", "id", "ood")}
    norms["ood"][:, 1] *= 100
    return Anatomy(
        levels=2, tensors=tensors, norms=norms, density=LayerwiseDensity().fit(norms["fit"])
    )


def test_parts_are_the_density_of_some_tensors(part):
    table = part.parts().set_index("part")
    assert list(table.index) == ["level 1", "level 2", "actnorm", "1x1 convolution", "prior"]
    assert table.AUROC["level 2"] == table.AUROC["1x1 convolution"] > 95 > 60 > table.AUROC["prior"]


def test_full_covariance_agrees_where_tensors_are_independent(part):
    row = part.full_covariance().iloc[0]
    known = metrics.auroc(*(part.density.score(part.norms[k]) for k in ("id", "ood")))
    assert row.independent == 100 * known
    assert row["full covariance"] == pytest.approx(100 * known, abs=3)


def test_distances_are_those_of_kolmogorov_and_smirnov(part):
    u, (mean, sd) = part.u("id"), part.gaussians
    known = [kstest(u[:, i], "norm", (mean[i], sd[i])).statistic for i in range(3)]
    np.testing.assert_allclose(flows.kolmogorov(u, mean, sd), known)
    assert part.chi_squared().shape == (3,) and flows.mean_correlation(u) < 0.2


def test_an_overflow_is_left_out_of_u(part):
    norms = part.norms | {"id": part.norms["id"].copy()}
    norms["id"][0, 0] = np.inf
    spoilt = Anatomy(levels=2, tensors=part.tensors, norms=norms, density=part.density)
    assert len(spoilt.u("id")) == 199 and np.isfinite(spoilt.full_covariance().iloc[0, 1])
