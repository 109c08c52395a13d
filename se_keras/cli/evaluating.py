"""What the command judges: accuracy, the speed of the input, the time of a training step."""

import tempfile
from pathlib import Path

from .files import normalization_of
from .screen import Output, answer, new_table, print_json, progress_on


def evaluate(options, console):
    """`se-keras evaluate`."""
    from se_keras import storage
    from se_keras.evaluation import evaluate, write_confusion
    from se_keras.training import sources

    if options.confusion:
        storage.check_writable(options.confusion)
    with progress_on(console) as progress:
        said = [_said_of(path) for path in options.models]
        normalization = _common_normalization(options, said)
        data = sources.load(options.data, **normalization)
        _require_classes(options.models, said, data)
        protocol = options.protocol or ("plain" if hasattr(data.test, "images") else "224")
        split = {"train": data.train, "test": data.test}[options.split]
        found = evaluate(options.models, split, data, protocol=protocol, corrupt_budget=options.corrupt_budget,
                         progress=progress)  # fmt: skip
        if options.confusion:
            write_confusion(options.confusion, found, data.classes)
    paper = _paper_error(said, data)
    if options.json:
        return print_json({"models": list(map(str, options.models)), "data": data.name, "split": options.split,
                           "protocol": protocol, "paper_top1_error": paper, **found.to_json(),
                           "confusion": found.confusion.tolist() if len(data.classes) <= 100 else None})  # fmt: skip
    title = f"{' + '.join(map(str, options.models))} on {data.name}, protocol {protocol}"
    table = new_table("", "accuracy", "95 % interval", "error", "paper's error", title=title,
                      caption=f"{found.images:,} images, {len(data.classes)} classes")  # fmt: skip
    for name, share in (("top-1", found.top1), ("top-5", found.top5)):
        told = f"{paper:.2f}%" if paper is not None and name == "top-1" else ""
        table.add_row(name, f"{share.value:.2%}", f"{share.low:.2%}..{share.high:.2%}", f"{1 - share.value:.2%}", told)
    Output().print(table)
    if found.corrupt:
        answer(f"left out, because they cannot be decoded: {', '.join(found.corrupt)}")
    if options.confusion:
        answer(f"wrote {options.confusion}")


def _said_of(path):
    """What a model's files say: `network`, `classes` and `normalization`, as far as they do."""
    from se_keras.training.loop import training_of

    if path.suffix == ".keras":
        return training_of(path) or {}
    if path.suffix == ".tflite" and path.is_file():
        from se_keras.export.litert.metadata import read

        about = read(path.read_bytes())
        if about is None:
            return {}
        mean, std = about.normalization or (None, None)
        return {"network": about.network, "classes": list(about.labels or ()) or None,
                "normalization": mean and {"mean": list(mean), "std": list(std)}, "pixels": "0..255"}  # fmt: skip
    return {}


def _common_normalization(options, said):
    """`mean` and `std` for the data: what was asked for, or what all models say."""
    if options.normalize:
        return dict(zip(("mean", "std"), normalization_of(options.normalize), strict=True))
    told = [x["normalization"] for x in said if x.get("normalization")]
    if any(x != told[0] for x in told):
        raise ValueError(f"The models were trained on images of different scales. Received: {told[0]} and {told[1]}")
    return {name: tuple(values) for name, values in told[0].items()} if told else {}


def _require_classes(paths, said, data):
    for path, about in zip(paths, said, strict=True):
        own = about.get("classes")
        for number, (theirs, ours) in enumerate(zip(own or data.classes, data.classes, strict=False)):
            if theirs != ours:
                raise ValueError(f"{str(path)!r} calls class {number} {theirs!r}, and {data.name} calls it {ours!r}")


def _paper_error(said, data):
    """The paper's top-1 error of a single network on ImageNet, whose validation images have 1000 classes."""
    from se_keras.figures import PAPER

    known = PAPER.get(said[0].get("network")) if len(said) == 1 else None
    return known.error.get("ImageNet") if known and len(data.classes) == 1000 else None


def benchmark_input(options, console):
    """`se-keras benchmark-input`."""
    from se_keras.training.throughput import input_speed, photographs

    with progress_on(console) as progress, tempfile.TemporaryDirectory() as scratch:
        path = options.images
        if path is None:
            progress("making 400 JPEG files of scikit-learn's photographs")
            photographs(path := Path(scratch) / "photographs")
        how = {"batch": options.batch_size, "size": options.size, "blocks": options.blocks, "images": options.epoch}
        found = input_speed(path, **how, progress=progress)
    if options.json:
        return print_json(found.to_json())
    ratio = found.comparison.ratio
    table = new_table("", "images/s", title=f"JPEG files to batches of {options.batch_size} at {options.size}x"
                      f"{options.size}, cropped, scaled, mirrored")  # fmt: skip
    table.add_row("keras.utils.image_dataset_from_directory", f"{found.keras:,.0f}")
    table.add_row("se_keras", f"{found.ours:,.0f}")
    Output().print(table)
    answer(f"{1 / ratio.median:.2f} times as fast as Keras [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]; memory over "
           f"{found.images:,} images: {', '.join(f'{x:,.0f}' for x in found.megabytes)} MB")  # fmt: skip


def benchmark_training(options, console):
    """`se-keras benchmark-training`."""
    from dataclasses import asdict

    from se_keras.catalogue import baseline_name
    from se_keras.environment import environment
    from se_keras.training.throughput import PAPER_STEP, step_time

    with progress_on(console) as progress:
        found = step_time(options.network, batch=options.batch_size, size=options.size, blocks=options.blocks,
                          progress=progress)  # fmt: skip
    baseline = baseline_name(options.network)
    if options.json:
        return print_json({"network": options.network, "baseline": baseline, "batch": options.batch_size,
                           "comparison": asdict(found), "paper": PAPER_STEP, "environment": environment()})  # fmt: skip
    table = new_table("", "plain ms", "SE ms", "ratio", "95 % interval", "A/A null",
                      title=f"A training step of {options.network} beside {baseline}, {options.batch_size} images",
                      caption=environment()["processor"])  # fmt: skip
    table.add_row("paper, 256 images, 8 GPUs", "190", "209", f"{PAPER_STEP['ratio']:.3f}", "", "")
    table.add_row("here", f"{found.a_ms:,.0f}", f"{found.b_ms:,.0f}", f"{found.ratio.median:.3f}",
                  f"{found.ratio.low:.3f}..{found.ratio.high:.3f}",
                  f"{found.null.low:.3f}..{found.null.high:.3f}")  # fmt: skip
    Output().print(table)
