"""SE-ResNet-50 by other runtimes, beside this project's LiteRT file: one image, one thread, in pairs in one process.

python examples/compare_runtimes.py              # what is installed: Keras' own export, TensorFlow
pip install torch timm onnx onnxruntime onnxscript && python examples/compare_runtimes.py

Each runtime is timed in pairs with the lowered float32 file; so a row's ratio holds though the machine's clock drifts.
Of each runtime the plain network is timed too, beside its own SE network: what SE costs there. Weights are random. The
networks are those with the stride on the 3x3, which timm has with and without SE.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

from ai_edge_litert.interpreter import Interpreter  # noqa: E402  TensorFlow takes its threads before anything else

import se_keras  # noqa: E402
from se_keras.export import to_litert  # noqa: E402
from se_keras.timing import compare  # noqa: E402

SE, PLAIN = "se_resnet50b", "resnet50b"
IMAGE = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype("float32")


def lowered(name):
    """This project's file."""
    return to_litert(se_keras.create(name)).runner(threads=1).prepare(IMAGE)


def of_keras(name):
    """The file that `Model.export(format="litert")` of Keras writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        se_keras.create(name, input_shape=(224, 224, 3)).export(str(path), format="litert", verbose=False)
        interpreter = Interpreter(model_content=path.read_bytes(), num_threads=1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], IMAGE.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], IMAGE)
    return interpreter.invoke


def tensorflow(name):
    """The Keras model as a tf.function."""
    model, image = se_keras.create(name), tf.constant(IMAGE)
    run = tf.function(lambda x: model(x, training=False))
    return lambda: run(image)


def torch_model(name):
    """timm's network, the same as ours."""
    import timm
    import torch

    torch.set_num_threads(1)
    return timm.create_model({SE: "seresnet50", PLAIN: "resnet50"}[name], pretrained=False).eval()


def pytorch(name):
    """PyTorch on the CPU, channels last."""
    import torch

    model = torch_model(name).to(memory_format=torch.channels_last)
    image = torch.from_numpy(IMAGE.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            model(image)

    return run


def onnx_runtime(name):
    """ONNX Runtime on the CPU, all of its graph optimizations."""
    import onnxruntime
    import torch

    image = IMAGE.transpose(0, 3, 1, 2).copy()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(torch_model(name), (torch.from_numpy(image),), path, dynamo=False, input_names=["images"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": image})


RUNTIMES = {
    "LiteRT, lowered (se_keras)": lowered,
    "LiteRT, Keras' Model.export": of_keras,
    "TensorFlow, tf.function": tensorflow,
    "PyTorch, timm, channels last": pytorch,
    "ONNX Runtime, timm": onnx_runtime,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15, help="paired measurements (default: %(default)s)")
    blocks = parser.parse_args().blocks
    ours, control = lowered(SE), lowered(SE)
    titles = ("runtime", "SE ms", "beside ours", "95 % interval", "plain ms", "what SE costs there", "95 % interval")
    print(f"| {' | '.join(titles)} |")
    print("| --- | ---: | ---: | --- | ---: | ---: | --- |")
    for title, make in RUNTIMES.items():
        try:
            with_se, plain = make(SE), make(PLAIN)
        except ImportError as error:
            print(f"| {title} | not measured: {error} | | | | | |")
            continue
        beside = compare(ours, with_se, control, blocks=blocks, runs=1)
        cost = compare(plain, with_se, plain, blocks=blocks, runs=1)
        cells = (
            f"{beside.b_ms:.1f}",
            f"{beside.ratio.median:.2f}",
            f"{beside.ratio.low:.2f} to {beside.ratio.high:.2f}",
            f"{cost.a_ms:.1f}",
            f"{100 * (cost.ratio.median - 1):+.1f} %",
            f"{100 * (cost.ratio.low - 1):+.1f} to {100 * (cost.ratio.high - 1):+.1f} %",
        )
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
