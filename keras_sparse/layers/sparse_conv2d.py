"""Conv2D with a mask."""

import keras
from keras import ops

from keras_sparse import validation
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

    While it trains on a CPU with TensorFlow, the layer runs the compiled sparse ops whenever its mask is sparse enough
    for them to win; see `execution`.

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

    # `(is_supported, convolve)` of keras_sparse.engine.training. The package sets it where TensorFlow and the compiled
    # ops are there: layers know neither.
    _training_engine = None
    _execution = "auto"

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

    @property
    def execution(self):
        """How the layer computes while it trains: `"auto"`, `"sparse"` or `"dense"`.

        `"auto"` runs the compiled sparse ops, forward and backward, in each step in which the mask is sparse enough
        for them to win, and the dense convolution in the others; `"sparse"` runs them at any density and `"dense"` at
        none. All give the same results but for the order of sums. The ops take float32 on CPUs with the TensorFlow
        backend, `"channels_last"`, without `groups` and without XLA (`jit_compile=True`); elsewhere, and outside of
        training, the layer computes densely whatever is set here.

        It belongs to the machine and not to the model: it is neither saved nor copied with the layer. Set it before
        the model's first training step, whose graph keeps it.
        """
        return self._execution

    @execution.setter
    def execution(self, value):
        validation.one_of("execution", value, ("auto", "sparse", "dense"))
        self._execution = value

    def call(self, inputs, training=None):
        if training is not True or not self._runs_sparse(inputs):
            return super().call(inputs)
        _, convolve = self._training_engine
        # A layer as activation may hold state, which must not be made in one of two branches.
        apart = isinstance(self.activation, keras.Layer)
        outputs = convolve(
            inputs,
            self.kernel,
            ops.convert_to_tensor(self.mask),
            self.convolution_op,
            self._add_bias if apart else lambda outputs: self._activate(self._add_bias(outputs)),
            execution=self.execution,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
        )
        return self._activate(outputs) if apart else outputs

    def _runs_sparse(self, inputs):
        """Return whether the compiled ops take this call and this layer; the density is another matter."""
        own = type(self).convolution_op is not SparseConv2D.convolution_op  # a subclass means what it computes
        single = self.compute_dtype == self.variable_dtype == "float32"
        if self._training_engine is None or self.execution == "dense" or own or not single:
            return False
        is_supported, _ = self._training_engine
        return self.data_format == "channels_last" and self.groups == 1 and is_supported(inputs)

    def _add_bias(self, outputs):
        # In the form in which Keras adds it: TensorFlow fuses that into its convolution.
        return outputs if self.bias is None else ops.add(outputs, ops.reshape(self.bias, (1, 1, 1, self.filters)))

    def _activate(self, outputs):
        return outputs if self.activation is None else self.activation(outputs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # TensorFlow recomputes functions of positional arguments only, and Conv2D, without `training`, is one.
        training = kwargs.pop("training", None)
        call = super().rematerialized_call(lambda *a, **k: layer_call(*a, training=training, **k), *args, **kwargs)
        return lambda *a, training=None, **k: call(*a, **k)
