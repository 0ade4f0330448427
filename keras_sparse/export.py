"""Export to a SavedModel that runs the sparse routines, and loading it again."""

import json
import os
import shutil
import tempfile
import time
import warnings

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from keras_sparse import ops, probing, selection, validation
from keras_sparse.engine import inference, machine, planner, timing
from keras_sparse.layers import BaseSparse
from keras_sparse.surgery import fusion
from keras_sparse.surgery.shrink import shrink_counted
from keras_sparse.surgery.sparsify import dense_twin
from keras_sparse.surgery.transform import check_supported, graph_layers, transform

__all__ = ["ExportedModel", "export", "load"]

# backend -> the routines that may replace the dense one
_BACKENDS = {"op": ("connection", "thinned", "compact"), "compact": ("compact",), "dense": ()}
_METADATA = os.path.join("assets.extra", "keras_sparse.json")
# Channels of a float32 pixel that fill a cache line. A pixel that begins in the middle of one costs more than the
# channels that are left out save.
_CACHE_LINE = 16
# A graph with larger constants does not fit into the 2 GiB of a protocol buffer; its variables stay variables.
_MAX_FROZEN_BYTES = 1_500_000_000
# A whole model counts as slower than the dense one beyond this factor, the noise of medians on a busy machine.
_NOISE = 1.03


def export(
    model,
    path,
    backend="op",
    *,
    routine="auto",
    batch_size=(1, 32),
    input_shape=None,
    verbose=True,
):
    """Write the model as a TensorFlow SavedModel for inference, signature `"serving_default"`.

    Weights become constants of the graph. With `"op"`, every layer with zeros in its kernel is measured on this
    machine with each routine, and gets the fastest; the whole model is then measured against the dense export, which
    takes its place, with a warning, should it be faster. So the export is never slower than the dense one on the
    machine that planned it.

    | backend     | layers run as                                    | to load it                         |
    |-------------|--------------------------------------------------|------------------------------------|
    | `"op"`      | the package's compiled ops, where they win       | the ops must be registered         |
    | `"compact"` | TensorFlow's, over the channels that are alive   | stock TensorFlow                   |
    | `"dense"`   | TensorFlow's, zeros included                     | stock TensorFlow                   |

    `"op"` and `"compact"` first remove the channels that nothing reads and those that are constant, as `ks.shrink`
    does, but leave a multiple of 16, a cache line, where there was one and more than 8 stay.

    Around a layer with zeros, layers are computed together where one alone reads the other: batch normalisation
    behind it goes into its weights; a ReLU or ReLU6, the sum of a residual block and a `ZeroPadding2D` before a
    convolution are part of its routine, and so is a `MaxPooling2D` by squares that do not overlap. They are measured
    together as well.

    Where a layer got such a routine, each other `MaxPooling2D` (float32, channels last) is measured with `"per_image"`,
    TensorFlow's kernel that cuts no image up for several threads: of use in small batches. It needs no ops.

    `import keras_sparse` registers the ops, and so does `tf.load_op_library(ks.ops.library_path())` alone.

    The directory is written whole or not at all; one that exists is replaced in the end. The plan is kept beside
    the graph in `assets.extra/keras_sparse.json`.

    Args:
        model: A built Sequential or functional model: with sparse layers, or plain and pruned in place.
        path: Directory to write.
        backend: `"op"`, `"compact"` or `"dense"`.
        routine: `"auto"` measures. `"connection"`, `"thinned"` (backend `"op"` only) or `"compact"` is taken
            unmeasured wherever it applies: for a machine other than this one.
        batch_size: Batch size, or several, at which the export must be fast. The exported graph takes any.
        input_shape: Shape of one example without the batch axis, to measure at where the model leaves it open.
        verbose: Whether the progress and the choice for each layer are printed.

    Returns:
        The plan, as written: `{"backend", "layers": {path: {"routine", "bytes", "milliseconds"}}, "removed": {path:
        {"inputs", "outputs"}}, "model", ...}`, with milliseconds by routine and batch size, and for each layer that
        lost channels how many of how many.

    Raises:
        TypeError, ValueError: If an argument is of the wrong kind or outside its range, or the model is subclassed
            or not built.
        RuntimeError: If `backend="op"` and the compiled ops are missing.
        FileExistsError: If `path` is a file.
    """
    validation.one_of("backend", backend, tuple(_BACKENDS))
    candidates = _candidates(backend, routine)
    batch_sizes = _batch_sizes(batch_size)
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileExistsError(f"`path` must be a directory or not exist. Received: path={path!r}, a file")
    check_supported(model, "export it")
    if backend == "op" and not ops.is_available():
        raise RuntimeError(
            "`backend` must be 'compact' or 'dense' where the compiled ops are missing. To build them, install "
            "a C++ compiler and reinstall keras_sparse with `pip install --force-reinstall --no-deps keras_sparse`. "
            f"Received: backend={backend!r}"
        )
    started = time.time()
    units, removed = _units(model), {}
    if candidates:
        smaller, removed = shrink_counted(model, inference=True, multiple=_CACHE_LINE)
        smaller_units = _units(smaller)
        # The other backends promise the kernels that TensorFlow takes by itself.
        poolings = _poolings(smaller) if backend == "op" and routine == "auto" else {}
        plans, routines = _plan(
            smaller, smaller_units, poolings, candidates, routine, batch_sizes, input_shape, verbose
        )
        exported = _with_routines(smaller, smaller_units, routines)
    else:
        plans, routines, exported = {}, {}, _with_routines(model, units, {})
    milliseconds = {}
    if routine == "auto" and (routines or removed):
        milliseconds = _measure_models(
            {"dense": _with_routines(model, units, {}), backend: exported}, model, input_shape, batch_sizes
        )
        slower = [b for b in batch_sizes if milliseconds[backend][b] > _NOISE * milliseconds["dense"][b]]
        if slower:
            warnings.warn(
                f"The '{backend}' export of '{model.name}' is slower than the dense one at batch size {slower} "
                f"({milliseconds}, ms): the dense one is written instead.",
                stacklevel=2,
            )
            exported = _with_routines(model, units, {})
            plans = {path: planner.LayerPlan("dense", p.bytes, p.milliseconds) for path, p in plans.items()}
            removed = {}
    plan = {
        "backend": backend,
        "routine": routine,
        "batch_sizes": batch_sizes,
        "model": milliseconds,
        "layers": {path: vars(layer_plan) for path, layer_plan in plans.items()},
        "removed": removed,
        "machine": machine.describe(),
        "tensorflow": tf.__version__,
    }
    _write(exported, path, plan)
    if verbose:
        _print_plan(plan, path, time.time() - started)
    return plan


def _candidates(backend, routine):
    allowed = ("auto", *_BACKENDS[backend])
    if routine == "dense" or routine not in allowed:
        validation.one_of("routine", routine, allowed)
    return _BACKENDS[backend] if routine == "auto" else (routine,)


def _batch_sizes(batch_size):
    sizes = batch_size if isinstance(batch_size, (list, tuple)) else [batch_size]
    if not sizes:
        validation.fail("batch_size", "hold at least one size", batch_size)
    return [validation.integer("batch_size", size, at_least=1) for size in sizes]


def _plannable(layer):
    """Whether a routine of ours can stand in for the layer: it prunes, or is plain and holds zeros."""
    if isinstance(layer, BaseSparse):
        return getattr(layer, "quantization_mode", None) is None
    if type(layer) not in (keras.layers.Conv2D, keras.layers.Dense) or getattr(layer, "quantization_mode", None):
        return False
    return bool((keras.ops.convert_to_numpy(layer.kernel) == 0).any())


def _exchangeable(model):
    """Return `{path: layer}` of the layers that `transform` can exchange: not those in wrappers."""
    outer = graph_layers(model)
    return {path: layer for path, layer in selection.flatten_layers(model).items() if id(layer) in outer}


def _units(model):
    """Return `{path: Unit}` of the plannable layers, each with what can be computed together with it."""
    layers = {path: layer for path, layer in _exchangeable(model).items() if _plannable(layer)}
    units = fusion.find_units(model, layers.values())
    return {path: units[id(layer)] for path, layer in layers.items()}


def _poolings(model):
    """Return `{path: layer}` of the max poolings that may run per image."""
    return {
        path: layer
        for path, layer in _exchangeable(model).items()
        if type(layer) is keras.layers.MaxPooling2D
        and layer.data_format == "channels_last"
        and layer.compute_dtype == "float32"
    }


def _plan(model, units, poolings, candidates, routine, batch_sizes, input_shape, verbose):
    """Return `{path: LayerPlan}` for the units and poolings, and `{path: routine}` for those not to run dense.

    The routine of a unit is what its `Convolution` was built into, that of a pooling one of `POOLINGS`.
    """
    calls = probing.record_calls(model, input_shape) if routine == "auto" else {}
    paths = {id(layer): path for path, layer in selection.flatten_layers(model).items()} if calls else {}
    progress = keras.utils.Progbar(
        len(units) + len(poolings), verbose=1 if verbose and routine == "auto" else 0, unit_name="layer"
    )
    plans, routines = {}, {}
    for path, unit in units.items():
        shapes = []
        if calls:
            # A shared layer is measured at its first call.
            call, first = calls[path][0], unit.padding or unit.layer
            shapes = [calls[paths[id(first)]][0].input_shape]
            if unit.addition is not None:
                shapes.insert(1 - unit.position, call.output_shape)
        built, plans[path] = planner.plan_convolution(
            _convolution(unit),
            candidates,
            [[(batch, *shape[1:]) for shape in shapes] for batch in batch_sizes] if shapes else [],
            batch_sizes,
            lambda routine, unit=unit: _function_of(_inference_layer(unit, routine)),
        )
        if plans[path].routine != "dense":
            routines[path] = built
        progress.add(1)
    # With no sparse routine in it the export is to be the dense one, which is what TensorFlow does by itself.
    has_sparse_routine = bool(routines)
    pooled = {id(units[path].pooling) for path in routines}
    for path, layer in poolings.items():
        if has_sparse_routine and id(layer) not in pooled:
            shape = calls[path][0].input_shape
            choice, milliseconds = planner.fastest(
                {name: build(layer) for name, build in inference.POOLINGS.items()},
                [[(batch, *shape[1:])] for batch in batch_sizes],
                batch_sizes,
            )
            plans[path] = planner.LayerPlan(choice, 0, milliseconds)
            if choice != "dense":
                routines[path] = inference.POOLINGS[choice]
        progress.add(1)
    return plans, routines


def _function_of(layer):
    return lambda *tensors: layer(list(tensors) if len(tensors) > 1 else tensors[0])


def _weights(unit):
    bias = None if unit.layer.bias is None else keras.ops.convert_to_numpy(unit.layer.bias)
    return fusion.fold_normalization(keras.ops.convert_to_numpy(unit.layer.kernel), bias, unit.normalization)


def _padding(unit):
    return None if unit.padding is None else unit.padding.padding


def _convolution(unit):
    return inference.convolution_of(
        unit.layer, *_weights(unit), _padding(unit), unit.activation_name or "linear", unit.pool_size
    )


def _inference_layer(unit, routine):
    # In the place of the addition, where there is one: only there is the residual at hand.
    name = (unit.addition or unit.layer).name
    activation = unit.layer.activation if unit.activation_name is None else None
    return inference.inference_layer(unit.layer, routine, name, activation, _padding(unit), unit.position, unit.pooling)


def _with_routines(model, units, routines):
    """Return the model with a routine in place of each unit and pooling in `routines`, the others dense."""
    layers = selection.flatten_layers(model)
    exchanges = {id(layers[path]): routine for path, routine in routines.items() if path not in units}
    for path, unit in units.items():
        if path in routines:
            for layer in (unit.layer, *unit.absorbed):
                exchanges[id(layer)] = inference.PassThrough
            place = unit.addition or unit.layer
            exchanges[id(place)] = lambda _, unit=unit, path=path: _inference_layer(unit, routines[path])
        elif unit.normalization is not None:
            # TensorFlow fuses the rest by itself.
            exchanges[id(unit.normalization)] = inference.PassThrough
            exchanges[id(unit.layer)] = lambda _, unit=unit: _folded_twin(unit)

    def exchange(layer):
        new = exchanges[id(layer)](layer) if id(layer) in exchanges else dense_twin(layer)
        return (new, lambda old, new: None) if isinstance(new, keras.Layer) else new

    return transform(model, exchange, inference=True)


def _folded_twin(unit):
    """The plain layer for the unit's layer and its normalisation, and how it gets its weights."""
    layer, _ = dense_twin(unit.layer) or (unit.layer, None)
    layer = layer.__class__.from_config({**layer.get_config(), "use_bias": True})

    def transfer(old, new):
        kernel, bias = _weights(unit)
        new._kernel.assign(kernel)
        new.bias.assign(bias)

    return layer, transfer


def _serving_function(model):
    """Return `(function, specs)`: the model in inference mode on flat tensors, and their specifications."""
    structure = probing.input_structure(model)
    inputs = keras.tree.flatten(structure)
    names = [spec.name.split(":")[0] for spec in inputs]
    specs = [
        tf.TensorSpec((None, *spec.shape[1:]), keras.backend.standardize_dtype(spec.dtype), name=name)
        for spec, name in zip(inputs, names)
    ]

    def function(*tensors):
        return model(keras.tree.pack_sequence_as(structure, list(tensors)), training=False)

    return function, specs


def _measure_models(models, model, input_shape, batch_sizes):
    shapes = probing.concrete_input_shapes(model, input_shape)
    functions = {}
    for name, candidate in models.items():
        function, specs = _serving_function(candidate)
        functions[name] = _frozen(tf.function(function).get_concrete_function(*specs))
    dtypes = [spec.dtype.name for spec in specs]
    milliseconds = {name: {} for name in models}
    for batch in batch_sizes:
        times = timing.alternate(functions, [(batch, *shape) for shape in shapes], dtypes)
        for name, seconds in times.items():
            milliseconds[name][batch] = round(seconds * 1e3, 4)
    return milliseconds


def _frozen(concrete):
    size = sum(v.shape.num_elements() * v.dtype.size for v in concrete.variables)
    if not concrete.variables or size > _MAX_FROZEN_BYTES:
        return concrete
    frozen = convert_variables_to_constants_v2(concrete)
    outputs = concrete.structured_outputs

    def function(*tensors):
        return tf.nest.pack_sequence_as(outputs, tf.nest.flatten(frozen(*tensors)))

    return function


def _write(model, path, plan):
    function, specs = _serving_function(model)
    concrete = tf.function(function).get_concrete_function(*specs)
    run = _frozen(concrete)
    module = tf.Module()
    module.weights = list(concrete.variables) if run is concrete else []
    module.serve = tf.function(lambda *tensors: run(*tensors), input_signature=specs)

    @tf.function(input_signature=specs)
    def serving_default(*tensors):
        outputs = run(*tensors)
        if isinstance(outputs, dict):
            return outputs
        return {f"output_{i}": output for i, output in enumerate(keras.tree.flatten(outputs))}

    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Beside the goal, so that the last step is a rename within one file system.
    staging = tempfile.mkdtemp(prefix=".export-", dir=os.path.dirname(path))
    try:
        target = os.path.join(staging, "model")
        tf.saved_model.save(module, target, signatures={"serving_default": serving_default})
        os.makedirs(os.path.join(target, os.path.dirname(_METADATA)))
        with open(os.path.join(target, _METADATA), "w", encoding="utf-8") as file:
            json.dump(plan, file, indent=1)
        if os.path.isdir(path):
            os.rename(path, os.path.join(staging, "replaced"))
        os.rename(target, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _print_plan(plan, path, seconds):
    for layer, counts in plan["removed"].items():
        print("  {}: {} of {} inputs and {} of {} outputs removed".format(layer, *counts["inputs"], *counts["outputs"]))
    for layer, choice in plan["layers"].items():
        times = ", ".join(
            f"{routine} {'/'.join(f'{ms:.3f}' for ms in by_batch.values())}"
            for routine, by_batch in choice["milliseconds"].items()
        )
        print(f"  {layer}: {choice['routine']}" + (f"  (ms at batch {plan['batch_sizes']}: {times})" if times else ""))
    for batch in plan["batch_sizes"] if plan["model"] else []:
        by_backend = ", ".join(f"{name} {times[batch]:.3f} ms" for name, times in plan["model"].items())
        print(f"  whole model at batch {batch}: {by_backend}")
    print(f"Exported '{plan['backend']}' to {path} in {seconds:.1f} s")


class ExportedModel:
    """A loaded export: call it with arrays or tensors, in the structure of the model's inputs.

    Attributes:
        plan: What `ks.export` returned, or `None` for a SavedModel that something else has written.
        saved_model: What `tf.saved_model.load` returned.
    """

    def __init__(self, saved_model, plan):
        self.saved_model = saved_model
        self.plan = plan
        self._serve = saved_model.serve

    def __call__(self, inputs):
        """Return the model's outputs, tensors in the structure the model returned.

        Args:
            inputs: Array or tensor with a batch axis; for several inputs a list, tuple or dict of these.
        """
        specs = self._serve.input_signature or []
        flat = keras.tree.flatten(inputs)
        if specs and len(flat) != len(specs):
            validation.fail("inputs", f"hold {len(specs)} tensors", f"{len(flat)} tensors")
        tensors = [tf.cast(x if tf.is_tensor(x) else np.asarray(x), s.dtype) for x, s in zip(flat, specs)]
        return self._serve(*tensors)


def load(path):
    """Load what `ks.export` wrote.

    Args:
        path: Directory of the SavedModel.

    Returns:
        An `ExportedModel`, a callable.

    Raises:
        FileNotFoundError: If there is no SavedModel at `path`.
        RuntimeError: If it runs the compiled ops and they are missing.
    """
    path = os.fspath(path)
    if not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise FileNotFoundError(f"`path` must be the directory of a SavedModel. Received: path={path!r}")
    plan = None
    if os.path.exists(os.path.join(path, _METADATA)):
        with open(os.path.join(path, _METADATA), encoding="utf-8") as file:
            plan = json.load(file)
        used = {layer["routine"] for layer in plan["layers"].values()}
        if used & {"connection", "thinned"} and not ops.is_available():
            raise RuntimeError(
                "`path` must hold a 'dense' or 'compact' export where the compiled ops are missing: install a C++ "
                f"compiler and reinstall keras_sparse. Received: path={path!r}, which runs {sorted(used)}"
            )
    saved_model = tf.saved_model.load(path)
    if not hasattr(saved_model, "serve"):
        raise ValueError(f"`path` must hold a model that ks.export wrote. Received: path={path!r}")
    return ExportedModel(saved_model, plan)
