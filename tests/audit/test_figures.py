"""Statistics against numpy, hand-computed cases and simulation; energy against integrals known in closed form."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lfm_audit.figures import Figure, interval, separable
from lfm_audit.measure.power import Power, integral, read_meter
from lfm_audit.measure.watch import StateSample
from lfm_profiles.sensors import Reading
from lfm_runtime.errors import SettingError

numbers = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60)


@given(numbers)
def test_against_numpy(samples) -> None:
    found = Figure.of(samples)
    close = lambda value: pytest.approx(float(value), rel=1e-9, abs=1e-9)  # noqa: E731
    assert found.n == len(samples) and list(found.samples) == samples
    assert found.median == close(np.median(samples))
    assert found.mad == close(np.median(np.abs(np.array(samples) - np.median(samples))))
    assert found.mean == close(np.mean(samples))
    assert found.p90 == close(np.percentile(samples, 90))
    assert (found.p95 is None) == (len(samples) < 20)
    if found.p95 is not None:
        assert found.p95 == close(np.percentile(samples, 95))
    assert (found.min, found.max) == (min(samples), max(samples))


def test_interval_by_hand() -> None:
    """Ranks of the 95 % interval as in Conover's and the usual tables: n = 6: 1 and 6; 10: 2 and 9; 15: 4 and 12; 20: 6
    and 15; 25: 8 and 18.
    """
    for n, ranks in ((6, (1, 6)), (10, (2, 9)), (15, (4, 12)), (20, (6, 15)), (25, (8, 18))):
        assert interval(list(range(1, n + 1))) == ranks
    assert interval([1, 2, 3, 4, 5]) == (None, None)


def test_interval_covers() -> None:
    """Of a skewed distribution, whose median is known, at least 95 % of intervals hold it, up to the chance of 2,000
    trials.
    """
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = interval(sorted(rng.expovariate(1) for _ in range(12)))
        held += low <= 0.6931471805599453 <= high
    assert held / 2000 >= 0.94


def test_separable() -> None:
    a, b, c = (
        Figure.of([10, 11, 10, 11, 10, 11, 10]),
        Figure.of([12, 13, 12, 13, 12, 13, 12]),
        Figure.of([10, 13, 12, 11, 10, 13, 12]),
    )
    assert separable(a, b) and separable(b, a)
    assert not separable(a, c)
    assert not separable(Figure.of([1, 1, 1]), Figure.of([9, 9, 9])), "three samples do not tell"


def test_spread() -> None:
    assert Figure.of([100, 100, 100]).spread == 0
    assert Figure.of([90, 100, 110]).spread == pytest.approx(0.1)


def state(at: float, watt: float | None = None, counter: int | None = None) -> StateSample:
    return StateSample(at, at + 1e9, Reading({}, {}, None, None, watt, counter, 1000), 1.0)


def test_energy() -> None:
    rising = [state(t, watt=2.0 + t) for t in range(11)]  # ∫ (2 + t) dt
    assert Power().joules(rising, 1, 4) == pytest.approx(2 * 3 + (16 - 1) / 2)
    assert Power().joules(rising, 1.5, 1.75) == pytest.approx(0.25 * 3.625)
    assert Power().mean_w(rising) == pytest.approx(7.0)
    wraps = [state(0, counter=900), state(1, counter=100), state(2, counter=300)]  # of 1000: 200 and 200 more, µJ
    assert Power().joules(wraps, 0, 2) == pytest.approx(400e-6)
    assert Power().joules(wraps, 0.5, 1) == pytest.approx(100e-6)
    assert Power().joules([state(0), state(1)], 0, 1) is None
    meter = Power([(1e9 + t, 5.0) for t in range(5)])
    assert meter.joules([state(0, watt=1.0)], 1, 3) == pytest.approx(10.0)
    assert meter.joules([state(0)], 3, 6) is None, "the meter had stopped"


@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 10)), min_size=2, max_size=20), st.floats(0, 5), st.floats(0, 5)
)
def test_integral_adds_up(steps, a, b) -> None:
    times = list(np.cumsum([step for step, _ in steps]))
    values = [value for _, value in steps]
    low, middle, high = sorted((a, b, statistics.fmean((a, b))))
    assert integral(times, values, low, high) == pytest.approx(
        integral(times, values, low, middle) + integral(times, values, middle, high), abs=1e-6
    )


@pytest.mark.parametrize(
    "text", ["", "time_s,power_w\n1,2\n", "time_s,power_w\n2,1\n1,1\n", "t,w\n1,1\n2,2\n", "time_s,power_w\n1,x\n2,2\n"]
)
def test_meters_that_are_none(tmp_path, text) -> None:
    path = tmp_path / "meter.csv"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"meter\.csv"):
        read_meter(path)
