import keras
import numpy as np
import pytest

from keras_sparse import allocation as allocations
from keras_sparse.allocation import Candidate, Global, Uniform, units_to_keep


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
