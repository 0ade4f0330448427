"""What a model holds and what one forward pass costs."""

import math

import keras
import numpy as np
from keras import ops

from keras_sparse import probing, selection, storage
from keras_sparse.layers import BaseSparse

__all__ = ["count", "summary"]


def count(model, input_shape=None):
    """Count parameters, kept weights, connections, multiply-adds and bytes.

    Args:
        model: A built Sequential or functional model.
        input_shape: Shape of one example, without the batch axis; needed where the model's own input shape leaves
            sizes open.

    Returns:
        `{"layers": {path: {...}}, "total": {...}}`, each entry with

        - `params`: weights and biases, masks not counted
        - `nnz`: kept ones among them
        - `sparsity`: share of zeros in the kernel, in [0, 1]
        - `connections`: pairs of one input and one output channel that any tap still joins
        - `madds`: multiply-adds of kept kernel weights in one forward pass on one example, all calls of a shared
          layer included; `None` for a layer type whose multiply-adds are not known (left out of the total)
        - `bytes`: `dense`, every parameter as it is stored in memory; `bitmask`, the kept ones and one bit for each
          unit of the mask (for each weight, where the layer has no mask); `csr`, the kept ones and an index of 4 or 5
          bits for each kept weight of the kernel, fillers included, whichever is smaller; `compressed`, what
          `ks.save_compressed` writes for the layer, each of its tensors in its smallest encoding, the mask included

        Layers without weights are left out. Biases and additions are not multiply-adds.

    Raises:
        ValueError: If the model is not built, or sizes of the input stay unknown.
    """
    calls = probing.record_calls(model, input_shape)
    layers = {}
    for path, layer in selection.flatten_layers(model).items():
        entry = _count_layer(layer, calls[path])
        if entry["params"]:
            layers[path] = entry
    total = {key: sum(e[key] or 0 for e in layers.values()) for key in ("params", "nnz", "connections", "madds")}
    kernel = sum(e["_kernel"] for e in layers.values())
    zeros = sum(e["sparsity"] * e["_kernel"] for e in layers.values())
    total["sparsity"] = zeros / kernel if kernel else 0.0
    total["bytes"] = {key: sum(e["bytes"][key] for e in layers.values()) for key in _SIZES}
    for entry in layers.values():
        del entry["_kernel"]
    return {"layers": layers, "total": total}


def _own_weights(layer):
    """Return a layer's weights without its mask and without those of layers inside it."""
    inner = {id(w) for child in getattr(layer, "_layers", []) for w in child.weights}
    mask = id(layer.mask) if isinstance(layer, BaseSparse) and layer.built else None
    return [w for w in layer.weights if id(w) not in inner and id(w) != mask]


def _kernels(layer):
    """Return `[(kept, block_shape)]`: for each kernel, which of its weights are kept, and the shape of one unit."""
    if isinstance(layer, BaseSparse):
        mask, shape = ops.convert_to_numpy(layer.mask) != 0, tuple(layer._kernel.shape)
        return [(np.broadcast_to(mask, shape), tuple(size // units for size, units in zip(shape, mask.shape)))]
    # A wrapper may show the kernel of the layer within as its own.
    own = {id(w) for w in _own_weights(layer)}
    found = []
    for variable, _ in selection.own_prunable(layer).values():
        if id(variable) in own:
            values = ops.convert_to_numpy(variable)
            found.append((values != 0, None))
    return found


def _count_layer(layer, calls):
    weights = _own_weights(layer)
    params = sum(math.prod(w.shape) for w in weights)
    itemsize = {id(w): np.dtype(_numpy_dtype(w.dtype)).itemsize for w in weights}
    kernels = _kernels(layer) if params else []
    size = sum(kept.size for kept, _ in kernels)
    nnz = sum(int(kept.sum()) for kept, _ in kernels)
    width = next((itemsize[id(w)] for w in weights), 4)
    dense_bytes = sum(math.prod(w.shape) * itemsize[id(w)] for w in weights)
    others = dense_bytes - size * width
    csr = [min(storage.CSR(bits).nbytes(kept, width) for bits in (4, 5)) for kept, _ in kernels]
    return {
        "params": params,
        "nnz": params - size + nnz,
        "sparsity": 1.0 - nnz / size if size else 0.0,
        "connections": sum(_connections(kept) for kept, _ in kernels),
        "madds": _madds(layer, kernels, calls),
        "bytes": {
            "dense": dense_bytes,
            "bitmask": others + sum(storage.BitMask(block).nbytes(kept, width) for kept, block in kernels),
            "csr": others + sum(csr),
            "compressed": sum(storage.compressed_bytes(_stored(layer, weights)).values()),
        },
        "_kernel": size,
    }


def _stored(layer, weights):
    """Return the layer's tensors as a file holds them, by any names."""
    tensors = {str(index): ops.convert_to_numpy(weight) for index, weight in enumerate(weights)}
    if isinstance(layer, BaseSparse) and weights:
        place = next(index for index, weight in enumerate(weights) if weight is layer._kernel)
        tensors |= {str(place): ops.convert_to_numpy(layer.kernel), "mask": ops.convert_to_numpy(layer.mask)}
    return tensors


def _numpy_dtype(dtype):
    return "uint16" if dtype == "bfloat16" else dtype  # NumPy knows no bfloat16; the size is what counts


def _connections(kept):
    if kept.ndim < 2:
        return 0
    return int(kept.any(axis=tuple(range(kept.ndim - 2))).sum())


def _positions_of_outputs(call, channels):
    return math.prod(call.output_shape) // channels


def _madds(layer, kernels, calls):
    if not kernels:
        return 0
    nnz = [int(kept.sum()) for kept, _ in kernels]
    sizes = [kept.shape for kept, _ in kernels]
    if isinstance(layer, keras.layers.Embedding):
        return 0
    if isinstance(layer, keras.layers.EinsumDense):
        return sum(nnz[0] * _einsum_positions(layer, sizes[0], call) for call in calls)
    if isinstance(layer, keras.layers.Conv1DTranspose | keras.layers.Conv2DTranspose | keras.layers.Conv3DTranspose):
        return sum(nnz[0] * math.prod(call.input_shape) // sizes[0][-1] for call in calls)
    if isinstance(layer, keras.layers.SeparableConv1D | keras.layers.SeparableConv2D):
        return sum(sum(nnz) * _positions_of_outputs(call, sizes[1][-1]) for call in calls)
    if isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D):
        return sum(nnz[0] * _positions_of_outputs(call, math.prod(sizes[0][-2:])) for call in calls)
    if isinstance(layer, keras.layers.Conv1D | keras.layers.Conv2D | keras.layers.Conv3D | keras.layers.Dense):
        return sum(nnz[0] * _positions_of_outputs(call, sizes[0][-1]) for call in calls)
    return None


def _einsum_positions(layer, kernel_shape, call):
    """Return how often an EinsumDense uses each weight: the size of the output axes that the kernel lacks."""
    kernel_labels = layer.equation.replace("...", "").split("->")[0].split(",")[1]
    output_labels = layer.equation.replace("...", "").split("->")[1]
    shared = [size for label, size in zip(kernel_labels, kernel_shape) if label in output_labels]
    return math.prod(call.output_shape) // math.prod(shared)


_SIZES = ("dense", "bitmask", "csr", "compressed")
_COLUMNS = (
    ("params", "params", "{:,}"),
    ("nnz", "nnz", "{:,}"),
    ("sparsity", "sparsity", "{:.1%}"),
    ("connections", "connections", "{:,}"),
    ("madds", "MAdds", "{:,}"),
)


def summary(model, input_shape=None, print_fn=None):
    """Print `ks.count(model)` as a table, one line a layer.

    Args:
        model: A built Sequential or functional model.
        input_shape: As in `ks.count`.
        print_fn: Called with each line; default `print`.
    """
    counts = count(model, input_shape)
    layers = selection.flatten_layers(model)
    header = ("layer", "class", *(title for _, title, _ in _COLUMNS), *(f"bytes {key}" for key in _SIZES))
    rows = [header]
    for path, entry in [*counts["layers"].items(), ("total", counts["total"])]:
        cells = ["-" if entry[key] is None else form.format(entry[key]) for key, _, form in _COLUMNS]
        sizes = [f"{entry['bytes'][key]:,}" for key in _SIZES]
        rows.append((path, type(layers[path]).__name__ if path in layers else "", *cells, *sizes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for index, row in enumerate(rows):
        aligned = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        if index in (1, len(rows) - 1):
            (print_fn or print)("-" * (sum(widths) + 2 * len(widths) - 2))
        (print_fn or print)("  ".join(aligned))
