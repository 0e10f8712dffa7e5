"""GEN: the formula against pytorch-ood and by hand, what makes it exact, and bad parameters."""

import numpy as np
import pytest
import torch

from oodlib import OodlibError
from oodlib.scores import gen


@pytest.mark.oracle
@pytest.mark.parametrize("top", [1, 3, 5])
def test_pytorch_ood_gives_the_same_mean(batch, top):
    detectors = pytest.importorskip("pytorch_ood.detector")
    z = batch[3] / 4  # theirs cuts probabilities off below 1e-7
    torch.testing.assert_close(
        gen(z, gamma=0.3, top=top) / top, detectors.GEN.score(z, gamma=0.3, M=top)
    )


def test_by_hand():
    z = np.log([[0.5, 0.3, 0.2]])
    terms = np.array([0.5 * 0.5, 0.3 * 0.7, 0.2 * 0.8]) ** 0.1
    np.testing.assert_allclose(gen(z, top=2), [terms[:2].sum()], rtol=1e-12)
    np.testing.assert_allclose(
        gen(z), [terms.sum()], rtol=1e-12
    )  # fewer than 100 classes: all of them


def test_larger_where_the_network_is_less_certain():
    assert (
        np.diff(
            gen(np.array([[300.0, 0, 0], [200.0, 0, 0], [40.0, 0, 0], [5.0, 0, 0], [0.0, 0, 0]]))
        )
        > 0
    ).all()


def test_a_shift_of_the_logits_changes_nothing(batch):
    torch.testing.assert_close(gen(batch[3] + 7), gen(batch[3]))


@pytest.mark.parametrize("params", [{"gamma": 0}, {"gamma": 1.5}, {"top": 0}])
def test_refusals(batch, params):
    with pytest.raises(OodlibError, match=r"must lie in [\(\[]"):
        gen(batch[3], **params)
