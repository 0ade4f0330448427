"""From an effective kernel to the operands of the compiled ops."""

import dataclasses

import numpy as np

from keras_sparse import validation

__all__ = ["ConnectionTable", "ThinnedFilter", "connection_table", "thinned_filter"]


@dataclasses.dataclass(frozen=True)
class ConnectionTable:
    """Operands of `ks.ops.connection_conv2d`.

    Attributes:
        filter: float32 `(n, kernel_height, kernel_width)`, the taps of every kept connection.
        row_splits: int32 `(out_channels + 1,)`; connections `row_splits[j]` to `row_splits[j + 1]` lead into output j.
        input_channels: int32 `(n,)`, ascending within an output.
    """

    filter: np.ndarray
    row_splits: np.ndarray
    input_channels: np.ndarray

    @property
    def nbytes(self):
        return self.filter.nbytes + self.row_splits.nbytes + self.input_channels.nbytes


@dataclasses.dataclass(frozen=True)
class ThinnedFilter:
    """Operands of `ks.ops.thinned_conv2d`.

    Attributes:
        filter: float32 `(n, out_channels)`, the kept rows of the lowered kernel.
        indices: int32 `(n,)`, ascending: `(i * kernel_width + j) * in_channels + s` for tap (i, j) of input map s.
        kernel_size: `(kernel_height, kernel_width)`.
    """

    filter: np.ndarray
    indices: np.ndarray
    kernel_size: tuple

    @property
    def nbytes(self):
        return self.filter.nbytes + self.indices.nbytes


def _check_kernel(kernel):
    kernel = np.asarray(kernel)
    if kernel.ndim != 4:
        validation.fail("kernel", "be of rank 4, HWIO", kernel.shape)
    return kernel


def connection_table(kernel, groups=1):
    """Pack the connections of a kernel that hold any nonzero weight.

    Args:
        kernel: Effective kernel, `(kernel_height, kernel_width, in_channels / groups, out_channels)`.
        groups: Groups of the convolution; the table holds absolute input channels and needs no groups any more.

    Returns:
        A `ConnectionTable`.
    """
    kernel = _check_kernel(kernel)
    channels, filters = kernel.shape[2:]
    if filters % validation.integer("groups", groups, at_least=1):
        validation.fail("groups", f"divide the number of output channels, {filters}", groups)
    kept = (kernel != 0).any(axis=(0, 1)).T  # (out, in): row-major order is the table's order
    outputs, inputs = np.nonzero(kept)
    first_channel = outputs // (filters // groups) * channels
    return ConnectionTable(
        filter=np.ascontiguousarray(kernel[:, :, inputs, outputs].transpose(2, 0, 1), "float32"),
        row_splits=np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype("int32"),
        input_channels=(inputs + first_channel).astype("int32"),
    )


def thinned_filter(kernel):
    """Pack the rows of the lowered kernel that hold any nonzero weight (Lebedev & Lempitsky, 2016, section 3.1).

    Args:
        kernel: Effective kernel, `(kernel_height, kernel_width, in_channels, out_channels)`.

    Returns:
        A `ThinnedFilter`.
    """
    kernel = _check_kernel(kernel)
    lowered = kernel.reshape(-1, kernel.shape[-1])
    indices = np.flatnonzero((lowered != 0).any(axis=1))
    return ThinnedFilter(
        filter=np.ascontiguousarray(lowered[indices], "float32"),
        indices=indices.astype("int32"),
        kernel_size=tuple(kernel.shape[:2]),
    )
