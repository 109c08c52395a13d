"""Our networks compute what timm's and pytorchcv's do: the same weights give the same logits.

Both are independent of us: other authors, another framework, other layouts and paddings. Their weights here are
random, so nothing is downloaded; every tensor is drawn so that it matters to the logits, and goes the users' way into
our network, through `se_keras.weights.port`.

Where they differ from ours, because ours follow the papers:
- `legacy_seresnet18` and `legacy_seresnet34`: timm's `SEResNetBlock` has a ReLU between the second BatchNorm and the
  SE module. In the paper that acts on the residual branch as it is (arXiv:1709.01507, section 3.3), which ends in
  BatchNorm: so do timm's bottlenecks, and so do our blocks. These two are compared with timm's block in the paper's
  order, and the test shows that this ReLU is the whole difference.
- `mobilenetv1_*`: timm's have ReLU6, the paper (Howard et al. 2017, Figure 3) ReLU. They are compared with ReLU, and
  the test shows that the 6 is the whole difference.
- `sepreresnet*`: pytorchcv's begin with BatchNorm and ReLU behind the first convolution and end without them, though
  their blocks are pre-activated: the first block then reads what is normalized twice, and the classifier what is not
  at all. Its `preresnet*` begin and end as in He et al. 2016, so its SE stages are compared between those.
- `shakeshakeresnet*`: no weights could make them ours. Their blocks end in ReLU, and branches and shortcuts read that,
  where Gastaldi's begin with ReLU and add to what nothing has cut off (arXiv:1705.07485, section 2.1). Not compared.
- `num_batches_tracked` of torch's BatchNorm is a counter of training steps without counterpart in Keras.
"""

import dataclasses
import gc

import keras
import numpy as np
import pytest
from torch_oracles import torchvision_for_import

from se_keras.architectures import cifar, resnet
from se_keras.catalogue import create, spec_of
from se_keras.recalibration import SEConfig
from se_keras.weights.porting import port

pytestmark = pytest.mark.parity
try:
    import torch

    with torchvision_for_import():
        import pytorchcv.model_provider as pytorchcv
        import timm
except ImportError:
    torch = None


@pytest.fixture(autouse=True)
def packages():
    if torch is None:
        pytest.skip('needs torch, timm and pytorchcv: pip install -e ".[parity]"')


# Both sides compute in float32 and differ in the order of their sums alone. A sum of n terms is off by some
# sqrt(n) * 6e-8 of its size, n up to 9 * 512 here (25088 in VGG), and the residual sums keep the errors of 18 to 164
# layers apart: 1e-7 to 9e-6 of the logits' range, measured, the most in ResNet-164, 5e-6 in VGG-19. The faults that
# this test is to find lie above the bound, most of them far: 1 % of one variance moves the logits by 5e-4 in
# SE-ResNet-50, by 3e-4 to 4e-2 in the CIFAR networks, MobileNet, ShuffleNet and BN-Inception (by 7e-5 in the middle of
# Inception-ResNet-v2, whose branches are scaled by a tenth), one SE bias left out by 3e-3, BatchNorm with another
# epsilon by 1e-3 to 1e-1, another padding or pooling by 5e-2.
BOUND = 1e-4
# The maps behind conv1 have 112, 97 or 68 pixels a side, and the last stage 7, 6 or 5. At even sizes, TF's "same"
# padding would differ from the symmetric one and Caffe's pooling rounds up; at 193, conv1 and the pooling meet odd
# sizes, and at 135 the strided blocks do (17, 9).
SIZES = (224, 193, 135)
# pytorchcv's networks end in a pooling of a fixed size, which has to be the last map's: 193 pixels give 97, 49, 25, 13,
# 7, all odd, and 29 of CIFAR's 32 give 29, 15, 8. BN-Inception rounds down at its poolings and up at its convolutions
# beside them: only a multiple of 4 behind the second pooling fits, and 225 gives 113, 56, 28.
FIXED_SIZES, CIFAR_SIZES, BN_INCEPTION_SIZES = (224, 193), (32, 29), (224, 225)
# VGG's classifier takes 7x7. From 255 pixels, 127, 63, 31, 15: every pooling leaves a row out.
VGG_SIZES = (224, 255)
# Inception-ResNet-v2 hardly pads: 299 pixels give 149, 147, 73, 71, 35, 17, 8, and 190 give 94, 92, 45, 43, 21, 10, 4.
INCEPTION_RESNET_SIZES = (299, 190)
TIMM = [
    ("legacy_seresnet50", "se_resnet50", SIZES),
    ("legacy_seresnet101", "se_resnet101", SIZES),
    ("legacy_seresnet152", "se_resnet152", SIZES),
    ("legacy_seresnext50_32x4d", "se_resnext50_32x4d", SIZES),
    ("legacy_seresnext101_32x4d", "se_resnext101_32x4d", SIZES),
    ("legacy_senet154", "senet154", SIZES),
    ("seresnet50", "se_resnet50b", SIZES),
    ("seresnext50_32x4d", "se_resnext50b_32x4d", SIZES),
    ("resnet50", "resnet50b", SIZES),
    ("inception_resnet_v2", "inception_resnet_v2", INCEPTION_RESNET_SIZES),
]
PYTORCHCV = [
    ("bninception", "bn_inception", BN_INCEPTION_SIZES),
    ("mobilenet_w1", "mobilenet", FIXED_SIZES),
    ("mobilenet_wd2", "mobilenet_050", FIXED_SIZES),
    ("shufflenet_g1_w1", "shufflenet_g1", FIXED_SIZES),
    ("shufflenet_g3_w1", "shufflenet_g3", FIXED_SIZES),
    ("shufflenet_g8_w1", "shufflenet_g8", FIXED_SIZES),
    ("preresnet20_cifar10", "resnet20", CIFAR_SIZES),
    ("preresnet110_cifar10", "resnet110", CIFAR_SIZES),
    ("preresnet164bn_cifar10", "resnet164", CIFAR_SIZES),
]
VGG = ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")  # timm's names and ours
TIMM_BASIC = [("legacy_seresnet18", "se_resnet18"), ("legacy_seresnet34", "se_resnet34")]
PYTORCHCV_SE = [
    ("preresnet20_cifar10", "sepreresnet20_cifar10", "se_resnet20"),
    ("preresnet110_cifar10", "sepreresnet110_cifar10", "se_resnet110"),
    ("preresnet164bn_cifar10", "sepreresnet164bn_cifar10", "se_resnet164"),
]
# Networks that pytorchcv has and the catalogue has not, as rows of our families.
WRN16_10 = dataclasses.replace(spec_of("wrn16_8"), width=160)
SE_RESNET20_POSTACTIVATED = resnet.ResNetSpec(
    blocks=(3, 3, 3), block=resnet.basic, width=16, stem=resnet.stem_small, classes=10, se=SEConfig()
)


@pytest.fixture
def frugal():
    """torch computes in one thread, from one seed, and a pair of networks is gone before the next one starts.

    With more threads, torch's wait for each other at every layer by spinning: on a busy machine that doubles the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    keras.utils.clear_session()
    gc.collect()


# First, because it takes the most memory, before libraries have filled their caches.
@pytest.mark.parametrize("name", VGG)
def test_logits_of_vgg_are_timms_at_each_size_that_its_classifier_takes(name, frugal):
    theirs = scattered(timm.create_model(name, pretrained=False), size=min(VGG_SIZES))
    for size in VGG_SIZES:
        ours = ported(theirs, created(name, size=size), "timm")
        assert relative_difference(theirs, ours, size) <= BOUND, size
        del ours  # 0.5 GB of weights on each side
        keras.utils.clear_session()
        gc.collect()


@pytest.mark.parametrize(("timm_name", "name", "sizes"), TIMM, ids=[name for _, name, _ in TIMM])
def test_logits_are_timms(timm_name, name, sizes, frugal):
    theirs = scattered(timm.create_model(timm_name, pretrained=False), size=min(sizes))
    ours = ported(theirs, created(name), "timm")
    for size in sizes:
        assert relative_difference(theirs, ours, size) <= BOUND, size


@pytest.mark.parametrize(("their_name", "name", "sizes"), PYTORCHCV, ids=[name for _, name, _ in PYTORCHCV])
def test_logits_are_pytorchcvs(their_name, name, sizes, frugal):
    theirs = scattered(pytorchcv.get_model(their_name), size=min(sizes))
    ours = ported(theirs, created(name), "pytorchcv")
    for size in sizes:
        assert relative_difference(theirs, ours, size) <= BOUND, size


@pytest.mark.parametrize(
    ("their_name", "family", "spec"),
    [("wrn16_10_cifar10", cifar, WRN16_10), ("seresnet20_cifar10", resnet, SE_RESNET20_POSTACTIVATED)],
    ids=["wrn16_10", "se_resnet20 post-activated"],
)
def test_logits_of_a_spec_of_ones_own_are_pytorchcvs(their_name, family, spec, frugal):
    theirs = scattered(pytorchcv.get_model(their_name), size=min(CIFAR_SIZES))
    images = keras.Input((None, None, 3))
    logits = spec.head(family.build(spec, images), spec.classes, activation=None, dropout=spec.dropout)
    ours = ported(theirs, keras.Model(images, logits), "pytorchcv")
    for size in CIFAR_SIZES:
        assert relative_difference(theirs, ours, size) <= BOUND, size


@pytest.mark.parametrize(("timm_name", "name"), TIMM_BASIC, ids=[name for _, name in TIMM_BASIC])
def test_logits_are_timms_but_for_its_relu_before_the_se_module(timm_name, name, frugal, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(timm.models.senet.SEResNetBlock, "forward", basic_block_of_the_paper)
        theirs = scattered(timm.create_model(timm_name, pretrained=False), size=min(SIZES))
        ours = ported(theirs, created(name), "timm")
        for size in SIZES:
            assert relative_difference(theirs, ours, size) <= BOUND, size
    # timm's own order: if it ever agrees, timm has dropped its ReLU, and the patch above goes.
    assert relative_difference(theirs, ours, SIZES[-1]) > 100 * BOUND


def test_logits_are_timms_but_for_the_6_of_its_relu6_in_mobilenet(frugal):
    with_relu = timm.create_model("mobilenetv1_100", act_layer=torch.nn.ReLU, pretrained=False)
    theirs = scattered(with_relu, size=min(SIZES))
    ours = ported(theirs, created("mobilenet"), "timm")
    for size in SIZES:
        assert relative_difference(theirs, ours, size) <= BOUND, size
    # timm's own activation: if it ever agrees, timm has dropped the 6, and `act_layer` above goes.
    its_own = timm.create_model("mobilenetv1_100", pretrained=False).eval().requires_grad_(False)
    its_own.load_state_dict(theirs.state_dict())
    assert relative_difference(its_own, ours, SIZES[-1]) > 100 * BOUND


@pytest.mark.parametrize(("plain", "se", "name"), PYTORCHCV_SE, ids=[name for _, _, name in PYTORCHCV_SE])
def test_logits_are_those_of_pytorchcvs_se_stages_between_its_preactivated_ends(plain, se, name, frugal):
    theirs, excited = pytorchcv.get_model(plain), pytorchcv.get_model(se)
    for stage in ("stage1", "stage2", "stage3"):
        setattr(theirs.features, stage, getattr(excited.features, stage))
    scattered(theirs, size=min(CIFAR_SIZES))
    ours = ported(theirs, created(name), "pytorchcv")
    for size in CIFAR_SIZES:
        assert relative_difference(theirs, ours, size) <= BOUND, size


def test_pytorchcvs_own_se_preresnet_is_refused():
    with pytest.raises(ValueError, match="the network lacks features.init_block"):
        ported(pytorchcv.get_model("sepreresnet20_cifar10"), created("se_resnet20"), "pytorchcv")


def basic_block_of_the_paper(block, x):
    """`forward` of timm's `SEResNetBlock` without the ReLU between `bn2` and `se_module`."""
    y = block.relu(block.bn1(block.conv1(x)))
    y = block.se_module(block.bn2(block.conv2(y)))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def scattered(network, *, size):
    """A torch network in inference mode, of whose tensors none keeps a value that could hide an error.

    Both libraries start with gamma = 1, beta = 0, running_mean = 0 and running_var = 1, and some gammas and biases of
    0. With values scattered about those alone, activations would grow from block to block until the SE gates saturate,
    so: the running statistics are scattered about the true ones, which two images of `size` pixels show on their way
    through the network; and the residual branches that end in BatchNorm end with small gammas, as in a trained network,
    for without them each block would multiply the rounding error (timm's SENet-154 in float32 would be 2e-5 of the
    range off its float64 self).
    """
    network.eval().requires_grad_(False)
    for tensor_name, tensor in network.named_parameters():
        if tensor_name.endswith("bias"):  # beta, those of convolutions, SE modules and classifiers
            tensor.uniform_(-0.5, 0.5)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
    for block in network.modules():
        if hasattr(block, "downsample") and hasattr(block, "bn2"):
            getattr(block, "bn3", block.bn2).weight.uniform_(0.2, 0.6)

    def scatter_statistics(norm, inputs):
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.running_mean.copy_(mean + variance.sqrt() * torch.empty_like(mean).uniform_(-0.5, 0.5))
        norm.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2.0))

    hooks = [norm.register_forward_pre_hook(scatter_statistics) for norm in norms]
    network(torch.from_numpy(image_pair(size)))
    for hook in hooks:
        hook.remove()
    return network


def created(name, *, size=None):
    """Our network, for images of any size unless given, with logits as its output."""
    return create(name, classifier_activation=None, input_shape=(size, size, 3))


def ported(network, model, source):
    """Our `model` with the weights of a torch `network`."""
    port(model, network.state_dict(), source=source)
    return model


def image_pair(size):
    """Two random images, `(2, 3, size, size)`: coarse blobs, by which the two differ behind the pooling, and noise."""
    random = np.random.default_rng(size)
    blobs = random.normal(size=(2, 3, 4, 4)).repeat(-(-size // 4), axis=2).repeat(-(-size // 4), axis=3)
    noise = random.normal(size=(2, 3, size, size))
    return (blobs[:, :, :size, :size] + 0.5 * noise).astype("float32")


def relative_difference(theirs, ours, size):
    """The largest difference of the logits of two images, as a part of their logits' range."""
    images = image_pair(size)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images)).numpy()
    logits = keras.ops.convert_to_numpy(ours(images.transpose(0, 2, 3, 1), training=False))
    assert logits.shape == expected.shape == (2, ours.output_shape[-1])
    # Infinite, constant or image-independent logits would agree in spite of errors in front of them.
    assert np.isfinite(expected).all()
    spread = expected.std(axis=1)  # across classes: 0.2 to 4, measured
    assert 0.1 < spread.min() and spread.max() < 10
    assert (expected[0] - expected[1]).std() > 0.05 * spread.max()  # between images: 0.1 of it or more
    return float(np.abs(logits - expected).max() / np.ptp(expected))
