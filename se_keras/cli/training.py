"""The commands about training: train a network, draw curves, pack data."""

import argparse
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from .arguments import (
    COUNT,
    DATA,
    POSITIVE,
    RATE,
    RECIPES,
    SAMPLINGS,
    SECONDS,
    SEED,
    STRATEGIES,
    Commands,
    add_command,
    add_corrupt_budget,
    one_of,
    only_for,
)
from .screen import print_json, print_line, print_message, print_table, show_progress

_NAMED = 5  # files that cannot be decoded


def add_train(commands: Commands) -> None:
    """`se-keras train NAME -o FOLDER`."""
    add = add_command(commands, "train", train, json_output=True)
    add("network", metavar="NAME", help="a name that se-keras list prints")
    add("--data", default="digits", help=f"{DATA} (default: digits)")
    add("-o", "--output", type=Path, help="folder of the run")
    add(
        "--recipe",
        help=f"{one_of(RECIPES)} (default: the network's; digits for the digits)",
    )
    add("--dry-run", action="store_true", help="print the whole recipe with its sources, and exit")
    add("--epochs", type=POSITIVE, help="passes over the data (default: the recipe's)")
    add("--batch-size", type=POSITIVE, help="images per step; scales the learning rate in proportion")
    add("--learning-rate", type=RATE, help="the initial one (default: the recipe's, scaled)")
    add("--sampling", help=f"{one_of(SAMPLINGS)}, which draws each class equally often (default: the recipe's)")
    add("--seed", type=SEED, help="for initial weights and the order of images (default: the recipe's)")
    add("--size", type=POSITIVE, help="height and width of the images (default: the data set's, or the network's own)")
    add("--limit", type=POSITIVE, metavar="N", help="train on N images (default: all)")
    add("--weights", help="initial weights: imagenet, or a file (default: random)")
    _add_execution(add)


def _add_execution(add):
    """The options that change where and how fast a network is trained, but not the result."""
    add("--strategy", default="none", help=one_of(STRATEGIES, default="none"))
    add("--workers", metavar="HOST:PORT,...", help="instead of TF_CONFIG; the first one writes files")
    add("--index", type=COUNT, help="position of this worker in the list, from 0")
    add("--wait", type=SECONDS, metavar="S", help="seconds to wait for all workers (default: 600)")
    add("--tpu", help="name or address of the TPU (default: the local one)")
    policies = ("float32", "mixed_float16", "mixed_bfloat16")
    add("--precision", default="float32", choices=policies, help="dtype policy of the layers; weights stay in float32")
    add("--jit-compile", action="store_true", help="compile the forward and backward pass with XLA")
    steps = "steps to run before signals are checked again"
    add("--steps-per-execution", type=POSITIVE, default=1, metavar="N", help=steps)
    parts = "parts into which each batch is split, to save memory"
    add("--accumulate", type=POSITIVE, default=1, metavar="N", help=parts)
    add("--checkpoint-steps", type=POSITIVE, metavar="N", help="save every N steps, not only after epochs")
    add_corrupt_budget(add)
    add("--cache", action="store_true", help="keep the test images in memory")
    add("--service", metavar="ADDRESS", help="a tf.data service that prepares the images, grpc://host:port")


def train(options: argparse.Namespace, console: Console) -> int | None:
    r"""Train a network; the same command resumes an interrupted training.

    Examples:
      se-keras train se_resnet11_digits -o runs/se
      se-keras train resnet11_digits --epochs 30 -o runs/plain
      se-keras train se_resnet50 --data imagenet/ --recipe paper_imagenet --dry-run
      se-keras train se_resnet50 --data imagenet/ --recipe paper_imagenet \
          --strategy mirrored --precision mixed_float16 -o runs/se50
      se-keras train se_resnet50 --data shards/ --strategy multi-worker \
          --workers a:2222,b:2222 --index 0 -o runs/two
    """
    from se_keras.catalogue import spec_of
    from se_keras.training import distribution

    recipe, spec = _recipe(options), spec_of(options.network)
    received = f"--strategy {options.strategy}"
    only_for(options, "--wait", "--strategy multi-worker", received, possible=options.strategy == "multi-worker")
    only_for(options, "--tpu", "--strategy tpu", received, possible=options.strategy == "tpu")
    if options.dry_run:
        from se_keras.training.schedules import plan

        return _print_plan(options, plan(options.network, recipe, _data(options, spec)))
    if options.output is None:
        raise ValueError("-o FOLDER is needed: the folder of the run. Received: none")
    wait = {} if options.wait is None else {"timeout": options.wait}
    # Several workers must be connected before TensorFlow does anything else.
    replicas = distribution.replicas(options.strategy, cluster=_cluster(options), tpu=options.tpu, **wait)

    import keras

    from se_keras import create
    from se_keras.runs import MODEL_FILE, RUN_FILE, training_of
    from se_keras.training.loop import Execution, fit
    from se_keras.training.stopping import EXIT_SAVED, Preempted
    from se_keras.wording import counted

    execution = Execution(**{field.name: getattr(options, field.name) for field in fields(Execution)})
    data = _data(options, spec)
    keras.config.set_dtype_policy(options.precision)
    keras.utils.set_random_seed(recipe.seed)
    images = getattr(data.train, "images", None)
    shape = spec.input_shape if images is None else images.shape[1:]
    if options.size is not None:
        shape = (options.size, options.size, len(data.mean))
    model = create(options.network, classes=len(data.classes), input_shape=shape, weights=options.weights)
    with show_progress(console) as progress:

        def show(now):
            if now.step == 0 or console.is_terminal:  # elsewhere a line for each epoch
                progress(_progress_line(options.network, now))

        try:
            _, figures = fit(model, recipe, data, options.output, strategy=replicas, execution=execution, progress=show)
        except Preempted as saved:
            print_message(console, f"stopped by SIGTERM. {saved}")
            return EXIT_SAVED
    file, epochs = options.output / MODEL_FILE, len(figures["loss"])
    if options.json:
        return print_json({"path": str(file), "epochs": epochs, "figures": figures})
    print_line(f"{file}: test accuracy {figures['val_accuracy'][-1]:.1%} after {counted(epochs, 'epoch')}")
    if skipped := (training_of(file) or {}).get("corrupt"):
        named = f"{', '.join(skipped[:_NAMED])}{', ...' if len(skipped) > _NAMED else ''}"
        print_line(
            f"left out, because they cannot be decoded: {counted(len(skipped), 'file')} ({named}); {RUN_FILE} names all"
        )
    hint = "" if find_spec("tensorboard") else ', which pip install "se-keras[tensorboard]" brings'
    print_line(f"curves: {options.output / 'curves.png'}, or tensorboard --logdir {options.output}{hint}")


def _data(options, spec):
    """The data with the number of images and the size of the options."""
    from se_keras.training import sources
    from se_keras.training.data import limited, sized

    data = sources.load(options.data, mean=spec.mean, std=spec.std)
    if options.limit is not None:
        data = limited(data, options.limit)
    return data if options.size is None else sized(data, (options.size, options.size))


def _recipe(options):
    """The recipe with the values of the options; another batch size scales the learning rate."""
    from se_keras.catalogue import spec_of
    from se_keras.training.recipes import RECIPES

    name = options.recipe or ("digits" if options.data == "digits" else spec_of(options.network).recipe)
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}. Received: {name!r}")
    recipe = RECIPES[name]
    if options.batch_size is not None:
        recipe = recipe.scaled_to(options.batch_size)
    values = {field: getattr(options, field) for field in ("epochs", "learning_rate", "seed", "sampling")}
    return replace(recipe, **{field: value for field, value in values.items() if value is not None})


def _cluster(options):
    from se_keras.training.distribution import Cluster

    if options.workers is None and options.index is None:
        return None
    if options.strategy != "multi-worker" or options.workers is None or options.index is None:
        raise ValueError(
            "--workers and --index go together, with --strategy multi-worker. "
            f"Received: --strategy {options.strategy}, --workers {options.workers}, --index {options.index}"
        )
    return Cluster(workers=tuple(options.workers.split(",")), index=options.index)


def _progress_line(network, now):
    """Progress of a training, in one line."""
    parts = [f"training {network}: {now.epoch} of {now.epochs} epochs done"]
    if now.step:
        parts.append(f"step {now.step} of {now.steps}, loss {now.loss:.3f}, {now.images_per_second:,.0f} images/s")
    if now.figures:
        parts.append(f"test accuracy {now.figures['val_accuracy'][-1]:.1%}")
    return ", ".join(parts)


def _print_plan(options, plan):
    """Prints the plan of a training: the sizes of the data, and the recipe."""
    if options.json:
        return print_json(plan)
    rows = {name: f"{plan[name]:,}" for name in ("training_images", "test_images", "classes", "steps_per_epoch")}
    rows |= {name: _as_text(value) for name, value in plan["recipe"].items()}
    rates = (f"{rate:.4g} from epoch {epoch + 1}" for epoch, rate in plan["learning_rate_at_epoch"].items())
    rows["learning rate"] = ", ".join(rates)
    title = f"{plan['network']} on {plan['data']}, a dry run"
    print_table((), ((name.replace("_", " "), text) for name, text in rows.items()), title=title)


def _as_text(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} {_as_text(x)}" for key, x in value.items())
    if isinstance(value, tuple):
        return " to ".join(f"{x:.3g}" for x in value) if len(value) == 2 else ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def add_curves(commands: Commands) -> None:
    """`se-keras curves RUN ... -o FILE`."""
    add = add_command(commands, "curves", curves)
    add("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    add("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")


def curves(options: argparse.Namespace, console: Console) -> None:
    """Draw the curves of runs, such as SE and its baseline: training and validation.

    Examples:
      se-keras curves runs/plain runs/se -o curves.png
    """
    from se_keras.runs import MODEL_FILE, RUN_FILE, training_of
    from se_keras.training.record import draw_curves

    runs = {}
    for folder in options.runs:
        run = training_of(folder / MODEL_FILE)
        if run is None:
            raise FileNotFoundError(f"There is no run in {str(folder)!r}: no {RUN_FILE}")
        name = run["network"] if run["network"] not in runs else f"{run['network']} ({folder})"
        runs[name] = run["figures"]
    draw_curves(options.output, runs)
    print_line(f"wrote {options.output}: {', '.join(runs)}")


def add_pack(commands: Commands) -> None:
    """`se-keras pack FOLDER -o FOLDER`."""
    add = add_command(commands, "pack", pack, json_output=True)
    add("images", metavar="FOLDER", type=Path, help="with a folder for each class")
    add("-o", "--output", type=Path, required=True, help="folder of the shards")
    add("--shards", type=POSITIVE, default=8, metavar="N", help="files per split (default: %(default)s)")


def pack(options: argparse.Namespace, console: Console) -> None:
    """Pack a folder of images as TFRecords, which disks and networks read fast.

    Examples:
      se-keras pack imagenet/ --shards 1024 -o shards/
    """
    from se_keras.training import shards
    from se_keras.training.data import folder
    from se_keras.wording import counted

    with show_progress(console) as progress:
        index = shards.pack(folder(options.images), options.output, shards=options.shards, progress=progress)
    if options.json:
        return print_json(index)
    for name, entries in index["splits"].items():
        images, size = (sum(entry[key] for entry in entries) for key in ("count", "bytes"))
        print_line(f"{name}: {counted(images, 'image')} in {counted(len(entries), 'shard')}, {size / 1e6:,.1f} MB")
