"""From TensorFlow Model Optimization and tf_keras (Keras 2) to Keras 3. Neither is imported here."""

import inspect

import keras
import numpy as np

from keras_sparse import granularity as granularities
from keras_sparse import schedules, selection, validation
from keras_sparse.surgery.sparsify import sparsifiable_layers, with_sparse_layers
from keras_sparse.surgery.transform import check_supported, transform

__all__ = ["convert_model", "convert_schedule"]

_WRAPPER = "PruneLowMagnitude"
# What tf_keras says of a layer and Keras 3 does not know, where it is the only way there is now.
_OBSOLETE = {"groups": 1, "time_major": False, "ragged": False}
# What does not matter to a layer that has its weights, or that the graph says.
_IDLE = ("batch_input_shape", "implementation", "input_length", "kernel_initializer", "bias_initializer")


def convert_schedule(pruning_schedule):
    """Return the `ks.schedules.Schedule` that prunes as a schedule of TFMOT does.

    TFMOT counts a step up before it updates the masks, so that its step t falls after t - 1 updates of the weights.
    Steps are one less here, and masks change at the same states of the weights. Two things differ
    (docs/tfmot.md): `begin_step=0` prunes before the first batch, and `end_step` is always an update.

    Args:
        pruning_schedule: A TFMOT `PolynomialDecay` or `ConstantSparsity`, or the dict that its `get_config` returns.

    Returns:
        A `ks.schedules.PolynomialDecay` or `ConstantSparsity`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If `frequency` is longer than the interval: TFMOT then never prunes to the final sparsity.
    """
    name, config = _schedule_parts(pruning_schedule)
    known = {"PolynomialDecay": schedules.PolynomialDecay, "ConstantSparsity": schedules.ConstantSparsity}
    if name not in known:
        validation.fail(
            "pruning_schedule", "be a TFMOT PolynomialDecay or ConstantSparsity", pruning_schedule, TypeError
        )
    steps = {key: max(config[key] - 1, -1 if key == "end_step" and config[key] == -1 else 0) for key in _STEPS}
    return known[name](**{**config, **steps})


_STEPS = ("begin_step", "end_step")


def _schedule_parts(schedule):
    """Return class name and arguments of a TFMOT schedule."""
    if not isinstance(schedule, dict) and _is_of(schedule, "tensorflow_model_optimization"):
        schedule = schedule.get_config()
    if not isinstance(schedule, dict) or not isinstance(schedule.get("config"), dict):
        return None, {}
    return schedule.get("class_name"), schedule["config"]


def convert_model(model, granularity="weight", include=None, exclude=None, custom_objects=None):
    """Return a Keras 3 model with masks of a model that TFMOT has pruned, or of any model with zeros.

    Wrappers of `prune_low_magnitude` are taken off; their masks, and in other layers the zeros, become the masks.
    A `Conv2D` or `Dense` layer with a pruned weight becomes a sparse layer; other layers, recurrent ones say, become
    plain Keras 3 layers whose zeros `GradualPruning` takes for the mask. Weights are those of the model, pruned
    ones exactly zero. Compile the result anew: losses and optimizers of tf_keras are not those of Keras 3.

    ```python
    pruned = tf_keras.models.load_model("pruned.h5")  # within tfmot.sparsity.keras.prune_scope()
    model = ks.interop.tfmot.convert_model(pruned)
    ks.export(model, "exported")
    ```

    Args:
        model: A built Sequential or functional model of tf_keras, pruned by TFMOT or not, or of Keras 3. Nested models
            and shared layers are followed.
        granularity: Granularity of the masks. A unit is kept where any of its weights is.
        include: Which layers may become sparse, as in `ks.sparsify`; `None` for all that hold a pruned weight.
        exclude: The same, for layers to leave plain.
        custom_objects: `{class name: Keras 3 class}` of layers that are not Keras's own.

    Returns:
        A new Keras 3 model; where nothing is pruned yet, one without masks.

    Raises:
        TypeError: If `model` is a model of neither.
        ValueError: If it is subclassed or not built, or a layer in it has no counterpart in Keras 3.
    """
    granularity = granularities.get(granularity)
    masks = {}
    if _is_of(model, "tf_keras"):
        model, masks = _Converter(model, custom_objects or {}).convert()
    elif not isinstance(model, keras.Model):
        validation.fail("model", "be a model of tf_keras or of Keras 3", model, TypeError)
    check_supported(model, "convert it")
    candidates, masks_by_path = sparsifiable_layers(model), {}
    for path, layer in candidates.items():
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        mask = granularity.reduce(masks.get(id(layer), kernel) != 0, np.max)
        if mask.any() and not mask.all():  # a kernel of zeros alone is an untrained one
            masks_by_path[path] = mask
    pruned = {path: candidates[path] for path in masks_by_path}
    known, parents = selection.flatten_layers(model), selection.parents_of(model)
    wanted = set(selection.select(candidates, include, exclude, known=known, parents=parents)) & set(pruned)
    if not wanted:
        return transform(model, lambda layer: None)
    sparse = with_sparse_layers(model, [pruned[path] for path in wanted], granularity)
    layers = selection.flatten_layers(sparse)
    for path in wanted:
        layers[path].assign_mask(masks_by_path[path])
    return sparse


def _is_of(instance, package):
    """Return whether a class of `package` is among those of an object."""
    return any(cls.__module__.split(".")[0] == package for cls in type(instance).__mro__)


class _Converter:
    """Builds the Keras 3 model of a tf_keras model from its configuration, layer by layer, and fills in the weights.

    Args:
        model: A tf_keras model.
        custom_objects: Keras 3 classes by name.
    """

    def __init__(self, model, custom_objects):
        self.model = model
        self.custom_objects = custom_objects
        self.pairs = []  # (tf_keras layer, Keras 3 layer)
        self._made = {}  # id of a tf_keras layer or model -> its counterpart: one that is shared stays one

    def convert(self):
        """Return the Keras 3 model and `{id(its layer): mask of its kernel}`."""
        if not getattr(self.model, "built", False):
            validation.fail("model", "be built, so that its weights can be kept", self.model.name)
        with keras.saving.custom_object_scope(self.custom_objects):
            converted = self._model(self.model)
        masks = {}
        for old, new in self.pairs:
            mask = _transfer(old, new)
            if mask is not None:
                masks[id(new)] = mask
        return converted, masks

    def _model(self, model):
        """Return a model of the same layers; nested ones call this again."""
        kind = {cls.__name__ for cls in type(model).__mro__}
        if "Sequential" in kind:
            return self._sequential(model)
        if "Functional" in kind:
            return self._functional(model)
        rule = "be, and hold, Sequential and functional models only; a subclassed one has Python code of its own"
        validation.fail("model", rule, f"{model.name} of class {type(model).__name__}")

    def _sequential(self, model):
        inputs = model.inputs[0]
        parts = [keras.Input(batch_shape=tuple(inputs.shape), dtype=inputs.dtype.name)]
        parts += [self._layer(layer) for layer in model.layers if type(layer).__name__ != "InputLayer"]
        return keras.Sequential(parts, name=model.name)

    def _functional(self, model):
        config, layers = model.get_config(), {layer.name: layer for layer in model.layers}
        new, calls, results = {}, [], {}
        for entry in config["layers"]:
            old = layers[entry["name"]]
            if type(old).__name__ == "InputLayer":
                options = entry["config"]
                tensor = keras.Input(
                    batch_shape=options["batch_input_shape"],
                    dtype=_dtype(options["dtype"]),
                    sparse=options.get("sparse") or None,
                    name=old.name,
                )
                results[old.name, 0] = [tensor]
                continue
            new[old.name] = self._layer(old)
            # The first node of a nested model is its own, which is none of this graph.
            first = 1 if _is_model(old) else 0
            calls += [(old.name, index, node) for index, node in enumerate(entry["inbound_nodes"], start=first)]
        while calls:
            waiting = []
            for name, index, node in calls:
                try:
                    arguments, options = _arguments(node, results, name)
                except KeyError:  # a result that is not there yet
                    waiting.append((name, index, node))
                    continue
                results[name, index] = keras.tree.flatten(new[name](*arguments, **options))
            if len(waiting) == len(calls):
                validation.fail("model", "have a graph without cycles", model.name)
            calls = waiting
        inputs, outputs = (_tensors(config[key], results) for key in ("input_layers", "output_layers"))
        return keras.Model(inputs, outputs, name=model.name)

    def _layer(self, old):
        """Return the Keras 3 layer for one of tf_keras, wrapper taken off, and remember the two."""
        inner = old.layer if _is_wrapper(old) else old
        if id(inner) not in self._made:
            if _is_model(inner):
                self._made[id(inner)] = self._model(inner)
            else:
                new = _from_config(type(inner).__name__, inner.get_config(), inner.name, self.custom_objects)
                self._made[id(inner)] = new
                self.pairs.append((old, new))
        return self._made[id(inner)]


def _is_wrapper(layer):
    return type(layer).__name__ == _WRAPPER


def _is_model(layer):
    return any(cls.__name__ == "Model" and cls.__module__.startswith("tf_keras") for cls in type(layer).__mro__)


def _from_config(class_name, config, name, custom_objects):
    cls = custom_objects.get(class_name) or getattr(keras.layers, class_name, None)
    if cls is None or class_name in ("Lambda", "TFOpLambda", "SlicingOpLambda"):
        rule = (
            f"hold layers that Keras 3 has; '{name}' is of class {class_name}. Put a layer in its place, or give a "
            "Keras 3 class of that name in `custom_objects`"
        )
        validation.fail("model", rule, class_name)
    return cls.from_config(_translate(cls, config, name, custom_objects))


def _translate(cls, config, name, custom_objects):
    """Return a layer's tf_keras configuration as Keras 3 understands it."""
    accepted, anything = _accepted(cls)
    translated = {}
    for key, value in config.items():
        if key == "dtype":
            translated[key] = _dtype(value)
        elif key == "axis" and issubclass(cls, keras.layers.BatchNormalization) and not isinstance(value, int):
            (translated[key],) = value
        elif isinstance(value, dict) and isinstance(value.get("config"), dict) and _holds_layer(key, value):
            translated[key] = _inner(value, name, custom_objects)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, dict) and "config" in v for v in value):
            translated[key] = [_inner(v, name, custom_objects) for v in value]
        elif key in accepted or anything:
            translated[key] = list(value) if isinstance(value, (list, tuple)) else value
        elif key not in _IDLE and value is not None and value is not False and _OBSOLETE.get(key, key) != value:
            rule = f"hold layers with arguments that Keras 3 knows; '{name}' ({cls.__name__}) has `{key}`"
            validation.fail("model", rule, value)
    return translated


def _holds_layer(key, value):
    return key in ("layer", "cell", "backward_layer", "forward_layer") or value["config"].get("trainable") is not None


def _inner(value, name, custom_objects):
    """Return a layer that another one holds, a cell say, in its serialised form."""
    if value["class_name"] == _WRAPPER:
        value = value["config"]["layer"]
    layer = _from_config(value["class_name"], value["config"], f"{name}/{value['config'].get('name')}", custom_objects)
    return keras.saving.serialize_keras_object(layer)


def _accepted(cls):
    """Return the names of a layer's arguments, and whether it takes whatever it is given."""
    names = {"name", "dtype", "trainable", "activity_regularizer", "autocast"}
    parameters = inspect.signature(cls.__init__).parameters.values()
    names |= {p.name for p in parameters}
    # Keras's own layers hand **kwargs on to `Layer`, which refuses what it does not know.
    own = not cls.__module__.startswith("keras.")
    return names, own and any(p.kind is p.VAR_KEYWORD for p in parameters)


def _dtype(value):
    """Return the name of a data type or of a policy."""
    return value["config"]["name"] if isinstance(value, dict) else value


def _arguments(node, results, name):
    """Return how a layer is called, by its tf_keras node; `KeyError` where a tensor is not there yet."""
    if not (isinstance(node, list) and node and all(isinstance(item, list) and len(item) >= 3 for item in node)):
        validation.fail("model", f"call its layers on tensors and lists of tensors; '{name}' is not", node)
    tensors = [results[item[0], item[1]][item[2]] for item in node]
    options = {
        key: _resolve(value, results) for item in node for key, value in (item[3] if len(item) > 3 else {}).items()
    }
    options.pop("name", None)
    return [tensors if len(tensors) > 1 else tensors[0]], options


def _resolve(value, results):
    """Return an argument of a call, with tensors where it refers to some."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
        return results[value[0], value[1]][value[2]]
    if isinstance(value, list):
        return [_resolve(item, results) for item in value]
    return value


def _tensors(places, results):
    """Return the tensors of a model's inputs or outputs in the structure in which it takes or returns them."""
    if isinstance(places, dict):
        return {key: _tensors(place, results) for key, place in places.items()}
    if isinstance(places[0], str):
        return results[places[0], places[1]][places[2]]
    found = [_tensors(place, results) for place in places]
    return found[0] if len(found) == 1 else found


def _transfer(old, new):
    """Give a layer the weights of its tf_keras twin, masked; return the mask of its kernel, where there is one."""
    inner = old.layer if _is_wrapper(old) else old
    masks = {_identity(weight): mask for weight, mask, _ in getattr(old, "pruning_vars", [])}
    values = []
    for weight, value in zip(inner.weights, inner.get_weights()):
        mask = masks.get(_identity(weight))
        values.append(value if mask is None else value * np.asarray(mask))
    shapes = [tuple(weight.shape) for weight in new.weights]
    if shapes != [value.shape for value in values]:
        layer = f"'{inner.name}' ({type(inner).__name__})"
        rule = f"hold layers whose weights are those of Keras 3; there {layer} has weights of shapes {shapes}"
        validation.fail("model", rule, [value.shape for value in values])
    new.set_weights(values)
    new.trainable = inner.trainable
    kernel = getattr(inner, "kernel", None)
    mask = None if kernel is None else masks.get(_identity(kernel))
    return None if mask is None else np.asarray(mask)


def _identity(weight):
    # Under mixed precision a layer shows its variables through objects made anew each time.
    return getattr(weight, "_variable", weight).ref()
