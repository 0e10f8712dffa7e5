"""KL matching: templates and divergences against pytorch-ood and SciPy, certain outputs, and bad
shapes.
"""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

import oodlib
from oodlib import FeatureBank, OodlibError
from oodlib.scores import kl_matching


@pytest.mark.oracle
def test_pytorch_ood_gives_the_same(blobs):
    detectors = pytest.importorskip("pytorch_ood.detector")
    train, test, _ = blobs
    theirs = detectors.KLMatching(None).fit_logits(torch.from_numpy(train.logits))
    expected = theirs.predict_logits(torch.from_numpy(test.logits)).numpy()
    np.testing.assert_allclose(
        oodlib.create("kl_matching").fit(train).score(test), expected, rtol=1e-6, atol=1e-9
    )


def test_by_loops(blobs):
    train, _, ood = blobs
    p, q = softmax(train.logits.astype(float), 1), softmax(ood.logits.astype(float), 1)
    templates = [p[p.argmax(1) == k].mean(0) for k in range(4)]
    expected = [min(entropy(row, template) for template in templates) for row in q]
    np.testing.assert_allclose(
        oodlib.create("kl_matching").fit(train).score(ood), expected, rtol=1e-6, atol=1e-9
    )


def test_a_class_that_is_never_predicted_has_no_template(blobs):
    train, test, _ = blobs
    detector = oodlib.create("kl_matching").fit(train.subset(train.logits.argmax(1) != 2))
    assert detector.log_templates_.shape == (3, 4) and np.isfinite(detector.score(test)).all()


def test_certain_outputs_stay_finite():
    """Probabilities of exactly 0 in float64, in the templates and in the scored images."""
    features = np.array([[2000.0, 0], [0, 2000.0]])
    bank = FeatureBank.from_arrays(features, weight=np.eye(2))
    scores = (
        oodlib.create("kl_matching")
        .fit(bank)
        .score(FeatureBank.from_arrays([[2000.0, 0.0], [0.0, 0.0]], weight=np.eye(2)))
    )
    np.testing.assert_allclose(scores, [0, 1000 - np.log(2)], rtol=1e-12, atol=1e-12)


def test_templates_of_another_model_are_refused(batch):
    with pytest.raises(OodlibError, match="need the same C"):
        kl_matching(batch[3], log_templates=np.zeros((5, 4)))
