"""Random criterion: every unit is as likely to go as any other."""

import zlib

import numpy as np

from keras_sparse import validation
from keras_sparse.criteria.base import Criterion, register

__all__ = ["Random"]


@register
class Random(Criterion):
    """Scores drawn uniformly from [0, 1), once per weight tensor.

    The draw depends on the seed, the name of the weight and the shape of its mask alone, never on the step.
    Asked again, it gives the same scores: the masks of a rising sparsity are nested, and a resumed run goes on
    as the uninterrupted one would (Changpinyo et al., 2017, section 3: uniform random connection tables).

    Args:
        seed: Non-negative integer.

    Raises:
        TypeError: If `seed` is not an integer.
        ValueError: If `seed` is negative.
    """

    def __init__(self, seed=0):
        self.seed = validation.integer("seed", seed, at_least=0)

    def scores(self, kernel, granularity, name=""):
        # crc32 rather than hash(): the same in every process.
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return generator.random(granularity.units_shape(np.shape(kernel)))

    def get_config(self):
        return {"seed": self.seed}
