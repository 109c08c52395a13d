"""An SE network as the image encoder of KerasHub's RetinaNet, trained on pictures of bright rectangles.

pip install -e ".[detection]" && python examples/retinanet.py
"""

import keras
import keras_hub
import numpy as np

import se_keras

SIZE, CLASSES = 256, 2  # tall rectangles and wide ones


def scenes(count):
    """Noise with one bright rectangle in each picture; its box as (ymin, xmin, ymax, xmax) in pixels."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 100, (count, SIZE, SIZE, 3)).astype("float32")
    labels = rng.integers(0, CLASSES, (count, 1))
    boxes = np.empty((count, 1, 4), "float32")
    for image, box, label in zip(images, boxes[:, 0], labels[:, 0], strict=True):
        height, width = (120, 60) if label == 0 else (60, 120)
        top, left = rng.integers(0, (SIZE - height, SIZE - width))
        image[top : top + height, left : left + width] += 155
        box[:] = top, left, top + height, left + width
    return images, {"boxes": boxes, "labels": labels.astype("float32")}


keras.utils.set_random_seed(0)
network = se_keras.create("se_resnet50", include_top=False, include_preprocessing=True)
encoder = se_keras.pyramid(network)  # weights="imagenet" above starts from the released ones
backbone = keras_hub.models.RetinaNetBackbone(image_encoder=encoder, min_level=3, max_level=5, use_p5=False)
detector = keras_hub.models.RetinaNetObjectDetector(backbone, num_classes=CLASSES, bounding_box_format="yxyx")
# The losses are RetinaNet's own, focal and Huber. Without XLA, whose compilation takes longer than the steps here.
detector.compile(keras.optimizers.Adam(1e-4), jit_compile=False)

# One batch an epoch: the loss of an epoch is that of the weights before its step.
images, boxes = scenes(4)
losses = detector.fit(images, boxes, batch_size=4, epochs=3, shuffle=False, verbose=2).history["loss"]
print(f"loss {losses[0]:.3f} before training, {losses[1]:.3f} after one step, {losses[2]:.3f} after two")
