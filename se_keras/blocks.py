"""Pieces of every family: convolution with BatchNorm, explicit padding, the classifier. Nothing of one family."""

from keras import layers

BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-5}  # as in the released networks; Keras' own are 0.99 and 1e-3
TOP = "predictions"
# "We adopt the weight initialisation strategy of [He et al. 2015]", section 5: variance 2 / fan-in. Uniform, because
# drawing 28 million normal values takes longer than building the rest of the network.
HE = "he_uniform"


def conv_bn(x, channels, kernel, *, strides=1, groups=1, name):
    """Convolution without bias, padded symmetrically, then BatchNorm."""
    padding = "same"
    if kernel > 1 and strides > 1:
        # Symmetric padding as in Caffe: TF "same" shifts strided convolutions by one pixel.
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        padding = "valid"
    x = layers.Conv2D(
        channels,
        kernel,
        strides=strides,
        padding=padding,
        groups=groups,
        use_bias=False,
        kernel_initializer=HE,
        name=name,
    )(x)
    return layers.BatchNormalization(**BATCH_NORM, name=f"{name}_bn")(x)


def conv_bn_relu(x, channels, kernel, *, strides=1, groups=1, name):
    """Convolution, BatchNorm, ReLU."""
    x = conv_bn(x, channels, kernel, strides=strides, groups=groups, name=name)
    return layers.ReLU(name=f"{name}_relu")(x)


def add_relu(x, shortcut, *, name):
    """The end of a residual block: sum, then ReLU."""
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, shortcut]))


def max_pool_caffe(x, *, name):
    """3x3 max pooling with stride 2 that rounds sizes up, as Caffe does (torch: ceil_mode=True).

    `x` must not be negative (behind a ReLU), so that padding with zeros equals no padding.
    """
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"{name}_pad")(x))


def max_pool_torch(x, *, name):
    """3x3 max pooling with stride 2 and symmetric padding (torch: padding=1). `x` must not be negative."""
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(1, name=f"{name}_pad")(x))


def classifier(x, classes, *, activation, dropout):
    """Global average pooling, dropout if any, and the fully connected layer `predictions`."""
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    # Logits and probabilities stay in float32 under mixed precision.
    return layers.Dense(classes, kernel_initializer=HE, name=TOP, dtype="float32", activation=activation)(x)
