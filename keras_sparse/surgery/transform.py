"""Rebuilding a model with some of its layers exchanged, weights kept."""

import keras

__all__ = ["check_supported", "is_graph", "transform"]


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


def transform(model, exchange):
    """Return a new model in which `exchange` replaced layers; all other layers are copied.

    Nested models are opened, and a layer that is called several times, in one model or in several, stays one layer.

    Args:
        model: A built Sequential or functional model; it is left as it is.
        exchange: Called with each layer. Returns `None` to copy it, or a pair of a new unbuilt layer and a function
            `transfer(old, new)` that sets the new layer's weights once it is built.

    Returns:
        The new model. Where `model` was compiled, so is the result, with a fresh optimizer.
    """
    clones = []

    def clone(layer):
        exchanged = exchange(layer)
        if exchanged is None:
            copy, transfer = layer.__class__.from_config(layer.get_config()), _copy_weights
        else:
            copy, transfer = exchanged
        clones.append((layer, copy, transfer))
        return copy

    # One cache over all recursion levels keeps layers shared between nested models shared.
    result = keras.models.clone_model(model, clone_function=clone, recursive=True, cache={})
    if not result.built:
        result.build(model.input_shape)
    for old, new, transfer in clones:
        transfer(old, new)
    return result


def _copy_weights(old, new):
    if getattr(old, "weights", None):  # bare operations of a functional graph have none
        new.set_weights(old.get_weights())
