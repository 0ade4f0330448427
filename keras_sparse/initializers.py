"""Initialisers of masks."""

import keras
import numpy as np

from keras_sparse import validation
from keras_sparse.allocation import units_to_keep
from keras_sparse.criteria import FixedPattern

__all__ = ["PatternMask", "RandomMask", "fan_scale"]


@keras.saving.register_keras_serializable(package="keras_sparse")
class PatternMask(keras.initializers.Initializer):
    """A mask that keeps the taps of a fixed pattern, the same ones for every input map.

    ```python
    layer = ks.layers.SparseConv2D(50, 5, granularity="group", mask_initializer=ks.initializers.PatternMask("cross"))
    model = ks.sparsify(model, granularity="group", mask_initializer=ks.initializers.PatternMask("cross"))
    ```

    Training with patterns chosen in advance is the simplest way to thin a network (Lebedev & Lempitsky, 2016, section
    4.1). `ks.criteria.FixedPattern` says where a pattern lies in kernels of any size; kernels without taps, those of
    dense layers, stay whole.

    Args:
        pattern: Name, array or list of strings, as in `ks.criteria.FixedPattern`.

    Raises:
        TypeError: If `pattern` is of another kind.
        ValueError: If `pattern` is no pattern, or a mask does not tell taps apart or holds none of the pattern.
    """

    def __init__(self, pattern):
        self._criterion = FixedPattern(pattern)

    def __call__(self, shape, dtype=None):
        if len(shape) > 2 and set(shape[:-2]) == {1} and shape[-1] != 1:
            # Most likely the connections of a larger kernel, all of which would silently be kept.
            validation.fail("shape", "tell taps apart, as masks of granularity 'group' do", tuple(shape))
        return keras.ops.convert_to_tensor(self._criterion.mask(shape), dtype=dtype)

    def get_config(self):
        return self._criterion.get_config()


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


def fan_scale(initializer, mask, kernel_shape):
    r"""Return the factor from an initializer's values for a dense kernel to those for a masked one.

    Initializers that scale variance (Glorot, He, LeCun) draw weights of variance \(s / n\), with the fan \(n\) of a
    dense kernel. Under a mask the weight from input channel \(i\) to output channel \(j\) has the smaller fan
    \(n_{ij}\), counted over kept weights, and

    $$\operatorname{Var}(w_{ij}) = \frac{s}{n_{ij}}, \quad n_{ij} = \begin{cases}
    \text{kept weights into } j & \text{mode "fan\_in" (He, LeCun)} \\
    \text{kept weights out of } i & \text{mode "fan\_out"} \\
    \text{the mean of both} & \text{mode "fan\_avg" (Glorot)}
    \end{cases}$$

    so that activations and gradients keep their scale at any density.

    Args:
        initializer: Keras initializer of the kernel.
        mask: Array of 0 and 1 that broadcasts to the kernel.
        kernel_shape: Shape of the kernel, input and output axis last.

    Returns:
        Array that broadcasts to the kernel, \(\sqrt{n / n_{ij}}\); 1 for initializers whose values know no fan.
    """
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        return np.ones((1,) * len(kernel_shape))
    mask = np.broadcast_to(np.asarray(mask) != 0, kernel_shape)

    def fans(kept):
        taps = tuple(range(kept.ndim - 2))
        fan_in, fan_out = (kept.sum(axis=(*taps, axis), keepdims=True) for axis in (-2, -1))
        return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[initializer.mode]

    return np.sqrt(fans(np.ones_like(mask)) / np.maximum(fans(mask), 1))
