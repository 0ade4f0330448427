"""Dense model to sparse layers and back."""

import keras

from keras_sparse import granularity as granularities
from keras_sparse import selection, validation
from keras_sparse.layers import BaseSparse, SparseConv2D, SparseDense
from keras_sparse.surgery.transform import check_supported, graph_layers, transform

__all__ = ["dense_twin", "sparsifiable_layers", "sparsify", "strip", "with_sparse_layers"]

# Exact classes: a user's subclass of Conv2D has a `call` that the sparse layer would not run.
_SPARSE_TWIN = {keras.layers.Conv2D: SparseConv2D, keras.layers.Dense: SparseDense}
_DENSE_TWIN = {sparse: dense for dense, sparse in _SPARSE_TWIN.items()}


def sparsify(model, granularity="connection", include=None, exclude=None, mask_initializer="ones"):
    """Return the model with sparse layers in place of its convolutions and dense layers.

    Weights are kept and, unless told otherwise, all masks are ones, so the new model computes what the old one does.
    `Conv2D` becomes `SparseConv2D` and `Dense` becomes `SparseDense`; other layers, subclasses of the two included,
    are copied.

    ```python
    sparse = ks.sparsify(model, granularity="connection", exclude=["conv1", "logits"])
    sparse.compile(...)
    sparse.fit(..., callbacks=[ks.callbacks.GradualPruning(schedule)])
    ```

    Args:
        model: A built Sequential or functional model. Nested models and shared layers are followed.
        granularity: Granularity of the masks, a name or a `Granularity`.
        include: Which layers: a name, a path in a nested model (`"block/conv1"`), a regular expression matched against
            the whole of either, a layer class, or a list of these. `None`: all that have a sparse twin.
        exclude: The same, for layers to leave dense; wins over `include`.
        mask_initializer: Initializer of the masks, giving zeros and ones: `ks.initializers.PatternMask("cross")` or
            `ks.initializers.RandomMask(0.9)` for a network that is sparse before it is trained.

    Returns:
        A new model; `model` is left as it is. Compiled like `model`, with a fresh optimizer, where that was compiled.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If `model` is subclassed or not built, a pattern matches no layer, or nothing is left to do.
    """
    check_supported(model, "sparsify it")
    granularity = granularities.get(granularity)
    known, parents = selection.flatten_layers(model), selection.parents_of(model)
    chosen = selection.select(sparsifiable_layers(model), include, exclude, known=known, parents=parents)
    if not chosen:
        rule = "hold a Conv2D or Dense layer that `include` names and `exclude` does not"
        validation.fail("model", rule, model.name)
    return with_sparse_layers(model, chosen.values(), granularity, mask_initializer)


def sparsifiable_layers(model):
    """Return `{path: layer}` of the layers that have a sparse twin to take their place."""
    # Children of wrappers and composite layers cannot be exchanged from outside.
    outer = graph_layers(model)
    return {
        path: layer
        for path, layer in selection.flatten_layers(model).items()
        if type(layer) in _SPARSE_TWIN and id(layer) in outer and not _is_quantized(layer)
    }


def with_sparse_layers(model, layers, granularity, mask_initializer="ones"):
    """Return the model with sparse twins, of a `Granularity`, in place of some of its layers."""
    identities = {id(layer) for layer in layers}

    def exchange(layer):
        if id(layer) not in identities:
            return None
        config = {
            **layer.get_config(),
            "granularity": granularities.serialize(granularity),
            "mask_initializer": mask_initializer,
        }
        return _SPARSE_TWIN[type(layer)].from_config(config), _copy_kernel_and_bias

    return transform(model, exchange)


def strip(model):
    """Return the model with plain Keras layers in place of the sparse ones.

    The kernels hold exact zeros where weights were pruned; outputs are the same, and neither loading nor serving the
    result needs keras_sparse.

    Args:
        model: A built Sequential or functional model.

    Returns:
        A new model, compiled like `model` where that was compiled. Without sparse layers in it, it is a plain copy.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If `model` is subclassed or not built, or holds a sparse layer in a wrapper.
    """
    check_supported(model, "strip it")
    outer = graph_layers(model)
    for path, layer in selection.flatten_layers(model).items():
        if isinstance(layer, BaseSparse) and id(layer) not in outer:
            rule = f"hold no sparse layer inside another layer, as it does '{path}'"
            validation.fail("model", rule, model.name)

    return transform(model, dense_twin)


def dense_twin(layer):
    """Return the plain Keras twin of a sparse layer and how its weights get there; `None` for any other layer."""
    if not isinstance(layer, BaseSparse):
        return None
    dense = next(_DENSE_TWIN[cls] for cls in type(layer).__mro__ if cls in _DENSE_TWIN)
    config = layer.get_config()
    del config["granularity"], config["mask_initializer"]
    config.pop("lora_rank", None)  # the effective kernel holds the update already
    config.pop("lora_alpha", None)
    return dense.from_config(config), _copy_kernel_and_bias


def _is_quantized(layer):
    return getattr(layer, "quantization_mode", None) is not None


def _copy_kernel_and_bias(old, new):
    kernel = old.kernel
    if isinstance(new, BaseSparse):  # whose initial mask may prune
        kernel = kernel * new.mask
    new._kernel.assign(kernel)
    if old.bias is not None:
        new.bias.assign(old.bias)
