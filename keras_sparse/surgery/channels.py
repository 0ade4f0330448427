"""Which channels of a model feed which: the graph that liveness and removal of channels are computed on.

`ChannelGraph(model)` walks a Sequential or functional model, nested models and shared layers included, and gives every
channel of every tensor an integer identity. A tensor's identities are an index array along its channel axis:

```python
graph = ChannelGraph(model)
for call in graph.calls:  # in the order of execution
    call.path, call.layer, call.kind  # "block/conv1", the layer, "kernel"
    call.inputs[0].axis, call.inputs[0].ids  # the channel axis, and one identity for each channel along it
    call.outputs[0].ids
```

| kind          | calls                                             | identities of the output                        |
|---------------|---------------------------------------------------|-------------------------------------------------|
| `kernel`      | convolutions, dense layers                        | new; each depends on the inputs it connects     |
| `elementwise` | Add and its like, depthwise convolutions          | new; number j depends on `sources[...][j]`      |
| `copy`        | batch norm, activations, pooling, concat, flatten | those of the inputs, in their new places        |
| `mix`         | whatever is not known: attention, recurrence, ... | new; each depends on all inputs                 |

Two questions are answered on it. Liveness, on directed edges: `alive()`, `dangling()` and, for tables that grow,
`reach(levels)`. Removal: `ties()` says which identities can only go together, as those that a residual addition sums,
and which ones cannot go at all.
"""

import dataclasses

import keras
import numpy as np

from keras_sparse import selection, validation
from keras_sparse.layers import BaseSparse
from keras_sparse.surgery.transform import functional_graph, is_graph

__all__ = ["Call", "ChannelGraph", "Channels", "connection_table"]

layers = keras.layers


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one tensor.

    Attributes:
        axis: The channel axis, counted with the batch axis; `None` for a tensor that has none beside the batch.
        ids: Identities along that axis, an integer array; a single one where the size of the axis is unknown.
            Flattened tensors repeat the identity of a channel for each of its pixels.
    """

    axis: int | None
    ids: np.ndarray


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a layer, or of an operation that is no layer.

    Attributes:
        path: Path of the layer as `selection.flatten_layers` has it; `None` for an operation.
        layer: The layer or operation.
        kind: `"kernel"`, `"elementwise"`, `"copy"` or `"mix"`; see the module's table.
        inputs: List of `Channels`, one for each tensor that is passed.
        outputs: List of `Channels`.
        sources: Of an elementwise call: for each input, the identities that the output's channels depend on, an array
            as long as the output's; an array of size 1 is broadcast.
        coupled: Whether an output's values depend on those of all outputs, as in a softmax or a layer normalization:
            a channel has its own path through such a call, but cannot be removed without changing the others.
        node: Keras's record of the call, with its arguments and symbolic tensors.
        training: Whether it is called with `training=True`, itself or within a nested model.
    """

    path: str | None
    layer: object
    kind: str
    inputs: list
    outputs: list
    sources: list = dataclasses.field(default_factory=list)
    coupled: bool = False
    node: object = None
    training: bool = False


class ChannelGraph:
    """The channels of a model and the calls that lead from one to another.

    Args:
        model: A built Sequential or functional model.

    Attributes:
        size: Number of identities; they are 0 to `size - 1`.
        calls: List of `Call` in the order of execution. A shared layer has several, with identities of their own.
        inputs, outputs: Lists of `Channels` of the model's inputs and outputs.
        nested: List of pairs of a nested model and the list of `Channels` that it is called on, one for each call.

    Raises:
        ValueError: If the model has no graph of its own that Keras could show.
    """

    def __init__(self, model):
        functional = functional_graph(model)
        if functional is None:
            validation.fail("model", "be a Sequential or functional model whose layers know their shapes", model.name)
        self.size = 0
        self.calls = []
        self.nested = []
        self._training = False
        self._paths = {id(layer): path for path, layer in selection.flatten_layers(model).items()}
        first = _readers_in(functional, "channels_first")
        self.inputs = [self._new(t.shape, 1 if id(t) in first else -1) for t in functional.inputs]
        self.outputs = self._walk(functional, self.inputs)

    # Making it

    def _new(self, shape, axis=-1):
        """Return `Channels` with identities of their own for a tensor of this shape."""
        axis = axis % len(shape) if len(shape) > 1 else None
        count = 1 if axis is None or shape[axis] is None else shape[axis]
        ids = np.arange(self.size, self.size + count)
        self.size += count
        return Channels(axis, ids)

    def _walk(self, functional, inputs):
        """Add the calls of a functional model on these inputs; return the `Channels` of its outputs."""
        tensors = {id(tensor): channels for tensor, channels in zip(functional.inputs, inputs, strict=True)}
        by_depth = functional._nodes_by_depth
        for depth in sorted(by_depth, reverse=True):
            for node in by_depth[depth]:
                known = [id(tensor) in tensors for tensor in node.arguments.keras_tensors]
                if node.is_input or not all(known):
                    continue
                passed = [tensors[id(tensor)] for tensor in node.arguments.keras_tensors]
                for tensor, channels in zip(node.outputs, self._call(node, passed), strict=True):
                    tensors[id(tensor)] = channels
        return [tensors[id(tensor)] for tensor in functional.outputs]

    def _call(self, node, inputs):
        layer = node.operation
        training = self._training or node.arguments.kwargs.get("training") is True
        if is_graph(layer):
            functional = functional_graph(layer)
            # Tensors come in the order in which Keras flattens a structure, unless it matches them by name.
            passed = node.arguments.args[0] if node.arguments.args else None
            if functional is not None and isinstance(passed, dict) == isinstance(functional.input, dict):
                if len(functional.inputs) == len(inputs):
                    self.nested.append((layer, inputs))
                    outer, self._training = self._training, training
                    outputs = self._walk(functional, inputs)
                    self._training = outer
                    return outputs
        rule = _rule(layer)
        call = rule(self, node, inputs) if rule else None
        if call is None:  # unknown, or used in a way that the rule does not cover
            axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
            call = Call(None, layer, "mix", inputs, [self._new(tensor.shape, axis) for tensor in node.outputs])
        call.path, call.node, call.training = self._paths.get(id(layer)), node, training
        self.calls.append(call)
        return call.outputs

    # Liveness

    def kernels(self):
        """Return `{path: [call, ...]}` of the layers with a table of connections."""
        found = {}
        for call in self.calls:
            if call.kind == "kernel":
                found.setdefault(call.path, []).append(call)
        return found

    def reach(self, levels=None):
        """Return from which level on each channel is joined to the input, and to the prediction.

        A connection is there from its level on, and a path from the highest level on it: of all paths the one that is
        there first counts. Levels of 0 and infinity, for kept and pruned ones, make it plain reachability.

        Args:
            levels: `{path: array}` of the levels of connections, of the shape of `connection_table`, (in / groups,
                out). Layers left out have the level 0 where their mask keeps a connection.

        Returns:
            Two arrays of levels, one entry for each identity; infinity where there is no path.
        """
        levels = self._expanded(levels or {})
        forward, backward = np.full(self.size, np.inf), np.full(self.size, np.inf)
        for channels in self.inputs:
            forward[channels.ids] = 0
        for call in self.calls:
            if call.kind == "kernel":
                forward[call.outputs[0].ids] = _through(levels[call.path], forward[call.inputs[0].ids])
            elif call.kind == "elementwise":
                each = [np.broadcast_to(forward[ids], call.outputs[0].ids.shape) for ids in call.sources]
                forward[call.outputs[0].ids] = np.min(each, axis=0)
            elif call.kind == "mix":
                earliest = min((forward[channels.ids].min() for channels in call.inputs), default=np.inf)
                for channels in call.outputs:
                    forward[channels.ids] = earliest
        for channels in self.outputs:
            backward[channels.ids] = 0
        for call in reversed(self.calls):
            if call.kind == "kernel":
                values = _through(levels[call.path], backward[call.outputs[0].ids], towards="inputs")
                np.minimum.at(backward, call.inputs[0].ids, values)  # a flattened channel is read many times
            elif call.kind == "elementwise":
                for ids in call.sources:
                    values = backward[call.outputs[0].ids]
                    np.minimum.at(backward, ids, values if ids.size == values.size else values.min())
            elif call.kind == "mix":
                earliest = min((backward[channels.ids].min() for channels in call.outputs), default=np.inf)
                for channels in call.inputs:
                    backward[channels.ids] = np.minimum(backward[channels.ids], earliest)
        return forward, backward

    def _expanded(self, levels):
        """Return `{path: levels (in, out)}`, with those of groups that do not meet at infinity."""
        expanded = {}
        for path, calls in self.kernels().items():
            call = calls[0]
            given = levels.get(path)
            if given is None:
                table = connection_table(call.layer)
                given = None if table is None else np.where(table, 0.0, np.inf)
            shape = (call.inputs[0].ids.size, call.outputs[0].ids.size)
            expanded[path] = _ungrouped(given, call.layer, shape)
        return expanded

    def table(self, call, table=None):
        """Return the table of a kernel call over all its channels, booleans (in, out), groups spread out.

        Args:
            call: A call of kind `kernel`.
            table: Nonzero where kept, (in / groups, out); default the mask of the layer.

        Returns:
            `None` where every input reaches every output.
        """
        table = connection_table(call.layer) if table is None else np.asarray(table) != 0
        levels = None if table is None else np.where(table, 0.0, np.inf)
        levels = _ungrouped(levels, call.layer, (call.inputs[0].ids.size, call.outputs[0].ids.size))
        return None if levels is None else np.isfinite(levels)

    def alive(self, tables=None):
        """Return which channels lie on a path from the input to the prediction, a boolean for each identity.

        Args:
            tables: `{path: array}` of kept connections, nonzero where kept, of the shape of `connection_table`;
                the masks of layers that are left out hold.
        """
        forward, backward = self.reach(_as_levels(tables))
        return np.isfinite(np.maximum(forward, backward))

    def dangling(self, tables=None):
        """Return `{path: array}`: the kept connections that lie on no path from the input to the prediction.

        A shared layer's connection lies on a path if it does in one of its calls.

        Args:
            tables: As for `alive`.

        Returns:
            Boolean arrays (in / groups, out) of the layers that have a table: sparse ones, and those in `tables`.
        """
        levels = _as_levels(tables)
        forward, backward = self.reach(levels)
        found = {}
        for path, calls in self.kernels().items():
            layer = calls[0].layer
            table = np.isfinite(levels[path]) if path in levels else connection_table(layer)
            if table is not None:
                found[path] = table & ~np.isfinite(_ends(calls, layer, table.shape, forward, backward))
        return found

    def levels_of_ends(self, path, forward, backward):
        """Return from which level on both ends of each connection of a layer are joined, in any of its calls.

        Args:
            path: Path of a layer of kind `kernel`.
            forward: The first array that `reach` returned.
            backward: The second one.

        Returns:
            Array (in / groups, out).
        """
        calls = self.kernels()[path]
        groups = getattr(calls[0].layer, "groups", 1)
        shape = (calls[0].inputs[0].ids.size // groups, calls[0].outputs[0].ids.size)
        return _ends(calls, calls[0].layer, shape, forward, backward)

    # Removal

    def ties(self):
        """Return which channels can only be removed together, and which ones not at all.

        Tied are the channels that an elementwise call brings together (a residual addition), and those at the same
        place in several calls of one layer, whose weights are the same. Fixed are the channels of the model's inputs
        and outputs, of calls of kind `mix` and of grouped convolutions, the outputs of coupled calls, and single
        channels that are broadcast over many.

        Returns:
            A pair of arrays with an entry for each identity: the number of its class, which is the lowest identity in
            it, and whether its class is fixed.
        """
        parent = np.arange(self.size)

        def root(i):
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        def tie(one, other):
            for i, j in zip(one, other):
                a, b = sorted((root(i), root(j)))
                parent[b] = a

        fixed = np.zeros(self.size, bool)
        first = {}
        for channels in (*self.inputs, *self.outputs):
            fixed[channels.ids] = True
        for call in self.calls:
            both = (*call.inputs, *call.outputs)
            if call.coupled:
                for channels in call.outputs:
                    fixed[channels.ids] = True
            if call.kind == "mix" or getattr(call.layer, "groups", 1) > 1:
                for channels in both:
                    fixed[channels.ids] = True
            for ids in call.sources:
                if ids.size == call.outputs[0].ids.size:
                    tie(ids, call.outputs[0].ids)
                else:
                    fixed[ids] = True
            if call.kind != "mix" and getattr(call.layer, "weights", None):
                for one, other in zip(first.setdefault(id(call.layer), both), both):
                    tie(one.ids, other.ids)
        for model, inputs in self.nested:  # whose inputs have one shape in all calls
            for one, other in zip(first.setdefault(id(model), inputs), inputs):
                tie(one.ids, other.ids)
        classes = np.array([root(i) for i in range(self.size)], int)
        of_class = np.zeros(self.size, bool)
        of_class[classes[fixed]] = True
        return classes, of_class[classes]


def _readers_in(functional, data_format):
    """Return the ids of the tensors that layers of this data format read."""
    nodes = [node for nodes in functional._nodes_by_depth.values() for node in nodes]
    read = [n.arguments.keras_tensors for n in nodes if getattr(n.operation, "data_format", None) == data_format]
    return {id(tensor) for tensors in read for tensor in tensors}


def connection_table(layer):
    """Return which connections a layer's mask keeps, booleans (in / groups, out); `None` for one without a mask."""
    if not isinstance(layer, BaseSparse):
        return None
    mask = keras.ops.convert_to_numpy(layer.mask) != 0
    return np.broadcast_to(mask, layer._kernel.shape).any(axis=tuple(range(mask.ndim - 2)))


def _as_levels(tables):
    return {path: np.where(np.asarray(table) != 0, 0.0, np.inf) for path, table in (tables or {}).items()}


def _through(levels, values, towards="outputs"):
    """Return from which level each channel at one end is joined to any with its value at the other end.

    `levels` are (in, out), or `None` where all connections are there from the start.
    """
    if levels is None:
        return values.min()
    if towards == "inputs":
        levels = levels.T
    return np.maximum(levels, values[:, None]).min(axis=0)


def _ungrouped(levels, layer, shape):
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return levels
    inputs, outputs = shape[0] // groups, shape[1] // groups
    full = np.full(shape, np.inf)
    for group in range(groups):
        rows, columns = slice(group * inputs, (group + 1) * inputs), slice(group * outputs, (group + 1) * outputs)
        full[rows, columns] = 0 if levels is None else levels[:, columns]
    return full


def _ends(calls, layer, shape, forward, backward):
    """Return the level from which on both ends of each connection are joined; the earliest of all calls."""
    groups = getattr(layer, "groups", 1)
    earliest = np.full(shape, np.inf)
    for call in calls:
        # Input i of a group is another channel for the outputs of another group.
        inputs = forward[call.inputs[0].ids].reshape(groups, -1)
        inputs = np.repeat(inputs.T, shape[1] // groups, axis=1)
        np.minimum(earliest, np.maximum(inputs, backward[call.outputs[0].ids]), out=earliest)
    return earliest


# Rules: (graph, node, inputs) -> Call, or None where the call is none that the rule covers.

# Functions of one value each; any other activation is taken to look at all channels.
_PER_VALUE = {
    getattr(keras.activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish "
        "relu relu6 selu sigmoid silu soft_shrink softplus softsign squareplus tanh tanh_shrink threshold"
    ).split()
    if hasattr(keras.activations, name)
}
_OPERATIONS_ON_ONE = frozenset(
    "Absolute Cast Celu Clip Elu Erf Exp Expm1 Gelu HardSigmoid HardSilu HardTanh LeakyRelu Log Log1p LogSigmoid "
    "Negative Reciprocal Relu Relu6 Round Rsqrt Selu Sigmoid Sign Silu Softplus Softsign Sqrt Square Squareplus "
    "StopGradient Tanh Threshold".split()
)
_OPERATIONS_ON_MORE = frozenset("Add Divide Maximum Minimum Multiply Power Subtract TrueDivide".split())


def _channel_axis(layer, rank):
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _is_coupled(layer):
    activation = getattr(layer, "activation", None)
    if isinstance(activation, tuple(_VALUE_LAYERS)):
        return _is_coupled(activation)
    return activation is not None and activation not in _PER_VALUE


def _rule_for_kernel(graph, node, inputs):
    layer = node.operation
    rank = len(node.outputs[0].shape)
    # A Dense layer acts on the last axis; the `data_format` of convolutions says theirs.
    axis = _channel_axis(layer, rank)
    if len(inputs) != 1:
        return None
    if inputs[0].axis != axis:  # each place along this axis holds values of all channels
        turned = graph._new(node.arguments.keras_tensors[0].shape, axis)
        graph.calls.append(Call(None, layers.Identity(), "mix", inputs, [turned], node=node))
        inputs = [turned]
    return Call(None, layer, "kernel", inputs, [graph._new(node.outputs[0].shape, axis)], coupled=_is_coupled(layer))


def _rule_for_depthwise(graph, node, inputs):
    layer = node.operation
    axis = _channel_axis(layer, len(node.outputs[0].shape))
    if inputs[0].axis != axis:
        return None
    outputs = [graph._new(node.outputs[0].shape, axis)]
    sources = [np.repeat(inputs[0].ids, layer.depth_multiplier)]
    return Call(None, layer, "elementwise", inputs, outputs, sources, _is_coupled(layer))


def _rule_for_merging(graph, node, inputs):
    shape = node.outputs[0].shape
    rank = len(shape)
    if rank < 2:
        return None
    tensors = node.arguments.keras_tensors
    # NumPy's rule: shapes are aligned at their ends.
    axes = {channels.axis + rank - len(t.shape) for t, channels in zip(tensors, inputs) if channels.axis is not None}
    if len(axes) != 1 or any(channels.axis is None for channels in inputs):
        return None
    outputs = [graph._new(shape, axes.pop())]
    sources = [channels.ids for channels in inputs]
    if any(ids.size not in (1, outputs[0].ids.size) for ids in sources):
        return None
    return Call(None, node.operation, "elementwise", inputs, outputs, sources)


def _rule_for_concatenation(graph, node, inputs):
    shape = node.outputs[0].shape
    axes = {channels.axis for channels in inputs}
    if len(axes) != 1 or None in axes:
        return None
    axis = axes.pop()
    if node.operation.axis % len(shape) == axis:
        joined = Channels(axis, np.concatenate([channels.ids for channels in inputs]))
        return Call(None, node.operation, "copy", inputs, [joined]) if joined.ids.size == shape[axis] else None
    return _rule_for_merging(graph, node, inputs)


def _copied(node, inputs, axis=None, coupled=False):
    # A new object for each tensor: the values of two tensors with the same channels differ.
    axis = inputs[0].axis if axis is None else axis
    outputs = [Channels(axis, inputs[0].ids) for _ in node.outputs]
    return Call(None, node.operation, "copy", inputs, outputs, coupled=coupled)


def _rule_for_values(graph, node, inputs):
    return _copied(node, inputs, coupled=_is_coupled(node.operation)) if inputs else None


def _rule_for_normalization(graph, node, inputs):
    return _copied(node, inputs, coupled=True)


def _rule_for_batch_normalization(graph, node, inputs):
    rank = len(node.outputs[0].shape)
    return _copied(node, inputs, coupled=node.operation.axis % rank != inputs[0].axis)


def _rule_for_planes(graph, node, inputs):
    """What moves, drops or joins pixels, within each channel."""
    rank = len(node.arguments.keras_tensors[0].shape)
    return _copied(node, inputs) if inputs[0].axis == _channel_axis(node.operation, rank) else None


def _rule_for_global_pooling(graph, node, inputs):
    layer = node.operation
    axis = _channel_axis(layer, len(node.arguments.keras_tensors[0].shape))
    if inputs[0].axis != axis:
        return None
    return _copied(node, inputs, axis if layer.keepdims else 1)


def _rule_for_reshaping(graph, node, inputs):
    before, after = node.arguments.keras_tensors[0].shape[1:], node.outputs[0].shape[1:]
    axis = inputs[0].axis
    if axis is None or None in before or None in after or not after:
        return None
    ids = inputs[0].ids.reshape([-1 if i == axis - 1 else 1 for i in range(len(before))])
    ids = np.broadcast_to(ids, before)
    if isinstance(node.operation, layers.Flatten) and node.operation.data_format == "channels_first":
        ids = np.moveaxis(ids, 0, -1)
    ids = ids.reshape(after)
    for new in reversed(range(len(after))):
        lines = np.moveaxis(ids, new, 0).reshape(after[new], -1)
        if (lines == lines[:, :1]).all():  # each place along this axis holds one channel
            return Call(None, node.operation, "copy", inputs, [Channels(new + 1, lines[:, 0])])
    return None


def _rule_for_permutation(graph, node, inputs):
    axis = inputs[0].axis
    return None if axis is None else _copied(node, inputs, 1 + node.operation.dims.index(axis))


def _rule_for_repetition(graph, node, inputs):
    return _copied(node, inputs, 2) if inputs[0].axis == 1 else None


def _named(*names):
    return [getattr(layers, name) for name in names if hasattr(layers, name)]


_DIMENSIONS = ("1D", "2D", "3D")
_VALUE_LAYERS = _named(
    *("ActivityRegularization", "Activation", "AlphaDropout", "Dropout", "ELU", "GaussianDropout", "GaussianNoise"),
    *("Identity", "LeakyReLU", "PReLU", "ReLU", "Rescaling", "SpatialDropout1D", "SpatialDropout2D"),
    *("SpatialDropout3D", "Normalization"),
)
_RULES = {
    _rule_for_kernel: _named(
        *(f"Conv{d}" for d in _DIMENSIONS),
        *(f"Conv{d}Transpose" for d in _DIMENSIONS),
        *("Dense", "SeparableConv1D", "SeparableConv2D"),
    ),
    _rule_for_depthwise: _named("DepthwiseConv1D", "DepthwiseConv2D"),
    _rule_for_merging: _named("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract"),
    _rule_for_concatenation: _named("Concatenate"),
    _rule_for_values: _VALUE_LAYERS,
    _rule_for_normalization: _named(
        *("GroupNormalization", "LayerNormalization", "RMSNormalization", "Softmax", "UnitNormalization")
    ),
    _rule_for_batch_normalization: _named("BatchNormalization"),
    _rule_for_planes: _named(
        *(f"{kind}{d}" for d in _DIMENSIONS for kind in ("AveragePooling", "MaxPooling", "Cropping", "UpSampling")),
        *(f"{kind}{d}" for d in _DIMENSIONS for kind in ("AdaptiveAveragePooling", "AdaptiveMaxPooling")),
        *(f"ZeroPadding{d}" for d in _DIMENSIONS),
        *("CenterCrop", "RandomCrop", "RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "Resizing"),
    ),
    _rule_for_global_pooling: _named(*(f"Global{kind}Pooling{d}" for d in _DIMENSIONS for kind in ("Average", "Max"))),
    _rule_for_reshaping: _named("Flatten", "Reshape"),
    _rule_for_permutation: _named("Permute"),
    _rule_for_repetition: _named("RepeatVector"),
}
_RULE_OF_CLASS = {cls: rule for rule, classes in _RULES.items() for cls in classes}


def _rule(layer):
    if not isinstance(layer, keras.Layer):
        name = type(layer).__name__
        if not type(layer).__module__.startswith("keras.src.ops"):
            return None
        if name in _OPERATIONS_ON_MORE:
            return _rule_for_merging
        return _rule_for_values if name in _OPERATIONS_ON_ONE else None
    # A class of someone else's that overrides `call` may compute anything.
    owner = next(cls for cls in type(layer).__mro__ if "call" in vars(cls))
    if owner.__module__.split(".")[0] not in ("keras", "keras_sparse"):
        return None
    return next((_RULE_OF_CLASS[cls] for cls in type(layer).__mro__ if cls in _RULE_OF_CLASS), None)
