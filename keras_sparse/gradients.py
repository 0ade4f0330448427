"""Gradients of a model's loss on batches that a user gives, on the Keras backend at hand.

The forward pass runs in a `keras.StatelessScope`: it reads values that are put in place of variables, and what it would
write (moving averages, seeds, metrics) is dropped. So the model is left as it is, and weights that a mask prunes get
the gradient they would have if they took part.
"""

import itertools

import keras
import numpy as np
from keras import ops

from keras_sparse import validation

__all__ = ["Batches", "check_loss", "loss_gradients"]


class Batches:
    """Batches of examples, from whatever `fit` takes.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, `x` alone, or something that gives batches of this form
            each time it is iterated: a dataset, a `keras.utils.PyDataset`, a list. Or a function without arguments
            that returns any of these.
        batch_size: Examples of a batch, where `data` are arrays.
        count: How many batches are taken at a time.

    Raises:
        TypeError: If `data` is none of these, or an iterator, which can be used but once.
        ValueError: If a number is below 1.
    """

    def __init__(self, data, batch_size=32, count=1):
        self.data = data
        self.batch_size = validation.integer("batch_size", batch_size, at_least=1)
        self.count = validation.integer("batches", count, at_least=1)
        again = hasattr(data, "__iter__") and not hasattr(data, "__next__")
        if not (callable(data) or again or _is_array(data) or isinstance(data, keras.utils.PyDataset)):
            rule = "be arrays (x, y), a dataset that can be iterated again, or a function that returns one"
            validation.fail("data", rule, data, TypeError)

    def take(self, turn=0):
        """Yield `(x, y, sample_weight)`; of arrays, the batches that follow on from one turn to the next."""
        data = self.data() if callable(self.data) and not isinstance(self.data, keras.utils.PyDataset) else self.data
        if isinstance(data, tuple) or _is_array(data):
            arrays = keras.utils.unpack_x_y_sample_weight(data)
            examples = len(keras.tree.flatten(arrays[0])[0])
            for index in range(self.count):
                begin = (turn * self.count + index) * self.batch_size % examples
                rows = np.arange(begin, begin + min(self.batch_size, examples)) % examples
                yield tuple(_rows(part, rows) for part in arrays)
            return
        if isinstance(data, keras.utils.PyDataset):
            batches = (data[index % len(data)] for index in itertools.count(turn * self.count))
        else:
            batches = iter(data)
        taken = 0
        for batch in itertools.islice(batches, self.count):
            taken += 1
            yield keras.utils.unpack_x_y_sample_weight(batch)
        if not taken:
            validation.fail("data", "hold at least one batch", self.data)


def _rows(part, rows):
    return None if part is None else keras.tree.map_structure(lambda array: np.asarray(array)[rows], part)


def _is_array(data):
    return hasattr(data, "shape") and hasattr(data, "__getitem__")


def check_loss(model, loss):
    """Return the function of a loss, `None` for that of the compiled model; raise where there is neither."""
    if loss is None and not getattr(model, "compiled", False):
        validation.fail("loss", "be given where the model is not compiled", loss)
    return None if loss is None else keras.losses.get(loss)


def loss_gradients(model, weights, batch, loss=None):
    """Return the gradients of the loss on a batch with respect to weights, those a mask prunes included.

    The model is called as in training. Takes as long as a step of training, outside of a compiled function, and the
    memory of one gradient a weight while it runs.

    Args:
        model: A built Keras model.
        weights: Objects with `unmasked()`, pairs of variables and values that lift their mask, the weight itself first.
        batch: `(x, y, sample_weight)`.
        loss: Name, `keras.losses.Loss` or function of `(y, y_pred)`; `None` takes the compiled model's.

    Returns:
        List of float32 or float64 NumPy arrays, one a weight.

    Raises:
        NotImplementedError: If the backend is neither TensorFlow nor JAX.
    """
    backend = keras.backend.backend()
    if backend not in _DIFFERENTIATE:
        raise NotImplementedError(
            "Gradients of batches are computed on the backends " + ", ".join(_DIFFERENTIATE) + f"; this is {backend}."
        )
    loss = check_loss(model, loss)
    x, y, sample_weight = (keras.tree.map_structure(_to_tensor, part) for part in batch)
    unmasked = [weight.unmasked() for weight in weights]
    variables = [pairs[0][0] for pairs in unmasked]
    fixed = [(variable, ops.convert_to_tensor(value)) for pairs in unmasked for variable, value in pairs[1:]]
    # A loss in half precision may leave nothing of small gradients; the optimizer's scale is there for that.
    optimizer = getattr(model, "optimizer", None)
    scale = 1.0 if optimizer is None else float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))

    # In a stateless scope Keras shows regularisers what it maps, and nothing of other variables.
    mapped = {id(variable) for variable in [*variables, *(variable for variable, _ in fixed)]}
    regularized = [v for v in model.trainable_weights if v.regularizer is not None and id(v) not in mapped]
    fixed += [(variable, variable.value) for variable in regularized]

    def compute(values):
        with keras.StatelessScope(state_mapping=[*zip(variables, values), *fixed], collect_losses=True):
            training = {"training": True} if getattr(model, "_call_has_training_arg", False) else {}
            return scale * ops.cast(_loss(model, loss, x, y, model(x, **training), sample_weight), "float32")

    values = [ops.cast(pairs[0][1], pairs[0][0].dtype) for pairs in unmasked]
    gradients = (ops.convert_to_numpy(gradient) for gradient in _DIFFERENTIATE[backend](compute, values))
    return [g.astype(np.promote_types(g.dtype, "float32")) / scale for g in gradients]


def _loss(model, loss, x, y, y_pred, sample_weight):
    if loss is None:
        return model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    if isinstance(loss, keras.losses.Loss):
        value = loss(y, y_pred, sample_weight=sample_weight)
    else:
        value = loss(y, y_pred)
        value = ops.mean(value if sample_weight is None else value * ops.cast(sample_weight, value.dtype))
    return sum((ops.cast(ops.sum(own), value.dtype) for own in model.losses), value)


def _to_tensor(array):
    text = getattr(getattr(array, "dtype", None), "kind", "") in "OUS" and not hasattr(array, "device")
    return array if array is None or text else ops.convert_to_tensor(array)


def _differentiate_tensorflow(function, values):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        loss = function(values)
    gradients = tape.gradient(loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(gradient) for gradient in gradients]  # of embeddings, slices


def _differentiate_jax(function, values):
    import jax

    return jax.grad(function)(values)


_DIFFERENTIATE = {"tensorflow": _differentiate_tensorflow, "jax": _differentiate_jax}
