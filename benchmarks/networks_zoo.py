"""The networks of networks.py: those for 32x32 images, which Keras lacks, and those of keras.applications.

All are built without weights and return logits.
"""

import dataclasses
from collections.abc import Callable

import keras
from keras import layers


def _norm_relu(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


def vgg19(classes=10):
    """16 convolutions and one dense layer, the VGG-19 of the literature on 32x32 images."""
    x = inputs = keras.Input((32, 32, 3))
    for block, (channels, convolutions) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        if block:
            x = layers.MaxPooling2D(2)(x)
        for _ in range(convolutions):
            x = _norm_relu(layers.Conv2D(channels, 3, padding="same", use_bias=False)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x), name="vgg19")


def resnet18(classes=10):
    """ResNet-18 with a 3x3 convolution at full resolution in place of the stem for large images."""

    def convolution(x, channels, size, strides=1):
        return layers.Conv2D(channels, size, strides, padding="same", use_bias=False)(x)

    inputs = keras.Input((32, 32, 3))
    x = _norm_relu(convolution(inputs, 64, 3))
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides > 1:
                shortcut = layers.BatchNormalization()(convolution(x, channels, 1, strides))
            x = _norm_relu(convolution(x, channels, 3, strides))
            x = layers.BatchNormalization()(convolution(x, channels, 3))
            x = layers.ReLU()(layers.add([x, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x), name="resnet18")


def densenet40(classes=10, growth=12):
    """Three blocks of 12 layers without bottleneck or compression: batch norm, ReLU, 3x3 convolution, concatenation."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(2 * growth, 3, padding="same", use_bias=False)(inputs)
    for block in range(3):
        if block:
            x = layers.Conv2D(x.shape[-1], 1, use_bias=False)(_norm_relu(x))
            x = layers.AveragePooling2D(2)(x)
        for _ in range(12):
            new = layers.Conv2D(growth, 3, padding="same", use_bias=False)(_norm_relu(x))
            x = layers.concatenate([x, new])
    x = layers.GlobalAveragePooling2D()(_norm_relu(x))
    return keras.Model(inputs, layers.Dense(classes)(x), name="densenet40")


def _application(name):
    return getattr(keras.applications, name)(weights=None, classifier_activation=None)


@dataclasses.dataclass(frozen=True)
class Network:
    build: Callable
    input_shape: tuple


NETWORKS = {
    "vgg19": Network(vgg19, (32, 32, 3)),
    "resnet18": Network(resnet18, (32, 32, 3)),
    "densenet40": Network(densenet40, (32, 32, 3)),
    "resnet50": Network(lambda: _application("ResNet50"), (224, 224, 3)),
    "inceptionv3": Network(lambda: _application("InceptionV3"), (299, 299, 3)),
    "mobilenet": Network(lambda: _application("MobileNet"), (224, 224, 3)),
}
