"""What squeeze-and-excitation costs: a network and its baseline, exported in the same way and timed in pairs."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Literal

import keras

from se_keras.catalogue import AS_PUBLISHED, AsPublished, baseline_name, create, spec_of
from se_keras.recalibration import SEConfig
from se_keras.typing import Json, OnMessage

from ..litert.conversion import PRECISIONS, Precision, to_litert
from ..litert.file import LiteRTModel, check_threads
from ..model import check_images
from .profiler import profile
from .results import AS_GIVEN, Cell, Overhead, complete, described
from .targets.host import measure

Variant = Literal["published", "lowered"]
VARIANTS: dict[Variant, bool] = {"published": False, "lowered": True}  # the exporters' argument `lowering`
Pair = tuple[LiteRTModel, LiteRTModel]  # baseline and network


def overheads(
    network: str,
    *,
    precisions: Sequence[Precision],
    variants: Sequence[Variant] = tuple(VARIANTS),
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    input_shape: Sequence[int] | None = None,
    threads: Sequence[int] = (1,),
    kept: Collection[Json] = (),
    profiled: bool = False,
    measure: Callable[..., Overhead] = measure,
    progress: OnMessage | None = None,
) -> Iterator[Overhead]:
    """Exports and measures a network and its baseline, and yields each `Overhead` as soon as it is measured.

    Args:
        network: A network of the catalogue with squeeze-and-excitation.
        input_shape: `(height, width, channels)`; default: the network's own.
        kept: Records of earlier measurements, from `Overhead.to_json`, which are not repeated.
        profiled: Whether to profile both files too. If that fails, `progress` is called with the reason.
        measure: Measures a pair: `functools.partial(host.measure, blocks=10)`, or `adb.measure` for a phone.

    Raises:
        ValueError: If the network is a baseline, if a variant or precision does not exist, or if `measure` raises it.
    """
    progress = progress or (lambda message: None)
    for what, values, possible in (("variant", variants, tuple(VARIANTS)), ("precision", precisions, PRECISIONS)):
        if not values or not set(values) <= set(possible):
            raise ValueError(f"{what} must be one or more of {possible}. Received: {', '.join(values) or 'none'}")
    config = config_of(network, se)
    for number in threads:
        check_threads(number)
    shape = (1, *(input_shape or spec_of(network).input_shape))
    names = {"network": network, "baseline": baseline_name(network)}
    measured = set(map(Cell.of, complete(kept)))
    missing: dict[Variant, dict[Precision, list[Cell]]] = {}
    for variant, precision, number in product(variants, precisions, threads):
        cell = Cell(**names, precision=precision, variant=variant, threads=number, input_shape=shape, se=config)
        if cell not in measured:
            missing.setdefault(variant, {}).setdefault(precision, []).append(cell)
    for variant, cells in missing.items():
        pairs = export_pairs(
            network, variant=variant, precisions=tuple(cells), se=config, input_shape=input_shape, progress=progress
        )
        gc.collect()  # Keras models are reference cycles of some hundred megabytes
        for precision, of_precision in cells.items():
            pair = pairs.pop(precision)
            for cell in of_precision:
                yield _measure_cell(cell, pair, f", {precision} {variant}", profiled, measure, progress)


def overheads_of_files(
    baseline: LiteRTModel,
    network: LiteRTModel,
    *,
    names: Sequence[str],
    threads: Sequence[int] = (1,),
    kept: Collection[Json] = (),
    profiled: bool = False,
    measure: Callable[..., Overhead] = measure,
    progress: OnMessage | None = None,
) -> Iterator[Overhead]:
    """Measures two LiteRT files, as `overheads` does, and yields an `Overhead` for each number of threads.

    `names` are the names of baseline and network in the record: two files of one network have the same name.
    """
    progress = progress or (lambda message: None)
    about = described(baseline, network) | {"baseline": names[0], "network": names[1]}
    sha256 = about.pop("sha256")
    measured = {(tuple(record["sha256"]), record["threads"]) for record in complete(kept)}
    for number in threads:
        if (sha256, number) not in measured:
            cell = Cell(**about, variant=AS_GIVEN, threads=number, input_shape=(), se=None)
            yield _measure_cell(cell, (baseline, network), "", profiled, measure, progress)


def export_pairs(
    network: str,
    *,
    variant: Variant,
    precisions: Sequence[Precision],
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    input_shape: Sequence[int] | None = None,
    progress: OnMessage | None = None,
) -> dict[str, Pair]:
    """Exports `{precision: (baseline, network)}` with random weights: times depend on shapes, not on weights."""
    progress = progress or (lambda message: None)
    sides, lowering = {baseline_name(network): None, network: config_of(network, se)}, VARIANTS[variant]
    keras.utils.set_random_seed(0)  # the same weights, and so the same int8 scales, every time
    pairs: dict[Precision, list[LiteRTModel]] = {precision: [] for precision in precisions}
    for name, config in sides.items():
        progress(f"exporting {name} {variant}")
        # Logits: the softmax of an untrained network is 0 and 1, which would hide how well the files agree.
        model = create(network, se=config, name=name, input_shape=input_shape, classifier_activation=None)
        images = check_images(model, samples=5)
        float32 = to_litert(model, held_out=images, lowering=lowering)
        quantized = partial(to_litert, model, calibration=images, lowering=lowering, converted=float32)
        for precision, files in pairs.items():
            files.append(float32 if precision == "float32" else quantized(precision=precision))
    return {precision: (baseline, other) for precision, (baseline, other) in pairs.items()}


def _measure_cell(cell, pair, what, profiled, measure, progress):
    more = f", {cell.threads} threads" * (cell.threads > 1)
    progress(f"timing {cell.network} compared with {cell.baseline}{what}{more}")
    found = measure(*pair, variant=cell.variant, threads=cell.threads)
    profiles = _profiles(pair, cell.threads, progress) if profiled else ()
    se = cell.se and asdict(cell.se)
    return replace(found, baseline=cell.baseline, network=cell.network, se=se, profiles=profiles)


def _profiles(pair, threads, progress):
    """Microseconds by stage and part of both files; empty, with a message, if they cannot be profiled."""
    profiles = []
    try:
        for file in pair:
            profiles.append({})
            for (stage, part), microseconds in profile(file, threads=threads).by("stage", "part").items():
                profiles[-1].setdefault(stage or "outside", {})[part] = microseconds
        return tuple(profiles)
    except ValueError as error:
        progress(f"not profiled: {error}")
        return ()


def config_of(network: str, se: SEConfig | None | AsPublished = AS_PUBLISHED) -> SEConfig:
    """The configuration to measure; raises ValueError if the network is a baseline."""
    config = spec_of(network).se if se == AS_PUBLISHED else se
    if config is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    return config
