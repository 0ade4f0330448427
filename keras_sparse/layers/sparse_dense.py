"""Dense with a mask."""

import keras

from keras_sparse.layers.base_sparse import BaseSparse

__all__ = ["SparseDense"]


@keras.saving.register_keras_serializable(package="keras_sparse")
class SparseDense(BaseSparse, keras.layers.Dense):
    r"""Densely connected layer whose kernel carries a mask.

    $$y = \mathrm{activation}\left(x\,(K \odot M) + b\right)$$

    with the kernel \(K\) (in, units) and the mask \(M\) broadcast to it. Takes the arguments of `keras.layers.Dense`
    unchanged and computes what it computes while the mask is all ones (Zhu & Gupta, 2017, section 3).

    Args:
        units: Size of the output's last axis.
        activation: Activation function, its name, or `None`.
        use_bias: Whether a bias is added. The bias is never pruned.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer; it sees the effective kernel.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint; it sees the effective kernel, and its result is masked again.
        bias_constraint: Constraint of the bias.
        lora_rank: Rank of a LoRA update of the kernel; the update is masked with the kernel.
        lora_alpha: Scale of the LoRA update.
        quantization_config: As in `keras.layers.Dense`, where this version of Keras has it.
        granularity: Keyword only. What is pruned together, and with it the shape of the mask: `"weight"` and
            `"connection"` (in, units), `"group"` and `"channel"` (in, 1), `"feature_map"` (1, units), or a
            `Granularity`.
        mask_initializer: Keyword only. Initializer of the mask, giving zeros and ones.
        **kwargs: `name`, `dtype`, `trainable` and whatever else a Keras layer takes.

    Input shape:
        `(batch, ..., in)`.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError: If an argument is outside its range, or `granularity` is unknown.
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        lora_rank=None,
        lora_alpha=None,
        quantization_config=None,
        *,
        granularity="weight",
        mask_initializer="ones",
        **kwargs,
    ):
        if quantization_config is not None:  # older Keras 3 does not know the argument
            kwargs["quantization_config"] = quantization_config
        super().__init__(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            granularity=granularity,
            mask_initializer=mask_initializer,
            **kwargs,
        )

    def _kernel_shape(self, input_shape):
        return (input_shape[-1], self.units)
