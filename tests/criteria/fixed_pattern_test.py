"""Fixed patterns: where each lies, in kernels of every size."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import granularity as granularities
from keras_sparse.criteria import FixedPattern
from keras_sparse.initializers import PatternMask

# (pattern, kernel size, the taps that stay)
PLACES = [
    ("center", (5, 5), [(2, 2)]),
    ("center", (4, 4), [(1, 1)]),
    ("center", (1, 1), [(0, 0)]),
    ("two_adjacent", (5, 5), [(2, 2), (2, 3)]),
    ("two_adjacent", (2, 2), [(0, 0), (0, 1)]),
    ("1x3", (5, 5), [(2, 1), (2, 2), (2, 3)]),
    ("3x1", (5, 5), [(1, 2), (2, 2), (3, 2)]),
    ("1x3", (4, 4), [(1, 0), (1, 1), (1, 2)]),
    ("1x3", (3, 1), [(1, 0)]),
    ("1x3", (2, 2), [(0, 0), (0, 1)]),
    ("2x2", (5, 5), [(2, 2), (2, 3), (3, 2), (3, 3)]),
    ("2x2", (4, 4), [(1, 1), (1, 2), (2, 1), (2, 2)]),
    ("cross", (5, 5), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2)]),
    ("cross", (3, 3), [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]),
    ("square", (3, 3), [(i, j) for i in range(3) for j in range(3)]),
    ("square", (7, 5), [(i, j) for i in (2, 3, 4) for j in (1, 2, 3)]),
    ("diamond", (3, 3), [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]),
    ("diamond", (5, 5), [(i, j) for i in range(5) for j in range(5) if abs(i - 2) + abs(j - 2) <= 2]),
    ("diamond", (6, 4), [(1, 1), (2, 0), (2, 1), (2, 2), (3, 1)]),
    (["#..", "...", "..#"], (5, 5), [(1, 1), (3, 3)]),
    ([[1, 0], [0, 1]], (3, 3), [(1, 1), (2, 2)]),
    (["x#1", "-0 "], (2, 3), [(0, 0), (0, 1), (0, 2)]),
]


@pytest.mark.parametrize(("pattern", "size", "taps"), PLACES, ids=[f"{p[0]}-{p[1]}" for p in PLACES])
def test_placement(pattern, size, taps):
    fixed = FixedPattern(pattern)
    expected = np.zeros(size, bool)
    expected[tuple(np.transpose(taps))] = True
    np.testing.assert_array_equal(fixed.taps(size), expected)
    assert fixed.count(size) == len(taps)
    assert fixed.sparsity(size) == pytest.approx(1 - len(taps) / np.prod(size))


def test_the_center_reads_the_pixel_that_is_computed():
    """Under "same" padding a convolution with the pattern's anchor alone is the identity, at any kernel size."""
    image = np.random.default_rng(0).random((1, 7, 6, 1)).astype("float32")
    for size in ((1, 1), (2, 3), (3, 3), (4, 4), (5, 2)):
        kernel = FixedPattern("center").mask((*size, 1, 1))
        np.testing.assert_allclose(keras.ops.conv(image, kernel, padding="same"), image, rtol=1e-6)


@pytest.mark.parametrize("kernel_size", [(5, 5), (3, 3), (4, 3)])
@pytest.mark.parametrize("pattern", ["center", "cross", "diamond", "2x2", ["##.", "..#"]], ids=str)
def test_pruning_to_the_patterns_sparsity_gives_the_pattern(pattern, kernel_size):
    """Through the criterion before the first step, and through the initial mask."""
    fixed = FixedPattern(pattern)
    model = keras.Sequential([keras.Input((9, 9, 3)), keras.layers.Conv2D(7, kernel_size, name="conv")])
    sparse = ks.sparsify(model, granularity="group")
    pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(fixed.sparsity(kernel_size)), criterion=fixed)
    pruning.start(sparse)
    pruning.finish()
    expected = np.broadcast_to(fixed.taps(kernel_size)[..., None, None], (*kernel_size, 3, 1))
    np.testing.assert_array_equal(sparse.get_layer("conv").mask, expected)
    direct = ks.sparsify(model, granularity="group", mask_initializer=PatternMask(pattern)).get_layer("conv")
    np.testing.assert_array_equal(direct.mask, expected)
    np.testing.assert_array_equal(direct._kernel, model.get_layer("conv").kernel * expected.astype("float32"))
    again = ks.layers.SparseConv2D.from_config(direct.get_config())
    again.build((None, 9, 9, 3))
    np.testing.assert_array_equal(again.mask, expected)


@pytest.mark.parametrize("shape", [(5, 5, 4, 6), (5, 4, 6), (4, 6)])
@pytest.mark.parametrize("granularity", ["weight", "group"])
def test_other_ranks_and_granularities(shape, granularity):
    scores = FixedPattern("1x3").scores(np.zeros(shape), granularities.get(granularity))
    assert scores.shape == granularities.get(granularity).mask_shape(shape)
    kept = {4: 3 / 25, 3: 3 / 5, 2: 1.0}[len(shape)]
    assert scores.mean() == pytest.approx(kept)


def test_blocks_of_taps():
    scores = FixedPattern("cross").scores(np.zeros((3, 3, 5, 4)), granularities.block(2, 3))
    assert scores.shape == (3, 3, 3, 2) and scores.mean() == pytest.approx(5 / 9)


def test_a_one_by_one_kernel_stays_whole():
    assert FixedPattern("square").mask((1, 1, 8, 1)).all()


@pytest.mark.parametrize("pattern", ["diamond", "3x1", [[0, 1, 0], [1, 1, 1]], ("#.", ".#")], ids=str)
def test_serialisation(pattern):
    fixed = FixedPattern(pattern)
    again = ks.criteria.get(keras.saving.serialize_keras_object(fixed))
    np.testing.assert_array_equal(again.taps((5, 5)), fixed.taps((5, 5)))
    mask = keras.initializers.get(keras.initializers.serialize(PatternMask(pattern)))
    np.testing.assert_array_equal(mask((5, 5, 2, 1)), PatternMask(pattern)((5, 5, 2, 1)))


def test_the_documented_counts():
    counts = {"center": 1, "two_adjacent": 2, "1x3": 3, "3x1": 3, "2x2": 4, "cross": 5, "square": 9, "diamond": 13}
    assert {name: FixedPattern(name).count(5) for name in counts} == counts
