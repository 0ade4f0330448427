"""A regularizer on the kernels of a model for the time of one `model.fit`."""

import keras
from keras import ops

from keras_sparse import validation
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.layers import BaseSparse

__all__ = ["Regularization"]


class Regularization(keras.callbacks.Callback):
    r"""Adds a regularizer to the kernels of a model while `fit` runs, and takes it off in the end.

    $$L' = L + \sum_l \Omega(K_l)$$

    Nothing of the model has to be built anew, and no file that is saved meanwhile knows of the penalty: it belongs to
    this training, not to the model. Regularizers that the layers have themselves stay in force beside it. Sparse layers
    show it the effective kernel.

    Group-wise sparsification with fine-tuning (Lebedev & Lempitsky, 2016, section 4.2) trains with the group lasso,
    prunes the weakest groups and goes on without it:

    ```python
    model = ks.sparsify(model, granularity="group")
    model.compile("adam", loss, metrics=["accuracy"])
    lasso = ks.callbacks.Regularization(ks.regularizers.GroupLasso(1e-3))
    model.fit(x, y, epochs=10, callbacks=[lasso])

    pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(0.9), criterion="l2")
    pruning.start(model)  # keeps a tenth of the groups, those with the largest norms; masks stay from here on
    pruning.finish()
    model.fit(x, y, epochs=10)  # the fine-tuning
    ```

    In a training loop of your own, call `start(model)` before the train step is traced and `finish()` after it; the
    penalty is part of `sum(model.losses)`.

    Args:
        regularizer: Keras regularizer or its name; `ks.regularizers.GroupLasso(...)`, for instance.
        include: Which layers: name, path in a nested model, regular expression, layer class, or a list of these.
            `None`: the model's sparse layers; in a model without any, all layers whose kernels can be pruned.
        exclude: The same, for layers to leave alone; wins over `include`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `regularizer` is an unknown name, or a pattern matches no layer.
    """

    def __init__(self, regularizer, include=None, exclude=None):
        super().__init__()
        checked = keras.regularizers.get(regularizer)
        if checked is None:
            validation.fail("regularizer", "be a Keras regularizer or its name", regularizer, TypeError)
        self.regularizer = checked
        self.include = include
        self.exclude = exclude
        self._weights = None
        self._attached = False

    def _take(self, model):
        """Return the `MaskedWeight`s of a model whose kernels are regularized; raise where there are none."""
        return masked_weights(model, None, self.include, self.exclude)

    # Keras calls these.

    def set_model(self, model):
        self.finish()
        super().set_model(model)
        self._weights = self._take(model)

    def on_train_begin(self, logs=None):
        for weight in self._weights:
            weight.variable.regularizer = _without(weight.variable.regularizer, None)

    def on_epoch_begin(self, epoch, logs=None):
        # Here, not in on_train_begin: by now every callback has taken off what an exception left on the model.
        if not self._attached:
            self._attach()

    def on_train_end(self, logs=None):
        self.finish()

    # Training loops of one's own call these.

    def start(self, model):
        """Take hold of a model; call it before the train step is traced.

        Args:
            model: A built Keras model.
        """
        self.set_model(model)
        self._attach()

    def finish(self):
        """Take the regularizer off the model. `fit` calls it by itself, unless an exception ends it."""
        if self._attached:
            for weight in self._weights:
                kernel = weight.variable
                kernel.regularizer = _without(kernel.regularizer, self)
            self.model.train_function = self.model.test_function = None  # traced again when they are needed
        self._attached = False

    # The work.

    def _attach(self):
        for weight in self._weights:
            kernel = weight.variable
            mask = weight.layer.mask if isinstance(weight.layer, BaseSparse) else None
            kernel.regularizer = _Added(self.regularizer, kernel.regularizer, mask, self)
        self._retrace()
        self._attached = True

    def _retrace(self):
        """Make the compiled steps read the regularizers anew, also in the midst of `fit`."""
        if getattr(self.model, "train_function", None) is not None:
            self.model.make_train_function(force=True)
        self.model.test_function = None


class _Added(keras.regularizers.Regularizer):
    """A regularizer on top of the one that the variable had before."""

    def __init__(self, regularizer, before, mask, owner):
        self.regularizer = regularizer
        self.before = before
        self.mask = mask
        self.owner = owner

    def __call__(self, raw_kernel):
        kernel = raw_kernel if self.mask is None else raw_kernel * ops.cast(self.mask, raw_kernel.dtype)
        penalty = self.regularizer(kernel)
        return penalty if self.before is None else penalty + ops.cast(self.before(raw_kernel), penalty.dtype)


def _without(regularizer, owner):
    """Return a variable's regularizer without what `owner` has added; `None` stands for all owners."""
    if not isinstance(regularizer, _Added):
        return regularizer
    before = _without(regularizer.before, owner)
    if owner is None or regularizer.owner is owner:
        return before
    return _Added(regularizer.regularizer, before, regularizer.mask, regularizer.owner)
