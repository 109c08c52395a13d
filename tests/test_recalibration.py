"""SEConfig, what it refuses, and the hook that blocks call at each site."""

import dataclasses

import keras
import pytest

import se_keras
from se_keras.layers import SqueezeExcite
from se_keras.recalibration import SITES, SEConfig, check_fits, recalibrator


def test_defaults_are_those_of_the_released_networks():
    assert dataclasses.asdict(SEConfig()) == {
        "ratio": 16,
        "squeeze": "avg",
        "excitation": "sigmoid",
        "bias": True,
        "site": "standard",
        "stages": "all",
        "minimum_units": 1,
    }


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SEConfig)])
def test_config_is_frozen(field):
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(SEConfig(), field, None)


def test_fields_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        SEConfig(16)


def test_equal_configs_are_one_dictionary_key():
    assert len({SEConfig(stages=(3, 4)), SEConfig(stages=[3, 4])}) == 1


def test_stages_as_a_list_become_a_tuple():
    assert SEConfig(stages=[3, 4]).stages == (3, 4)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"ratio": 0}, ValueError, r"ratio must be at least 1\. Received: ratio=0"),
        ({"ratio": 2.5}, TypeError, r"ratio must be an int\. Received: ratio=2\.5"),
        ({"squeeze": "mean"}, ValueError, r"squeeze must be one of .* Received: squeeze='mean'"),
        ({"excitation": "softmax"}, ValueError, r"excitation must be one of .* Received: excitation='softmax'"),
        ({"bias": "no"}, TypeError, r"bias must be True or False\. Received: bias='no'"),
        ({"site": "after"}, ValueError, r"site must be one of \('standard', 'pre', .* Received: site='after'"),
        ({"site": None}, ValueError, r"site must be one of .* Received: site=None"),
        ({"stages": "3"}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages='3'"),
        ({"stages": (3, "4")}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages=\(3, '4'\)"),
        ({"stages": (3.0,)}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages=\(3\.0,\)"),
        ({"stages": 3}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages=3"),
        ({"stages": None}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages=None"),
        ({"minimum_units": 0}, ValueError, r"minimum_units must be an int of at least 1\. Received: 0"),
        ({"minimum_units": 2.0}, ValueError, r"minimum_units must be an int of at least 1\. Received: 2\.0"),
        ({"stages": (True,)}, TypeError, r"stages must be 'all' or a tuple of ints\. Received: stages=\(True,\)"),
    ],
)
def test_wrong_field_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        SEConfig(**fields)


@pytest.mark.parametrize("config", [None, SEConfig(), SEConfig(site="pre", stages=(2, 5))])
def test_config_of_known_site_and_stages_fits(config):
    check_fits(config, network="resnet50", sites=SITES, stages=range(2, 6))


@pytest.mark.parametrize("site", [site for site in SITES if site != "standard"])
def test_site_that_a_family_lacks_is_refused_by_name(site):
    message = rf"^vgg16 has no such site: site must be 'standard'\. Received: site='{site}'$"
    with pytest.raises(ValueError, match=message):
        check_fits(SEConfig(site=site), network="vgg16", sites=("standard",), stages=range(1, 6))


def test_site_error_lists_each_site_of_the_family():
    with pytest.raises(ValueError, match=r"mobilenet .* site must be 'standard' or '3x3'\. Received: site='post'"):
        check_fits(SEConfig(site="post"), network="mobilenet", sites=("standard", "3x3"), stages=range(2, 6))


@pytest.mark.parametrize("stages", [(6,), (2, 6), (1,), ()])
def test_stages_that_a_network_lacks_are_refused(stages):
    message = rf"resnet50 has the stages \(2, 3, 4, 5\): name some of them\. Received: \({', '.join(map(str, stages))}"
    with pytest.raises(ValueError, match=message):
        check_fits(SEConfig(stages=stages), network="resnet50", sites=SITES, stages=range(2, 6))


@pytest.mark.parametrize("config", ["standard", True, {"ratio": 16}, SEConfig])
def test_anything_but_a_config_or_none_is_refused(config):
    with pytest.raises(TypeError, match=r"se must be an SEConfig, or None for the plain baseline\. Received: se="):
        check_fits(config, network="resnet50", sites=SITES, stages=range(2, 6))


@pytest.mark.parametrize("site", SITES)
def test_hook_of_a_baseline_returns_its_input(site):
    x = keras.Input((8, 8, 32))
    assert recalibrator(None, stage=2, name="stage2_block1")(site, x) is x


@pytest.mark.parametrize("site", SITES)
def test_hook_returns_its_input_in_other_stages(site):
    x = keras.Input((8, 8, 32))
    assert recalibrator(SEConfig(site=site, stages=(3, 4)), stage=2, name="stage2_block1")(site, x) is x


@pytest.mark.parametrize("called", SITES)
@pytest.mark.parametrize("site", SITES)
def test_hook_recalibrates_at_its_own_site_alone(site, called):
    x = keras.Input((8, 8, 32))
    assert (recalibrator(SEConfig(site=site), stage=2, name="stage2_block1")(called, x) is x) == (site != called)


@pytest.mark.parametrize("stages", ["all", (2,), (2, 5)])
def test_hook_adds_one_layer_named_after_its_block(stages):
    x = keras.Input((8, 8, 32))
    model = keras.Model(x, recalibrator(SEConfig(stages=stages), stage=2, name="stage2_block1")("standard", x))
    assert [(type(layer), layer.name) for layer in model.layers[1:]] == [(SqueezeExcite, "stage2_block1_se")]


def test_layer_of_the_hook_has_the_fields_of_the_config():
    x = keras.Input((8, 8, 32))
    config = SEConfig(ratio=4, squeeze="max", excitation="tanh", bias=False, site="post")
    layer = keras.Model(x, recalibrator(config, stage=2, name="stage2_block1")("post", x)).layers[-1]
    assert (layer.ratio, layer.squeeze, layer.excitation, layer.bias) == (4, "max", "tanh", False)


@pytest.mark.parametrize("minimum, units", [(1, (1, 2, 4)), (3, (3, 3, 4)), (8, (8, 8, 8))])
def test_bottlenecks_have_at_least_the_minimum_of_units(minimum, units):
    model = se_keras.create("se_resnet20", se=SEConfig(minimum_units=minimum))
    found = [layer.reduce_kernel.shape[1] for layer in model.layers if isinstance(layer, SqueezeExcite)]
    assert tuple(found[::3]) == units
    assert se_keras.create("se_resnet20", se=SEConfig(ratio=65, minimum_units=8)).count_params()
