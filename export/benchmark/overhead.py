"""The pairs to measure: a network and its baseline, exported in the same way."""

import gc
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import groupby, product
from typing import Literal

import keras

from se_keras.catalogue import AS_PUBLISHED, AsPublished, baseline_name, create, spec_of
from se_keras.recalibration import SEConfig
from se_keras.storage import sha256
from se_keras.typing import Json, OnMessage

from ..litert.conversion import FOR_GPU, PRECISIONS, Precision, to_litert
from ..litert.file import LiteRTModel, check_threads
from ..model import check_images
from .measuring import Pair, pair_of_files
from .results import Cell, complete

Variant = Literal["published", "lowered"]
VARIANTS: dict[Variant, bool] = {"published": False, "lowered": True}  # the exporters' argument `lowering`


def pairs(
    network: str,
    *,
    precisions: Sequence[Precision],
    variants: Sequence[Variant] = tuple(VARIANTS),
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    input_shape: Sequence[int] | None = None,
    threads: Sequence[int] = (1,),
    kept: Collection[Json] = (),
    for_gpu: bool = False,
    progress: OnMessage | None = None,
) -> Iterator[Pair]:
    """A network and its baseline in each variant and precision, exported when the iterator comes to them.

    `Host().measure(pairs("se_resnet50", precisions=["int8"]), print)` yields an `Overhead` for each.

    Args:
        network: A network of the catalogue with squeeze-and-excitation.
        input_shape: `(height, width, channels)`; default: the network's own.
        kept: Records of earlier measurements, from `Overhead.to_json`, which are not repeated.
        for_gpu: Whether int8 and dynamic files are for a GPU: see `to_litert`.

    Raises:
        ValueError: At once, if the network is a baseline, or if there is no such variant, precision or thread count.
    """
    for what, values, possible in (("variant", variants, tuple(VARIANTS)), ("precision", precisions, PRECISIONS)):
        if not values or not set(values) <= set(possible):
            raise ValueError(f"{what} must be one or more of {possible}. Received: {', '.join(values) or 'none'}")
    config = config_of(network, se)
    for number in threads:
        check_threads(number)
    shape = (1, *(input_shape or spec_of(network).input_shape))
    names = {"network": network, "baseline": baseline_name(network)}
    cells = [
        Cell(**names, precision=precision, variant=variant, threads=number, input_shape=shape, se=config)
        for variant, precision, number in product(*map(dict.fromkeys, (variants, precisions, threads)))
    ]
    measured = set(map(Cell.of, complete(kept)))
    return _exported([cell for cell in cells if cell not in measured], input_shape, for_gpu, progress)


def _exported(cells, input_shape, for_gpu, progress):
    """The pair of each cell: all precisions of a variant are exported at once."""
    for variant, of_variant in groupby(cells, lambda cell: cell.variant):
        of_precision = {precision: list(same) for precision, same in groupby(of_variant, lambda cell: cell.precision)}
        files = export_pairs(
            cells[0].network,
            variant=variant,
            precisions=tuple(of_precision),
            se=cells[0].se,
            input_shape=input_shape,
            for_gpu=for_gpu,
            progress=progress,
        )
        gc.collect()  # Keras models are reference cycles of some hundred megabytes
        for precision, same in of_precision.items():
            baseline, network = files.pop(precision)
            for cell in same:
                yield Pair(cell=cell, baseline=baseline, network=network)


def pairs_of_files(
    baseline: LiteRTModel,
    network: LiteRTModel,
    *,
    names: Sequence[str],
    threads: Sequence[int] = (1,),
    kept: Collection[Json] = (),
) -> Iterator[Pair]:
    """The pair of two LiteRT files for each number of threads that is not in a record of `kept`.

    `names` are the names of baseline and network in the record: two files of one network have the same name.
    """
    files = sha256(baseline.content), sha256(network.content)
    measured = {(tuple(record["sha256"]), record["threads"]) for record in complete(kept)}
    for number in threads:
        if (files, number) not in measured:
            yield pair_of_files(baseline, network, names=names, threads=number)


def export_pairs(
    network: str,
    *,
    variant: Variant,
    precisions: Sequence[Precision],
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    input_shape: Sequence[int] | None = None,
    for_gpu: bool = False,
    progress: OnMessage | None = None,
) -> dict[str, tuple[LiteRTModel, LiteRTModel]]:
    """Exports `{precision: (baseline, network)}` with random weights: times depend on shapes, not on weights."""
    progress = progress or (lambda message: None)
    sides, lowering = {baseline_name(network): None, network: config_of(network, se)}, VARIANTS[variant]
    keras.utils.set_random_seed(0)  # the same weights, and so the same int8 scales, every time
    exported: dict[Precision, list[LiteRTModel]] = {precision: [] for precision in precisions}
    for name, config in sides.items():
        progress(f"exporting {name} {variant}")
        # Logits: the softmax of an untrained network is 0 and 1, which would hide how well the files agree.
        model = create(network, se=config, name=name, input_shape=input_shape, classifier_activation=None)
        images = check_images(model, samples=5)
        float32 = to_litert(model, held_out=images, lowering=lowering)
        quantized = partial(to_litert, model, calibration=images, lowering=lowering, converted=float32)
        for precision, files in exported.items():
            of_gpu = for_gpu and precision in FOR_GPU
            files.append(float32 if precision == "float32" else quantized(precision=precision, for_gpu=of_gpu))
    return {precision: (baseline, other) for precision, (baseline, other) in exported.items()}


def config_of(network: str, se: SEConfig | None | AsPublished = AS_PUBLISHED) -> SEConfig:
    """The configuration to measure; raises ValueError if the network is a baseline."""
    config = spec_of(network).se if se == AS_PUBLISHED else se
    if config is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    return config
