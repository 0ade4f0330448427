"""Finding what follows a convolution in a model's graph and can be computed together with it."""

import collections
import dataclasses

import keras
import numpy as np

from keras_sparse.surgery.transform import functional_graph, is_graph

__all__ = ["Unit", "activation_name", "find_units", "fold_normalization"]

_NAMED_ACTIVATIONS = {
    keras.activations.linear: "linear",
    keras.activations.relu: "relu",
    keras.activations.relu6: "relu6",
}
# Layers that hand on what they get when a model is not trained.
_INERT = (
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.SpatialDropout2D,
)


@dataclasses.dataclass
class Unit:
    """A Conv2D or Dense layer and the layers around it that one computation can stand for.

    `pooling(activation(normalization(layer(padding(x))) + residual))`, any part of which may be missing.

    Attributes:
        layer: The convolution or dense layer.
        padding: A `ZeroPadding2D` before it, or `None`.
        normalization: A `BatchNormalization`, to be folded into the weights, or `None`.
        addition: An `Add` of the layer's output and another tensor, the residual, or `None`.
        position: Which input of `addition` comes from the layer, 0 or 1.
        activation: A layer that applies ReLU or ReLU6, or `None`.
        pooling: A `MaxPooling2D` by squares that do not overlap, or `None`. Not behind an addition.
    """

    layer: keras.Layer
    padding: keras.Layer | None = None
    normalization: keras.Layer | None = None
    addition: keras.Layer | None = None
    position: int = 0
    activation: keras.Layer | None = None
    pooling: keras.Layer | None = None

    @property
    def absorbed(self):
        """All of its layers but `layer`."""
        parts = (self.padding, self.normalization, self.addition, self.activation, self.pooling)
        return [part for part in parts if part is not None]

    @property
    def activation_name(self):
        """`"linear"`, `"relu"` or `"relu6"`; `None` where `layer` has an activation of another kind."""
        return activation_name(self.layer if self.activation is None else self.activation)

    @property
    def pool_size(self):
        """The side of the squares of `pooling`; 1 where there is none."""
        return 1 if self.pooling is None else self.pooling.pool_size[0]


def activation_name(layer):
    """Return what a layer applies last, `"linear"`, `"relu"` or `"relu6"`, or `None` for anything else."""
    if type(layer) is keras.layers.ReLU:
        if layer.negative_slope != 0 or layer.threshold != 0 or layer.max_value not in (None, 6):
            return None
        return "relu" if layer.max_value is None else "relu6"
    activation = layer.activation
    return "linear" if activation is None else _NAMED_ACTIVATIONS.get(activation)


def fold_normalization(kernel, bias, normalization):
    """Return the kernel and bias of a layer with a `BatchNormalization` behind it, in inference mode.

    Args:
        kernel: Array whose last axis is that of the output channels.
        bias: Vector, or `None`.
        normalization: The layer, or `None` to leave all as it is.
    """
    if normalization is None:
        return kernel, bias

    def value(variable):
        return keras.ops.convert_to_numpy(variable).astype("float64")

    factor = 1 / np.sqrt(value(normalization.moving_variance) + normalization.epsilon)
    if normalization.scale:
        factor = factor * value(normalization.gamma)
    offset = -value(normalization.moving_mean) if bias is None else bias - value(normalization.moving_mean)
    offset = offset * factor
    if normalization.center:
        offset = offset + value(normalization.beta)
    return kernel * factor, offset


def find_units(model, layers):
    """Return `{id(layer): Unit}` for Conv2D and Dense layers of a model.

    A layer is absorbed where it alone reads the output of the one before, that output is no output of a model, and it
    is called once. What does not fit stays out, so a unit may be the layer alone.

    Args:
        model: A built Sequential or functional model. Nested models are opened.
        layers: The layers to find units for.
    """
    units = {id(layer): Unit(layer) for layer in layers}
    graphs = list({id(graph): graph for graph in map(_Graph, _functional_models(model))}.values())
    calls = collections.Counter(id(node.operation) for graph in graphs for node in graph.nodes)
    taken = set(units)  # Layers of some unit, which no other one may absorb.
    for graph in graphs:
        for node in graph.nodes:
            unit = units.get(id(node.operation))
            if unit is not None and calls[id(unit.layer)] == 1 and _is_plain(node, inputs=1):
                _absorb_padding(graph, node, unit, calls, taken)
                last = _absorb_followers(graph, node, unit, calls, taken)
                _absorb_pooling(graph, last, unit, calls, taken)
    return units


def _functional_models(model):
    """Yield the functional models that a model consists of, each once."""
    seen, waiting = set(), [model]
    while waiting:
        graph = waiting.pop()
        if id(graph) in seen:
            continue
        seen.add(id(graph))
        waiting.extend(layer for layer in graph.layers if is_graph(layer))
        functional = functional_graph(graph)
        if functional is not None:
            yield functional


class _Graph:
    """The nodes of one functional model and who reads which tensor."""

    def __init__(self, functional):
        by_depth = functional._nodes_by_depth
        self.nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]
        self._readers = collections.defaultdict(list)
        for node in self.nodes:
            for tensor in node.arguments.keras_tensors:
                self._readers[id(tensor)].append(node)
        self._outputs = {id(tensor) for tensor in functional.outputs}
        self._makers = {id(tensor): node for node in self.nodes for tensor in node.outputs}

    def only_reader(self, tensor):
        """The node that alone reads the tensor, or `None`."""
        readers = self._readers[id(tensor)]
        return readers[0] if len(readers) == 1 and id(tensor) not in self._outputs else None

    def maker(self, tensor):
        return self._makers.get(id(tensor))


def _is_plain(node, inputs):
    """Whether a call passes this many tensors and nothing else, `training=True` above all."""
    others = [
        value
        for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        if not isinstance(value, keras.KerasTensor) and value is not None and value is not False
    ]
    return len(node.arguments.keras_tensors) == inputs and len(node.outputs) == 1 and not others


def _absorb_padding(graph, node, unit, calls, taken):
    layer, tensor = unit.layer, node.arguments.keras_tensors[0]
    before = graph.maker(tensor)
    if before is None or graph.only_reader(tensor) is not node or not isinstance(layer, keras.layers.Conv2D):
        return
    padding = before.operation
    fits = type(padding) is keras.layers.ZeroPadding2D and layer.padding == "valid"
    if fits and padding.data_format == layer.data_format and _may_absorb(before, 1, layer, calls, taken):
        unit.padding = padding
        taken.add(id(padding))


def _absorb_followers(graph, last, unit, calls, taken):
    """Absorb normalization, addition and activation; return the node that makes what the unit then computes."""
    layer = unit.layer
    while unit.activation_name == "linear":
        tensor = last.outputs[0]
        node = graph.only_reader(tensor)
        if node is None:
            return last
        follower = node.operation
        if _is_inert(node, layer):
            last = node
            continue
        if not _may_absorb(node, 2 if type(follower) is keras.layers.Add else 1, layer, calls, taken):
            return last
        if type(follower) is keras.layers.BatchNormalization:
            channel_axis = 1 if getattr(layer, "data_format", "") == "channels_first" else len(tensor.shape) - 1
            if unit.normalization or unit.addition or follower.axis % len(tensor.shape) != channel_axis:
                return last
            unit.normalization = follower
        elif type(follower) is keras.layers.Add:
            residual = [other for other in node.arguments.keras_tensors if other is not tensor]
            # An unknown size might be broadcast.
            alike = len(residual) == 1 and residual[0].shape == tensor.shape and residual[0].dtype == tensor.dtype
            if unit.addition or not alike or None in tensor.shape[1:]:
                return last
            unit.addition = follower
            unit.position = next(i for i, other in enumerate(node.arguments.keras_tensors) if other is tensor)
        elif type(follower) in (keras.layers.Activation, keras.layers.ReLU):
            if activation_name(follower) in (None, "linear"):
                return last
            unit.activation = follower
        else:
            return last
        taken.add(id(follower))
        last = node
    return last


def _absorb_pooling(graph, last, unit, calls, taken):
    layer = unit.layer
    if not isinstance(layer, keras.layers.Conv2D) or unit.addition is not None or unit.activation_name is None:
        return
    node = graph.only_reader(last.outputs[0])
    while node is not None and _is_inert(node, layer):
        last = node
        node = graph.only_reader(last.outputs[0])
    if node is None or not _may_absorb(node, 1, layer, calls, taken):
        return
    pooling = node.operation
    if type(pooling) is not keras.layers.MaxPooling2D or pooling.data_format != layer.data_format:
        return
    size = pooling.pool_size[0]
    if tuple(pooling.pool_size) != (size, size) or tuple(pooling.strides) != (size, size):
        return
    image = last.outputs[0].shape[2:] if layer.data_format == "channels_first" else last.outputs[0].shape[1:3]
    if pooling.padding != "valid" and any(axis is None or axis % size for axis in image):
        return  # squares beyond the edge
    unit.pooling = pooling
    taken.add(id(pooling))


def _is_inert(node, layer):
    """Whether a call hands on what it gets, in the dtype of the layer."""
    operation = node.operation
    return type(operation) in _INERT and _is_plain(node, 1) and operation.compute_dtype == layer.compute_dtype


def _may_absorb(node, inputs, layer, calls, taken):
    operation = node.operation
    if not isinstance(operation, keras.Layer) or id(operation) in taken or calls[id(operation)] != 1:
        return False
    return operation.compute_dtype == layer.compute_dtype and _is_plain(node, inputs)
