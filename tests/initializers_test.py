import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.initializers import RandomMask, fan_scale


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_random_mask_keeps_an_exact_count(sparsity):
    mask = np.asarray(RandomMask(sparsity, seed=1)((1, 1, 13, 17)))
    assert mask.shape == (1, 1, 13, 17) and set(np.unique(mask)) <= {0.0, 1.0}
    assert mask.sum() == max(1, round(13 * 17 * (1 - sparsity)))


def test_random_masks_of_one_seed_are_nested():
    sparser, denser, other = (np.asarray(RandomMask(s, seed)((9, 11))) for s, seed in ((0.8, 2), (0.3, 2), (0.3, 3)))
    assert (sparser <= denser).all() and (denser != other).any()


def test_random_mask_config():
    again = keras.initializers.get(keras.initializers.serialize(RandomMask(0.25, seed=4)))
    assert again.get_config() == {"sparsity": 0.25, "seed": 4}


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1, 4, 3), (5, 6)])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_fan_scale_counts_kept_weights(shape, mode):
    generator = np.random.default_rng(0)
    for granularity in ("weight", "connection", "group"):
        mask_shape = ks.granularity.get(granularity).mask_shape(shape)
        for sparsity in (0, 0.5, 0.9):
            mask = (generator.random(mask_shape) >= sparsity).astype("float64")
            scale = fan_scale(keras.initializers.VarianceScaling(mode=mode), mask, shape)
            full = np.broadcast_to(mask, shape).reshape(-1, *shape[-2:])
            for i in range(shape[-2]):
                for j in range(shape[-1]):
                    fans = {"fan_in": full[:, :, j], "fan_out": full[:, i, :]}
                    kept = {key: values.sum() for key, values in fans.items()}
                    dense = {key: values.size for key, values in fans.items()}
                    for counts in (kept, dense):
                        counts["fan_avg"] = (counts["fan_in"] + counts["fan_out"]) / 2
                    wanted = np.sqrt(dense[mode] / max(kept[mode], 1))
                    got = np.broadcast_to(scale, shape).reshape(-1, *shape[-2:])[:, i, j]
                    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_fan_scale_of_an_initializer_without_a_fan():
    assert (fan_scale(keras.initializers.RandomNormal(), np.zeros((1, 1, 2, 2)), (3, 3, 2, 2)) == 1).all()
