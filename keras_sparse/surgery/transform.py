"""Rebuilding a model with some of its layers exchanged, weights kept."""

import contextlib
import tempfile
import warnings

import keras

__all__ = ["check_supported", "functional_graph", "graph_layers", "is_graph", "transform"]


def check_supported(model, verb):
    """Raise unless `model` is a built Sequential or functional Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model to {verb}. Received: model={model!r}")
    if not is_graph(model):
        raise ValueError(
            f"`model` must be a Sequential or functional model to {verb}: the layers of a subclassed model are called "
            "from its own Python code, where they cannot be exchanged. Build it from `keras_sparse.layers` directly "
            "(`SparseConv2D` in place of `Conv2D`), or add `GradualPruning` to `fit`, which prunes the layers it has. "
            f"Received: model={model.name!r} of class {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built to {verb}, so that its weights can be kept: give it an `Input` layer or call "
            f"`model.build(input_shape)`. Received: model={model.name!r}, not built"
        )


def is_graph(model):
    """Return whether the layers of `model` are called by Keras, not by Python code of the model's own."""
    # `keras.Model(inputs, outputs)` is of the class that this private name exports; there is no public one.
    return isinstance(model, (keras.Sequential, keras.src.models.Functional))


def functional_graph(model):
    """Return the functional model that a Sequential or functional one runs; `None` where it has none."""
    # Sequential makes one of its own where its layers know their shapes.
    return model._functional if isinstance(model, keras.Sequential) else model


def graph_layers(model):
    """Return the ids of the layers that the graphs of `model` and its nested models call themselves.

    These `transform` can exchange, and not those that a wrapper or a composite layer calls.
    """
    found = set()
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= graph_layers(layer) if is_graph(layer) else set()
        else:
            found.add(id(layer))
    return found


def transform(model, exchange, inference=False, nested_inputs=None):
    """Return a new model in which `exchange` replaced layers; all other layers are copied.

    Nested models are opened, and a layer that is called several times, in one model or in several, stays one layer.

    Args:
        model: A built Sequential or functional model; it is left as it is.
        exchange: Called with each layer. Returns `None` to copy it, or a pair of a new unbuilt layer and a function
            `transfer(old, new)` that sets the new layer's weights once it is built.
        inference: Whether the new model is only called: it is not compiled then, and may lose a `train_step`.
        nested_inputs: Called with each nested model. Returns new input tensors in the structure of its own ones, where
            their shapes change, or `None`.

    Returns:
        The new model. Where `model` was compiled, so is the result, with a fresh optimizer.

    Raises:
        ValueError: If it or a model in it overrides `call` in a class that Keras cannot rebuild.
    """
    copies, transfers = {}, []

    def clone(layer):
        if is_graph(layer):
            # By hand: `recursive=True` goes one level deep in older Keras 3.
            inputs = nested_inputs(layer) if nested_inputs else None
            return keras.models.clone_model(layer, inputs, clone_function=clone, cache=copies)
        exchanged = exchange(layer)
        if exchanged is None:
            copy, transfer = _copy_layer(layer), _copy_state
        else:
            copy, transfer = exchanged
        transfers.append((layer, copy, transfer))
        return copy

    with _uncompiled(model):
        # One cache over all recursion levels keeps layers shared between nested models shared.
        result = keras.models.clone_model(model, _input_tensors(model), clone_function=clone, cache=copies)
    if not result.built:
        result.build(model.input_shape)
    for old, new, transfer in transfers:
        transfer(old, new)
    copies[id(model)] = result
    for old in _graphs(model):
        _check_same_call(old, copies[id(old)])
        # Past the setter, which would set all layers inside alike; their configs gave them theirs.
        copies[id(old)]._trainable = old.trainable
    if inference:
        return result
    if type(result) is not type(model):
        warnings.warn(
            f"The result is a plain {type(result).__name__} model: Keras cannot make a "
            f"{type(model).__name__}, the class of '{model.name}', of inputs and outputs. Methods of "
            "that class, such as `train_step`, are lost.",
            stacklevel=3,
        )
    for old in _graphs(model):
        if old.compiled:
            _compile_like(old, copies[id(old)])
    return result


def _input_tensors(model):
    """Return inputs like the model's: those `clone_model` makes are renamed, dense and never optional."""
    if isinstance(model, keras.Sequential):
        return None

    def copy(tensor):
        layer = tensor._keras_history.operation
        return layer.__class__.from_config(layer.get_config()).output

    return keras.tree.map_structure(copy, model.input)


def _graphs(model):
    """Yield the model and its nested models, each after all that hold it, some more than once."""
    yield model
    for layer in model.layers:
        if is_graph(layer):
            yield from _graphs(layer)


def _check_same_call(old, new):
    if type(old).call is not type(new).call:
        raise ValueError(
            "`model` must not be or hold a model that overrides `call`, unless its constructor takes "
            "`inputs` and `outputs`: Keras rebuilds it from its layers, and its own code would be "
            "lost. "
            f"Received: model={old.name!r} of class {type(old).__name__}"
        )


def _copy_layer(layer):
    if type(layer) is keras.layers.Lambda:
        # With the function itself: Keras does not read a lambda back from a config.
        return keras.layers.Lambda(
            layer.function,
            layer._output_shape,
            layer.mask,
            layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    return layer.__class__.from_config(layer.get_config())


def _copy_state(old, new):
    if not isinstance(old, keras.Layer):
        return  # a bare operation of a functional graph
    new.set_weights(old.get_weights())
    # Preprocessing layers hold more than weights: constants computed from them, or a vocabulary.
    for old_part, new_part in zip(old._flatten_layers(), new._flatten_layers()):
        if hasattr(old_part, "adapt"):
            variables = {}
            old_part.save_own_variables(variables)
            new_part.load_own_variables(variables)
        if hasattr(old_part, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                old_part.save_assets(folder)
                new_part.load_assets(folder)


@contextlib.contextmanager
def _uncompiled(model):
    """Keep `clone_model` from compiling: it fails on a loss that is not registered with Keras."""
    compiled = [graph for graph in _graphs(model) if graph.compiled]
    for graph in compiled:
        graph.compiled = False
    try:
        yield
    finally:
        for graph in compiled:
            graph.compiled = True


def _compile_like(old, new):
    if type(new).compile is not keras.Model.compile:
        new.compile_from_config(old.get_compile_config())  # the class's own, or Keras's warning
        return
    arguments = dict(old._compile_config.config)
    arguments["optimizer"] = _fresh(old.optimizer)
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_fresh, arguments[name])
    # The optimizer is wrapped already where the loss is to be scaled.
    new.compile(**arguments, auto_scale_loss=False)
    if new.optimizer is not None:
        new.optimizer.build(new.trainable_variables)


def _fresh(part):
    """Return an optimizer or metric of the same configuration without its state; anything else as it is."""
    if isinstance(part, (keras.optimizers.Optimizer, keras.Metric)):
        return part.__class__.from_config(part.get_config())
    return part
