"""Allocations: from one target for the network to a count of kept units for every layer."""

import dataclasses

import keras
import numpy as np

from keras_sparse import validation

__all__ = ["Allocation", "Candidate", "Global", "Uniform", "get", "names", "units_to_keep"]


@dataclasses.dataclass
class Candidate:
    """What an allocation is told of one weight tensor.

    Attributes:
        scores: Array of the mask's shape; `-inf` marks units that must not be chosen before any other.
        unit_size: Weights in one unit.
    """

    scores: np.ndarray
    unit_size: int


def units_to_keep(units, sparsity):
    """Return the count of kept units closest to the target; a layer always keeps one.

    A layer that lost everything would cut the network in two, and no later step could undo it.
    """
    return max(1, round(units * (1.0 - sparsity))) if units else 0


class Allocation:
    """Shares the target sparsity of a network over its layers."""

    def allocate(self, sparsity, candidates):
        """Return the number of units to keep in each candidate.

        Args:
            sparsity: Target in [0, 1), counted in weights over all candidates together.
            candidates: List of `Candidate`.

        Returns:
            List of integers, one a candidate.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `allocate(sparsity, candidates)`.")

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        return f"{type(self).__name__}()"


def _register(cls):
    return keras.saving.register_keras_serializable(package="keras_sparse")(cls)


@_register
class Uniform(Allocation):
    """The same sparsity in every layer, each met to one unit (Zhu & Gupta, 2017, section 3)."""

    def allocate(self, sparsity, candidates):
        return [units_to_keep(candidate.scores.size, sparsity) for candidate in candidates]


@_register
class Global(Allocation):
    """The highest scores of the whole network, whichever layer they are in (Zhu & Gupta, 2017, section 4.3).

    The target counts weights over all layers together and is met to one unit. Equal scores are kept in the order of
    the layers, then of the units. Every layer keeps its best unit.

    Scores of different layers are compared as they are: with units of different sizes (connections of a 3x3 and of a
    1x1 convolution), a criterion that does not grow with the size, such as `Magnitude("mean")`, is the fair one.
    """

    def allocate(self, sparsity, candidates):
        scores, sizes, owners = [], [], []
        for index, candidate in enumerate(candidates):
            flat = np.array(candidate.scores, "float64").ravel()
            if np.isnan(flat).any():
                validation.fail("scores", "hold no NaN (has training diverged?)", f"candidate {index}")
            if flat.size:
                flat[np.argmax(flat)] = np.inf
            scores.append(flat)
            sizes.append(np.full(flat.size, candidate.unit_size, "int64"))
            owners.append(np.full(flat.size, index, "int64"))
        if not scores:
            return []
        total = sum(candidate.scores.size * candidate.unit_size for candidate in candidates)
        target = (1.0 - sparsity) * total
        # Asked again, as by a resumed run, for what is in place: with units of several sizes, the sums over units in an
        # order that has changed meanwhile would come closer to the target with another count.
        available = [int((flat > -np.inf).sum()) for flat in scores]
        weights = sum(count * candidate.unit_size for count, candidate in zip(available, candidates))
        if abs(weights - target) <= max(candidate.unit_size for candidate in candidates) / 2:
            return available
        order = np.argsort(-np.concatenate(scores), kind="stable")
        sizes = np.concatenate(sizes)[order]
        kept_weights = np.concatenate([[0], np.cumsum(sizes)])
        units = int(np.argmin(np.abs(kept_weights - target)))
        # The best unit of every layer stands first in the order; none of them may fall to the rounding.
        units = max(units, sum(1 for flat in scores if flat.size))
        return np.bincount(np.concatenate(owners)[order[:units]], minlength=len(candidates)).tolist()


_BY_NAME = {"uniform": Uniform, "global": Global}


def names():
    """Return the names that `get` understands."""
    return tuple(_BY_NAME)


def get(identifier):
    """Return an `Allocation` from its name, its serialised form, or itself."""
    if isinstance(identifier, Allocation):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if not isinstance(identifier, str):
        validation.fail("allocation", "be a name or an Allocation", identifier, TypeError)
    return _BY_NAME[validation.one_of("allocation", identifier, names())]()
