import keras
import numpy as np
import pytest

from keras_sparse.initializers import RandomMask


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
