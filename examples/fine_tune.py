"""Fine-tune an SE network to new classes: first a new head on the frozen trunk, then both at a lower learning rate.

python examples/fine_tune.py                    # trains a trunk on the digits 0 to 4 first
python examples/fine_tune.py weights.keras      # uses the trunk of a saved se_resnet11_digits
"""

import sys
import tempfile
from pathlib import Path

import keras

import se_keras
from se_keras.training.data import digits

NETWORK = "se_resnet11_digits"


def of_classes(split, classes):
    """The images of some classes, and their labels from 0."""
    chosen = (split.labels >= classes.start) & (split.labels < classes.stop)
    return split.images[chosen], split.labels[chosen] - classes.start


def pretrain(data, path):
    """Trains the network on the digits 0 to 4 and saves it."""
    model = se_keras.create(NETWORK, classes=5)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy")
    model.fit(*of_classes(data.train, range(5)), epochs=5, verbose=0)
    model.save(path)
    return path


def with_new_head(weights, classes):
    """The trunk of a saved network under a head with random weights."""
    trunk = se_keras.create(NETWORK, include_top=False, pooling="avg", weights=weights)
    images = keras.Input((8, 8, 1), name="images")
    return keras.Model(images, keras.layers.Dense(classes, activation="softmax", name="head")(trunk(images)))


def learn(model, train, test, *, trainable, learning_rate, epochs):
    """Trains the head, and the trunk if it is `trainable`; returns the accuracy on `test`."""
    for layer in model.get_layer(NETWORK).layers:
        # BatchNorm stays frozen, with its statistics: new ones would change the features that the head was trained on.
        # Calling the trunk with training=False has no effect in fit, where Keras overrides it with the outer model's.
        layer.trainable = trainable and not isinstance(layer, keras.layers.BatchNormalization)
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, epochs=epochs, verbose=0)
    return model.evaluate(*test, return_dict=True, verbose=0)["accuracy"]


FROZEN = {"trainable": False, "learning_rate": 1e-2, "epochs": 10}
UNFROZEN = {"trainable": True, "learning_rate": 1e-4, "epochs": 5}

if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    data = digits()
    with tempfile.TemporaryDirectory() as folder:
        model = with_new_head(sys.argv[1] if sys.argv[1:] else pretrain(data, Path(folder) / "trunk.keras"), classes=5)
    train, test = of_classes(data.train, range(5, 10)), of_classes(data.test, range(5, 10))
    for name, phase in (("frozen", FROZEN), ("unfrozen", UNFROZEN)):
        accuracy = learn(model, train, test, **phase)
        print(f"accuracy on the digits 5 to 9, trunk {name}: {accuracy:.3f}")
