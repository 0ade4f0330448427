"""Argument checks shared by the package.

Every message names the argument, the rule it broke and the value received, so that a user can mend the
call without reading our source.
"""

import numbers

__all__ = ["fail", "integer", "number", "one_of", "fraction", "sparsity_value"]


def fail(argument, rule, received, error=ValueError):
    """Raise `error` with the message form that the whole package uses."""
    raise error(f"`{argument}` must {rule}. Received: {argument}={received!r}")


def _is_integer(value):
    # NumPy integers register as numbers.Integral; booleans do too and are never meant as counts.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(argument, value, *, at_least=None):
    """Return `value` as an `int`, or raise when it is not a whole number or lies below `at_least`."""
    rule = "be an integer" + ("" if at_least is None else f" >= {at_least}")
    if not _is_integer(value):
        fail(argument, rule, value, TypeError)
    if at_least is not None and value < at_least:
        fail(argument, rule, value)
    return int(value)


def number(argument, value, *, above=None, at_least=None):
    """Return `value` as a finite `float` that respects the bounds, or raise."""
    rule = "be a finite number"
    if above is not None:
        rule += f" > {above}"
    if at_least is not None:
        rule += f" >= {at_least}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        fail(argument, rule, value, TypeError)
    value = float(value)
    finite = value == value and abs(value) != float("inf")
    if not finite or (above is not None and value <= above) or (at_least is not None and value < at_least):
        fail(argument, rule, value)
    return value


def fraction(argument, value, *, low_open=False, high_open=False):
    """Return `value` as a `float` within [0, 1], either end open on request, or raise."""
    rule = f"lie in {'(' if low_open else '['}0, 1{')' if high_open else ']'}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        fail(argument, rule, value, TypeError)
    value = float(value)
    above = value > 0 if low_open else value >= 0
    below = value < 1 if high_open else value <= 1
    if not (above and below):  # also catches NaN
        fail(argument, rule, value)
    return value


def sparsity_value(argument, value):
    """Return a sparsity, a fraction of zeros in [0, 1): a layer without any weight left is refused."""
    return fraction(argument, value, high_open=True)


def one_of(argument, value, allowed):
    """Return `value` when it is among `allowed`, or raise listing them."""
    if value not in allowed:
        fail(argument, f"be one of {', '.join(repr(a) for a in allowed)}", value)
    return value
