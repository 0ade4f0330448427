"""Finding layers in a model, and choosing among them by name, pattern or class."""

import re

import keras

from keras_sparse import validation

__all__ = ["flatten_layers", "kernel_variable", "matches", "select"]


def flatten_layers(model):
    """Return `{path: layer}` of a model's layers, nested models opened, each shared layer once.

    The path joins the names from the outermost model's own layers on, as in `"backbone/conv1"`. Wrappers and
    composite layers are opened too, since a layer worth pruning may sit in one.
    """
    found, seen = {}, set()

    def visit(layer, prefix):
        for child in _children(layer):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{child.name}"
            while path in found:  # composite layers may hold children of equal names
                path += "_"
            if not isinstance(child, keras.Model):
                found[path] = child
            visit(child, path + "/")

    visit(model, "")
    return found


def kernel_variable(layer):
    """Return the variable behind a layer's `kernel`, or `None` where the layer has none.

    Keras keeps it as `_kernel` in layers that can take a LoRA update, and as `kernel` in the others.
    """
    for name in ("_kernel", "kernel"):
        variable = getattr(layer, name, None) if getattr(layer, "built", False) else None
        if isinstance(variable, keras.Variable) and len(variable.shape) >= 2:
            return variable
    return None


def _children(layer):
    if isinstance(layer, keras.Model):
        return [child for child in layer.layers if not isinstance(child, keras.layers.InputLayer)]
    return list(getattr(layer, "_layers", []))


def matches(pattern, path, layer):
    """Return whether a pattern of `include` or `exclude` means this layer."""
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    if pattern in (path, layer.name):  # names may hold characters special in expressions
        return True
    expression = pattern if isinstance(pattern, re.Pattern) else re.compile(pattern)
    return bool(expression.fullmatch(path) or expression.fullmatch(layer.name))


def _check_patterns(argument, patterns):
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


def select(layers, include=None, exclude=None, known=None):
    """Return the part of `layers` that `include` names and `exclude` does not.

    Args:
        layers: `{path: layer}` to choose among.
        include: A name, regular expression (matched against the whole path or the whole name) or layer class, or a
            list of these. `None` takes all.
        exclude: The same; wins over `include`.
        known: `{path: layer}` of everything in the model, for the error on a pattern that matches nothing
            in `layers`. Defaults to `layers`.

    Raises:
        ValueError: If a pattern matches no layer.
        TypeError: If a pattern is of another kind.
    """
    known = layers if known is None else known
    include_patterns = _check_patterns("include", include)
    exclude_patterns = _check_patterns("exclude", exclude)
    for pattern in include_patterns:
        if not any(matches(pattern, path, layer) for path, layer in layers.items()):
            _fail_unmatched("include", pattern, layers, known)
    for pattern in exclude_patterns:
        if not any(matches(pattern, path, layer) for path, layer in known.items()):
            _fail_unmatched("exclude", pattern, layers, known)

    def chosen(path, layer):
        included = include is None or any(matches(p, path, layer) for p in include_patterns)
        return included and not any(matches(p, path, layer) for p in exclude_patterns)

    return {path: layer for path, layer in layers.items() if chosen(path, layer)}


def _fail_unmatched(argument, pattern, layers, known):
    unsupported = [
        f"'{path}' ({type(layer).__name__})" for path, layer in known.items() if matches(pattern, path, layer)
    ]
    if unsupported:
        rule = f"name layers that can be pruned here; {', '.join(unsupported[:3])} cannot"
    else:
        rule = f"match a layer; the layers are {', '.join(map(repr, layers)) or 'none'}"
    validation.fail(argument, rule, getattr(pattern, "pattern", pattern))
