"""The mask interface: what a callback needs of a weight, whoever holds its mask."""

import math

import keras
import numpy as np
from keras import ops

from keras_sparse import allocation as allocations
from keras_sparse import granularity as granularities
from keras_sparse import selection, validation
from keras_sparse.layers import BaseSparse

__all__ = ["MaskedWeight", "masked_weights"]


class MaskedWeight:
    """A weight tensor and its mask.

    Attributes:
        name: Path of the layer in the model, with the weight's key behind it where the layer has several.
        layer: The layer.
        variable: The `keras.Variable` that is trained.
        granularity: The `Granularity` the callback prunes at.
        mask: NumPy array of the shape of the granularity's units, zeros and ones.
    """

    def __init__(self, weight, granularity):
        self.weight = weight
        self.name = weight.name
        self.layer = weight.layer
        self.variable = weight.variable
        self.granularity = granularity

    def kernel(self):
        """Return the effective kernel as a NumPy array."""
        raise NotImplementedError

    def mask(self):
        """Return which units are kept, as a NumPy array of zeros and ones."""
        raise NotImplementedError

    def kept(self):
        """Return the mask for somebody who only looks: without one that is in force, what the zeros say."""
        return self.mask()

    def assign(self, mask):
        """Set which units are kept; pruned weights are zero from here on, returning ones start at zero."""
        raise NotImplementedError

    def fill(self, values, where):
        """Set weights to `values` where `where`, broadcast to the kernel, is true."""
        where = np.broadcast_to(where, self._kernel_shape)
        values = ops.cast(values, self.variable.dtype)
        self.variable.assign(ops.where(where, values, ops.convert_to_tensor(self.variable)))

    def pruned(self):
        """Return how many of the kernel's weights the mask sets to zero."""
        return self.size - self.count(self.mask())

    def expand(self, units):
        """Return units in the shape of the mask, which broadcasts to the kernel."""
        return self.granularity.expand(units, self._kernel_shape)

    def unmasked(self):
        """Return pairs of variables and values with which a forward pass sees this weight without its mask.

        The variable that is trained comes first, with the effective kernel as its value.
        """
        return [(self.variable, self.kernel())]

    @property
    def can_grow(self):
        """Whether a unit that has been pruned can come back whole."""
        return True

    def candidate(self, scores):
        """Return what an allocation is told of this weight."""
        preferred = self.granularity.preferred(scores)
        return allocations.Candidate(
            scores, self.granularity.unit_sizes(self._kernel_shape), self._kernel_shape, preferred
        )

    def release(self):
        """Called when training begins: undo what a run that an exception ended has left behind."""

    def attach(self, model):
        """Called before the first batch, after a saved state has been restored."""

    def after_batch(self, optimizer):
        """Called after each training batch."""

    def detach(self):
        """Called after training."""

    @property
    def size(self):
        return math.prod(self._kernel_shape)

    @property
    def unit_size(self):
        return self.granularity.unit_size(self._kernel_shape)

    def count(self, units):
        """Return how many weights the units hold that are not zero in the array `units`."""
        return self.granularity.count_weights(units, self._kernel_shape)

    @property
    def _kernel_shape(self):
        return tuple(self.variable.shape)


class LayerMask(MaskedWeight):
    """The kernel and mask of a sparse layer."""

    def __init__(self, weight, granularity=None):
        layer = weight.layer
        granularity = granularity or layer.granularity
        super().__init__(weight, granularity)
        shape, own = granularity.mask_shape(self._kernel_shape), tuple(layer.mask.shape)
        if not (granularities.broadcastable(shape, own) and layer.granularity.admits(granularity)):
            validation.fail(
                "granularity",
                f"be None or one whose units hold whole units of layer '{self.name}', which has granularity "
                f"'{layer.granularity.name}'",
                granularity.name,
            )

    def kernel(self):
        return _to_numpy(self.layer.kernel)

    def unmasked(self):
        return [*super().unmasked(), (self.layer.mask, ops.ones_like(self.layer.mask))]

    def mask(self):
        own = _to_numpy(self.layer.mask)
        shape = self.granularity.mask_shape(self._kernel_shape)
        axes = tuple(i for i, (have, want) in enumerate(zip(own.shape, shape)) if have != want)
        return self.granularity.contract(own.max(axis=axes, keepdims=True) if axes else own, self._kernel_shape)

    def assign(self, mask):
        mask = self.granularity.expand(mask, self._kernel_shape)
        # A coarser granularity than the layer's own writes whole units and leaves what was pruned inside them.
        if not self.can_grow:
            mask = mask * _to_numpy(self.layer.mask)
        self.layer.assign_mask(mask)

    @property
    def can_grow(self):
        units, mask = (
            shape(self._kernel_shape) for shape in (self.granularity.units_shape, self.granularity.mask_shape)
        )
        coarser = units != mask and self.granularity != self.layer.granularity
        return not coarser and mask == tuple(self.layer.mask.shape)

    def detach(self):
        # The averages that an optimizer with `use_ema` puts in the weights' place in the end know no mask.
        self.layer.assign_mask(_to_numpy(self.layer.mask))

    def pruned(self):
        own = _to_numpy(self.layer.mask)
        return (own.size - int(np.count_nonzero(own))) * (self.size // own.size)


class InPlaceMask(MaskedWeight):
    """A weight of a plain Keras layer, pruned in place: the zeros are the only trace in the saved model.

    Units that are exactly zero when training starts count as pruned, so that a resumed run, or the fine-tuning
    of a pruned model, knows its masks. A kernel of zeros alone is an untrained one and keeps its units.
    """

    def __init__(self, weight, granularity):
        super().__init__(weight, granularity or granularities.get("weight"))
        shape = self.granularity.mask_shape(self._kernel_shape)
        if not self.granularity.is_single_weights and not selection.ends_in_channels(weight):
            rule = (
                f"be 'weight' for '{self.name}': the last two axes of its {weight.key}, of shape {self._kernel_shape}, "
                "are not input and output channels"
            )
            validation.fail("granularity", rule, self.granularity.name)
        self._mask = keras.Variable(np.ones(shape, "float32"), trainable=False, name=f"{weight.key}_mask")
        self._model = None

    def kernel(self):
        return _to_numpy(self.variable)

    def mask(self):
        return self.granularity.contract(_to_numpy(self._mask), self._kernel_shape)

    def kept(self):
        return self.granularity.reduce(self.kernel() != 0, np.max).astype("float32")

    def assign(self, mask):
        mask = self.granularity.expand(mask, self._kernel_shape)
        kept_throughout = _to_numpy(self._mask) * mask
        self._mask.assign(mask)
        self.variable.assign(ops.multiply(self.variable, ops.cast(kept_throughout, self.variable.dtype)))

    def release(self):
        if isinstance(self.variable.constraint, _KeepPruned):
            self.variable.constraint = self.variable.constraint.users_constraint

    def attach(self, model):
        # A constraint runs inside the optimizer's step, so that no file written by any callback, in any order,
        # can hold a pruned weight that momentum or weight decay has moved.
        # Under JAX, whose optimizer step is a pure function of the model's variables, after_batch does it.
        if keras.backend.backend() != "jax":
            if not isinstance(self.variable.constraint, _KeepPruned):
                self.variable.constraint = _KeepPruned(self.variable.constraint)
            self.variable.constraint.masks[id(self)] = self._mask
        self._model = model
        if getattr(model, "train_function", None) is not None:
            model.make_train_function(force=True)  # traced without the constraint, possibly
        mask = self.granularity.reduce(self.kernel() != 0, np.max).astype("float32")
        mask = mask if mask.any() else np.ones_like(mask)
        self._mask.assign(self.granularity.expand(mask, self._kernel_shape))

    def after_batch(self, optimizer):
        if keras.backend.backend() == "jax":
            self.variable.assign(self.variable * ops.cast(self._mask, self.variable.dtype))
        if not getattr(optimizer, "use_ema", False) or not optimizer.built:
            return
        # The averages are taken before constraints are applied, and overwrite the weights in the end.
        averages = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average)
        for variable, average in averages:  # that of a frozen layer is not among them
            if variable is self.variable:
                average.assign(average * ops.cast(self._mask, average.dtype))

    def detach(self):
        constraint = self.variable.constraint
        if isinstance(constraint, _KeepPruned):
            constraint.masks.pop(id(self), None)
            if not constraint.masks:
                self.variable.constraint = constraint.users_constraint
        self._model.train_function = None
        self.variable.assign(ops.multiply(self.variable, ops.cast(self._mask, self.variable.dtype)))


class _KeepPruned(keras.constraints.Constraint):
    """Constraint that holds pruned weights at zero, whatever the user's own constraint makes of them.

    One for a variable, with a mask for each callback that prunes it.
    """

    def __init__(self, users_constraint):
        self.users_constraint = users_constraint
        self.masks = {}

    def __call__(self, kernel):
        kept = 1
        for mask in self.masks.values():
            kept = kept * ops.cast(mask, kernel.dtype)
        kernel = kernel * kept
        return kernel if self.users_constraint is None else self.users_constraint(kernel) * kept


def _to_numpy(tensor):
    array = ops.convert_to_numpy(tensor)
    # NumPy counts and adds up half precisions in half precision: a mask of bfloat16 would have 256 ones at most.
    return array.astype(np.promote_types(array.dtype, "float32"))


def masked_weights(model, granularity=None, include=None, exclude=None, weights=None):
    """Return the weights of `model` that a callback is to drive.

    Those of its sparse layers, and those of plain layers where it has no sparse ones or `include` or `weights` asks
    for them.

    Args:
        model: A built Keras model.
        granularity: A `Granularity`, or `None` for the layers' own.
        include: As in `selection.select_weights`.
        exclude: As in `selection.select_weights`.
        weights: As in `selection.prunable_weights`.

    Raises:
        ValueError: If the model has no weights yet, or nothing in it can be pruned.
    """
    if not model.built:
        rule = "be built before it is pruned: give it an `Input` layer or call `model.build(input_shape)`"
        validation.fail("model", rule, model.name)
    candidates = selection.prunable_weights(model, weights)
    if include is None and any(map(_is_sparse, candidates)):
        candidates = [w for w in candidates if _is_sparse(w) or any(map(w.named_by, weights or ()))]
    chosen = selection.select_weights(candidates, include, exclude, known=selection.flatten_layers(model))
    if not chosen:
        rule = "hold a layer with a kernel that `include` names and `exclude` does not"
        validation.fail("model", rule, model.name)
    return [(LayerMask if _is_sparse(weight) else InPlaceMask)(weight, granularity) for weight in chosen]


def _is_sparse(weight):
    return isinstance(weight.layer, BaseSparse) and weight.key == "kernel"
