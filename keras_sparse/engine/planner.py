"""Choosing a routine for every layer by measuring, on the machine at hand."""

import dataclasses
import math

from keras_sparse.engine import routines, timing

__all__ = ["LayerPlan", "fastest", "plan_convolution"]

# A routine has to win by this factor: medians on a busy machine differ by a few percent without a cause.
_MARGIN = 1.05


@dataclasses.dataclass
class LayerPlan:
    """The routine chosen for a layer, and why.

    Attributes:
        routine: Key of `ROUTINES`, or of `POOLINGS`.
        bytes: Stored size of the routine's constants.
        milliseconds: `{routine: {batch size: median}}` of the candidates, empty where nothing was measured.
    """

    routine: str
    bytes: int
    milliseconds: dict


def fastest(functions, input_shapes, batch_sizes):
    """Return the fastest function that is slower than the one called `"dense"` at no batch size.

    Args:
        functions: `{name: function of tensors}`, `"dense"` first and one more at least.
        input_shapes: For each batch size, the shapes of what the functions are called with.
        batch_sizes: The batch size behind each input shape, for the record.

    Returns:
        A pair of its name and the medians, `{name: {batch size: milliseconds}}`.
    """
    seconds = [timing.alternate(functions, shapes, unroll=8, budget=0.4) for shapes in input_shapes]

    def speed_up(name):
        ratios = [times["dense"] / times[name] for times in seconds]
        return math.prod(ratios) ** (1 / len(ratios)) if min(ratios) >= 1.0 else 0.0

    best = max((name for name in functions if name != "dense"), key=speed_up)
    milliseconds = {
        name: {batch: round(times[name] * 1e3, 4) for batch, times in zip(batch_sizes, seconds)} for name in functions
    }
    return best if speed_up(best) >= _MARGIN else "dense", milliseconds


def plan_convolution(convolution, candidates, input_shapes, batch_sizes, layer_of):
    """Return the routine for a convolution or dense layer: the `fastest`.

    Args:
        convolution: A `Convolution`.
        candidates: Names of routines to consider beside the dense one. A single name is taken unmeasured where it
            applies and `input_shapes` is empty.
        input_shapes: For each batch size to be good at, the shapes of what the layer is called with.
        batch_sizes: The batch size behind each input shape, for the record.
        layer_of: Maps a routine to the function of tensors that the exported model will call: what is measured is
            what will run, with bias, residual and activation, which TensorFlow fuses into its dense convolution.

    Returns:
        A pair of the built routine and its `LayerPlan`.
    """
    built = {name: routines.build(name, convolution) for name in ("dense", *candidates)}
    built = {name: routine for name, routine in built.items() if routine is not None}
    if not input_shapes or len(built) == 1:
        name = list(built)[-1]
        return built[name], LayerPlan(name, built[name].nbytes, {})
    functions = {name: layer_of(routine) for name, routine in built.items()}
    name, milliseconds = fastest(functions, input_shapes, batch_sizes)
    return built[name], LayerPlan(name, built[name].nbytes, milliseconds)
