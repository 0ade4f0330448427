"""Breaking a run of `fit` off, and what must be equal when it has been resumed."""

import keras


class Interrupt(keras.callbacks.Callback):
    """Breaks `fit` off after so many steps, or at the end of an epoch."""

    def __init__(self, step=None, epoch=None):
        super().__init__()
        self.step, self.epoch = step, epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.step == int(self.model.optimizer.iterations):
            raise InterruptedError(f"step {self.step}")

    def on_epoch_end(self, epoch, logs=None):
        if self.epoch == epoch:
            raise InterruptedError(f"epoch {self.epoch}")


def state(model):
    """Return every number that training left in the model and its optimizer."""
    return [keras.ops.convert_to_numpy(variable) for variable in model.variables + model.optimizer.variables]
