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


# N of M.


def most_in_a_run(mask, m):
    """The largest number of ones in any run of m input channels, one run at a time."""
    runs = [mask[..., start : start + m, :].sum(axis=-2) for start in range(0, mask.shape[-2], m)]
    return max(run.max() for run in runs)


@pytest.mark.parametrize("shape", [(8, 5), (7, 5), (1, 3), (3, 2, 10, 4), (3, 3, 3, 2)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 5)])
def test_n_m(shape, n, m):
    """At 1 - n/m every run holds n at most: its best ones. On the way there, the others go by their scores."""
    granularity = granularities.n_m(n, m)
    assert (
        granularity.mask_shape(shape) == granularity.units_shape(shape) == shape and granularity.unit_size(shape) == 1
    )
    scores = np.random.default_rng(5).permutation(int(np.prod(shape))).reshape(shape) + 0.5
    best = np.zeros(shape)
    for index in np.ndindex(*shape):
        start = index[-2] - index[-2] % m
        run = scores[(*index[:-2], slice(start, start + m), index[-1])]
        best[index] = (run > scores[index]).sum() < n
    np.testing.assert_array_equal(granularity.preferred(scores), best == 1)
    previous = None
    for sparsity in (0.0, 0.2, 1 - n / m, 0.9):
        keep = round(scores.size * (1 - sparsity))
        mask = granularity.mask(scores, keep, previous)
        assert mask.sum() == keep and (previous is None or (mask <= previous).all())
        rank = np.where(best == 1, 1e6, 0) + scores
        assert rank[mask == 1].min() > rank[mask == 0].max() if 0 < keep < scores.size else True
        assert sparsity < granularity.least_sparsity or most_in_a_run(mask, m) <= n
        previous = mask


def test_n_m_with_pruned_and_returning_weights():
    granularity = granularities.n_m(2, 4)
    scores = np.array([[9.0], [8.0], [7.0], [6.0], [1.0], [2.0], [3.0], [4.0]])
    before = np.array([[0], [1], [1], [1], [1], [1], [1], [1]], "float32")
    fewer = granularity.mask(scores, 4, before)  # 9 is gone already: 8 and 7 are the best left
    np.testing.assert_array_equal(fewer.ravel(), [0, 1, 1, 0, 0, 0, 1, 1])
    more = granularity.mask(scores, 3, np.array([[0], [0], [0], [1], [0], [0], [0], [0]]))
    # One place is left in the first run, for 9; two in the second, for 4 and 3, which come before 8.
    np.testing.assert_array_equal(more.ravel(), [1, 0, 0, 1, 0, 0, 0, 1])
    ties = granularity.mask(np.ones((4, 1)), 2)
    np.testing.assert_array_equal(ties.ravel(), [1, 1, 0, 0])


def test_n_m_names():
    assert granularities.get("2:4") == granularities.n_m(2, 4) != granularities.n_m(1, 4)
    assert granularities.serialize(granularities.n_m(2, 4)) == "2:4"
    assert granularities.n_m(2, 4).least_sparsity == 0.5
    config = keras.saving.serialize_keras_object(granularities.n_m(1, 4))
    assert keras.saving.deserialize_keras_object(config) == granularities.n_m(1, 4)


# Blocks.


@pytest.mark.parametrize("function", [np.sum, np.mean, np.max])
@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 4), (7, 11), (16, 5)])
def test_blocks(rows, columns, taps, function):
    """Every tile by itself, those of the ragged edges with the weights they have."""
    granularity = granularities.block(rows, columns, taps)
    for shape in (CONV, DENSE):
        kernel = np.random.default_rng(6).standard_normal(shape)
        tiles = (-(-shape[-2] // rows), -(-shape[-1] // columns))
        lead = shape[:-2] if taps else (1,) * (len(shape) - 2)
        assert granularity.units_shape(shape) == (*lead, *tiles)
        assert granularity.mask_shape(shape) == (*lead, *shape[-2:])
        reduced, sizes = granularity.reduce(kernel, function), granularity.unit_sizes(shape)
        assert reduced.shape == sizes.shape == (*lead, *tiles) and sizes.sum() == kernel.size
        assert granularity.unit_size(shape) == sizes.max()
        units = (np.random.default_rng(7).random((*lead, *tiles)) < 0.5).astype("float32")
        mask = granularity.expand(units, shape)
        assert mask.shape == granularity.mask_shape(shape) and granularity.accepts(mask, shape)
        np.testing.assert_array_equal(granularity.contract(mask, shape), units)
        assert granularity.count_weights(units, shape) == np.broadcast_to(mask, shape).sum()
        for *tap, row, column in np.ndindex(*reduced.shape):
            inside = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            tile = kernel[(*tap, *inside)] if taps else kernel[(..., *inside)]
            assert reduced[(*tap, row, column)] == pytest.approx(function(tile), rel=1e-9)
            assert sizes[(*tap, row, column)] == tile.size
            assert (mask[(*tap, *inside)] == units[(*tap, row, column)]).all()


def test_blocks_are_told_from_other_masks():
    granularity = granularities.block(2, 3)
    mask = np.zeros((7, 11), "float32")
    assert granularity.accepts(mask, mask.shape)
    mask[0, 0] = 1
    assert not granularity.accepts(mask, mask.shape)
    assert granularities.get(granularities.serialize(granularity)) == granularity != granularities.block(3, 2)
    assert granularity.admits(granularities.block(2, 3)) and not granularity.admits(granularities.get("weight"))
