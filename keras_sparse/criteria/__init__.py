"""Criteria: which units go first. The highest scores are kept."""

import keras

from keras_sparse import validation
from keras_sparse.criteria.base import Criterion
from keras_sparse.criteria.fixed_pattern import FixedPattern
from keras_sparse.criteria.given import Given
from keras_sparse.criteria.magnitude import Magnitude
from keras_sparse.criteria.random import Random
from keras_sparse.criteria.saliency import Saliency

__all__ = ["Criterion", "FixedPattern", "Given", "Magnitude", "Random", "Saliency", "get", "names"]

_BY_NAME = {
    "magnitude": Magnitude,
    "l1": Magnitude,
    "l2": lambda: Magnitude("l2"),
    "mean": lambda: Magnitude("mean"),
    "max": lambda: Magnitude("max"),
    "random": Random,
}


def names():
    """Return the names that `get` understands."""
    return tuple(_BY_NAME)


def get(identifier):
    """Return a `Criterion` from its name, its serialised form, a user's scores or function of them, or itself."""
    if isinstance(identifier, Criterion):
        return identifier
    if isinstance(identifier, dict) and "class_name" in identifier:
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, dict) or (callable(identifier) and not isinstance(identifier, type)):
        return Given(identifier)
    if not isinstance(identifier, str):
        rule = "be a name, a Criterion, a dict of scores or a function of (kernel, name)"
        validation.fail("criterion", rule, identifier, TypeError)
    return _BY_NAME[validation.one_of("criterion", identifier, names())]()
