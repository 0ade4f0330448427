"""Fixed patterns: the taps that stay are chosen in advance, the same ones for every input map."""

import re

import numpy as np

from keras_sparse import validation
from keras_sparse.criteria.base import Criterion, register

__all__ = ["FixedPattern"]

# As rows of characters; the anchor is the tap in the middle, rounded down.
_NAMED = {
    "center": ("#",),
    "two_adjacent": ("##",),
    "square": ("###", "###", "###"),
    "cross": (".#.", "###", ".#."),
}
_KEPT, _PRUNED = "#x1", ".-0 "


@register
class FixedPattern(Criterion):
    r"""Scores 1 for the taps of a given pattern and 0 for all others, whatever the weights are.

    $$V(x, y, t) = \sum_s \sum_{(i, j) \in Q} K(i, j, s, t) \cdot U(x + i, y + j, s)$$

    with one pattern \(Q\) for all input maps (Lebedev & Lempitsky, 2016, equation 2 and section 4.1). With
    granularity `"group"`, a kernel keeps exactly the pattern if it is pruned to `sparsity(kernel_size)`:

    ```python
    cross = ks.criteria.FixedPattern("cross")
    cross.count((5, 5))  # 5 of 25 taps
    schedule = ks.schedules.OneShot(cross.sparsity((5, 5)))  # at step 0: before the first update of the weights
    ks.callbacks.GradualPruning(schedule, granularity="group", criterion=cross, include="conv2")
    ```

    `ks.initializers.PatternMask` gives the same masks to layers as they are built, and asks for no sparsity: use it
    where kernels differ in size.

    **Placement.** A pattern's anchor, the tap at row `(rows - 1) // 2` and column `(columns - 1) // 2` of it, stands on
    the kernel's, at `((kh - 1) // 2, (kw - 1) // 2)`: the tap that with padding `"same"` and stride 1 reads the pixel
    that is being computed. For even sizes this is the upper left of the four in the middle, so that `"2x2"` in a 5x5
    kernel keeps rows 2 to 3 and columns 2 to 3, counted from 0. What falls outside of a kernel that is too small is
    left out; a 1x1 kernel stays whole.

    | pattern                      | taps in 5x5 | in 3x3  |                                                         |
    |------------------------------|-------------|---------|---------------------------------------------------------|
    | `"center"`                   | 1           | 1       | the anchor alone                                        |
    | `"two_adjacent"`, `"1x2"`    | 2           | 2       | the anchor and its right neighbour                      |
    | `"1x3"`, `"3x1"`, `"2x2"`... | 3, 3, 4     | 3, 3, 4 | a block of so many rows and columns                     |
    | `"cross"`                    | 5           | 5       | the anchor and its four neighbours                      |
    | `"square"`                   | 9           | 9       | the 3x3 block                                           |
    | `"diamond"`                  | 13          | 5       | the largest city-block disc around the anchor that fits |

    Args:
        pattern: One of these names, an array of 0 and 1 with one entry a tap, or a list of strings such as
            `[".#.", "###", ".#."]`, in which `#`, `x` and `1` keep a tap and `.`, `-`, `0` and a blank prune it.

    Raises:
        TypeError: If `pattern` is of another kind.
        ValueError: If the name is unknown, values are neither 0 nor 1, rows differ in length, or no tap is kept.
    """

    def __init__(self, pattern):
        self.pattern = pattern if isinstance(pattern, str) else _to_strings(pattern)
        if isinstance(pattern, str) and pattern not in (*_NAMED, "diamond") and not _block(pattern):
            rule = f"be one of {', '.join(map(repr, (*_NAMED, 'diamond')))}, a block such as '1x3', an array or strings"
            validation.fail("pattern", rule, pattern)

    def taps(self, kernel_size):
        """Return which taps stay, as a boolean array of the shape `kernel_size`.

        Args:
            kernel_size: Pair (height, width), or an integer for both.

        Raises:
            ValueError: If the kernel holds none of the pattern's taps.
        """
        height, width = _pair(kernel_size)
        pattern = self._array(height, width)
        taps = np.zeros((height, width), bool)
        # Row r of the pattern lies on row r + down of the kernel.
        down, right = ((size - 1) // 2 - (own - 1) // 2 for size, own in zip((height, width), pattern.shape))
        rows, columns = np.nonzero(pattern)
        rows, columns = rows + down, columns + right
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        taps[rows[inside], columns[inside]] = True
        if not taps.any():
            validation.fail("pattern", f"keep a tap of a kernel of size {(height, width)}", self.pattern)
        return taps

    def count(self, kernel_size):
        """Return how many taps of a kernel of this size stay."""
        return int(self.taps(kernel_size).sum())

    def sparsity(self, kernel_size):
        """Return the share of taps that are pruned: the sparsity at which a kernel of this size keeps the pattern."""
        height, width = _pair(kernel_size)
        return 1.0 - self.count(kernel_size) / (height * width)

    def scores(self, kernel, granularity, name=""):
        shape = np.shape(kernel)
        if len(shape) > 2 and not granularity.taps:
            validation.fail("granularity", f"tell taps apart for {self!r}, as 'group' does", granularity.name)
        return self.mask(granularity.units_shape(shape))

    def mask(self, shape):
        """Return the pattern as a mask.

        Args:
            shape: Shape of the mask, `(kh, kw, in or 1, out or 1)`; without taps, as of a dense layer, all is kept, and
                the taps of a 1D convolution are a row.

        Returns:
            Array of 0 and 1, float32.
        """
        sizes = tuple(shape[:-2])
        if len(sizes) > 2:
            validation.fail("shape", f"have at most two axes of taps for {self!r}", tuple(shape))
        taps = self.taps((1, 1, *sizes)[-2:]).reshape(*sizes, 1, 1)
        return np.broadcast_to(taps, shape).astype("float32")

    def get_config(self):
        return {"pattern": self.pattern}

    def _array(self, height, width):
        if not isinstance(self.pattern, str):
            return np.array([[character == "#" for character in row] for row in self.pattern])
        if self.pattern == "diamond":
            radius = (min(height, width) - 1) // 2
            steps = np.abs(np.arange(-radius, radius + 1))
            return steps[:, None] + steps <= radius
        if self.pattern in _NAMED:
            return np.array([[character == "#" for character in row] for row in _NAMED[self.pattern]])
        return np.ones(_block(self.pattern), bool)


def _pair(kernel_size):
    pair = (kernel_size, kernel_size) if np.ndim(kernel_size) == 0 else tuple(kernel_size)
    if len(pair) != 2:
        validation.fail("kernel_size", "be an integer or a pair (height, width)", kernel_size)
    return tuple(validation.integer("kernel_size", size, at_least=1) for size in pair)


def _block(name):
    """Return (rows, columns) of a name such as "1x3", or `None`."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", name)
    return match and (int(match[1]), int(match[2]))


def _to_strings(pattern):
    """Return a user's pattern as strings of `#` and `.`, the form in which it is kept and saved."""
    rule = "be a name, an array of 0 and 1 with one entry a tap, or a list of strings of '#' and '.' of one length"
    if isinstance(pattern, (list, tuple)) and pattern and all(isinstance(row, str) for row in pattern):
        if len({len(row) for row in pattern}) != 1 or any(c not in _KEPT + _PRUNED for row in pattern for c in row):
            validation.fail("pattern", rule, pattern)
        kept = np.array([[character in _KEPT for character in row] for row in pattern])
    else:
        try:
            values = np.asarray(pattern, "float64")
        except (TypeError, ValueError):
            validation.fail("pattern", rule, pattern, TypeError)
        if values.ndim != 2 or not np.isin(values, (0, 1)).all():
            validation.fail("pattern", rule, pattern)
        kept = values == 1
    if not kept.any():
        validation.fail("pattern", "keep at least one tap", pattern)
    return ["".join("#" if tap else "." for tap in row) for row in kept]
