"""What squeeze-and-excitation costs: a network and its baseline, exported alike and timed in pairs."""

import gc
from dataclasses import asdict, replace

import keras

from se_keras.catalogue import AS_PUBLISHED, baseline_name, create, spec_of

from ..litert.conversion import PRECISIONS, to_litert
from ..litert.file import check_threads
from ..model import check_images
from .profiler import profile
from .results import AS_GIVEN, _text, cell, described
from .targets.host import measure

VARIANTS = {"published": False, "lowered": True}  # the exporter's `lowering`


def overheads(
    network,
    *,
    precisions,
    variants=tuple(VARIANTS),
    se=AS_PUBLISHED,
    input_shape=None,
    threads=(1,),
    kept=(),
    profiled=False,
    measure=measure,
    progress=None,
):
    """Exports and measures a network beside its baseline, yielding each `Overhead` as soon as it is there.

    Args:
        network: A network of the catalogue with squeeze-and-excitation.
        precisions: Names of precisions of `to_litert`.
        variants: Of `VARIANTS`.
        se: An `SEConfig` in place of the network's own.
        input_shape: `(height, width, channels)`; default: the network's own.
        threads: Numbers of threads.
        kept: Records of earlier measurements, as `to_json` gives them: what is among them is not measured again.
        profiled: Whether to profile both files too; where the runtime cannot, `progress` is told, and nothing is lost.
        measure: What measures a pair: `functools.partial(measure, blocks=10)`, or `android.measure` for a phone.
        progress: Called with what is done next, as a string.

    Raises:
        ValueError: If the network has no squeeze-and-excitation, if a variant or precision does not exist, or as
            `measure` does.
    """
    for what, given, possible in (("variant", variants, tuple(VARIANTS)), ("precision", precisions, PRECISIONS)):
        if not given or not set(given) <= set(possible):
            raise ValueError(f"{what} must be one or more of {possible}. Received: {', '.join(given) or 'none'}")
    config = _config(network, se)
    for number in threads:
        check_threads(number)
    shape = (1, *(input_shape or spec_of(network).input_shape))
    done = {cell(record) for record in kept if not record.get("missing")}

    def missing(variant):
        cells = {(precision, number) for precision in precisions for number in threads}
        pair = (network, baseline_name(network))
        return {(p, n) for p, n in cells if (*pair, p, variant, n, shape, _text(asdict(config))) not in done}

    for variant in variants:
        wanted = missing(variant)
        if not wanted:
            continue
        needed = [precision for precision in precisions if precision in {p for p, _ in wanted}]
        exporting = {"precisions": needed, "se": config, "input_shape": input_shape, "progress": progress}
        pairs = export_pairs(network, variant=variant, **exporting)
        gc.collect()  # Keras models are cycles of some hundred megabytes
        for precision in needed:
            pair = pairs.pop(precision)
            for number in (number for number in threads if (precision, number) in wanted):
                if progress:
                    more = f", {number} threads" * (number > 1)
                    progress(f"timing {network} beside {baseline_name(network)}, {precision} {variant}{more}")
                found = replace(measure(**pair, variant=variant, threads=number), se=asdict(config))
                if profiled:
                    try:
                        found = replace(found, profiles=tuple(_by_stage(file, number) for file in pair.values()))
                    except ValueError as error:  # the times are there all the same
                        if progress:
                            progress(f"not profiled: {error}")
                yield found


def overheads_of_files(baseline, network, *, names, threads=(1,), kept=(), measure=measure, progress=None):
    """Measures two LiteRT files, yielding an `Overhead` for each number of threads.

    Args:
        baseline, network: As in `measure`.
        names: What to call them in the record: files of one network differ in their names alone.
        threads, kept, measure, progress: As in `overheads`.
    """
    done = {(tuple(record["sha256"]), record["threads"]) for record in kept if not record.get("missing")}
    for number in threads:
        if (described(baseline, network)["sha256"], number) not in done:
            if progress:
                progress(f"timing {' beside '.join(reversed(names))}{f', {number} threads' * (number > 1)}")
            found = measure(baseline, network, variant=AS_GIVEN, threads=number)
            yield replace(found, baseline=names[0], network=names[1])


def _by_stage(file, threads):
    sums = {}
    for (stage, part), microseconds in profile(file, threads=threads).by("stage", "part").items():
        sums.setdefault(stage or "outside", {})[part] = microseconds
    return sums


def export_pairs(network, *, variant, precisions, se=AS_PUBLISHED, input_shape=None, progress=None):
    """Exports a network and its baseline with random weights, which cost as much time as trained ones.

    Returns:
        `{precision: {"baseline": LiteRTModel, "network": LiteRTModel}}`; the arguments are those of `overheads`.
    """
    config = _config(network, se)
    keras.utils.set_random_seed(0)  # the same weights, and so the same int8 scales, every time
    pairs = {precision: {} for precision in precisions}
    for side, arguments in {
        "baseline": {"se": None, "name": baseline_name(network)},
        "network": {"se": config},
    }.items():
        if progress:
            progress(f"exporting {arguments.get('name', network)} {variant}")
        # Logits: the softmax of an untrained network is 0 and 1, and would hide how well the files agree.
        model = create(network, input_shape=input_shape, classifier_activation=None, **arguments)
        images = check_images(model, samples=5)
        float32 = to_litert(model, held_out=images, lowering=VARIANTS[variant])
        for precision in precisions:
            pairs[precision][side] = (
                float32
                if precision == "float32"
                else to_litert(
                    model,
                    precision=precision,
                    calibration=images,
                    lowering=VARIANTS[variant],
                    converted=float32,
                )
            )
    return pairs


def _config(network, se):
    """The `SEConfig` of what is measured."""
    config = spec_of(network).se if se == AS_PUBLISHED else se
    if config is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    return config
