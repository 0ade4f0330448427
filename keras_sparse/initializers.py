"""Initialisers of masks."""

import keras
import numpy as np

from keras_sparse import validation
from keras_sparse.allocation import units_to_keep

__all__ = ["RandomMask"]


@keras.saving.register_keras_serializable(package="keras_sparse")
class RandomMask(keras.initializers.Initializer):
    """A mask that keeps an exact share of the units, drawn uniformly without replacement.

    One seed draws one order of the units and keeps the first of them: with the same seed, the mask of a higher
    sparsity is a subset of that of a lower one (Changpinyo et al., 2017, section 3).

    Args:
        sparsity: Share of the units that are pruned, in [0, 1).
        seed: Non-negative integer. Layers of equal shape and seed get equal masks.

    Raises:
        ValueError: If `sparsity` is outside [0, 1) or `seed` is negative.
    """

    def __init__(self, sparsity, seed=0):
        self.sparsity = validation.sparsity_value("sparsity", sparsity)
        self.seed = validation.integer("seed", seed, at_least=0)

    def __call__(self, shape, dtype=None):
        units = int(np.prod(shape))
        order = np.random.default_rng(self.seed).permutation(units)
        mask = np.zeros(units, "float32")
        mask[order[: units_to_keep(units, self.sparsity)]] = 1.0
        return keras.ops.convert_to_tensor(mask.reshape(shape), dtype=dtype)

    def get_config(self):
        return {"sparsity": self.sparsity, "seed": self.seed}
