"""Finding layers and their weights in a model, and choosing among them by name, pattern or class."""

import dataclasses
import re

import keras

from keras_sparse import validation

__all__ = [
    "Weight",
    "check_patterns",
    "ends_in_channels",
    "flatten_layers",
    "kernel_variable",
    "matches",
    "own_prunable",
    "parents_of",
    "prunable_weights",
    "select",
    "select_weights",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight tensor of a layer that can be pruned.

    Attributes:
        name: The layer's path where this is all that can be pruned of it, else path and key: `"rnn/cell/kernel"`.
        path: Path of the layer in the model.
        key: Name of the weight within the layer, as `"recurrent_kernel"`.
        layer: The layer.
        variable: The `keras.Variable`.
        by_default: Whether it is pruned where nothing names it.
        parents: `(path, layer)` of all that encloses the layer: models, wrappers, composite layers.
    """

    name: str
    path: str
    key: str
    layer: keras.layers.Layer
    variable: keras.Variable
    by_default: bool = True
    parents: tuple = ()

    def named_by(self, pattern):
        """Return whether a pattern means this weight, by itself, its layer or what encloses that."""
        return self._matched_itself(pattern) or any(matches(pattern, *parent) for parent in self.parents)

    def _matched_itself(self, pattern):
        return _matches_text(pattern, f"{self.path}/{self.key}") or matches(pattern, self.path, self.layer)


def flatten_layers(model):
    """Return `{path: layer}` of a model's layers, nested models opened, each shared layer once.

    The path joins the names from the outermost model's own layers on, as in `"backbone/conv1"`. Wrappers and
    composite layers are opened too, since a layer worth pruning may sit in one.
    """
    return {path: layer for path, layer, _ in _walk(model) if not isinstance(layer, keras.Model)}


def parents_of(model):
    """Return `{path: ((path, layer), ...)}`: what encloses each layer within the model, outermost first."""
    return {path: parents for path, _, parents in _walk(model)}


def _walk(model):
    """Yield path, layer and parents of every layer, models among them, before what it holds."""
    found, seen = set(), set()

    def visit(layer, parents):
        prefix = f"{parents[-1][0]}/" if parents else ""
        for child in _children(layer):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{child.name}"
            while path in found:  # composite layers may hold children of equal names
                path += "_"
            found.add(path)
            yield path, child, parents
            yield from visit(child, (*parents, (path, child)))

    yield from visit(model, ())


def kernel_variable(layer):
    """Return the variable behind a layer's `kernel`, or `None` where the layer has none."""
    return _variable(layer, "kernel")


def _variable(layer, key):
    """Return the variable that a layer calls `key`, or `None`.

    Keras keeps it as `_kernel` in layers that can take a LoRA update, and as `kernel` in the others.
    """
    if not getattr(layer, "built", False):
        return None
    for name in (f"_{key}", key):
        variable = getattr(layer, name, None)
        if isinstance(variable, keras.Variable) and _is_prunable(variable):
            return variable
    return None


def _is_prunable(variable):
    return len(variable.shape) >= 2 and keras.backend.is_float_dtype(variable.dtype)


# What Keras calls the weights of its layers, and whether they are pruned unless something says otherwise. Depthwise
# kernels hold few weights and much accuracy (Zhu & Gupta, 2017, section 4.1).
_KEYS = {
    "kernel": True,
    "recurrent_kernel": True,
    "depthwise_kernel": False,
    "pointwise_kernel": True,
    "embeddings": True,
    "reverse_embeddings": True,
}


def prunable_weights(model, weights=None):
    """Return the list of `Weight` in a model, in the order of its layers, each variable once.

    Those that Keras's layers have, by the names that Keras gives them, in layers of other origin too; what a layer's
    own `get_prunable_weights()` returns, as TensorFlow Model Optimization knows it; and what `weights` names.

    Args:
        model: A built Keras model.
        weights: `{name, path, regular expression or layer class: names of weights}`. In the layers it matches, and
            those inside them, the named weights are the ones to prune, in place of those above.

    Raises:
        ValueError: If a key of `weights` matches no layer, or a name no weight of rank 2 or more.
        TypeError: If it is no dict of names or lists of names.
    """
    wanted = _check_weights(weights)
    unused = {(pattern, key) for pattern, keys in wanted.items() for key in keys}
    layers = {path: (layer, parents) for path, layer, parents in _walk(model) if not isinstance(layer, keras.Model)}
    by_variable = {}
    for path, (layer, parents) in layers.items():
        keyed = own_prunable(layer)
        named = {}
        for pattern, keys in wanted.items():
            if not (matches(pattern, path, layer) or any(matches(pattern, *parent) for parent in parents)):
                continue
            for key in keys:
                variable = _named_variable(layer, key)
                if variable is not None:
                    named[key] = (variable, True)
                    unused.discard((pattern, key))
        keyed = named or keyed
        for key, (variable, by_default) in keyed.items():
            name = path if len(keyed) == 1 else f"{path}/{key}"
            # A wrapper may show its layer's kernel as its own: the layer, which comes later, is the one to name.
            place = Weight(name, path, key, layer, variable, by_default, parents)
            by_variable[id(variable)] = place
    for pattern, key in sorted(unused, key=str):
        _fail_unnamed(pattern, key, layers)
    return list(by_variable.values())


def ends_in_channels(weight):
    """Return whether the last two axes of a weight are the input and the output channels, and the others taps."""
    layer, rank = weight.layer, len(weight.variable.shape)
    other = (
        keras.layers.DepthwiseConv1D,
        keras.layers.DepthwiseConv2D,
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )
    if isinstance(layer, other) or weight.key == "depthwise_kernel":
        return False
    if isinstance(layer, keras.layers.EinsumDense):
        kernel, output = re.fullmatch(r".*,(.*)->(.*)", layer.equation.replace(".", "")).groups()
        return rank == 2 and kernel[-1] in output and kernel[0] not in output
    taps = isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv3D)) or weight.key == "pointwise_kernel"
    return rank in (2, 4) or taps


def own_prunable(layer):
    """Return `{key: (variable, by_default)}` of a single layer, as in `prunable_weights`."""
    if callable(getattr(layer, "get_prunable_weights", None)) and layer.built:
        own = {variable.name: (variable, True) for variable in layer.get_prunable_weights()}
        return {key: entry for key, entry in own.items() if _is_prunable(entry[0])}
    depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
    found = {key: (_variable(layer, key), default and not depthwise) for key, default in _KEYS.items()}
    return {key: entry for key, entry in found.items() if entry[0] is not None}


def _named_variable(layer, key):
    """Return what a layer calls `key`, by attribute or by the name of the variable."""
    variable = _variable(layer, key)
    if variable is not None:
        return variable
    return next((v for v in _own_variables(layer) if v.name == key and _is_prunable(v)), None)


def _own_variables(layer):
    inner = {id(v) for child in _children(layer) for v in child.weights}
    return [v for v in layer.weights if id(v) not in inner]


def _check_weights(weights):
    if weights is None:
        return {}
    rule = "be a dict from layer names, regular expressions or layer classes to names of weights"
    if not isinstance(weights, dict):
        validation.fail("weights", rule, weights, TypeError)
    wanted = {}
    for pattern, keys in weights.items():
        check_patterns("weights", pattern)
        wanted[pattern] = [keys] if isinstance(keys, str) else keys
        if not isinstance(wanted[pattern], (list, tuple)) or not all(isinstance(key, str) for key in wanted[pattern]):
            validation.fail("weights", rule, weights, TypeError)
    return wanted


def _fail_unnamed(pattern, key, layers):
    shown = getattr(pattern, "pattern", getattr(pattern, "__name__", pattern))
    matched = [
        (path, layer)
        for path, (layer, parents) in layers.items()
        if matches(pattern, path, layer) or any(matches(pattern, *parent) for parent in parents)
    ]
    if not matched:
        rule = f"match a layer; the layers are {', '.join(map(repr, layers)) or 'none'}"
        validation.fail("weights", rule, shown)
    have = [f"'{path}' has {_list_variables(layer)}" for path, layer in matched if _own_variables(layer)]
    listed = "; ".join(have[:3]) or "they have none"
    rule = f"name weights of rank 2 or more of the layers that {shown!r} matches; {listed}"
    validation.fail("weights", rule, key)


def _list_variables(layer):
    return ", ".join(f"'{v.name}' {tuple(v.shape)}" for v in _own_variables(layer))


def _children(layer):
    if isinstance(layer, keras.Model):
        return [child for child in layer.layers if not isinstance(child, keras.layers.InputLayer)]
    return list(getattr(layer, "_layers", []))


def matches(pattern, path, layer):
    """Return whether a pattern of `include` or `exclude` means this layer."""
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    return _matches_text(pattern, path) or _matches_text(pattern, layer.name)


def _matches_text(pattern, text):
    if isinstance(pattern, type):
        return False
    # Names may hold characters special in expressions.
    return pattern == text or re.fullmatch(pattern, text) is not None


def check_patterns(argument, patterns):
    """Return a list of patterns, or raise in the name of `argument` where one cannot match any layer."""
    if patterns is None:
        return []
    if isinstance(patterns, (str, re.Pattern, type)):
        patterns = [patterns]
    elif not isinstance(patterns, (list, tuple, set)):
        rule = "be a layer name, a regular expression, a layer class, or a list of these"
        validation.fail(argument, rule, patterns, TypeError)
    patterns = list(patterns)
    for pattern in patterns:
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                validation.fail(argument, f"hold names or regular expressions ({error})", pattern)
        elif not isinstance(pattern, re.Pattern) and not (
            isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer)
        ):
            rule = "hold layer names, regular expressions or layer classes"
            validation.fail(argument, rule, pattern, TypeError)
    return patterns


def select(layers, include=None, exclude=None, known=None, parents=None):
    """Return the part of `layers` that `include` names and `exclude` does not.

    Args:
        layers: `{path: layer}` to choose among.
        include: A name, regular expression (matched against the whole path or the whole name) or layer class, or a
            list of these. `None` takes all. A nested model, wrapper or composite layer stands for what is in it.
        exclude: The same; wins over `include`.
        known: `{path: layer}` of everything in the model, for the error on a pattern that matches nothing
            in `layers`. Defaults to `layers`.
        parents: What encloses the layers, from `parents_of`.

    Raises:
        ValueError: If a pattern matches no layer.
        TypeError: If a pattern is of another kind.
    """
    known = layers if known is None else known
    parents = parents or {}

    def named(pattern, path):
        layer = known.get(path, layers.get(path))
        return matches(pattern, path, layer) or any(matches(pattern, *parent) for parent in parents.get(path, ()))

    items, everything = {path: path for path in layers}, {path: path for path in known}
    chosen = _select(items, everything, include, exclude, named, named, known)
    return {path: layers[path] for path in chosen}


def select_weights(weights, include=None, exclude=None, known=None):
    """Return the weights of a list of `Weight` that `include` names and `exclude` does not.

    A pattern means a layer, as in `select`, or a single weight: `"cell/recurrent_kernel"`, `".*/recurrent_kernel"`.
    Weights that are not pruned by default are taken where a pattern names themselves, or their layer and it has no
    others; what encloses the layer does not bring them in.

    Args:
        weights: List of `Weight` to choose among.
        include: As in `select`.
        exclude: As in `select`.
        known: `{path: layer}` of everything in the model.

    Raises:
        ValueError: If a pattern matches no layer.
        TypeError: If a pattern is of another kind.
    """
    only = {weight.path: not any(w.by_default for w in weights if w.path == weight.path) for weight in weights}

    def included(pattern, weight):
        if weight.by_default:
            return weight.named_by(pattern)
        layer = matches(pattern, weight.path, weight.layer)
        return only[weight.path] if layer else weight._matched_itself(pattern)

    def excluded(pattern, weight):
        return weight.named_by(pattern) if isinstance(weight, Weight) else matches(pattern, weight, known[weight])

    items = {weight.name: weight for weight in weights}
    everything = {**{path: path for path in known}, **items}
    if include is None:
        items = {name: weight for name, weight in items.items() if weight.by_default}
    return list(_select(items, everything, include, exclude, included, excluded, known).values())


def _select(items, everything, include, exclude, included, excluded, known):
    """Return the `{name: item}` of `items` that are included and not excluded; a pattern without a match raises."""
    include_patterns = check_patterns("include", include)
    exclude_patterns = check_patterns("exclude", exclude)
    for pattern in include_patterns:
        if not any(included(pattern, item) for item in items.values()):
            _fail_unmatched("include", pattern, items, known)
    for pattern in exclude_patterns:
        if not any(excluded(pattern, item) for item in everything.values()):
            _fail_unmatched("exclude", pattern, items, known)
    return {
        name: item
        for name, item in items.items()
        if (include is None or any(included(p, item) for p in include_patterns))
        and not any(excluded(p, item) for p in exclude_patterns)
    }


def _fail_unmatched(argument, pattern, layers, known):
    unsupported = [
        f"'{path}' ({type(layer).__name__})" for path, layer in known.items() if matches(pattern, path, layer)
    ]
    if unsupported:
        rule = f"name layers that can be pruned here; {', '.join(unsupported[:3])} cannot"
    else:
        rule = f"match a layer; the layers are {', '.join(map(repr, layers)) or 'none'}"
    validation.fail(argument, rule, getattr(pattern, "pattern", pattern))
