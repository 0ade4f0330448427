"""Granularities: what is removed together, expressed as the shape of a mask.

A mask broadcasts against the kernel it prunes. For a convolution kernel in HWIO layout
`(kernel_height, kernel_width, in_channels, out_channels)`, and for a dense kernel `(in, out)`, which is the same
with no taps:

| granularity   | mask of a convolution | mask of a dense layer | one unit is                                   |
|---------------|-----------------------|-----------------------|-----------------------------------------------|
| `weight`      | `(kh, kw, ci, co)`    | `(ci, co)`            | one weight                                    |
| `connection`  | `(1, 1, ci, co)`      | `(ci, co)`            | the kh x kw taps between one pair of channels |
| `group`       | `(kh, kw, ci, 1)`     | `(ci, 1)`             | one tap of one input map, over all outputs    |
| `feature_map` | `(1, 1, 1, co)`       | `(1, co)`             | all that makes one output channel             |
| `channel`     | `(1, 1, ci, 1)`       | `(ci, 1)`             | all that reads one input channel              |

Whatever follows (scores, counting, storage, plots) reduces over the axes where the mask has size 1 and needs
no other knowledge of the granularity.
"""

import math

import keras
import numpy as np

from keras_sparse import validation

__all__ = ["Granularity", "get", "names", "broadcastable"]


@keras.saving.register_keras_serializable(package="keras_sparse")
class Granularity:
    """A choice of the kernel axes along which units are told apart.

    Args:
        name: Name of the granularity, for configurations and messages.
        taps: Whether different taps (all kernel axes but the last two) are different units.
        inputs: Whether different input channels (the last axis but one) are different units.
        outputs: Whether different output channels (the last axis) are different units.
    """

    def __init__(self, name, taps, inputs, outputs):
        self.name = name
        self.taps = bool(taps)
        self.inputs = bool(inputs)
        self.outputs = bool(outputs)

    def mask_shape(self, kernel_shape):
        """Return the shape of the mask for a kernel of `kernel_shape` (rank >= 2, channels last)."""
        kernel_shape = tuple(int(size) for size in kernel_shape)
        if len(kernel_shape) < 2:
            validation.fail("kernel_shape", "have at least an input and an output axis", kernel_shape)
        kept = (self.taps,) * (len(kernel_shape) - 2) + (self.inputs, self.outputs)
        return tuple(size if keep else 1 for size, keep in zip(kernel_shape, kept))

    def unit_size(self, kernel_shape):
        """Return how many weights one unit holds."""
        return math.prod(kernel_shape) // max(math.prod(self.mask_shape(kernel_shape)), 1)

    def reduce(self, array, function):
        """Reduce an array of the kernel's shape to the mask's shape.

        Args:
            array: NumPy array of the kernel's shape.
            function: A NumPy reduction that takes `axis` and `keepdims`, such as `np.sum`.
        """
        mask_shape = self.mask_shape(array.shape)
        axes = tuple(i for i, (size, kept) in enumerate(zip(array.shape, mask_shape)) if size != kept)
        return function(array, axis=axes, keepdims=True) if axes else array

    def mask(self, scores, keep, previous=None):
        """Return the mask that keeps the `keep` units with the highest scores.

        The count is exact; among equal scores the unit that comes first in row-major order is kept. With
        `previous`, masks are nested: fewer units than before are chosen among those it keeps, more units are
        added to them.

        Args:
            scores: Array of the mask's shape, one score a unit; must hold no NaN.
            keep: Number of units to keep, between 0 and `scores.size`.
            previous: Optional mask of the same shape that the result must be a subset or a superset of.

        Returns:
            Array of 0 and 1, float32, of the shape of `scores`.
        """
        scores = np.asarray(scores)
        keep = validation.integer("keep", keep, at_least=0)
        if keep > scores.size:
            validation.fail("keep", f"be at most the number of units, {scores.size}", keep)
        if np.isnan(scores).any():
            validation.fail("scores", "hold no NaN (has training diverged?)", f"{np.isnan(scores).sum()} NaN")
        if previous is None:
            chosen = _highest(scores.ravel(), keep)
        else:
            before = np.asarray(previous).ravel() != 0
            if before.size != scores.size:
                validation.fail("previous", f"have the shape of scores, {scores.shape}", np.shape(previous))
            kept = int(before.sum())
            pool = np.flatnonzero(before if keep <= kept else ~before)
            among = _highest(scores.ravel()[pool], keep if keep <= kept else keep - kept)
            chosen = np.zeros(scores.size, bool) if keep <= kept else before.copy()
            chosen[pool[among]] = True
        return chosen.reshape(scores.shape).astype("float32")

    def get_config(self):
        return {"name": self.name, "taps": self.taps, "inputs": self.inputs, "outputs": self.outputs}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(tuple(sorted(self.get_config().items())))

    def __repr__(self):
        return f"<Granularity {self.name}>"


def _highest(scores, keep):
    """Return a boolean array that marks the `keep` highest of the flat `scores`, first come on ties."""
    chosen = np.zeros(scores.size, bool)
    if keep == 0:
        return chosen
    # A partition is linear in the number of weights, where a sort of a large layer takes seconds.
    threshold = np.partition(scores, scores.size - keep)[scores.size - keep]
    np.greater(scores, threshold, out=chosen)
    ties = np.flatnonzero(scores == threshold)[: keep - int(chosen.sum())]
    chosen[ties] = True
    return chosen


_GRANULARITIES = {
    granularity.name: granularity
    for granularity in (
        Granularity("weight", taps=True, inputs=True, outputs=True),
        Granularity("connection", taps=False, inputs=True, outputs=True),
        Granularity("group", taps=True, inputs=True, outputs=False),
        Granularity("feature_map", taps=False, inputs=False, outputs=True),
        Granularity("channel", taps=False, inputs=True, outputs=False),
    )
}


def names():
    """Return the names that `get` understands."""
    return tuple(_GRANULARITIES)


def get(identifier):
    """Return a `Granularity` from its name, its serialised form, or itself."""
    if isinstance(identifier, Granularity):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if not isinstance(identifier, str):
        validation.fail("granularity", "be a name or a Granularity", identifier, TypeError)
    return _GRANULARITIES[validation.one_of("granularity", identifier, names())]


def serialize(granularity):
    """Return what `get` needs to make the granularity again: its name where the name is enough."""
    if _GRANULARITIES.get(granularity.name) == granularity:
        return granularity.name
    return keras.saving.serialize_keras_object(granularity)


def broadcastable(mask_shape, onto):
    """Return whether a mask of `mask_shape` can be written into one of shape `onto`."""
    return len(mask_shape) == len(onto) and all(a in (1, b) for a, b in zip(mask_shape, onto))
