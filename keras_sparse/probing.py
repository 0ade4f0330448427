"""Running a model once to see the shapes its layers work on."""

import contextlib
import dataclasses

import keras
import numpy as np

from keras_sparse import selection, validation

__all__ = ["LayerCall", "concrete_input_shapes", "input_structure", "record_calls", "zeros_like_inputs"]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """Shapes of one call of a layer, the batch axis (of size 1) included."""

    input_shape: tuple
    output_shape: tuple


def input_structure(model):
    """Return the model's symbolic inputs, in the structure that the model is called with."""
    if not getattr(model, "inputs", None):
        rule = "be a built Sequential or functional model"
        validation.fail("model", rule, getattr(model, "name", model))
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def concrete_input_shapes(model, input_shape=None):
    """Return the shapes of the model's inputs without the batch axis, all sizes known.

    Args:
        model: A built Sequential or functional model.
        input_shape: Shape without the batch axis, for a model of one input whose own shape has unknown sizes.

    Raises:
        ValueError: If sizes stay unknown, or `input_shape` contradicts the model.
    """
    specs = keras.tree.flatten(input_structure(model))
    if input_shape is None:
        shapes = [tuple(spec.shape[1:]) for spec in specs]
        if any(size is None for shape in shapes for size in shape):
            rule = f"be given, since the model's input has unknown sizes, {[tuple(s.shape) for s in specs]}"
            validation.fail("input_shape", rule, input_shape)
        return shapes
    if len(specs) != 1:
        rule = f"be None for a model of {len(specs)} inputs; give its `Input` layers full shapes"
        validation.fail("input_shape", rule, input_shape)
    own = tuple(specs[0].shape[1:])
    fits = len(own) == len(input_shape) and all(a in (None, b) for a, b in zip(own, input_shape))
    if not fits:
        validation.fail("input_shape", f"fit the model's input {own}, without the batch axis", input_shape)
    return [tuple(int(size) for size in input_shape)]


def zeros_like_inputs(model, shapes, batch_size=1):
    """Return zeros in the structure and dtype of the model's inputs, `batch_size` examples each."""
    shapes = iter(shapes)

    def zeros(spec):
        dtype = keras.backend.standardize_dtype(spec.dtype)
        # NumPy knows no "string"; its zeros of text are empty.
        return np.zeros((batch_size, *next(shapes)), "U1" if dtype == "string" else dtype)

    return keras.tree.map_structure(zeros, input_structure(model))


def record_calls(model, input_shape=None):
    """Return `{path: [LayerCall, ...]}`: the shapes of every call of every layer for one example.

    The model is run once on zeros, so shared layers, nested models and layers that subclassed parts call in their own
    code are all seen as they are used. A model made for batches of one size is run on such a batch.
    """
    shapes = concrete_input_shapes(model, input_shape)
    layers = selection.flatten_layers(model)
    calls = {path: [] for path in layers}
    batch_size = keras.tree.flatten(input_structure(model))[0].shape[0] or 1
    states = [state for layer in layers.values() if getattr(layer, "stateful", False) for state in _states(layer)]
    before = [keras.ops.convert_to_numpy(state) for state in states]
    with contextlib.ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(_recording(layer, calls[path], batch_size))
        model(zeros_like_inputs(model, shapes, batch_size), training=False)
    for state, value in zip(states, before):
        state.assign(value)
    return calls


def _states(layer):
    """Return the variables in which a stateful recurrent layer keeps what it hands on to the next batch."""
    return [state for state in keras.tree.flatten(getattr(layer, "states", None)) if isinstance(state, keras.Variable)]


@contextlib.contextmanager
def _recording(layer, calls, batch_size):
    original = layer.call

    def of_one_example(tensor):
        shape = tuple(np.shape(tensor))
        return (shape[0] // batch_size, *shape[1:]) if batch_size > 1 and shape else shape

    def call(*args, **kwargs):
        outputs = original(*args, **kwargs)
        first_input = keras.tree.flatten((args, kwargs))[0]
        first_output = keras.tree.flatten(outputs)[0]
        calls.append(LayerCall(of_one_example(first_input), of_one_example(first_output)))
        return outputs

    # Past Keras's attribute tracking, which would take the method for a part of the layer's state.
    object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        object.__delattr__(layer, "call")
