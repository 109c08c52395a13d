"""What squeeze-and-excitation costs: a network and its baseline, exported in the same way and timed in pairs."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
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
VARIANTS: dict[Variant, bool] = {"published": False, "lowered": True}  # and `lowering` of the exporters
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
        precisions: Names of precisions of `to_litert`.
        variants: Of `VARIANTS`.
        se: An `SEConfig` in place of the network's own.
        input_shape: `(height, width, channels)`; default: the network's own.
        threads: Numbers of threads.
        kept: Records of earlier measurements, from `Overhead.to_json`. What they have is not measured again.
        profiled: Whether to profile both files too. If that fails, `progress` is called with the reason, and the times
            are kept.
        measure: Measures a pair: `functools.partial(host.measure, blocks=10)`, or `adb.measure` for a phone.
        progress: Called with what is done next.

    Raises:
        ValueError: If the network has no squeeze-and-excitation, if a variant or precision does not exist, or as
            `measure` does.
    """
    progress = progress or (lambda message: None)
    for what, values, possible in (("variant", variants, tuple(VARIANTS)), ("precision", precisions, PRECISIONS)):
        if not values or not set(values) <= set(possible):
            raise ValueError(f"{what} must be one or more of {possible}. Received: {', '.join(values) or 'none'}")
    config = _config(network, se)
    for number in threads:
        check_threads(number)
    shape = (1, *(input_shape or spec_of(network).input_shape))
    names = {"network": network, "baseline": baseline_name(network)}
    cells = [
        Cell(**names, precision=precision, variant=variant, threads=number, input_shape=shape, se=config)
        for variant in variants
        for precision in precisions
        for number in threads
    ]
    measured = set(map(Cell.of, complete(kept)))
    missing = [cell for cell in cells if cell not in measured]
    for variant in variants:
        wanted: dict[Precision, list[Cell]] = {
            precision: found
            for precision in precisions
            if (found := [cell for cell in missing if (cell.variant, cell.precision) == (variant, precision)])
        }
        if not wanted:
            continue
        pairs = export_pairs(
            network, variant=variant, precisions=tuple(wanted), se=config, input_shape=input_shape, progress=progress
        )
        gc.collect()  # Keras models are reference cycles of some hundred megabytes
        for precision, of_precision in wanted.items():
            pair = pairs.pop(precision)
            for cell in of_precision:
                found = _measure_cell(cell, pair, f", {precision} {variant}", measure, progress)
                yield replace(found, profiles=_profiles(pair, cell.threads, progress)) if profiled else found


def overheads_of_files(
    baseline: LiteRTModel,
    network: LiteRTModel,
    *,
    names: Sequence[str],
    threads: Sequence[int] = (1,),
    kept: Collection[Json] = (),
    measure: Callable[..., Overhead] = measure,
    progress: OnMessage | None = None,
) -> Iterator[Overhead]:
    """Measures two LiteRT files and yields an `Overhead` for each number of threads.

    Args:
        baseline, network: As in `measure`.
        names: Of the baseline and the network in the record, because two files of one network have the same name.
        threads, kept, measure, progress: As in `overheads`.
    """
    progress = progress or (lambda message: None)
    about = described(baseline, network) | {"baseline": names[0], "network": names[1]}
    sha256 = about.pop("sha256")
    measured = {(tuple(record["sha256"]), record["threads"]) for record in complete(kept)}
    for number in threads:
        if (sha256, number) not in measured:
            cell = Cell(**about, variant=AS_GIVEN, threads=number, input_shape=(), se=None)
            yield _measure_cell(cell, (baseline, network), "", measure, progress)


def export_pairs(
    network: str,
    *,
    variant: Variant,
    precisions: Sequence[Precision],
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    input_shape: Sequence[int] | None = None,
    progress: OnMessage | None = None,
) -> dict[str, Pair]:
    """Exports a network and its baseline with random weights: times depend on shapes, not on weights.

    Returns:
        `{precision: (baseline, network)}`.
    """
    progress = progress or (lambda message: None)
    config = _config(network, se)
    keras.utils.set_random_seed(0)  # the same weights, and so the same int8 scales, every time
    pairs: dict[Precision, list[LiteRTModel]] = {precision: [] for precision in precisions}
    for name, config_of_side in ((baseline_name(network), None), (network, config)):
        progress(f"exporting {name} {variant}")
        # Logits: the softmax of an untrained network is 0 and 1, which would hide how well the files agree.
        model = create(network, se=config_of_side, name=name, input_shape=input_shape, classifier_activation=None)
        images = check_images(model, samples=5)
        float32 = to_litert(model, held_out=images, lowering=VARIANTS[variant])
        for precision, files in pairs.items():
            files.append(
                float32
                if precision == "float32"
                else to_litert(
                    model, precision=precision, calibration=images, lowering=VARIANTS[variant], converted=float32
                )
            )
    return {precision: (baseline, other) for precision, (baseline, other) in pairs.items()}


def _measure_cell(cell, pair, what, measure, progress):
    """The `Overhead` of one cell."""
    more = f", {cell.threads} threads" * (cell.threads > 1)
    progress(f"timing {cell.network} compared with {cell.baseline}{what}{more}")
    found = measure(*pair, variant=cell.variant, threads=cell.threads)
    return replace(found, baseline=cell.baseline, network=cell.network, se=cell.se and asdict(cell.se))


def _profiles(pair, threads, progress):
    """Microseconds by stage and part of both files; empty, with a message, where they cannot be profiled."""
    try:
        return tuple(_by_stage(file, threads) for file in pair)
    except ValueError as error:
        progress(f"not profiled: {error}")
        return ()


def _by_stage(file, threads):
    sums = {}
    for (stage, part), microseconds in profile(file, threads=threads).by("stage", "part").items():
        sums.setdefault(stage or "outside", {})[part] = microseconds
    return sums


def _config(network, se):
    """The `SEConfig` to measure."""
    config = spec_of(network).se if se == AS_PUBLISHED else se
    if config is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    return config
