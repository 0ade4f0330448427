"""Allocations: from one target for the network to a count of kept units for every layer."""

import dataclasses
import math

import keras
import numpy as np

from keras_sparse import validation

__all__ = [
    "Allocation",
    "Candidate",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Global",
    "LayerwiseConstant",
    "Uniform",
    "get",
    "names",
    "units_to_keep",
]


@dataclasses.dataclass
class Candidate:
    """What an allocation is told of one weight tensor.

    Attributes:
        scores: Array of the units' shape; `-inf` marks units that must not be chosen before any other.
        unit_size: Weights in one unit, or an array of them where units differ.
        shape: Shape of the tensor, input and output channels last.
        preferred: Array of booleans, the units to keep before all others whatever their scores, or `None`.
    """

    scores: np.ndarray
    unit_size: int | np.ndarray
    shape: tuple = ()
    preferred: np.ndarray | None = None

    @property
    def unit_sizes(self):
        return np.broadcast_to(self.unit_size, self.scores.shape)

    @property
    def weights(self):
        """Number of weights in all units."""
        return int(self.unit_sizes.sum(dtype="int64"))


def units_to_keep(units, sparsity):
    """Return the count of kept units closest to the target; a layer always keeps one.

    A layer that lost everything would cut the network in two, and no later step could undo it.
    """
    return max(1, round(units * (1.0 - sparsity))) if units else 0


class Allocation:
    """Shares the target sparsity of a network over its layers.

    Attributes:
        by_shape: Whether the counts follow from the shapes of the layers alone, and not from scores or the step.
    """

    by_shape = False

    def allocate(self, sparsity, candidates):
        """Return the number of units to keep in each candidate.

        Args:
            sparsity: Target in [0, 1), counted in weights over all candidates together.
            candidates: List of `Candidate`.

        Returns:
            List of integers, one a candidate.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `allocate(sparsity, candidates)`.")

    def allocate_at(self, schedule, step, candidates):
        """Return the number of units to keep in each candidate at an update step of a schedule."""
        return self.allocate(schedule(step), candidates)

    def final_step(self, schedule):
        """Return the step from which on the counts stay what they are."""
        return schedule.final_step

    def check(self, schedule):
        """Raise where the layers cannot be pruned along a schedule in this way."""

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

    by_shape = True

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
        scores, preferred, sizes, owners, total = [], [], [], [], 0
        for index, candidate in enumerate(candidates):
            flat = np.array(candidate.scores, "float64").ravel()
            if np.isnan(flat).any():
                validation.fail("scores", "hold no NaN (has training diverged?)", f"candidate {index}")
            # A layer without a rule of its own stands beside the preferred units of one that has.
            first = np.ones(flat.size, bool) if candidate.preferred is None else candidate.preferred.ravel().copy()
            if flat.size:
                best = np.argmax(np.where(first, flat, -np.inf) if first.any() else flat)
                flat[best], first[best] = np.inf, True
            scores.append(flat)
            preferred.append(first)
            total += candidate.weights
            sizes.append(candidate.unit_sizes.ravel())
            owners.append(np.full(flat.size, index, "int64"))
        if not scores:
            return []
        target = (1.0 - sparsity) * total
        # Asked again, as by a resumed run, for what is in place: with units of several sizes, the sums over units in an
        # order that has changed meanwhile would come closer to the target with another count.
        available = [int((flat > -np.inf).sum()) for flat in scores]
        weights = sum(int(own[flat > -np.inf].sum()) for flat, own in zip(scores, sizes))
        if abs(weights - target) <= max(int(own.max(initial=0)) for own in sizes) / 2:
            return available
        order = np.lexsort((-np.concatenate(scores), ~np.concatenate(preferred)))
        sizes = np.concatenate(sizes)[order]
        kept_weights = np.concatenate([[0], np.cumsum(sizes, dtype="int64")])
        units = int(np.argmin(np.abs(kept_weights - target)))
        # The best unit of every layer stands first in the order; none of them may fall to the rounding.
        units = max(units, sum(1 for flat in scores if flat.size))
        return np.bincount(np.concatenate(owners)[order[:units]], minlength=len(candidates)).tolist()


@_register
class LayerwiseConstant(Allocation):
    r"""One layer after another, each to the final sparsity (Zhu & Gupta, 2017, section 4.3, "layerwise constant").

    The interval from `begin_step` to `end_step` is divided evenly among the \(L\) layers, in the order of the model.
    In its part, layer \(k = 0, \dots, L - 1\) runs through the whole curve \(s\) of the schedule; before it, the layer
    is dense, after it, at the final sparsity:

    $$s_k(t) = s\left(\min\left(t_0 + L\,(t - t_0) - k\,(t_1 - t_0),\; t_1\right)\right)$$

    with \(t_0\) = `begin_step`, \(t_1\) = `end_step`. Under `ConstantSparsity` each layer is pruned at once, at the
    first update of its part. Between two parts the network can recover. `frequency` should leave every layer some
    updates.

    Raises:
        ValueError: Before training, if the schedule has no interval to divide.
    """

    def allocate(self, sparsity, candidates):
        return [units_to_keep(candidate.scores.size, sparsity) for candidate in candidates]

    def allocate_at(self, schedule, step, candidates):
        begin, end = schedule.begin_step, schedule.end_step
        elapsed = len(candidates) * (step - begin)
        steps = [min(begin + elapsed - index * (end - begin), end) for index in range(len(candidates))]
        return [
            units_to_keep(c.scores.size, schedule(own) if own >= begin else 0.0) for c, own in zip(candidates, steps)
        ]

    def final_step(self, schedule):
        return schedule.end_step

    def check(self, schedule):
        if schedule.end_step <= schedule.begin_step:
            rule = "have an `end_step` after its `begin_step`, to be divided among the layers ('layerwise_constant')"
            validation.fail("schedule", rule, schedule)
        if schedule.densifies:
            validation.fail("schedule", "not lower the sparsity where layers go one by one", schedule)


class _ByShape(Allocation):
    """Densities in proportion to a function of the tensors' shapes, at most 1.

    What a layer whose density would exceed 1 cannot take is shared among the others, in the same proportion.
    """

    by_shape = True

    def _proportion(self, shape):
        raise NotImplementedError

    def allocate(self, sparsity, candidates):
        if not candidates:
            return []
        sizes = np.array([candidate.weights for candidate in candidates], "float64")
        proportions = np.array([self._proportion(candidate.shape) for candidate in candidates], "float64")
        dense = np.zeros(len(candidates), bool)
        while True:
            left = (1.0 - sparsity) * sizes.sum() - sizes[dense].sum()
            shares = (sizes * proportions)[~dense].sum()
            factor = left / shares if shares else 0.0
            above = ~dense & (factor * proportions >= 1.0)
            if not above.any():
                break
            dense |= above
        densities = np.where(dense, 1.0, factor * proportions)
        return [units_to_keep(c.scores.size, 1.0 - density) for c, density in zip(candidates, densities)]


@_register
class ErdosRenyi(_ByShape):
    r"""Erdos-Renyi random graphs: the density of a layer falls with its width (Mocanu et al., 2018, equation 1).

    $$d_l = \min\left(1,\; \varepsilon\,\frac{n_\mathrm{in} + n_\mathrm{out}}{n_\mathrm{in}\,n_\mathrm{out}}\right)$$

    with the input and output channels \(n_\mathrm{in}, n_\mathrm{out}\) of layer \(l\) and \(\varepsilon\) such that
    all layers together meet the target: where a density is cut off at 1, the others are raised. Counts are rounded to
    units in each layer, and a layer always keeps one.
    """

    def _proportion(self, shape):
        return sum(shape[-2:]) / math.prod(shape[-2:])


@_register
class ErdosRenyiKernel(_ByShape):
    r"""Erdos-Renyi-Kernel (ERK): as `ErdosRenyi`, with the taps of convolutions counted (Evci et al., 2020, section 3).

    $$d_l = \min\left(1,\; \varepsilon\,\frac{n_\mathrm{in} + n_\mathrm{out} + k_h + k_w}
    {n_\mathrm{in}\,n_\mathrm{out}\,k_h\,k_w}\right)$$

    for a kernel of \(k_h \times k_w\) taps; for others the sum and the product of all axes of the tensor. Layers with
    few weights, as the first one and 1x1 convolutions, stay denser.
    """

    def _proportion(self, shape):
        return sum(shape) / math.prod(shape)


_BY_NAME = {
    "uniform": Uniform,
    "global": Global,
    "layerwise_constant": LayerwiseConstant,
    "erdos_renyi": ErdosRenyi,
    "erk": ErdosRenyiKernel,
}


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
