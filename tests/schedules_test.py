"""Golden values by hand from the papers' formulas: Zhu & Gupta (2017), equation 1; Changpinyo et al. (2017), 5.3."""

import copy
import json

import keras
import numpy as np
import pytest

from keras_sparse import schedules
from keras_sparse.schedules import ConstantSparsity, Doubling, OneShot, PolynomialDecay, Schedule

# (schedule, {step: sparsity}); cubic: s_f + (s_i - s_f) (1 - progress)^3
GOLDEN = [
    pytest.param(
        PolynomialDecay(0.0, 0.8, 100, 500, frequency=100),
        # 0.8 (1 - 27/64), 0.8 (1 - 1/8), 0.8 (1 - 1/64)
        {0: 0.0, 99: 0.0, 100: 0.0, 200: 0.4625, 300: 0.7, 400: 0.7875, 500: 0.8, 10**9: 0.8},
        id="cubic",
    ),
    pytest.param(
        PolynomialDecay(0.5, 0.9, 0, 4, frequency=1),
        # 0.9 - 0.4 {1, 27/64, 1/8, 1/64, 0}
        {0: 0.5, 1: 0.73125, 2: 0.85, 3: 0.89375, 4: 0.9, 5: 0.9},
        id="cubic from 0.5",
    ),
    pytest.param(
        PolynomialDecay(0.1, 0.6, 10, 20, power=1, frequency=5),
        {9: 0.0, 10: 0.1, 15: 0.35, 17: 0.45, 20: 0.6},
        id="linear",
    ),
    pytest.param(
        PolynomialDecay(0.0, 0.64, 0, 8, power=2, frequency=2),
        {2: 0.28, 4: 0.48, 6: 0.60, 8: 0.64},  # 0.64 (1 - {9, 4, 1, 0} / 16)
        id="quadratic",
    ),
    pytest.param(PolynomialDecay(0.0, 0.5, 0, 4, power=0.5, frequency=1), {3: 0.25, 4: 0.5}, id="square root"),
    pytest.param(
        PolynomialDecay(0.875, 0.375, 2, 4, frequency=1),
        {1: 0.0, 2: 0.875, 3: 0.4375, 4: 0.375},  # 0.375 + 0.5 / 8
        id="cubic that densifies",
    ),
    pytest.param(PolynomialDecay(0.3, 0.3, 1, 9, frequency=4), {0: 0.0, 1: 0.3, 5: 0.3, 9: 0.3}, id="level"),
    pytest.param(ConstantSparsity(0.7, 5), {0: 0.0, 4: 0.0, 5: 0.7, 10**9: 0.7}, id="constant"),
    pytest.param(ConstantSparsity(0.7, 0, 10, frequency=5), {0: 0.7, 11: 0.7}, id="constant to 10"),
    pytest.param(OneShot(0.25), {0: 0.25, 1: 0.25}, id="one-shot at once"),
    pytest.param(OneShot(0.25, 3), {2: 0.0, 3: 0.25, 4: 0.25}, id="one-shot"),
    pytest.param(
        # density 0.1, 0.2, 0.4, 0.8: three doublings
        Doubling(0.1, 0.8, begin_step=10, frequency=7),
        {9: 0.0, 10: 0.9, 16: 0.9, 17: 0.8, 23: 0.8, 24: 0.6, 30: 0.6, 31: 0.2, 10**6: 0.2},
        id="doubling 0.1 -> 0.8",
    ),
    pytest.param(
        # density 0.001, 0.002, ..., 0.512, 1: ten doublings, the last one cut off
        Doubling(0.001, 1.0, frequency=100),
        {0: 0.999, 99: 0.999, 100: 0.998, 800: 0.744, 900: 0.488, 999: 0.488, 1000: 0.0},
        id="doubling 0.001 -> 1",
    ),
    pytest.param(Doubling(0.5, 0.75, frequency=4), {0: 0.5, 3: 0.5, 4: 0.25}, id="less than doubling"),
    pytest.param(Doubling(0.2, 0.2, begin_step=3), {2: 0.0, 3: 0.8, 999: 0.8}, id="no doubling"),
    pytest.param(Doubling(1.0), {0: 0.0, 999: 0.0}, id="dense from the start"),
]
SCHEDULES = [pytest.param(case.values[0], id=case.id) for case in GOLDEN]

# (schedule, all steps at which masks change among the first 40)
UPDATES = [
    (PolynomialDecay(0.0, 0.8, 4, 16, frequency=4), [4, 8, 12, 16]),
    (PolynomialDecay(0.0, 0.8, 4, 16, frequency=5), [4, 9, 14, 16]),  # the end is always an update
    (PolynomialDecay(0.0, 0.8, 0, 7, frequency=7), [0, 7]),
    (PolynomialDecay(0.0, 0.8, 3, 6, frequency=1), [3, 4, 5, 6]),
    (ConstantSparsity(0.5, 6, frequency=10), [6, 16, 26, 36]),  # no end
    (ConstantSparsity(0.5, 6, 27, frequency=10), [6, 16, 26, 27]),
    (ConstantSparsity(0.5, 6, 6, frequency=10), [6]),
    (OneShot(0.5, 9), [9]),
    (OneShot(0.5), [0]),
    (Doubling(0.1, 0.8, 2, frequency=5), [2, 7, 12, 17]),
    (Doubling(0.3, 1.0, 0, frequency=6), [0, 6, 12]),
    (Doubling(0.3, 0.3, 8, frequency=6), [8]),
]


@pytest.mark.parametrize(("schedule", "values"), GOLDEN)
def test_values(schedule, values):
    for step, sparsity in values.items():
        assert schedule(step) == pytest.approx(sparsity, abs=1e-12), step
        assert type(schedule(step)) is float


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_end_is_exact(schedule):
    """What rounds to a count of units must not be off by the last bit."""
    final = getattr(schedule, "target_sparsity", None)
    if isinstance(schedule, PolynomialDecay):
        final = schedule.get_config()["final_sparsity"]
    elif isinstance(schedule, Doubling):
        final = 1.0 - schedule.final_density
    assert schedule(schedule.final_step) == schedule.final_sparsity == final
    assert schedule(schedule.final_step + 12345) == final


@pytest.mark.parametrize(("schedule", "steps"), UPDATES, ids=repr)
def test_update_steps(schedule, steps):
    assert [t for t in range(40) if schedule.update_step(t) == t] == steps
    for step in range(40):
        assert schedule.update_step(step) == max((t for t in steps if t <= step), default=None), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_due_before_the_beginning(schedule):
    for step in range(schedule.begin_step):
        assert schedule.update_step(step) is None
        assert schedule(step) == 0.0
    assert schedule.update_step(schedule.begin_step) == schedule.begin_step


@pytest.mark.parametrize(
    ("schedule", "final_step"),
    [
        (PolynomialDecay(0.0, 0.9, 3, 50, frequency=20), 50),
        (ConstantSparsity(0.5, 7), 7),
        (ConstantSparsity(0.5, 7, 50, frequency=10), 7),  # reached at once
        (OneShot(0.5, 4), 4),
        (Doubling(0.1, 0.8, 5, frequency=10), 35),
        (Doubling(0.001, 1.0, 0, frequency=3), 30),
        (Doubling(0.25, 1.0, 0, frequency=3), 6),
        (Doubling(0.7, 0.7, 5, frequency=10), 5),
    ],
    ids=repr,
)
def test_final_step(schedule, final_step):
    assert schedule.final_step == final_step
    if final_step:
        updates = [t for t in range(final_step) if schedule.update_step(t) == t]
        assert all(schedule(t) != schedule.final_sparsity for t in updates)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_monotone_in_one_direction(schedule):
    last = min(schedule.final_step, 3000) + 2
    values = np.array([schedule(t) for t in range(schedule.begin_step, last)])
    assert ((0 <= values) & (values < 1)).all()
    steps = np.diff(values)
    assert (steps <= 0).all() if schedule.densifies else (steps >= 0).all()
    assert schedule.densifies == (values[-1] < values[0])


def test_doubling_counts_powers_of_two_exactly():
    """No doubling more or less for the last bit of a quotient."""
    for doublings in range(1, 40):
        for final in (0.1, 0.001, 1 / 3, 0.7, 0.8, 0.9):
            assert Doubling(final / 2**doublings, final).final_step == 100 * doublings
            assert Doubling(final / 2**doublings, final * 1.01).final_step == 100 * (doublings + 1)
    for initial in range(1, 100):  # as a user writes them: 0.07 -> 0.56
        for doublings in range(7):
            if initial * 2**doublings <= 100:
                schedule = Doubling(initial / 100, initial * 2**doublings / 100)
                assert schedule.final_step == 100 * doublings, schedule
    assert (1 - 0.9) * 8 < 0.8  # as one who thinks in sparsities writes them: not quite a tenth
    assert Doubling(1 - 0.9, 0.8).final_step == 300
    assert Doubling(1 - 0.999, 1 - 0.936).final_step == 600


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pure(schedule):
    """A schedule holds no state: order and number of calls change nothing."""
    config = copy.deepcopy(schedule.get_config())
    steps = [*range(20), 500, 1000]
    forward = [(schedule(t), schedule.update_step(t)) for t in steps]
    backward = [(schedule(t), schedule.update_step(t)) for t in reversed(steps)]
    assert forward == backward[::-1]
    assert schedule.get_config() == config


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_config_round_trip(schedule):
    """Through JSON, as in a file, with nothing but the package's registration."""
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    twin = keras.saving.deserialize_keras_object(config)
    assert twin is not schedule and type(twin) is type(schedule)
    assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)
    assert schedules.get(config) == schedule and schedules.get(schedule) is schedule
    steps = [*range(40), 499, 500, 1000]
    assert [twin(t) for t in steps] == [schedule(t) for t in steps]
    assert [twin.update_step(t) for t in steps] == [schedule.update_step(t) for t in steps]
    assert twin.final_step == schedule.final_step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_argument_is_in_the_config(schedule):
    names = type(schedule).__init__.__code__.co_varnames[1:][: len(schedule.get_config())]
    assert set(schedule.get_config()) == set(names)


def test_equality():
    assert ConstantSparsity(0.5, 0) != OneShot(0.5, 0)
    assert ConstantSparsity(0.5, 0) != ConstantSparsity(0.5, 1)
    assert OneShot(0.5) != 0.5
    assert len({OneShot(0.5), OneShot(0.5), OneShot(0.6)}) == 2


def test_numpy_arguments_become_plain_numbers():
    schedule = PolynomialDecay(np.float32(0.25), np.float64(0.5), np.int64(1), np.int32(5), 3, np.int16(2))
    assert {type(value) for value in schedule.get_config().values()} == {float, int}
    assert schedule == PolynomialDecay(0.25, 0.5, 1, 5, 3, 2)


def test_a_subclass_needs_only_call():
    class Sine(Schedule):
        def __call__(self, step):
            return 0.5 * np.sin(step / 10)

    schedule = Sine(0, 10, 5)
    assert schedules.get(schedule) is schedule
    assert [schedule.update_step(t) for t in (0, 7, 12)] == [0, 5, 10]
    assert schedule.final_sparsity == pytest.approx(0.5 * np.sin(1)) and not schedule.densifies
    with pytest.raises(NotImplementedError, match="Schedule must define `__call__"):
        Schedule(0, 10, 5)(3)
