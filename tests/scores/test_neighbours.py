"""Nearest neighbours of vectors e^l u: exact where promised, at any size; approximate indexes and
their traps.
"""

import sys

import numpy as np
import pytest

from oodlib.errors import OodlibError
from oodlib.scores.neighbours import PolarSearch


def polar(n, size=12, seed=0, spread=3.0, shift=0.0):
    """Log norms (n,) and unit vectors (n, size)."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, size))
    return shift + spread * rng.normal(size=n), u / np.linalg.norm(u, axis=1, keepdims=True)


def search(bank, **options):
    return PolarSearch(bank[0], lambda rows: bank[1][rows], **options)


def brute(query, bank, k=1):
    a, b = (np.exp(x[0])[:, None] * x[1] for x in (query, bank))
    return np.log(np.sort(np.linalg.norm(a[:, None] - b[None], axis=-1), 1)[:, k - 1])


@pytest.mark.parametrize("k", [1, 5, 700])
def test_flat_is_brute_force(k):
    query, bank = polar(90, seed=1), polar(700)
    np.testing.assert_allclose(
        search(bank)(*query, k), brute(query, bank, k), rtol=1e-10, atol=1e-12
    )


def test_flat_needs_no_faiss(monkeypatch):
    query, bank = polar(20, seed=1), polar(100)
    with_faiss = search(bank)(*query)
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.testing.assert_array_equal(search(bank)(*query), with_faiss)


@pytest.mark.parametrize("shift", [-5000.0, 5000.0])
def test_norms_that_no_float_holds(shift):
    query, bank = polar(90, seed=1), polar(700)
    moved = search((bank[0] + shift, bank[1]))(query[0] + shift, query[1])
    np.testing.assert_allclose(moved - shift, brute(query, bank), atol=1e-9)


def test_a_wide_spread_of_norms_hides_no_neighbour():
    (l, u), (lb, ub) = polar(60, seed=1, spread=200), polar(500, spread=200)
    result = search((lb, ub))(l, u)
    a, t = np.maximum(l[:, None], lb), np.exp(-np.abs(l[:, None] - lb))
    expected = (a + 0.5 * np.log((1 - t) ** 2 + 2 * t * (1 - u @ ub.T))).min(1)
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_near_duplicates_beyond_float32_are_told_apart():
    l, u = polar(400, spread=0.0)
    bank = np.repeat(u[:1], 400, 0) + 1e-9 * u  # float32 sees 400 equal vectors
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    query = bank[7:8] + 1e-12 * u[5]
    query /= np.linalg.norm(query)
    np.testing.assert_allclose(
        search((l, bank))(l[:1], query),
        np.log(np.linalg.norm(query - bank, axis=1).min()),
        rtol=1e-6,
    )


def test_a_member_is_at_distance_zero():
    bank = polar(300, shift=-300)
    assert np.isneginf(search(bank)(*bank)).all()


def test_zero_vectors_are_at_the_origin():
    bank, query = polar(50), (np.array([-np.inf]), np.zeros((1, 12)))
    np.testing.assert_allclose(search(bank)(*query), bank[0].min(), rtol=1e-12)
    both = (np.append(bank[0], -np.inf), np.vstack([bank[1], np.zeros(12)]))
    assert np.isneginf(search(both)(*query)).all()


def test_result_does_not_depend_on_the_number_of_queries_at_a_time():
    pytest.importorskip("faiss")
    query, bank = polar(600, seed=1), polar(2000)
    for index in ("flat", "ivf"):
        found = search(bank, index=index)
        whole = found(*query)
        single = np.concatenate(
            [found(query[0][i : i + 1], query[1][i : i + 1]) for i in range(30)]
        )
        np.testing.assert_allclose(single, whole[:30], rtol=1e-12, err_msg=index)


def test_ivf_that_probes_every_list_is_flat():
    pytest.importorskip("faiss")
    query, bank = polar(200, seed=1), polar(2000)
    every = search(bank, index="ivf", nlist=20, nprobe=20)
    np.testing.assert_allclose(every(*query, 3), search(bank)(*query, 3), rtol=1e-9)


def test_an_approximate_index_warns_of_norms_it_cannot_see():
    pytest.importorskip("faiss")
    log_norm, unit = polar(500)
    with pytest.warns(RuntimeWarning, match="2 of 500 norms lie more than 40 nats"):
        search((np.r_[-900.0, 900.0, log_norm[2:]], unit), index="ivf")


@pytest.mark.parametrize("index", ["ivf", "hnsw", "ivfpq"])
def test_approximate_distances_are_never_too_small_and_repeat(index):
    pytest.importorskip("faiss")
    query, bank = polar(200, seed=1, spread=0.5), polar(3000, spread=0.5)
    exact, found = search(bank)(*query), search(bank, index=index, seed=3)(*query)
    assert (found >= exact - 1e-9).all() and np.mean(found <= exact + 1e-9) > 0.5
    np.testing.assert_array_equal(search(bank, index=index, seed=3)(*query), found)


def test_short_lists_are_searched_on():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    u = np.vstack(
        [np.eye(12)[0] + 1e-3 * rng.normal(size=(97, 12)), np.eye(12)[1:4]]
    )  # three lists of one vector
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    bank = np.zeros(100), u
    found = search(bank, index="ivf", nlist=4, nprobe=1)
    short = found.index.search(u[-1:].astype(np.float32), 10)[1]
    assert (short < 0).any()  # the trap: label -1
    np.testing.assert_allclose(
        found(np.zeros(1), u[-1:], 10), search(bank)(np.zeros(1), u[-1:], 10), rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*clustering")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "ball"}, "index must be one of flat, ivf, hnsw, ivfpq, got 'ball'"),
        ({"index": "ivf", "nlist": 101}, "nprobe <= nlist <= 100 .*got nprobe 4 and nlist 101"),
        ({"index": "ivf", "nlist": 3}, "got nprobe 4 and nlist 3"),
        ({"index": "ivf", "nlist": 8, "nprobe": 0}, "got nprobe 0 and nlist 8"),
        ({"index": "ivfpq", "nlist": 4}, "needs at least 624 vectors to train its code, got 100"),
    ],
)
def test_refusals(options, message):
    pytest.importorskip("faiss")
    with pytest.raises(OodlibError, match=message):
        search(polar(100), **options)


def test_approximate_indexes_need_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(OodlibError, match="needs faiss, which is not installed"):
        search(polar(100), index="ivf")
