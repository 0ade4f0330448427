"""What an optimizer remembers of single weights: momenta, accumulators, averages."""

import keras
import numpy as np
from keras import ops

__all__ = ["clear"]


def clear(optimizer, variable, where):
    """Make an optimizer forget what it remembers of some weights, as if they had never been trained.

    Every variable that the optimizer keeps for `variable` and that has its shape is set, at these weights, to the value
    it has in a new optimizer; an exponential average of the weights, to the weights. Statistics that several weights
    share, such as the rows and columns of Adafactor, stay as they are.

    Args:
        optimizer: Keras optimizer, built or not.
        variable: The model's variable.
        where: NumPy array of 0 and 1 or booleans, broadcast to the variable: the weights to forget.
    """
    where = np.broadcast_to(np.asarray(where, "bool"), tuple(variable.shape))
    for inner in getattr(optimizer, "optimizers", [optimizer]):  # those of a MultiOptimizer
        slots = _slots(inner, variable)
        initial = _initial_values(inner, variable, slots)
        for name, slot in slots.items():
            value = variable if name == "_model_variables_moving_average" else initial[name]
            slot.assign(ops.where(where, ops.cast(value, slot.dtype), ops.convert_to_tensor(slot)))


def _slots(optimizer, variable):
    """Return `{attribute: slot variable}`; Keras's optimizers hold lists in the order of the variables they train."""
    trained = optimizer._trainable_variables
    index = next((i for i, own in enumerate(trained) if own is variable), None)
    if index is None:  # of a frozen layer, or the optimizer is not built yet
        return {}
    lists = {name: value for name, value in vars(optimizer).items() if isinstance(value, (list, tuple))}
    slots = {name: value[index] for name, value in lists.items() if len(value) == len(trained)}
    tracked = {id(own) for own in optimizer.variables}
    return {
        name: slot for name, slot in slots.items() if id(slot) in tracked and tuple(slot.shape) == tuple(variable.shape)
    }


def _initial_values(optimizer, variable, slots):
    """Return what new slots hold: zeros in most optimizers, not in Adagrad and Ftrl."""
    initial = dict.fromkeys(slots, 0.0)
    if not slots:
        return initial
    # A twin that shares all but the learning rate, since a schedule or function of one's own has no configuration.
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer), _learning_rate=None)
    try:
        fresh = type(optimizer).from_config({**twin.get_config(), "learning_rate": 0.0})
    except (NotImplementedError, TypeError, ValueError):  # an optimizer that its configuration does not describe
        return initial
    stand_in = keras.Variable(ops.zeros(variable.shape, variable.dtype), name=variable.name)
    fresh.build([stand_in])
    initial.update(_slots(fresh, stand_in))
    return initial
