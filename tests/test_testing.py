"""The error metrics: what must pass does, and what a mean over everything hides does not."""

import numpy as np
import pytest
from pairwise import cover

from jax_qgemm.testing import check_product, nmse, product_limit

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((64, 96)), RNG.standard_normal((96, 256))
OUT = X @ W
LIMIT = product_limit("float32")


def test_nmse():
    assert nmse([3.0, 4.0], [3.0, 4.0]) == 0
    assert nmse([3.0, 4.5], [3.0, 4.0]) == 0.25 / 25
    assert nmse(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert nmse([0.0], [0.0]) == 0
    assert nmse([1e-30], [0.0]) == np.inf
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        nmse([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nmse_of_values_that_are_not_finite(bad):
    assert not nmse([1.0, bad], [1.0, 2.0]) <= 1e30
    assert not nmse([1.0, 2.0], [1.0, bad]) <= 1e30
    assert not nmse([1.0, bad], [1.0, bad]) <= 1e30


def test_limits():
    assert product_limit("float16") == product_limit(np.float32) == 5e-7
    assert product_limit("bfloat16") == product_limit("float32", "bfloat16") == 2e-5
    assert product_limit("float16", minimums=True) == 1e-6
    assert product_limit("bfloat16", minimums=True) == 5e-5
    assert product_limit("float32", highest=True) == product_limit("float32", minimums=True, highest=True) == 1e-11
    assert product_limit("float32", "float16", highest=True) == 5e-7


def test_right_products_pass():
    check_product(OUT, X, W, 1e-30)
    check_product(OUT.astype(np.float16), X, W, product_limit("float16"))
    check_product(np.zeros((0, 256)), X[:0], W, LIMIT)
    check_product(OUT * 0, X, W * 0, LIMIT)
    check_product(np.stack([OUT, OUT]), np.stack([X, X]), W, LIMIT)


@pytest.mark.parametrize(
    "damage",
    [np.s_[:, 5], np.s_[63, :], np.s_[:, 255], np.s_[17:33, 100:116], np.s_[3, 3]],
    ids=["a column", "a row", "the last column", "a tile", "an element"],
)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_wrong_parts_fail(damage, value):
    out = OUT.copy()
    out[damage] = value
    with pytest.raises(AssertionError, match=r"of the whole output exceeds|are off"):
        check_product(out, X, W, LIMIT)


def test_a_small_column_is_not_hidden_by_the_whole():
    """One column in a thousand times smaller weights: the mean over everything does not see it."""
    w = W.copy()
    w[:, 7] *= 1e-4
    out = X @ w
    out[:, 7] = 0
    assert nmse(out, X @ w) < LIMIT
    with pytest.raises(AssertionError, match=r"1 of 256 columns are off; column \(7,\)"):
        check_product(out, X, w, LIMIT)


def test_a_slice_without_energy_must_be_zero():
    w = W.copy()
    w[:, 9] = 0
    out = X @ w
    check_product(out, X, w, LIMIT)
    out[4, 9] = 1e-6
    with pytest.raises(AssertionError, match=r"column \(9,\)"):
        check_product(out, X, w, LIMIT)


def test_a_wrong_shape_fails():
    with pytest.raises(AssertionError, match=r"\(64, 255\), expected \(64, 256\)"):
        check_product(OUT[:, :-1], X, W, LIMIT)


def test_cover_has_every_pair():
    factors = {"a": range(7), "b": "xyz", "c": (True, False), "d": range(4)}
    rows = cover(factors, seed=0)
    for first in factors:
        for second in factors:
            pairs = {(row[first], row[second]) for row in rows}
            expected = len(factors[first]) * (1 if first == second else len(factors[second]))
            assert len(pairs) == expected
    assert len(rows) <= 2 * 7 * 4
    assert rows == cover(factors, seed=0)
    assert len(cover(factors, seed=0, count=100)) == 100
