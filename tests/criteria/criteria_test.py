"""One table of criteria: each against a loop over units, in float64."""

import keras
import numpy as np
import pytest

from keras_sparse import criteria
from keras_sparse import granularity as granularities

KERNEL = np.random.default_rng(3).standard_normal((3, 2, 5, 7)).astype("float32")

# name -> what one unit's weights are worth
ORACLES = {
    "magnitude": lambda w: np.abs(w).sum(),
    "l1": lambda w: np.abs(w).sum(),
    "l2": lambda w: np.sqrt((w**2).sum()),
    "mean": lambda w: np.abs(w).mean(),
    "max": lambda w: np.abs(w).max(),
}


def test_table_lists_every_criterion():
    assert set(ORACLES) | {"random"} == set(criteria.names())


@pytest.mark.parametrize("granularity", granularities.names())
@pytest.mark.parametrize("name", ORACLES)
def test_scores(name, granularity):
    granularity = granularities.get(granularity)
    scores = criteria.get(name).scores(KERNEL, granularity)
    units = np.arange(scores.size).reshape(scores.shape)
    unit_of_weight = np.broadcast_to(units, KERNEL.shape)
    kernel = KERNEL.astype("float64")
    expected = [ORACLES[name](kernel[unit_of_weight == unit]) for unit in range(scores.size)]
    np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("granularity", granularities.names())
def test_random_is_a_function_of_seed_and_name(granularity):
    granularity = granularities.get(granularity)
    draw = criteria.Random(seed=5).scores(KERNEL, granularity, "block/conv")
    assert draw.shape == granularity.mask_shape(KERNEL.shape)
    np.testing.assert_array_equal(draw, criteria.Random(5).scores(KERNEL * 2, granularity, "block/conv"))
    assert (draw != criteria.Random(6).scores(KERNEL, granularity, "block/conv")).all()
    assert (draw != criteria.Random(5).scores(KERNEL, granularity, "block/other")).all()


def test_random_is_uniform():
    scores = criteria.Random(0).scores(np.zeros((100, 100)), granularities.get("weight"), "w")
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))
    # 1000 expected a bin, standard deviation 30: five of them.
    assert np.abs(counts - 1000).max() < 150


def test_random_is_the_same_in_every_process():
    scores = criteria.Random(1).scores(np.zeros((1, 3)), granularities.get("weight"), "conv")
    generator = np.random.default_rng([1, 0x094499CC])  # zlib.crc32(b"conv")
    np.testing.assert_array_equal(scores, generator.random((1, 3)))


@pytest.mark.parametrize("criterion", [criteria.Magnitude("l2"), criteria.Random(7)])
def test_serialisation(criterion):
    config = keras.saving.serialize_keras_object(criterion)
    again = criteria.get(config)
    assert type(again) is type(criterion) and again.get_config() == criterion.get_config()


@pytest.mark.parametrize("granularity", [granularities.block(2, 3), granularities.block(2, 3, taps=False), "2:4"])
def test_scores_have_the_shape_of_units(granularity):
    """Of blocks too, whose mask has another one."""
    granularity = granularities.get(granularity)
    for name in criteria.names():
        assert criteria.get(name).scores(KERNEL, granularity, "w").shape == granularity.units_shape(KERNEL.shape), name


def test_given_scores():
    by_weight, by_unit = np.random.default_rng(0).random(KERNEL.shape), np.arange(7).reshape(1, 1, 1, 7)
    maps = granularities.get("feature_map")
    given = criteria.get({"a": by_weight, "b": by_unit})
    np.testing.assert_allclose(given.scores(KERNEL, maps, "a").ravel(), by_weight.sum(axis=(0, 1, 2)))
    np.testing.assert_array_equal(given.scores(KERNEL, maps, "b"), by_unit)
    function = criteria.get(lambda kernel, name: kernel * (2 if name == "a" else -1))
    np.testing.assert_array_equal(function.scores(KERNEL, granularities.get("weight"), "b"), -KERNEL)
    with pytest.raises(ValueError, match="`scores` must hold an array for 'c'"):
        given.scores(KERNEL, maps, "c")
    assert "Given('a', 'b')" == repr(given)


def test_saliency_needs_gradients_first():
    saliency = criteria.Saliency((KERNEL, KERNEL), "mse", batches=3)
    assert repr(saliency) == "Saliency(loss='mse', batch_size=32, batches=3)"
    with pytest.raises(RuntimeError, match="Saliency knows no gradient of 'w'"):
        saliency.scores(KERNEL, granularities.get("weight"), "w")


def test_a_users_own_criterion():
    class Smallest(criteria.Criterion):
        def scores(self, kernel, granularity, name=""):
            return -granularity.reduce(np.abs(kernel), np.sum)

    own = criteria.get(Smallest())
    weight = granularities.get("weight")
    np.testing.assert_array_equal(own.scores(KERNEL, weight), -np.abs(KERNEL))
    with pytest.raises(NotImplementedError, match="must define `scores"):
        criteria.Criterion().scores(KERNEL, weight)
