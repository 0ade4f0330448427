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

Two families have a finer structure than a broadcast: `n_m(n, m)` keeps n of every m weights along the input channels,
and `block(rows, columns)` prunes tiles of input by output channels. Their masks have the shape of `weight`, or of
`connection`. The units of a block are not its mask's entries: `units_shape` is the shape of scores, `expand` and
`contract` lead from units to mask and back.
"""

import math
import re

import keras
import numpy as np

from keras_sparse import validation

__all__ = ["Block", "Granularity", "NM", "block", "broadcastable", "get", "n_m", "names", "serialize"]


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

    def units_shape(self, kernel_shape):
        """Return the shape of the units, which scores have: that of the mask, but for blocks."""
        return self.mask_shape(kernel_shape)

    def unit_size(self, kernel_shape):
        """Return how many weights one unit holds, the largest where they differ."""
        return math.prod(kernel_shape) // max(math.prod(self.mask_shape(kernel_shape)), 1)

    def unit_sizes(self, kernel_shape):
        """Return the number of weights of every unit, in the shape of the units."""
        return np.broadcast_to(self.unit_size(kernel_shape), self.units_shape(kernel_shape))

    def count_weights(self, units, kernel_shape):
        """Return how many weights the units hold that are not zero in the array `units`."""
        return int(np.count_nonzero(units)) * self.unit_size(kernel_shape)

    @property
    def is_single_weights(self):
        """Whether each weight is a unit and any set of them may be kept, so that no axis has to mean anything."""
        return self.taps and self.inputs and self.outputs

    @property
    def least_sparsity(self):
        """The sparsity from which on the granularity's own rule holds: 0 where it has none."""
        return 0.0

    def expand(self, units, kernel_shape):
        """Return the mask that an array of units, zeros and ones, stands for."""
        return units

    def contract(self, mask, kernel_shape):
        """Return the units of which a mask keeps anything."""
        return mask

    def accepts(self, mask, kernel_shape):
        """Return whether a mask of the right shape is made of whole units."""
        return True

    def admits(self, other):
        """Return whether masks of this structure keep it when whole units of another granularity are pruned."""
        return True

    def reduce(self, array, function):
        """Reduce an array of the kernel's shape to the units' shape.

        Args:
            array: NumPy array or tensor of the kernel's shape.
            function: A reduction of such that takes `axis` and `keepdims`: `np.sum`, `keras.ops.sum`.
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
            scores: Array of the units' shape, one score a unit; must hold no NaN.
            keep: Number of units to keep, between 0 and `scores.size`.
            previous: Optional units of the same shape that the result must be a subset or a superset of.

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
            before = np.ones(scores.size, bool)
        else:
            before = np.asarray(previous).ravel() != 0
            if before.size != scores.size:
                validation.fail("previous", f"have the shape of scores, {scores.shape}", np.shape(previous))
        fewer = keep <= int(before.sum())
        chosen = np.zeros(scores.size, bool) if fewer else before.copy()
        wanted = keep - int(chosen.sum())
        for pool in self._pools(scores, before, fewer):
            pool = np.flatnonzero(pool)
            among = _highest(scores.ravel()[pool], min(wanted, pool.size))
            chosen[pool[among]] = True
            wanted -= int(among.sum())
        return chosen.reshape(scores.shape).astype("float32")

    def preferred(self, scores):
        """Return which units are to stay before all others whatever their scores, or `None` where scores alone decide.

        Args:
            scores: Array of the units' shape; `-inf` where a unit is pruned already.
        """
        return None

    def _pools(self, scores, before, fewer):
        """Return the units to choose among, in rounds: whoever is in the first one stays or comes first."""
        return [before if fewer else ~before]

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


@keras.saving.register_keras_serializable(package="keras_sparse")
class NM(Granularity):
    r"""At most `n` of every `m` weights along the input channels.

    The input channels of each output, and of each tap of a convolution, are cut into runs of `m`; the last run is
    shorter where `m` does not divide them. The pattern of sparse matrix units is 2 of 4 (Mishra et al., 2021, section
    3).

    Under a rising sparsity, the `n` best of each run stay until all others are gone. From a sparsity of
    \(1 - n / m\) on no run holds more than `n`; schedules must reach at least that. Beyond it the `n` themselves go.

    Args:
        n: Weights to keep of each run, at least 1.
        m: Length of a run, greater than `n`.

    Raises:
        TypeError: If one is not an integer.
        ValueError: If `n` is below 1 or not below `m`.
    """

    def __init__(self, n, m):
        self.n = validation.integer("n", n, at_least=1)
        self.m = validation.integer("m", m, at_least=1)
        if self.n >= self.m:
            validation.fail("n", f"be below m, {self.m}: n of every m weights are kept", n)
        super().__init__(f"{self.n}:{self.m}", taps=True, inputs=True, outputs=True)

    @property
    def is_single_weights(self):
        return False

    @property
    def least_sparsity(self):
        return 1.0 - self.n / self.m

    def preferred(self, scores):
        channels = scores.shape[-2]
        pad = [(0, 0)] * scores.ndim
        pad[-2] = (0, -channels % self.m)
        # The padding ranks below what is pruned, so that it never takes a place.
        alive = np.pad(np.where(np.isneginf(scores), 0.0, 1.0), pad)
        padded = np.pad(scores, pad, constant_values=-np.inf)
        runs = padded.reshape(*scores.shape[:-2], -1, self.m, scores.shape[-1])
        order = np.argsort(-runs, axis=-2, kind="stable")
        ranks = np.argsort(order, axis=-2, kind="stable").reshape(padded.shape)
        return ((ranks < self.n) & (alive > 0))[..., :channels, :]

    def _pools(self, scores, before, fewer):
        in_place = before.reshape(scores.shape)
        preferred = self.preferred(
            np.where(in_place, scores if fewer else np.inf, -np.inf if fewer else scores)
        ).ravel()
        pool = before if fewer else ~before
        return [pool & preferred, pool & ~preferred]

    def admits(self, other):
        return other == self

    def get_config(self):
        return {"n": self.n, "m": self.m}


@keras.saving.register_keras_serializable(package="keras_sparse")
class Block(Granularity):
    """Tiles of `rows` input channels by `columns` output channels.

    The tiles at the edges are smaller where the channels do not divide. In a convolution a block holds one tap of its
    connections, or all taps with `taps=False`.

    Args:
        rows: Input channels of a block, at least 1.
        columns: Output channels of a block, at least 1.
        taps: Whether different taps are different blocks.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1.
    """

    def __init__(self, rows, columns, taps=True):
        self.rows = validation.integer("rows", rows, at_least=1)
        self.columns = validation.integer("columns", columns, at_least=1)
        name = f"block({self.rows}, {self.columns})" if taps else f"block({self.rows}, {self.columns}, taps=False)"
        super().__init__(name, taps=taps, inputs=True, outputs=True)

    @property
    def is_single_weights(self):
        return False

    def units_shape(self, kernel_shape):
        *taps, inputs, outputs = self.mask_shape(kernel_shape)
        return (*taps, -(-inputs // self.rows), -(-outputs // self.columns))

    def unit_size(self, kernel_shape):
        rows, columns = min(self.rows, kernel_shape[-2]), min(self.columns, kernel_shape[-1])
        return super().unit_size(kernel_shape) * rows * columns

    def unit_sizes(self, kernel_shape):
        weights = super().unit_size(kernel_shape)
        rows, columns = (
            np.minimum(size, length - size * np.arange(-(-length // size)))
            for size, length in zip((self.rows, self.columns), kernel_shape[-2:])
        )
        return np.broadcast_to(weights * np.outer(rows, columns), self.units_shape(kernel_shape))

    def count_weights(self, units, kernel_shape):
        return int(self.unit_sizes(kernel_shape)[units != 0].sum())

    def expand(self, units, kernel_shape):
        *_, inputs, outputs = kernel_shape
        tiled = np.repeat(np.repeat(units, self.rows, axis=-2), self.columns, axis=-1)
        return tiled[..., :inputs, :outputs]

    def contract(self, mask, kernel_shape):
        return self._over_tiles(np.asarray(mask), np.max, ())

    def accepts(self, mask, kernel_shape):
        return bool((self.expand(self.contract(mask, kernel_shape), kernel_shape) == mask).all())

    def admits(self, other):
        return other == self

    def reduce(self, array, function):
        return self._over_tiles(array, function, () if self.taps else tuple(range(len(array.shape) - 2)))

    def _over_tiles(self, array, function, axes):
        """Reduce over tiles, and over `axes` with them: full tiles at once, those of each edge for themselves."""
        concatenate = (np if isinstance(array, np.ndarray) else keras.ops).concatenate
        inputs, outputs = array.shape[-2:]
        bands = [
            concatenate(
                [
                    self._over_full_tiles(array[..., top:bottom, left:right], function, axes)
                    for left, right in _cuts(outputs, self.columns)
                ],
                axis=-1,
            )
            for top, bottom in _cuts(inputs, self.rows)
        ]
        return concatenate(bands, axis=-2)

    def _over_full_tiles(self, array, function, axes):
        *taps, inputs, outputs = array.shape
        rows, columns = min(self.rows, inputs), min(self.columns, outputs)
        reshape = (np if isinstance(array, np.ndarray) else keras.ops).reshape
        tiles = reshape(array, (*taps, inputs // rows, rows, outputs // columns, columns))
        reduced = function(tiles, axis=(*axes, len(taps) + 1, len(taps) + 3), keepdims=True)
        return reshape(reduced, (*reduced.shape[: len(taps)], inputs // rows, outputs // columns))

    def get_config(self):
        return {"rows": self.rows, "columns": self.columns, "taps": self.taps}


def _cuts(length, size):
    """Return where the full tiles of an axis begin and end, and where the rest does."""
    full = length - length % size
    return [cut for cut in ((0, full), (full, length)) if cut[0] < cut[1]]


def n_m(n, m):
    """Return the granularity that keeps `n` of every `m` weights along the input channels; `"2:4"` is `n_m(2, 4)`."""
    return NM(n, m)


def block(rows, columns, taps=True):
    """Return the granularity that prunes tiles of `rows` input by `columns` output channels, each tap for itself."""
    return Block(rows, columns, taps)


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
    """Return the names that `get` understands, beside `"n:m"`."""
    return tuple(_GRANULARITIES)


def get(identifier):
    """Return a `Granularity` from its name, its serialised form, or itself."""
    if isinstance(identifier, Granularity):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if not isinstance(identifier, str):
        validation.fail("granularity", "be a name or a Granularity", identifier, TypeError)
    pattern = re.fullmatch(r"(\d+):(\d+)", identifier)
    if pattern:
        return NM(*map(int, pattern.groups()))
    return _GRANULARITIES[validation.one_of("granularity", identifier, names())]


def serialize(granularity):
    """Return what `get` needs to make the granularity again: its name where the name is enough."""
    if _GRANULARITIES.get(granularity.name) == granularity or isinstance(granularity, NM):
        return granularity.name
    return keras.saving.serialize_keras_object(granularity)


def broadcastable(mask_shape, onto):
    """Return whether a mask of `mask_shape` can be written into one of shape `onto`."""
    return len(mask_shape) == len(onto) and all(a in (1, b) for a, b in zip(mask_shape, onto))
