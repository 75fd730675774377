"""Corrections for the number of tests: by hand, against their bounds by simulation."""

import numpy as np
import pytest

from hooked_vlm.analysis.multiple_testing import benjamini_hochberg, holm


def test_adjusted_p_by_hand() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, 0.02])


def test_what_was_not_tested_does_not_count() -> None:
    for adjust in (holm, benjamini_hochberg):
        np.testing.assert_allclose(adjust(np.array([0.02, np.nan])), [0.02, np.nan])
        assert np.isnan(adjust(np.array([np.nan]))).all() and len(adjust(np.array([]))) == 0
        assert (adjust(np.array([0.9, 0.8, 1.0])) <= 1).all()


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_families_without_an_effect_are_rejected_in_a_twentieth(adjust) -> None:
    rng = np.random.default_rng(0)
    assert np.mean([(adjust(rng.random(16)) <= 0.05).any() for _ in range(1000)]) <= 0.07
