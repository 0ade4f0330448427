"""Event files for TensorBoard. TensorFlow writes them, whatever the backend, and is imported with the first."""

import numpy as np

__all__ = ["EventFile", "mask_image"]

_LARGEST, _SMALLEST = 512, 64  # pixels of a side


class EventFile:
    """An event file: scalars and images, by name and step. TensorBoard itself need not be installed to write one.

    Args:
        folder: Where the file is made; TensorBoard shows each folder as a run.

    Raises:
        ImportError: If TensorFlow is missing.
    """

    def __init__(self, folder):
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ImportError(
                "`tensorflow` must be installed to write for TensorBoard, on any Keras backend: pip install "
                f"tensorflow-cpu. Received: {type(error).__name__}: {error}"
            ) from error
        self._tf = tf
        self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step, scalars, images):
        """Write values that belong to one step.

        Args:
            step: Number of the step.
            scalars: `{name: number}`.
            images: `{name: array}`, each (height, width) in [0, 1].
        """
        with self._writer.as_default(step), self._tf.device("cpu:0"):
            for name, value in scalars.items():
                self._write(name, self._tf.constant(value, "float32"), "scalars", "SCALAR")
            for name, image in images.items():
                gray = np.round(image * 255).astype("uint8")[:, :, None]
                sizes = [self._tf.as_string(size) for size in (image.shape[1], image.shape[0])]
                self._write(name, self._tf.stack([*sizes, self._tf.io.encode_png(gray)]), "images", "BLOB_SEQUENCE")
        self._writer.flush()

    def _write(self, name, tensor, plugin, data_class):
        # What `tf.summary.scalar` and `image` write; they are TensorBoard's, which TensorFlow no longer brings along.
        metadata = self._tf.compat.v1.SummaryMetadata(data_class=f"DATA_CLASS_{data_class}")
        metadata.plugin_data.plugin_name = plugin
        self._tf.summary.write(name, tensor, metadata=metadata)

    def close(self):
        """Write what is left and close the file."""
        self._writer.close()


def mask_image(mask):
    """Return a mask as a picture of (height, width) in [0, 1], white where everything is kept.

    Input channels run down and output channels to the right, in shades of the share of taps kept. A mask that does not
    tell output channels apart shows taps down and input channels to the right. Large pictures are averaged down to
    512 pixels a side, small ones enlarged.

    Args:
        mask: NumPy array of 0 and 1, of a granularity's shape.
    """
    mask = np.asarray(mask, "float32").reshape(-1, *mask.shape[-2:])
    picture = mask[:, :, 0] if mask.shape[2] == 1 else mask.mean(axis=0)
    for axis in (0, 1):
        size = picture.shape[axis]
        if size > _LARGEST:
            edges = np.linspace(0, size, _LARGEST + 1).astype(int)
            sums = np.add.reduceat(picture, edges[:-1], axis=axis)
            picture = sums / np.diff(edges).reshape([-1, 1] if axis == 0 else [1, -1])
    return np.kron(picture, np.ones([-(-_SMALLEST // size) for size in picture.shape], "float32"))
