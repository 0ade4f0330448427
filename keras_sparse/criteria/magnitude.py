"""Magnitude criteria: the weights of a unit, reduced to one number."""

import numpy as np

from keras_sparse import validation
from keras_sparse.criteria.base import Criterion, register

__all__ = ["Magnitude"]


def _l2(array, **axes):
    return np.sqrt(np.sum(np.square(array, dtype="float64"), **axes))


# norm -> reduction of abs(kernel) over the weights of a unit
_NORMS = {"l1": np.sum, "l2": _l2, "mean": np.mean, "max": np.max}


@register
class Magnitude(Criterion):
    r"""Scores a unit by the magnitude of its weights.

    For a unit \(u\) with the weights \(w_i\):

    - `"l1"`: \(\sum_i |w_i|\)
    - `"l2"`: \(\sqrt{\sum_i w_i^2}\), the group norm of Lebedev & Lempitsky (2016), equation 3
    - `"mean"`: \(\frac{1}{|u|}\sum_i |w_i|\), comparable between layers whose units differ in size
    - `"max"`: \(\max_i |w_i|\)

    At granularity `weight` all four are \(|w|\), the criterion of Zhu & Gupta (2017), section 3.

    Args:
        norm: One of `"l1"`, `"l2"`, `"mean"`, `"max"`.

    Raises:
        ValueError: If `norm` is none of these.
    """

    def __init__(self, norm="l1"):
        self.norm = validation.one_of("norm", norm, tuple(_NORMS))

    def scores(self, kernel, granularity, name=""):
        return granularity.reduce(np.abs(np.asarray(kernel)), _NORMS[self.norm])

    def get_config(self):
        return {"norm": self.norm}
