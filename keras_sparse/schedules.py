"""Schedules: how much is pruned, and when. Pure functions of the optimizer step.

A schedule answers three questions: `schedule(step)`, the sparsity that holds at a step; `update_step(step)`, the
last step up to `step` at which masks were to change; and `final_step`, where the last change happens. A
callback that is shown only every k-th step (`steps_per_execution=k`, a resumed run) asks `update_step` and
applies what it finds: it can neither miss an update nor apply one twice.
"""

import math

import keras

from keras_sparse import validation

__all__ = ["Schedule", "ConstantSparsity", "OneShot", "PolynomialDecay", "Doubling", "get"]


def _register(cls):
    return keras.saving.register_keras_serializable(package="keras_sparse")(cls)


class Schedule:
    """Base of all schedules.

    A subclass sets `begin_step`, `end_step` (-1: no end) and `frequency` through this constructor, defines
    `__call__` and, where it has further arguments, `get_config`.

    Args:
        begin_step: First optimizer step at which masks change; 0 is before the first update of the weights.
        end_step: Last such step, or -1 for no end.
        frequency: Masks change every `frequency` steps from `begin_step` on, and at `end_step`.
    """

    def __init__(self, begin_step, end_step, frequency):
        self.begin_step = validation.integer("begin_step", begin_step, at_least=0)
        self.end_step = validation.integer("end_step", end_step, at_least=-1)
        self.frequency = validation.integer("frequency", frequency, at_least=1)
        if self.end_step != -1:
            if self.end_step < self.begin_step:
                validation.fail("end_step", f"be -1 or >= begin_step, {self.begin_step}", self.end_step)
            span = self.end_step - self.begin_step
            if span and self.frequency > span:
                validation.fail("frequency", f"be at most end_step - begin_step, {span}", self.frequency)

    def __call__(self, step):
        """Return the sparsity, in [0, 1), that holds at optimizer step `step`."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(step)`.")

    def update_step(self, step):
        """Return the last step <= `step` at which masks change, or `None` before `begin_step`."""
        if step < self.begin_step:
            return None
        if self.end_step != -1 and step >= self.end_step:
            return self.end_step
        return step - (step - self.begin_step) % self.frequency

    def updates_before(self, step):
        """Return how many update steps come before update step `step`."""
        return -(-(step - self.begin_step) // self.frequency)

    @property
    def final_step(self):
        """The step from which on the sparsity stays what it is."""
        return self.end_step if self.end_step != -1 else self.begin_step

    @property
    def initial_sparsity(self):
        """The sparsity of the first update."""
        return self(self.begin_step)

    @property
    def final_sparsity(self):
        """The sparsity that is reached at `final_step`."""
        return self(self.final_step)

    @property
    def densifies(self):
        """Whether the sparsity falls: only then may a callback bring pruned units back."""
        return self.final_sparsity < self.initial_sparsity

    def get_config(self):
        return {"begin_step": self.begin_step, "end_step": self.end_step, "frequency": self.frequency}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self).__name__, tuple(sorted(self.get_config().items()))))

    def __repr__(self):
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


@_register
class ConstantSparsity(Schedule):
    r"""The same sparsity from `begin_step` on: \(s_t = s\).

    Args:
        target_sparsity: Sparsity in [0, 1).
        begin_step: Optimizer step of the first pruning.
        end_step: Optimizer step after which masks stay fixed; -1 for no end.
        frequency: Optimizer steps between two updates of the masks.

    Raises:
        ValueError: If `target_sparsity` is outside [0, 1) or the steps are out of order.
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        super().__init__(begin_step, end_step, frequency)
        self.target_sparsity = validation.sparsity_value("target_sparsity", target_sparsity)

    def __call__(self, step):
        return self.target_sparsity if step >= self.begin_step else 0.0

    @property
    def final_step(self):
        return self.begin_step  # full sparsity is there from the first update on

    def get_config(self):
        return {"target_sparsity": self.target_sparsity, **super().get_config()}


@_register
class OneShot(Schedule):
    r"""The whole target at one step: \(s_t = s\) for \(t \ge t_0\), masks never change again.

    Args:
        target_sparsity: Sparsity in [0, 1).
        begin_step: Optimizer step of the pruning; 0 prunes before the first update.

    Raises:
        ValueError: If `target_sparsity` is outside [0, 1) or `begin_step` is negative.
    """

    def __init__(self, target_sparsity, begin_step=0):
        super().__init__(begin_step, begin_step, 1)
        self.target_sparsity = validation.sparsity_value("target_sparsity", target_sparsity)

    def __call__(self, step):
        return self.target_sparsity if step >= self.begin_step else 0.0

    def get_config(self):
        return {"target_sparsity": self.target_sparsity, "begin_step": self.begin_step}


@_register
class PolynomialDecay(Schedule):
    r"""Gradual pruning along a polynomial, cubic by default.

    $$s_t = s_f + (s_i - s_f)\left(1 - \frac{t - t_0}{n\,\Delta t}\right)^3
    \quad t \in \{t_0, t_0 + \Delta t, \dots, t_0 + n\,\Delta t\}$$

    with \(t_0\) = `begin_step`, \(t_0 + n\,\Delta t\) = `end_step`, \(\Delta t\) = `frequency` (Zhu & Gupta, 2017,
    equation 1). `end_step` is always an update, even where `frequency` does not divide the interval, so the
    final sparsity is always reached.

    Args:
        initial_sparsity: \(s_i\), sparsity in [0, 1) at `begin_step`.
        final_sparsity: \(s_f\), sparsity in [0, 1) from `end_step` on.
        begin_step: Optimizer step of the first update.
        end_step: Optimizer step of the last update, greater than `begin_step`.
        power: Exponent of the polynomial, > 0.
        frequency: Optimizer steps between two updates of the masks.

    Raises:
        ValueError: If a sparsity is outside [0, 1), `end_step` is not after `begin_step`, `power` is not positive
            or `frequency` is longer than the interval.
    """

    def __init__(self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100):
        if validation.integer("end_step", end_step) <= validation.integer("begin_step", begin_step):
            validation.fail("end_step", f"be greater than begin_step, {begin_step}", end_step)
        super().__init__(begin_step, end_step, frequency)
        self._initial_sparsity = validation.sparsity_value("initial_sparsity", initial_sparsity)
        self._final_sparsity = validation.sparsity_value("final_sparsity", final_sparsity)
        self.power = validation.number("power", power, above=0)

    @property
    def initial_sparsity(self):
        return self._initial_sparsity

    @property
    def final_sparsity(self):
        return self._final_sparsity

    def __call__(self, step):
        if step < self.begin_step:
            return 0.0
        progress = min((step - self.begin_step) / (self.end_step - self.begin_step), 1.0)
        gap = self._initial_sparsity - self._final_sparsity
        return self._final_sparsity + gap * (1.0 - progress) ** self.power

    def get_config(self):
        return {
            "initial_sparsity": self._initial_sparsity,
            "final_sparsity": self._final_sparsity,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "power": self.power,
            "frequency": self.frequency,
        }


@_register
class Doubling(Schedule):
    r"""Densification: the density doubles every `frequency` steps until it reaches its final value.

    $$d_t = \min\left(d_f, d_i\,2^{\lfloor (t - t_0) / T \rfloor}\right), \quad s_t = 1 - d_t$$

    with \(T\) = `frequency` (incremental training, Changpinyo et al., 2017, sections 3 and 5.3). Which units come
    next is the criterion's choice; the weights of pruned units are zero, so a magnitude tells nothing about them and
    `criterion="random"` is the one to use.

    Args:
        initial_density: \(d_i\), density in (0, 1] at `begin_step`.
        final_density: \(d_f\), density in [`initial_density`, 1].
        begin_step: Optimizer step of the first mask.
        frequency: \(T\), optimizer steps between two doublings.

    Raises:
        ValueError: If a density is outside (0, 1] or `final_density` is below `initial_density`.
    """

    def __init__(self, initial_density, final_density=1.0, begin_step=0, frequency=100):
        self.initial_density = validation.fraction("initial_density", initial_density, low_open=True)
        self.final_density = validation.fraction("final_density", final_density, low_open=True)
        if self.final_density < self.initial_density:
            rule = f"be at least initial_density, {self.initial_density}"
            validation.fail("final_density", rule, final_density)
        begin_step = validation.integer("begin_step", begin_step, at_least=0)
        frequency = validation.integer("frequency", frequency, at_least=1)
        # The tolerance keeps 0.1 -> 0.8 at three doublings, whatever the last bit of the quotient says.
        doublings = math.ceil(math.log2(self.final_density / self.initial_density) - 1e-9)
        super().__init__(begin_step, begin_step + max(doublings, 0) * frequency, frequency)

    def __call__(self, step):
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return 1.0 - self.final_density
        doublings = (step - self.begin_step) // self.frequency
        return 1.0 - min(self.final_density, self.initial_density * 2.0**doublings)

    def get_config(self):
        return {
            "initial_density": self.initial_density,
            "final_density": self.final_density,
            "begin_step": self.begin_step,
            "frequency": self.frequency,
        }


def get(identifier):
    """Return a `Schedule` from itself or its serialised form."""
    if isinstance(identifier, Schedule):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    validation.fail("schedule", "be a keras_sparse.schedules.Schedule", identifier, TypeError)
