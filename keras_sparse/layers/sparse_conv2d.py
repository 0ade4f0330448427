"""Conv2D with a mask."""

import keras

from keras_sparse.layers.base_sparse import BaseSparse

__all__ = ["SparseConv2D"]


@keras.saving.register_keras_serializable(package="keras_sparse")
class SparseConv2D(BaseSparse, keras.layers.Conv2D):
    r"""2D convolution whose kernel carries a mask.

    $$y = \mathrm{activation}\left(x * (K \odot M) + b\right)$$

    with the kernel \(K\) (height, width, in, out), the mask \(M\) broadcast to it, and \(*\) the convolution of
    `keras.layers.Conv2D`, whose arguments this layer takes unchanged. At the initial mask of ones it computes what
    `Conv2D` computes. Connection tables follow Changpinyo et al. (2017), section 3; single weights Zhu & Gupta
    (2017), section 3; groups Lebedev & Lempitsky (2016), section 3.

    ```python
    layer = ks.layers.SparseConv2D(64, 3, padding="same", granularity="connection")
    layer.build((None, 32, 32, 16))
    layer.mask.assign(table)  # (1, 1, 16, 64) of 0 and 1: prunes at once
    layer.kernel  # exactly zero where pruned
    ```

    Args:
        filters: Number of output channels.
        kernel_size: int or pair, height and width of the kernel.
        strides: int or pair. With `strides > 1`, `dilation_rate` must be 1.
        padding: `"valid"` or `"same"`, in any case.
        data_format: `"channels_last"` or `"channels_first"`; default from the Keras configuration.
        dilation_rate: int or pair.
        groups: Number of groups the channels are split into; the kernel then has `in / groups` input channels.
        activation: Activation function, its name, or `None`.
        use_bias: Whether a bias is added. The bias is never pruned.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer; it sees the effective kernel.
        bias_regularizer: Regularizer of the bias.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint; it sees the effective kernel, and its result is masked again.
        bias_constraint: Constraint of the bias.
        granularity: Keyword only. What is pruned together, and with it the shape of the mask: `"weight"`
            (kh, kw, ci, co), `"connection"` (1, 1, ci, co), `"group"` (kh, kw, ci, 1), `"feature_map"`
            (1, 1, 1, co), `"channel"` (1, 1, ci, 1), or a `Granularity`.
        mask_initializer: Keyword only. Initializer of the mask, giving zeros and ones; for instance
            `ks.initializers.RandomMask(0.9)` for a fixed random table.
        **kwargs: `name`, `dtype`, `trainable` and whatever else a Keras layer takes.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` with `"channels_first"`.

    Output shape:
        `(batch, new_height, new_width, filters)`, or `(batch, filters, new_height, new_width)`.

    Raises:
        ValueError: If an argument is outside its range, or `granularity` is unknown.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        granularity="connection",
        mask_initializer="ones",
        **kwargs,
    ):
        super().__init__(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            granularity=granularity,
            mask_initializer=mask_initializer,
            **kwargs,
        )

    def _kernel_shape(self, input_shape):
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        return (*self.kernel_size, channels // self.groups, self.filters)
