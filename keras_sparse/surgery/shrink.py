"""Removing channels that nothing reads, and those that are constant."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_sparse import granularity as granularities
from keras_sparse.layers import BaseSparse, SparseConv2D, SparseDense
from keras_sparse.surgery.channels import ChannelGraph
from keras_sparse.surgery.transform import check_supported, functional_graph, transform

__all__ = ["shrink", "shrink_counted"]

layers = keras.layers
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)


def shrink(model):
    r"""Return a smaller model that computes the same, without the channels that pruning has emptied.

    A channel (a feature map, or a unit of a dense layer) is removed, with the filter that makes it and the weights that
    read it, where

    - no weight reads it: the input map's sparsity pattern \(Q_s\) is empty in all layers that see it (Lebedev &
      Lempitsky, 2016, sections 5.2 and 6), or what reads it is removed itself;
    - or it is constant, since its filter is all zero. Where the constant is not 0, its contribution moves into the
      bias of the layers that read it. That is exact where each of their weights sees it everywhere: not in the zeros
      of a `"same"` padding.

    Channels are followed through normalization, activations, pooling, flattening, concatenation, and nested models.
    Those that an addition brings together go together, as do those of a shared layer, or stay. The model's inputs and
    outputs stay as they are, and so do grouped convolutions and what is next to a layer whose channels cannot be told
    apart (attention, recurrence, `Lambda`, custom layers). One channel always stays in a tensor.

    ```python
    small = ks.shrink(model)
    ks.count(model)["total"]["params"], ks.count(small)["total"]["params"]
    ```

    It takes the masks of any granularity, and plain Keras models with zeros in their kernels. Outputs are equal up to
    rounding: sums have fewer terms.

    Args:
        model: A built Sequential or functional model.

    Returns:
        A new model, compiled like `model` where that was compiled, with a fresh optimizer. Sparse layers stay sparse
        layers, and kept weights keep their masks. Where removal breaks up the runs of `n_m` or the tiles of `block`,
        the layer's granularity becomes `"weight"`, or `"connection"`, whose masks have the same shape.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If `model` is subclassed or not built.
    """
    return shrink_counted(model)[0]


def shrink_counted(model, inference=False, multiple=1):
    """Shrink a model, and say how far.

    Args:
        model: As for `shrink`.
        inference: As for `transform`.
        multiple: Layers whose number of outputs is a multiple of this keep one, unless they keep at most half of it.

    Returns:
        A pair of the new model and what the layers with kernels lost, those that lost any:
        `{path: {"inputs": [removed, before], "outputs": [removed, before]}}`.
    """
    check_supported(model, "shrink it")
    graph = ChannelGraph(model)
    removal = _Removal(graph, multiple)
    exchanges, removed = {}, {}
    for calls in _by_layer(graph).values():
        call = calls[0]
        slices = removal.slices(call)
        if slices is None:
            continue
        exchanges[id(call.layer)] = slices
        if call.kind == "kernel":
            counts = {"inputs": slices.inputs, "outputs": slices.outputs}
            counts = {name: [int((~kept).sum()), kept.size] for name, kept in counts.items()}
            if counts["inputs"][0] or counts["outputs"][0]:
                removed[call.path] = counts

    def exchange(layer):
        slices = exchanges.get(id(layer))
        return None if slices is None else _SHRINKABLE[type(layer)](layer, slices)

    return transform(model, exchange, inference, _nested_inputs(graph, removal)), removed


def _by_layer(graph):
    found = {}
    for call in graph.calls:
        found.setdefault(id(call.layer), []).append(call)
    return found


def _nested_inputs(graph, removal):
    """Return the function that gives a nested model its new inputs, where they have fewer channels."""
    called_on = {}
    for model, inputs in graph.nested:
        called_on.setdefault(id(model), inputs)

    def smaller(tensor, channels):
        shape = list(tensor.shape)
        if channels.axis is not None and shape[channels.axis] is not None:
            shape[channels.axis] = int(removal.kept(channels).sum())
        layer = tensor._keras_history.operation
        return layer.__class__.from_config({**layer.get_config(), "batch_shape": tuple(shape)}).output

    def inputs_of(model):
        inputs = called_on.get(id(model), ())
        if all(removal.kept(channels).all() for channels in inputs):
            return None
        structure = functional_graph(model).input
        tensors = [smaller(tensor, channels) for tensor, channels in zip(keras.tree.flatten(structure), inputs)]
        return keras.tree.pack_sequence_as(structure, tensors)

    return inputs_of


@dataclasses.dataclass
class _Slices:
    """What is left of a layer.

    Attributes:
        inputs, outputs: Booleans along the channel axis of the first input and the output: which are kept.
        silent: Booleans along the kept inputs: those that stay although nothing reads them.
        bias: What the removed inputs add to each kept output, or `None` for nothing.
        axis: Channel axis of the output, counted with the batch axis.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    silent: np.ndarray
    bias: np.ndarray | None
    axis: int


class _Removal:
    """Which channels of a `ChannelGraph` can go."""

    def __init__(self, graph, multiple=1):
        self._constants = _Constants(graph)
        self._classes, fixed = graph.ties()
        fixed = fixed.copy()
        by_layer = _by_layer(graph)
        for call in _unsliceable(by_layer):
            for channels in (*call.inputs, *call.outputs):
                fixed[self._classes[channels.ids]] = True
        fixed = fixed[self._classes]
        self._calls_of = {key: len(calls) for key, calls in by_layer.items()}
        self._dead = self._fixed_point(graph, ~fixed)
        self._gone = self._dead.copy()
        changed = True
        while changed:
            changed = False
            for call in graph.calls:
                for channels in (*call.inputs, *call.outputs):
                    gone = self._gone[channels.ids]
                    # A tensor without channels is none.
                    if gone.all() or (gone.any() and _misreads_bias(call, int((~gone).sum()))):
                        self._bring_back(channels.ids[gone][0])
                        changed = True
                if call.kind != "kernel":
                    continue
                ids = call.outputs[0].ids
                kept = int((~self._gone[ids]).sum())
                if ids.size % multiple == 0 and kept > multiple // 2 and kept % multiple:
                    self._bring_back(ids[self._gone[ids]][0])
                    changed = True

    def _bring_back(self, channel):
        """Keep a channel, and those it is tied to, which nobody reads."""
        self._gone[self._classes == self._classes[channel]] = False

    def kept(self, channels):
        """Booleans: which of a tensor's channels are kept."""
        return ~self._gone[channels.ids]

    def _fixed_point(self, graph, dead):
        """Take all candidates for dead, and then back to life what those alive read, until nothing changes."""
        kernels = [call for call in graph.calls if call.kind == "kernel"]
        changed = True
        while changed:
            changed = False
            for call in reversed(kernels):
                ids = call.inputs[0].ids
                alive = ~dead[call.outputs[0].ids]
                kernel = self._constants.kernel(call)
                read = kernel.read[:, alive].any(axis=1)
                constant = self._constants.values(call.inputs[0])
                foldable = np.isfinite(constant) & ~kernel.cut[:, alive].any(axis=1)
                if self._calls_of[id(call.layer)] > 1:
                    foldable &= False  # another call would need another bias
                needed = read & dead[ids] & ~foldable & (constant != 0)
                if needed.any():
                    classes = np.unique(self._classes[ids[needed]])
                    dead[np.isin(self._classes, classes)] = False
                    changed = True
        return dead

    def slices(self, call):
        """Return the `_Slices` of the layer of a call; `None` where it stays as it is."""
        if type(call.layer) not in _SHRINKABLE or call.kind == "mix" or not call.inputs:
            return None
        inputs, outputs = call.inputs[0], call.outputs[0]
        kept_inputs, kept_outputs = self.kept(inputs), self.kept(outputs)
        dead = self._dead[inputs.ids]
        silent = dead[kept_inputs]
        if kept_inputs.all() and kept_outputs.all() and not (call.kind == "kernel" and silent.any()):
            return None
        bias = None
        if call.kind == "kernel" and self._calls_of[id(call.layer)] == 1:
            constant = np.where(dead, self._constants.values(inputs), 0)
            folded = self._constants.kernel(call).of_constants(constant)
            # What is silent itself needs no bias that is right.
            folded = np.where(self._dead[outputs.ids], 0, folded)[kept_outputs]
            bias = folded if folded.any() else None
        return _Slices(kept_inputs, kept_outputs, silent, bias, outputs.axis)


def _unsliceable(by_layer):
    """Yield the calls of layers that channels cannot be cut out of."""
    inside = set()
    for calls in by_layer.values():
        if calls[0].kind == "mix" and isinstance(calls[0].layer, keras.Layer):
            inside |= {id(part) for part in calls[0].layer._flatten_layers(include_self=False)}
    for key, calls in by_layer.items():
        if key in inside or not all(_is_sliceable(call, len(calls)) for call in calls):
            yield from calls


def _is_sliceable(call, calls):
    layer = call.layer
    constants = keras.tree.flatten((call.node.arguments.args, call.node.arguments.kwargs))
    if not isinstance(layer, keras.Layer):
        constants += vars(layer).values()
    if any(np.ndim(value) > 0 for value in constants if _is_array(value)):
        return False  # an array as long as the channels, maybe
    if isinstance(layer, layers.Rescaling) and (np.ndim(layer.scale) or np.ndim(layer.offset)):
        return False
    if isinstance(layer, layers.Normalization):  # its mean and variance need not be weights
        return False
    if getattr(layer, "noise_shape", None) is not None:
        return False
    if isinstance(layer, layers.Reshape):
        return type(layer) in _SHRINKABLE and calls == 1
    if call.kind == "kernel" or getattr(layer, "weights", None):
        return _is_cuttable(layer) and not _misreads_bias(call, call.outputs[0].ids.size)
    return True


def _misreads_bias(call, channels):
    """Whether Keras takes the width for the channels when it adds the bias of a channels-first layer."""
    # keras.src.backend.tensorflow.numpy.add, in Keras 3.15, where both have the same size.
    size = call.node.outputs[0].shape[-1]
    return getattr(call.layer, "data_format", None) == "channels_first" and channels == size


def _is_cuttable(layer):
    """Whether the layer has weights of a known meaning, and these alone."""
    plain = getattr(layer, "quantization_mode", None) is None and not getattr(layer, "lora_enabled", False)
    parts = layer._flatten_layers(include_self=False)  # an activation, for one
    whole = getattr(layer, "groups", 1) == 1 and not any(part.weights for part in parts)
    return type(layer) in _SHRINKABLE and plain and whole


def _is_array(value):
    return not isinstance(value, (str, keras.KerasTensor)) and hasattr(value, "shape")


# Constants.


@dataclasses.dataclass
class _Kernel:
    """How a call reads its inputs.

    Attributes:
        read: Booleans (in, out): whether any weight joins the two.
        cut: Booleans (in, out): whether any such weight falls into the padding for some outputs and not for others.
        weights: Array (taps, in, out).
        always: Booleans (taps,): those that fall on the image for all outputs.
    """

    read: np.ndarray
    cut: np.ndarray
    weights: np.ndarray
    always: np.ndarray

    def of_constants(self, constants):
        """Return what planes of these constants add to each output; nothing where there is 0 or no constant."""
        rows = np.flatnonzero(np.isfinite(constants) & (constants != 0))
        weights = self.weights[self.always][:, rows].astype("float64").sum(axis=0)
        return constants[rows] @ weights


class _Constants:
    """Which channels of a model's tensors hold one value everywhere, whatever the model's input is."""

    def __init__(self, graph):
        self._kernels = {}
        self._values = {}
        for call in graph.calls:
            if call.kind == "mix" or call.coupled or call.training:
                continue
            with_kernel = call.kind == "kernel" or isinstance(call.layer, _DEPTHWISE)
            # Keras's scope keeps losses and states of the layers out of it.
            with keras.StatelessScope():
                found = self._through_kernel(call) if with_kernel else self._through_values(call)
            for channels, values in zip(call.outputs, found):
                self._values[id(channels)] = values

    def values(self, channels):
        """Array with an entry for each channel of the tensor: its constant, or NaN where it is none."""
        found = self._values.get(id(channels))
        return np.full(channels.ids.size, np.nan) if found is None else found

    def kernel(self, call):
        if id(call) not in self._kernels:
            self._kernels[id(call)] = _kernel_of(call)
        return self._kernels[id(call)]

    def _through_kernel(self, call):
        if not _is_cuttable(call.layer) or _misreads_bias(call, call.outputs[0].ids.size):
            return []
        kernel = self.kernel(call)
        constant = self.values(call.inputs[0])
        unknown = ~np.isfinite(constant)
        hidden = kernel.read[unknown].any(axis=0) | kernel.cut[~unknown & (constant != 0)].any(axis=0)
        if hidden.all():
            return []
        layer = call.layer
        outputs = kernel.of_constants(constant)
        if layer.bias is not None:
            outputs = outputs + _numpy(layer.bias)
        outputs = ops.convert_to_tensor(outputs, dtype=layer.compute_dtype)
        if layer.activation is not None:
            outputs = layer.activation(outputs)
        return [np.where(hidden, np.nan, _numpy(outputs))]

    def _through_values(self, call):
        """Calls that treat each channel by itself: they are made, on planes of constants."""
        constants = [self.values(channels) for channels in call.inputs]
        known = self._known(call, constants)
        if not known.any():
            return []
        tensors = {
            id(tensor): _planes(tensor, channels.axis, constant)
            for tensor, channels, constant in zip(call.node.arguments.keras_tensors, call.inputs, constants)
        }
        args, kwargs = call.node.arguments.fill_in(tensors)
        try:
            results = keras.tree.flatten(call.layer(*args, **kwargs))
        except Exception:
            if all(None not in tensor.shape[1:] for tensor in call.node.arguments.keras_tensors):
                raise
            return []  # the sizes that stand for unknown ones do not suit the layer
        return [np.where(known, _if_constant(y, c.axis), np.nan) for y, c in zip(results, call.outputs)]

    def _known(self, call, constants):
        """Which channels of the output depend on constants alone."""
        outputs = call.outputs[0]
        if call.kind == "copy":
            known = {}
            for channels, constant in zip(call.inputs, constants):
                for identity, value in zip(channels.ids.tolist(), constant):
                    known[identity] = known.get(identity, True) and np.isfinite(value)
            return np.array([known[identity] for identity in outputs.ids.tolist()], bool)
        wide = [np.repeat(constant, outputs.ids.size // constant.size) for constant in constants]
        known = np.isfinite(wide).all(axis=0)
        if type(call.layer).__name__ == "Multiply":
            known |= (np.asarray(wide) == 0).any(axis=0)
        return known


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32")).astype("float64")


# Stands for a size that the model leaves open. Nothing that depends on the size is taken for a constant.
_SOME_SIZE = 33


def _planes(tensor, axis, constant):
    shape = [1, *(_SOME_SIZE if size is None else size for size in tensor.shape[1:])]
    along = [1] * len(shape)
    along[axis] = constant.size
    values = np.where(np.isfinite(constant), constant, 0).reshape(along)
    return ops.convert_to_tensor(np.broadcast_to(values, shape), dtype=tensor.dtype)


def _if_constant(tensor, axis):
    """Return the value of each channel, NaN where it is not one value."""
    values = np.moveaxis(_numpy(tensor), axis, -1)
    values = values.reshape(-1, values.shape[-1])
    return np.where((values == values[0]).all(axis=0), values[0], np.nan)


def _kernel_of(call):
    channels, outputs = call.inputs[0].ids.size, call.outputs[0].ids.size
    if not _is_cuttable(call.layer):  # may compute anything from its weights
        every = np.ones((channels, outputs), bool)
        return _Kernel(every, every, np.zeros((0, 0, 0)), np.zeros(0, bool))
    weights = _weights_by_connection(call.layer, channels, outputs)
    weights = weights.reshape(-1, channels, outputs)
    always, never = (inside.reshape(-1) for inside in _inside(call))
    cut = (weights[~(always | never)] != 0).any(axis=0)
    return _Kernel((weights != 0).any(axis=0), cut, weights, always)


def _weights_by_connection(layer, inputs, outputs):
    """Return the weights of each pair of an input and an output, an array (taps..., in, out)."""
    if isinstance(layer, _SEPARABLE):
        pointwise = _numpy(layer.pointwise_kernel).reshape(inputs, layer.depth_multiplier, outputs)
        return np.einsum("...im,imo->...io", _numpy(layer.depthwise_kernel), pointwise)
    kernel = ops.convert_to_numpy(layer.kernel)
    if isinstance(layer, _DEPTHWISE):
        diagonal = np.zeros((*kernel.shape[:-1], outputs), kernel.dtype)
        for channel in range(inputs):
            place = slice(channel * layer.depth_multiplier, (channel + 1) * layer.depth_multiplier)
            diagonal[..., channel, place] = kernel[..., channel, :]
        return diagonal
    return np.swapaxes(kernel, -1, -2) if isinstance(layer, _TRANSPOSED) else kernel


def _inside(call):
    """Return which taps of a kernel fall on the image for all outputs, and which ones for none."""
    layer = call.layer
    taps = tuple(getattr(layer, "kernel_size", ()))
    always, never = np.ones(taps, bool), np.zeros(taps, bool)
    if isinstance(layer, _TRANSPOSED):  # another set of taps for each output pixel
        return ~always, never
    if not taps or layer.padding == "valid":
        return always, never
    shape = call.node.arguments.keras_tensors[0].shape
    sizes = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]
    for axis, (size, length) in enumerate(zip(sizes, taps)):
        along = [1] * len(taps)
        along[axis] = length
        each, none = _inside_along(size, length, layer.strides[axis], layer.dilation_rate[axis], layer.padding)
        always, never = always & each.reshape(along), never | none.reshape(along)
    return always & ~never, never


def _inside_along(size, length, stride, dilation, padding):
    if size is None:
        return np.full(length, length == 1), np.zeros(length, bool)
    reach = (length - 1) * dilation
    outputs = -(-size // stride)
    before = reach if padding == "causal" else max((outputs - 1) * stride + reach + 1 - size, 0) // 2
    places = np.arange(outputs) * stride - before + dilation * np.arange(length)[:, None]
    inside = (places >= 0) & (places < size)
    return inside.all(axis=1), ~inside.any(axis=1)


# Smaller layers: (layer, slices) -> (new layer, transfer), or None for a copy.


def _smaller(layer, transfer, **changes):
    return layer.__class__.from_config({**layer.get_config(), **changes}), transfer


def _smaller_kernel(size, axes=(-2, -1)):
    """Return the function for layers with a `kernel` whose inputs and outputs are on these axes.

    Args:
        size: Name of the argument that gives the number of outputs.
        axes: Axes of the kernel's inputs and outputs.
    """

    def smaller(layer, slices):
        def cut(array, broadcast=False):
            array = ops.convert_to_numpy(array)
            for axis, kept in zip(axes, (slices.inputs, slices.outputs)):
                if array.shape[axis] != 1 or not broadcast:
                    array = np.compress(kept, array, axis=axis)
            return array

        def transfer(old, new):
            kernel = cut(old.kernel).copy()
            np.moveaxis(kernel, axes[0], 0)[slices.silent] = 0
            variable = new._kernel if hasattr(new, "_kernel") else new.kernel
            if isinstance(old, BaseSparse):
                new.mask.assign(cut(old.mask, broadcast=True))
            variable.assign(kernel)
            _transfer_bias(old, new, slices)

        changes = {size: int(slices.outputs.sum()), "use_bias": layer.use_bias or slices.bias is not None}
        if isinstance(layer, BaseSparse):
            granularity = _granularity_of(layer, cut(layer.mask, broadcast=True))
            changes["granularity"] = granularities.serialize(granularity)
            changes["mask_initializer"] = "ones"  # the layer's own may know one shape only
        return _smaller(layer, transfer, **changes)

    return smaller


def _granularity_of(layer, mask):
    """Return the layer's granularity; the plain one with masks of that shape where the runs or blocks are broken up."""
    granularity = layer.granularity

    def is_whole(mask):
        preferred = granularity.preferred(np.where(mask != 0, 0.0, -np.inf))
        return granularity.accepts(mask, mask.shape) and (preferred is None or bool(preferred[mask != 0].all()))

    if granularity.mask_shape(mask.shape) != mask.shape or is_whole(mask):
        return granularity
    if not is_whole(ops.convert_to_numpy(layer.mask)):
        return granularity  # it was not before, either
    return granularities.get("weight" if granularity.taps else "connection")


def _transfer_bias(old, new, slices):
    if new.bias is None:
        return
    bias = np.zeros(int(slices.outputs.sum()))
    if old.bias is not None:
        bias = _numpy(old.bias)[slices.outputs]
    new.bias.assign(bias if slices.bias is None else bias + slices.bias)


def _smaller_separable(layer, slices):
    def transfer(old, new):
        depthwise = np.compress(slices.inputs, _numpy(old.depthwise_kernel), axis=-2)
        depthwise[..., slices.silent, :] = 0
        between = np.repeat(slices.inputs, old.depth_multiplier)
        new.depthwise_kernel.assign(depthwise)
        new.pointwise_kernel.assign(_numpy(old.pointwise_kernel)[..., between, :][..., slices.outputs])
        _transfer_bias(old, new, slices)

    use_bias = layer.use_bias or slices.bias is not None
    return _smaller(layer, transfer, filters=int(slices.outputs.sum()), use_bias=use_bias)


def _smaller_depthwise(layer, slices):
    def transfer(old, new):
        new.kernel.assign(np.compress(slices.inputs, _numpy(old.kernel), axis=-2))
        _transfer_bias(old, new, slices)

    return _smaller(layer, transfer)


def _smaller_channelwise(layer, slices):
    """Layers whose weights have an axis of channels."""

    def transfer(old, new):
        for before, after in zip(old.weights, new.weights, strict=True):
            # Vectors, or of the shape of an example: PReLU's, with 1 in place of shared sizes.
            axis = slices.axis - 1 if len(before.shape) > 1 else 0
            values = ops.convert_to_numpy(before)
            after.assign(values if values.shape[axis] == 1 else np.compress(slices.outputs, values, axis=axis))

    return _smaller(layer, transfer)


def _smaller_reshape(layer, slices):
    target = list(layer.target_shape)
    if target[slices.axis - 1] != -1:
        target[slices.axis - 1] = int(slices.outputs.sum())
    return _smaller(layer, lambda old, new: None, target_shape=tuple(target))


# Exact classes: one of someone else's may be made differently.
_SHRINKABLE = {
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D, SparseConv2D), _smaller_kernel("filters")),
    **dict.fromkeys((layers.Dense, SparseDense), _smaller_kernel("units")),
    **dict.fromkeys(_TRANSPOSED, _smaller_kernel("filters", (-1, -2))),
    **dict.fromkeys(_SEPARABLE, _smaller_separable),
    **dict.fromkeys(_DEPTHWISE, _smaller_depthwise),
    **dict.fromkeys((layers.BatchNormalization, layers.PReLU), _smaller_channelwise),
    layers.Reshape: _smaller_reshape,
}
