"""Depth multiplier: the same network with fewer filters in every convolution."""

import math

import keras
import numpy as np

from keras_sparse import selection, validation
from keras_sparse.surgery.channels import ChannelGraph
from keras_sparse.surgery.transform import check_supported, functional_graph, transform

__all__ = ["depth_multiplier"]

layers = keras.layers
_CONVOLUTIONS = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.SeparableConv1D, layers.SeparableConv2D),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
)


def depth_multiplier(model, multiplier, of="filters", include=None, exclude=None, rounding=None):
    r"""Return a new network that has \(\lceil \alpha n \rceil\) filters where each convolution of `model` has \(n\).

    With \(\alpha\) the multiplier, parameters and multiply-adds of a layer become about \(\alpha^2\) of what they were
    (section 3.1). With `of="connections"` depths are scaled by \(\sqrt\alpha\) instead, so that about \(\alpha\) of the
    connections are left: the network to compare random tables of density \(\alpha\) with (section 5.2.1).

    ```python
    small = ks.depth_multiplier(model, 0.5)
    small.compile(...)
    small.fit(...)  # it is not trained

    # Both at once, as "0.50/0.01" in Table 1: half the filters, and 1% of the connections between them.
    sparse = ks.sparsify(ks.depth_multiplier(model, 0.5), granularity="connection", include=keras.layers.Conv2D)
    ks.random_tables(sparse, density=0.01)
    ```

    Whatever follows a convolution follows its channels: normalization, depthwise convolutions, dense layers after a
    flatten. Dense layers keep their units. So do convolutions whose channels are the model's prediction, such as the
    classifier of a fully convolutional network, and those that are added to the model's own input.

    Args:
        model: A built Sequential or functional model. Nested models and shared layers are followed.
        multiplier: The multiplier \(\alpha\), in (0, 1].
        of: What it is the share of: `"filters"` or `"connections"`.
        include: Which layers get fewer filters, or units: a name, a path in a nested model, a regular expression
            matched against the whole of either, a layer class, or a list of these. `None`: all convolutions whose
            channels are not the prediction. A layer that is named is thinned in any case, also a dense one.
        exclude: The same, for layers to keep as they are; wins over `include`.
        rounding: Function from the scaled number of filters of a layer, a float, to the number it gets. `None`: rounded
            up. `lambda n: max(8, int(n) // 8 * 8)` gives the multiples of 8 that the counts of Table 1 are of.

    Returns:
        A new model with new initial weights; the masks of sparse layers are what their initializers make. What
        preprocessing layers have adapted to is kept. Compiled like `model`, with a fresh optimizer, where that was
        compiled.

    Raises:
        TypeError: If `model` is no Keras model or `multiplier` no number.
        ValueError: If `multiplier` is outside (0, 1], `rounding` gives no positive integer, `model` is subclassed or
            not built, no layer is left to thin, or the network cannot be made with these numbers of channels: an
            addition of layers whose filters are rounded apart, groups that do not divide them, a `Reshape` that mixes
            channels.

    Reference:
        Changpinyo, Sandler & Zhmoginov (2017), *The Power of Sparsity in Convolutional Neural Networks*, section 3.1.
    """
    multiplier = validation.fraction("multiplier", multiplier, low_open=True)
    validation.one_of("of", of, ("filters", "connections"))
    check_supported(model, "make a narrower one of it")
    graph = ChannelGraph(model)
    factor = multiplier if of == "filters" else multiplier**0.5
    chosen = _choose(model, graph, include, exclude)
    rounding = rounding or _rounded_up
    counts = {id(layer): _thinned(_units(layer) * factor, rounding, path) for path, layer in chosen.items()}
    widths = _Widths(graph, model, counts)

    def exchange(layer):
        # Copied as they are: operations, functions, and what has been adapted to data.
        if not isinstance(layer, keras.Layer) or isinstance(layer, layers.Lambda) or hasattr(layer, "adapt"):
            return None
        config = {**_unbuilt(layer.get_config()), **widths.config_of(layer)}
        return layer.__class__.from_config(config), lambda old, new: None

    try:
        return transform(model, exchange, nested_inputs=widths.nested_inputs)
    except ValueError as error:
        if str(error).startswith("`model` must"):
            raise
        rule = f"have layers that take fewer channels, or `exclude` those whose channels they count ({error})"
        raise ValueError(f"`model` must {rule}. Received: model={model.name!r}") from error


def _unbuilt(config):
    """Return a configuration without the shapes that layers inside a layer were built for."""
    if isinstance(config, dict):
        return {key: _unbuilt(value) for key, value in config.items() if key != "build_config"}
    return [_unbuilt(value) for value in config] if isinstance(config, list) else config


def _units(layer):
    return layer.units if isinstance(layer, layers.Dense) else layer.filters


def _rounded_up(count):
    return math.ceil(round(count, 9))  # 0.1 * 30 is 3.0000000000000004, of which the ceiling is not 4


def _thinned(scaled, rounding, path):
    count = rounding(scaled)
    if not isinstance(count, int) or count < 1:
        validation.fail("rounding", f"give a positive int, also for the {scaled:.4g} filters of '{path}'", count)
    return count


def _choose(model, graph, include, exclude):
    known = selection.flatten_layers(model)
    kernels = graph.kernels()
    candidates = {
        path: calls[0].layer
        for path, calls in kernels.items()
        if isinstance(calls[0].layer, (*_CONVOLUTIONS, layers.Dense))
    }
    chosen = selection.select(candidates, include, exclude, known=known)
    if include is None:
        predicting = _predicting(graph)
        chosen = {
            path: layer
            for path, layer in chosen.items()
            if isinstance(layer, _CONVOLUTIONS)
            and not any(predicting[call.outputs[0].ids].any() for call in kernels[path])
        }
    if not chosen:
        rule = "hold a convolution, not that of the prediction, that `include` names and `exclude` does not"
        validation.fail("model", rule, model.name)
    return chosen


def _predicting(graph):
    """Return which channels have to be as many as those of the model's inputs and outputs, between which data flows."""
    classes, _ = graph.ties()
    found = np.zeros(graph.size, bool)  # by class

    def mark(tensors):
        for channels in tensors:
            found[classes[channels.ids]] = True

    mark((*graph.inputs, *graph.outputs))
    for call in reversed(graph.calls):
        # What computes a prediction without weights of its own, which would take any number of channels.
        if call.kind == "mix" and not getattr(call.layer, "weights", None):
            if any(found[classes[channels.ids]].any() for channels in call.outputs):
                mark(call.inputs)
    return found[classes]


class _Widths:
    """How many channels each tensor has in the narrower network, and what follows from it for layers of fixed size."""

    def __init__(self, graph, model, filters):
        self._model = model
        self._filters = filters
        self._target_shapes = {}
        # The first filters of each layer stand for those that stay: a flattened tensor counts them rightly.
        self._kept = np.ones(graph.size, bool)
        self._unknown = np.zeros(graph.size, bool)
        for call in graph.calls:
            if call.kind == "kernel":
                self._check_groups(call)
                if id(call.layer) in filters:
                    self._kept[call.outputs[0].ids[filters[id(call.layer)] :]] = False
            elif call.kind == "elementwise":
                self._merge(call)
            elif isinstance(call.layer, layers.Reshape):
                self._reshape(call)
            elif call.kind == "mix" and not all(self._is_whole(channels) for channels in call.inputs):
                for channels in call.outputs:
                    self._unknown[channels.ids] = True
        self._shapes = {}
        for nested, inputs in graph.nested:
            counts = [self._count(channels.ids) for channels in inputs]
            known, _ = self._shapes.setdefault(id(nested), (counts, inputs))
            if known != counts:
                self._fail(f"call '{nested.name}' on as many channels each time, not {known} and {counts}")

    def config_of(self, layer):
        """Return the part of a layer's configuration that changes."""
        config = {}
        if id(layer) in self._filters:
            config["units" if isinstance(layer, layers.Dense) else "filters"] = self._filters[id(layer)]
        if id(layer) in self._target_shapes:
            config["target_shape"] = self._target_shapes[id(layer)]
        return config

    def _count(self, ids):
        return int(self._kept[ids].sum())

    def _is_whole(self, channels):
        return self._kept[channels.ids].all() and not self._unknown[channels.ids].any()

    def nested_inputs(self, nested):
        """Return the new inputs of a nested model, or `None` where they stay as they are."""
        counts, inputs = self._shapes.get(id(nested), ((), ()))
        if all(count == channels.ids.size for count, channels in zip(counts, inputs)):
            return None

        def narrower(tensor, channels, count):
            shape = list(tensor.shape)
            if channels.axis is not None and shape[channels.axis] is not None:
                shape[channels.axis] = count
            layer = tensor._keras_history.operation
            return layer.__class__.from_config({**layer.get_config(), "batch_shape": tuple(shape)}).output

        structure = functional_graph(nested).input
        tensors = map(narrower, keras.tree.flatten(structure), inputs, counts)
        return keras.tree.pack_sequence_as(structure, list(tensors))

    def _fail(self, rule):
        validation.fail("model", f"{rule}; exclude a layer or choose another multiplier", self._model.name)

    def _check_groups(self, call):
        groups = getattr(call.layer, "groups", 1)
        inputs = self._count(call.inputs[0].ids)
        outputs = self._filters.get(id(call.layer), call.outputs[0].ids.size)
        if inputs % groups or outputs % groups:
            self._fail(f"have channels that the {groups} groups of '{call.path}' divide, not {inputs} and {outputs}")

    def _merge(self, call):
        outputs = call.outputs[0].ids
        along = [ids for ids in call.sources if ids.size == outputs.size and not self._unknown[ids].any()]
        counts = [self._count(ids) for ids in along]
        if len(set(counts)) > 1:
            sides = " and ".join(map(str, counts))
            self._fail(f"bring equal numbers of channels together in '{call.path or call.layer.name}', not {sides}")
        if counts:
            self._kept[outputs] = np.arange(outputs.size) < counts[0]
        else:
            self._unknown[outputs] = True

    def _reshape(self, call):
        if self._is_whole(call.inputs[0]):
            return
        if call.kind == "mix":
            self._fail(f"keep channels apart in its Reshape '{call.path}'")
        shape, axis = list(call.layer.target_shape), call.outputs[0].axis - 1
        if shape[axis] != -1:
            shape[axis] = self._count(call.outputs[0].ids)
        if self._target_shapes.setdefault(id(call.layer), tuple(shape)) != tuple(shape):
            self._fail(f"call its Reshape '{call.path}' on as many channels each time")
