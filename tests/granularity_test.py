import keras
import numpy as np
import pytest

from keras_sparse import granularity as granularities

CONV, DENSE = (3, 5, 7, 11), (7, 11)

SHAPES = {
    "weight": ((3, 5, 7, 11), (7, 11)),
    "connection": ((1, 1, 7, 11), (7, 11)),
    "group": ((3, 5, 7, 1), (7, 1)),
    "feature_map": ((1, 1, 1, 11), (1, 11)),
    "channel": ((1, 1, 7, 1), (7, 1)),
}


def test_table_lists_every_granularity():
    assert set(SHAPES) == set(granularities.names())


@pytest.mark.parametrize("name", SHAPES)
def test_mask_shape_and_unit_size(name):
    granularity = granularities.get(name)
    for kernel_shape, expected in zip((CONV, DENSE), SHAPES[name]):
        assert granularity.mask_shape(kernel_shape) == expected
        assert granularity.unit_size(kernel_shape) * np.prod(expected) == np.prod(kernel_shape)


@pytest.mark.parametrize("name", SHAPES)
def test_reduce_sums_the_weights_of_each_unit(name):
    kernel = np.random.default_rng(0).standard_normal(CONV)
    granularity = granularities.get(name)
    reduced = granularity.reduce(kernel, np.sum)
    assert reduced.shape == SHAPES[name][0]
    # The oracle adds weights one at a time into the unit that broadcasting assigns them to.
    unit = np.broadcast_to(np.arange(reduced.size).reshape(reduced.shape), CONV)
    np.testing.assert_allclose(reduced.ravel(), np.bincount(unit.ravel(), kernel.ravel()), rtol=1e-12)


@pytest.mark.parametrize("keep", [0, 1, 38, 76, 77])
def test_mask_keeps_the_highest_scores_exactly(keep):
    scores = np.random.default_rng(1).standard_normal((1, 1, 7, 11))
    mask = granularities.get("connection").mask(scores, keep)
    assert mask.shape == scores.shape and mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0.0, 1.0} and mask.sum() == keep
    if 0 < keep < scores.size:
        assert scores[mask == 1].min() > scores[mask == 0].max()


@pytest.mark.parametrize("keep", [0, 1, 5, 9, 12])
def test_ties_keep_the_first_units(keep):
    scores = np.array([[2.0, 1.0, 1.0, 1.0], [1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    order = sorted(range(12), key=lambda i: (-scores.ravel()[i], i))
    mask = granularities.get("weight").mask(scores, keep)
    assert sorted(np.flatnonzero(mask)) == sorted(order[:keep])


def test_masks_with_a_previous_one_are_nested_both_ways():
    generator = np.random.default_rng(2)
    granularity = granularities.get("weight")
    previous = granularity.mask(generator.random((6, 9)), 20)
    scores = generator.random((6, 9))
    fewer, same, more = (granularity.mask(scores, keep, previous) for keep in (7, 20, 33))
    assert fewer.sum() == 7 and more.sum() == 33
    assert (fewer <= previous).all() and (more >= previous).all()
    np.testing.assert_array_equal(same, previous)
    # Within what nesting allows, the scores decide.
    assert scores[fewer == 1].min() > scores[(fewer == 0) & (previous == 1)].max()
    assert scores[(more == 1) & (previous == 0)].min() > scores[more == 0].max()


def test_infinite_scores_are_legal_and_nan_is_not():
    granularity = granularities.get("weight")
    scores = np.array([[-np.inf, 1.0], [np.inf, -np.inf]])
    np.testing.assert_array_equal(granularity.mask(scores, 3), [[1, 1], [1, 0]])
    with pytest.raises(ValueError, match="`scores` must hold no NaN"):
        granularity.mask(np.array([[np.nan, 1.0]]), 1)


def test_serialisation():
    for name in SHAPES:
        assert granularities.serialize(granularities.get(name)) == name
    own = granularities.Granularity("row", taps=False, inputs=True, outputs=False)
    assert granularities.get(granularities.serialize(own)) == own
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(own)) == own


def test_broadcastable():
    assert granularities.broadcastable((1, 1, 1, 11), (1, 1, 7, 11))
    assert not granularities.broadcastable((1, 1, 7, 11), (1, 1, 1, 11))
    assert not granularities.broadcastable((7, 11), (1, 1, 7, 11))
