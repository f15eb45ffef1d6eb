import pytest
from scipy.stats import binomtest, norm, sem

from emu3_megatron.samples.quickstart.statistics import mean_interval, wilson_interval


@pytest.mark.parametrize(("right", "total"), [(0, 5), (3, 7), (64, 64), (219, 256), (1, 1000)])
def test_equals_scipy(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_no_trials_say_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_interval_of_a_mean_equals_scipy() -> None:
    values = [0.0, 1.0, -1.0, 1.0, 0.5]
    mean, low, high = mean_interval(values)
    assert (low, high) == pytest.approx(norm.interval(0.95, loc=mean, scale=sem(values)), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])
