import keras
import numpy as np
import pytest

from keras_sparse import allocation as allocations
from keras_sparse.allocation import (
    Candidate,
    ErdosRenyi,
    ErdosRenyiKernel,
    Global,
    LayerwiseConstant,
    Uniform,
    units_to_keep,
)
from keras_sparse.schedules import ConstantSparsity, Doubling, OneShot, PolynomialDecay


def candidates(sizes, unit_sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [Candidate(generator.random(size), unit) for size, unit in zip(sizes, unit_sizes)]


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9, 0.999])
def test_uniform_meets_the_target_in_every_layer(sparsity):
    sizes = (1, 7, 128, 1001)
    for size, keep in zip(sizes, Uniform().allocate(sparsity, candidates(sizes, (1, 9, 1, 25)))):
        assert 1 <= keep <= size
        assert abs(keep - size * (1 - sparsity)) <= 0.5 or keep == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("unit_sizes", [(1, 1, 1), (9, 1, 25)])
def test_global_meets_the_target_to_one_unit(sparsity, unit_sizes):
    layers = candidates((301, 77, 400), unit_sizes)
    keep = Global().allocate(sparsity, layers)
    total = sum(layer.scores.size * layer.unit_size for layer in layers)
    kept = sum(k * layer.unit_size for k, layer in zip(keep, layers))
    assert abs(kept - (1 - sparsity) * total) <= max(unit_sizes)


def test_global_takes_the_highest_scores_of_the_network():
    layers = candidates((50, 60), (1, 1))
    layers[1].scores += 0.1
    keep = Global().allocate(0.8, layers)
    everything = np.concatenate([layer.scores for layer in layers])
    threshold = np.sort(everything)[-22]
    assert keep == [int((layer.scores >= threshold).sum()) for layer in layers]


def test_global_leaves_every_layer_its_best_unit():
    layers = [Candidate(np.zeros(10), 1), Candidate(np.ones(90), 1)]
    assert Global().allocate(0.5, layers) == [1, 49]
    assert Global().allocate(0.99, layers) == [1, 1]


def test_global_breaks_ties_in_the_order_of_the_layers():
    layers = [Candidate(np.ones(10), 1), Candidate(np.ones(10), 1)]
    assert Global().allocate(0.5, layers) == [9, 1]


def test_global_never_chooses_excluded_units_first():
    layers = [Candidate(np.array([-np.inf, -np.inf, 0.1]), 1), Candidate(np.array([0.2, 0.3, 0.4]), 1)]
    assert Global().allocate(1 / 3, layers) == [1, 3]


def test_global_refuses_nan():
    with pytest.raises(ValueError, match="`scores` must hold no NaN"):
        Global().allocate(0.5, [Candidate(np.array([1.0, np.nan]), 1)])


def test_no_candidates():
    assert Uniform().allocate(0.5, []) == [] and Global().allocate(0.5, []) == []


def test_units_to_keep_rounds_and_never_reaches_zero():
    assert [units_to_keep(10, s) for s in (0.0, 0.04, 0.06, 0.94, 0.99)] == [10, 10, 9, 1, 1]


@pytest.mark.parametrize("name", allocations.names())
def test_serialisation(name):
    allocation = allocations.get(name)
    assert type(allocations.get(keras.saving.serialize_keras_object(allocation))) is type(allocation)


def test_global_leaves_what_is_in_place():
    layers = candidates((40, 30), (9, 25))
    keep = Global().allocate(0.6, layers)
    # As a callback hands them in again: pruned units rank last, and the scores have moved.
    for layer, count in zip(layers, keep):
        pruned = layer.scores < np.sort(layer.scores)[-count]
        layer.scores = np.where(pruned, -np.inf, np.random.default_rng(count).random(layer.scores.shape))
    assert Global().allocate(0.6, layers) == keep


def test_global_counts_units_of_several_sizes():
    """Edge tiles of blocks hold fewer weights than the others."""
    generator = np.random.default_rng(4)
    sizes = [np.array([[16, 4], [8, 2]]), np.array([[9]])]
    layers = [Candidate(generator.random(size.shape), size) for size in sizes]
    for sparsity in (0.0, 0.3, 0.6):
        keep = Global().allocate(sparsity, layers)
        order = np.argsort(-layers[0].scores.ravel())
        kept = sizes[0].ravel()[order[: keep[0]]].sum() + (9 if keep[1] else 0)
        assert abs(kept - (1 - sparsity) * 39) <= 8


def test_global_keeps_preferred_units_before_all_others():
    first = Candidate(np.array([0.9, 0.8, 0.7, 0.6]), 1, preferred=np.array([True, False, False, True]))
    second = Candidate(np.array([0.65, 0.1]), 1)  # without a rule of its own
    assert Global().allocate(0.5, [first, second]) == [2, 1]
    assert Global().allocate(1 / 3, [first, second]) == [2, 2]
    assert Global().allocate(1 / 6, [first, second]) == [3, 2]


# Layer after layer.


def test_layerwise_constant_is_the_schedule_in_each_layers_part():
    layers, allocation = candidates((1000, 1000, 1000), (1, 1, 1)), LayerwiseConstant()
    schedule = PolynomialDecay(0.2, 0.8, 100, 700, frequency=50)
    for step in range(100, 900, 50):
        expected = []
        for part in range(3):
            progress = min((step - (100 + 200 * part)) / 200, 1)
            expected.append(1000 if progress < 0 else round(1000 * (0.2 + 0.6 * (1 - progress) ** 3)))
        assert allocation.allocate_at(schedule, step, layers) == expected, step
    constant = ConstantSparsity(0.75, 0, 30, frequency=5)
    steps = [allocation.allocate_at(constant, step, layers) for step in (0, 5, 10, 15, 20, 30, 40)]
    assert steps == [[250, 1000, 1000]] * 2 + [[250, 250, 1000]] * 2 + [[250] * 3] * 3


def test_layerwise_constant_needs_an_interval():
    for schedule in (OneShot(0.5, 3), ConstantSparsity(0.5, 3)):
        with pytest.raises(ValueError, match="`schedule` must have an `end_step` after its `begin_step`"):
            LayerwiseConstant().check(schedule)
    with pytest.raises(ValueError, match="`schedule` must not lower the sparsity"):
        LayerwiseConstant().check(Doubling(0.25))


# Erdos-Renyi.

SHAPES = [(3, 3, 3, 64), (3, 3, 64, 128), (1, 1, 128, 256), (784, 300), (300, 11)]


def densities_by_bisection(proportions, sizes, density):
    """min(1, epsilon * proportion) with the epsilon that meets the target, found by halving an interval."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(size * min(1.0, middle * p) for size, p in zip(sizes, proportions))
        low, high = (middle, high) if kept < density * sum(sizes) else (low, middle)
    return [min(1.0, low * p) for p in proportions]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("allocation", "proportion"),
    [
        (ErdosRenyi(), lambda shape: (shape[-2] + shape[-1]) / (shape[-2] * shape[-1])),
        (ErdosRenyiKernel(), lambda shape: sum(shape) / np.prod(shape)),
    ],
    ids=["erdos_renyi", "erk"],
)
def test_erdos_renyi(allocation, proportion, sparsity):
    layers = [Candidate(np.zeros(shape), 1, shape) for shape in SHAPES]
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    expected = densities_by_bisection([proportion(shape) for shape in SHAPES], sizes, 1 - sparsity)
    keep = allocation.allocate(sparsity, layers)
    for count, size, density in zip(keep, sizes, expected):
        assert count == pytest.approx(size * density, abs=0.51)
    assert sum(keep) == pytest.approx((1 - sparsity) * sum(sizes), abs=len(SHAPES) / 2)
    if sparsity == 0.5:  # cut off at 1 and shared among the others
        assert keep[0] == sizes[0]


def test_erdos_renyi_counts_units():
    """As many connections of a convolution as its density says, whatever the taps hold."""
    layers = [Candidate(np.zeros((1, 1, 16, 32)), 9, (3, 3, 16, 32)), Candidate(np.zeros((200, 100)), 1, (200, 100))]
    keep = ErdosRenyiKernel().allocate(0.8, layers)
    assert 9 * keep[0] + keep[1] == pytest.approx(0.2 * (9 * 512 + 20000), abs=5)
    ratio = (keep[0] / 512) / (keep[1] / 20000)
    assert ratio == pytest.approx((54 / (9 * 512)) / (300 / 20000), rel=0.01)


@pytest.mark.parametrize("allocation", [ErdosRenyi(), ErdosRenyiKernel()])
def test_erdos_renyi_falls_in_every_layer(allocation):
    """As masks are nested, no layer may ask for more as the sparsity rises."""
    layers = [Candidate(np.zeros(shape), 1, shape) for shape in SHAPES]
    counts = [allocation.allocate(sparsity, layers) for sparsity in np.linspace(0, 0.99, 34)]
    assert (np.diff(counts, axis=0) <= 0).all()
    assert allocation.allocate(0.5, []) == []
