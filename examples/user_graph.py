"""A network of your own with SqueezeExcite in it, from training to an int8 LiteRT file.

python examples/user_graph.py
"""

import keras

import se_keras
from se_keras.export import lower, to_litert
from se_keras.training.data import digits

keras.utils.set_random_seed(0)
data = digits()

images = keras.Input((8, 8, 1), name="images")
x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(images)
x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(x)
y = keras.layers.Conv2D(64, 1, use_bias=False)(x)
y = keras.layers.BatchNormalization(momentum=0.9)(y)
y = se_keras.SqueezeExcite(ratio=8)(y)
y = keras.layers.ReLU()(y)
y = keras.layers.GlobalAveragePooling2D()(y)
model = keras.Model(images, keras.layers.Dense(10, activation="softmax")(y))

model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(data.train.images, data.train.labels, epochs=20, verbose=2)
print("test accuracy", model.evaluate(data.test.images, data.test.labels, verbose=0)[1])

print(lower(model).lowering)
litert = to_litert(model, precision="int8", calibration=data.train.images, held_out=data.test.images)
litert.save("user_graph_int8.tflite")
print(litert.manifest["agreement"])
