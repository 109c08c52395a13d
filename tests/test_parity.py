"""Our ResNets, ResNeXts and SENet-154 compute what timm's do: the same weights give the same logits.

timm's implementation is independent of ours: another author, framework, layout and padding. Its weights here are
random, so nothing is downloaded; every tensor is drawn so that it matters to the logits.

Where the two differ by design:
- `legacy_seresnet18` and `legacy_seresnet34`: timm's `SEResNetBlock` has a ReLU between the second BatchNorm and the
  SE module. In the paper that acts on the residual branch as it is (arXiv:1709.01507, section 3.3), which ends in
  BatchNorm: so do timm's bottlenecks, and so do our blocks. These two are compared with timm's block in the paper's
  order, and the test shows that this ReLU is the whole difference.
- `num_batches_tracked` of torch's BatchNorm is a counter of training steps without counterpart in Keras.
"""

import gc

import keras
import numpy as np
import pytest
from timm_port import port, torchvision_for_import

from se_keras.catalogue import create

REASON = 'needs torch and timm: pip install -e ".[parity]"'
torch = pytest.importorskip("torch", reason=REASON)
with torchvision_for_import():
    timm = pytest.importorskip("timm", reason=REASON)

# Both sides compute in float32 and differ in the order of their sums alone. A sum of n terms is off by some
# sqrt(n) * 6e-8 of its size, n up to 9 * 512 here, and the residual sums keep the errors of 18 to 154 layers apart:
# 2e-7 to 2e-6 of the logits' range, measured. The faults that this test is to find lie above the bound, most of them
# far: 1 % of one variance in SE-ResNet-50 moves the logits by 5e-4, one SE bias left out by 3e-3, BatchNorm with
# Keras' own epsilon by 1e-2, another padding or pooling by 5e-2.
BOUND = 1e-4
# The maps behind conv1 have 112, 97 or 68 pixels a side, and the last stage 7, 6 or 5. At even sizes, TF's "same"
# padding would differ from the symmetric one and Caffe's pooling rounds up; at 193, conv1 and the pooling meet odd
# sizes, and at 135 the strided blocks do (17, 9).
SIZES = (224, 193, 135)
PAIRS = [
    ("legacy_seresnet50", "se_resnet50"),
    ("legacy_seresnet101", "se_resnet101"),
    ("legacy_seresnet152", "se_resnet152"),
    ("legacy_seresnext50_32x4d", "se_resnext50_32x4d"),
    ("legacy_seresnext101_32x4d", "se_resnext101_32x4d"),
    ("legacy_senet154", "senet154"),
    ("seresnet50", "se_resnet50b"),
    ("resnet50", "resnet50b"),
]
BASIC_PAIRS = [("legacy_seresnet18", "se_resnet18"), ("legacy_seresnet34", "se_resnet34")]


@pytest.fixture
def frugal():
    """torch computes in one thread, and a pair, 1 GB of weights at most, is gone before the next one starts.

    With more threads, torch's wait for each other at every layer by spinning: on a busy machine that doubles the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    keras.utils.clear_session()
    gc.collect()


@pytest.mark.parametrize(("timm_name", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_logits_are_timms(timm_name, name, frugal):
    theirs = random_timm_network(timm_name)
    ours = ported(theirs, name)
    for size in SIZES:
        assert relative_difference(theirs, ours, size) <= BOUND, size


@pytest.mark.parametrize(("timm_name", "name"), BASIC_PAIRS, ids=[name for _, name in BASIC_PAIRS])
def test_logits_are_timms_but_for_its_relu_before_the_se_module(timm_name, name, frugal, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(timm.models.senet.SEResNetBlock, "forward", basic_block_of_the_paper)
        theirs = random_timm_network(timm_name)
        ours = ported(theirs, name)
        for size in SIZES:
            assert relative_difference(theirs, ours, size) <= BOUND, size
    # timm's own order: if it ever agrees, timm has dropped its ReLU, and the patch above goes.
    assert relative_difference(theirs, ours, SIZES[-1]) > 100 * BOUND


@pytest.fixture(scope="module")
def small():
    """A network for the tests of the port: timm's state, and ours to take it."""
    network = timm.create_model("legacy_seresnet18", pretrained=False, num_classes=10)
    model = create("se_resnet18", classes=10)
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}, model


VECTOR = np.zeros(128, "float32")
CONVOLUTION = np.zeros((64, 64, 1, 3), "float32")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer2.1.bn2.running_var": None}, ["no tensor for stage3_block2_conv2_bn/moving_variance"]),
        ({"aux.weight": VECTOR}, ["no rule for timm's aux.weight"]),
        ({"layer2.1.bn2.scale": VECTOR}, ["no rule for timm's layer2.1.bn2.scale"]),
        ({"layer2.1.bn3.bias": VECTOR}, ["no weight stage3_block2_conv3_bn/beta for timm's layer2.1.bn3.bias"]),
        ({"fc.bias": VECTOR[:10]}, ["two tensors for predictions/bias: timm's last_linear.bias and fc.bias"]),
        (
            {"layer1.0.conv1.weight": CONVOLUTION},
            ["stage2_block1_conv1/kernel has the shape (3, 3, 64, 64)", "layer1.0.conv1.weight", "(1, 3, 64, 64)"],
        ),
        (
            {"last_linear.bias": None, "layer1.0.bn1.weight": None, "aux.bias": VECTOR},
            ["no tensor for predictions/bias", "no tensor for stage2_block1_conv1_bn/gamma", "timm's aux.bias"],
        ),
    ],
    ids=["missing", "unknown module", "unknown tensor", "no such weight", "twice", "shape", "all are named"],
)
def test_port_is_strict(small, changes, named):
    state, model = small
    before = model.get_weights()
    doctored = {name: array for name, array in (state | changes).items() if array is not None}
    with pytest.raises(ValueError) as error:
        port(doctored, model)
    assert str(error.value).startswith("se_resnet18 does not take these weights: ")
    for name in named:
        assert name in str(error.value)
    assert all(map(np.array_equal, before, model.get_weights())), "a port that raises must leave the model as it was"


def basic_block_of_the_paper(block, x):
    """`forward` of timm's `SEResNetBlock` without the ReLU between `bn2` and `se_module`."""
    y = block.relu(block.bn1(block.conv1(x)))
    y = block.se_module(block.bn2(block.conv2(y)))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def random_timm_network(name):
    """A timm network in inference mode, of whose tensors none has a value that could hide an error.

    timm starts with gamma = 1, beta = 0, running_mean = 0 and running_var = 1, and some gammas and biases of 0. With
    values scattered about those alone, activations would grow from block to block until the SE gates saturate, so:
    the running statistics are scattered about the true ones, which two images show on their way through the network;
    and the residual branches end with small gammas, as in a trained network, for without them each block would
    multiply the rounding error (timm's SENet-154 in float32 would be 2e-5 of the range off its float64 self).
    """
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    for tensor_name, tensor in network.named_parameters():
        if tensor_name.endswith("bias"):  # beta, both biases of the SE modules, the classifier's
            tensor.uniform_(-0.5, 0.5)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
    for block in network.modules():
        if hasattr(block, "downsample"):
            getattr(block, "bn3", block.bn2).weight.uniform_(0.2, 0.6)

    def scatter_statistics(norm, inputs):
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.running_mean.copy_(mean + variance.sqrt() * torch.empty_like(mean).uniform_(-0.5, 0.5))
        norm.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2.0))

    hooks = [norm.register_forward_pre_hook(scatter_statistics) for norm in norms]
    network(torch.from_numpy(image_pair(96)))
    for hook in hooks:
        hook.remove()
    return network


def ported(network, name):
    """Our network `name` with the weights of timm's `network`, for images of any size, with logits as its output."""
    model = create(name, classifier_activation=None, input_shape=(None, None, 3))
    state = {tensor_name: tensor.numpy() for tensor_name, tensor in network.state_dict().items()}
    port(state, model, stem_3x3x3=name == "senet154")
    return model


def image_pair(size):
    """Two random images, `(2, 3, size, size)`: coarse blobs, by which the two differ behind the pooling, and noise."""
    random = np.random.default_rng(size)
    blobs = random.normal(size=(2, 3, 4, 4)).repeat(-(-size // 4), axis=2).repeat(-(-size // 4), axis=3)
    noise = random.normal(size=(2, 3, size, size))
    return (blobs[:, :, :size, :size] + 0.5 * noise).astype("float32")


def relative_difference(theirs, ours, size):
    """The largest difference of the logits of two images, as a part of timm's logits' range."""
    images = image_pair(size)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images)).numpy()
    logits = keras.ops.convert_to_numpy(ours(images.transpose(0, 2, 3, 1), training=False))
    assert logits.shape == expected.shape == (2, 1000)
    # Infinite, constant or image-independent logits would agree in spite of errors in front of them.
    assert np.isfinite(expected).all()
    spread = expected.std(axis=1)  # across classes: 0.45 to 0.97, measured
    assert 0.1 < spread.min() and spread.max() < 10
    assert (expected[0] - expected[1]).std() > 0.05 * spread.max()  # between images: 0.17 of it or more
    return float(np.abs(logits - expected).max() / np.ptp(expected))
