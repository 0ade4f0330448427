"""Base of the layers whose kernel carries a mask."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_sparse import granularity as granularities
from keras_sparse import validation

__all__ = ["BaseSparse"]


class BaseSparse:
    """Gives a Keras layer with a `kernel` a mask; mixed in before the layer's Keras class.

    The layer computes with `kernel = raw kernel * mask`. The raw kernel is the trainable variable; its masked
    entries are driven back to zero inside every optimizer step, after momentum and weight decay have had their
    say, so that what is stored, saved and resumed is the effective kernel.

    Subclasses define `_kernel_shape(input_shape)`.

    Args:
        granularity: Name of a granularity or a `Granularity`.
        mask_initializer: Keras initializer of the mask; must give zeros and ones.
    """

    def __init__(self, *args, granularity, mask_initializer, **kwargs):
        self.granularity = granularities.get(granularity)
        self.mask_initializer = keras.initializers.get(mask_initializer)
        if self.mask_initializer is None:
            validation.fail("mask_initializer", "be a Keras initializer", mask_initializer)
        super().__init__(*args, **kwargs)
        if getattr(self, "quantization_mode", None) is not None:
            validation.fail("dtype", "be a policy without quantization", self.dtype_policy.name)

    def _kernel_shape(self, input_shape):
        raise NotImplementedError

    def build(self, input_shape):
        kernel_shape = self._kernel_shape(input_shape)
        if None in kernel_shape:
            return super().build(input_shape)  # raises what Keras raises
        # The mask comes first because Keras locks a layer's state once LoRA is enabled in its own build().
        shape = self.granularity.mask_shape(kernel_shape)
        self.mask = self.add_weight(
            name="mask",
            shape=shape,
            initializer=self._initial_mask,
            trainable=False,
            dtype=self.variable_dtype,
        )
        super().build(input_shape)
        # Both act on the variable, which is the raw kernel; the user meant them for the kernel in use.
        if self.kernel_regularizer is not None:
            self._kernel.regularizer = _EffectiveRegularizer(self.kernel_regularizer, self.mask)
        # Under JAX the optimizer's step is a pure function that is given no mask: there the masked entries of the raw
        # kernel may drift, unseen by `kernel` and by files, until `assign_mask` zeroes them.
        if keras.backend.backend() != "jax":
            self._kernel.constraint = _EffectiveConstraint(self.kernel_constraint, self.mask)

    def _initial_mask(self, shape, dtype=None):
        mask = self.mask_initializer(shape, dtype=dtype)
        with contextlib.suppress(NotImplementedError):  # in a layer built within a tf.function
            _check_binary("mask_initializer", mask)
            self._check_units("mask_initializer", mask)
        return mask

    def _check_units(self, argument, mask):
        mask = ops.convert_to_numpy(mask)
        if not self.granularity.accepts(mask, mask.shape):
            validation.fail(argument, f"keep or prune whole units of granularity '{self.granularity.name}'", mask)

    @property
    def kernel(self):
        """The effective kernel: exactly zero where pruned."""
        return super().kernel * self.mask

    def assign_mask(self, mask):
        """Replace the mask and zero the raw kernel wherever the old or the new mask prunes.

        `layer.mask.assign(...)` prunes at once as well; this method also checks the values, and makes weights
        that come back start from zero, whatever their variable still held.

        Args:
            mask: Array of 0 and 1 of the shape of `layer.mask`.

        Raises:
            ValueError: If the shape differs, or a value is neither 0 nor 1.
        """
        mask = np.asarray(mask)
        if mask.shape != tuple(self.mask.shape):
            rule = f"have the shape of the mask of layer '{self.name}', {tuple(self.mask.shape)}"
            validation.fail("mask", rule, mask.shape)
        _check_binary("mask", mask)
        self._check_units("mask", mask)
        kept_throughout = ops.multiply(self.mask, ops.cast(mask, self.mask.dtype))
        self._kernel.assign(ops.multiply(self._kernel, kept_throughout))
        self.mask.assign(mask)

    def quantize(self, *args, **kwargs):
        # `keras.Model.quantize` catches this, warns with it and goes on to the next layer.
        raise NotImplementedError(
            "A sparse layer cannot be quantized: Keras would compute with its raw kernel, past the "
            f"mask. Quantize `ks.strip(model)` instead. Received: layer={self.name!r}"
        )

    def save_own_variables(self, store):
        if not self.built:
            return
        entries = {}
        super().save_own_variables(entries)
        entries["0"] = self.kernel  # the effective kernel, also right after `mask.assign`
        entries["mask"] = self.mask
        for key, value in entries.items():
            store[key] = value

    def load_own_variables(self, store):
        entries = {key: store[key] for key in store.keys()}
        if self.built and "0" in entries:
            # Weights of the dense twin have no mask; the layer keeps the one it has.
            self.mask.assign(entries.setdefault("mask", self.mask))
        super().load_own_variables(entries)

    def get_config(self):
        config = super().get_config()
        config["granularity"] = granularities.serialize(self.granularity)
        config["mask_initializer"] = keras.initializers.serialize(self.mask_initializer)
        return config


class _EffectiveRegularizer(keras.regularizers.Regularizer):
    """Shows the user's regularizer the effective kernel in place of the raw one."""

    def __init__(self, regularizer, mask):
        self.regularizer = regularizer
        self.mask = mask

    def __call__(self, raw_kernel):
        return self.regularizer(raw_kernel * self.mask)


class _EffectiveConstraint(keras.constraints.Constraint):
    """Zeroes the masked weights, and shows the user's constraint, if there is one, what is left."""

    def __init__(self, constraint, mask):
        self.constraint = constraint
        self.mask = mask

    def __call__(self, raw_kernel):
        kernel = raw_kernel * self.mask
        return kernel if self.constraint is None else self.constraint(kernel) * self.mask


def _check_binary(argument, mask):
    mask = ops.convert_to_numpy(mask)
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        validation.fail(argument, "give zeros and ones only", wrong.ravel()[0].item())
