"""What the command does with training: train a network, draw its curves, pack data."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from .screen import Output, answer, new_table, print_json, progress_on, say

EXIT_SAVED = 75


def train(options, console):
    """`se-keras train`; status 75 where SIGTERM came and all was saved."""
    from se_keras.training import distribution, sources
    from se_keras.training import recipes as recipe

    if options.recipe is not None and options.recipe not in recipe.RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(recipe.RECIPES)}. Received: {options.recipe!r}")
    chosen = _recipe(options, recipe.RECIPES)
    if options.dry_run:
        return _print_plan(options, chosen)
    if options.output is None:
        raise ValueError("-o FOLDER says where the run goes. Received: none")
    # Several workers come before anything else of TensorFlow.
    replicas = distribution.replicas(
        options.strategy, cluster=_cluster(options, distribution), tpu=options.tpu, timeout=options.wait
    )

    import keras

    from se_keras import create
    from se_keras.catalogue import spec_of
    from se_keras.training.loop import MODEL_FILE, Execution, Preempted, fit

    execution = Execution(
        steps_per_execution=options.steps_per_execution,
        accumulate=options.accumulate,
        jit_compile=options.jit_compile,
        checkpoint_steps=options.checkpoint_steps,
        corrupt_budget=options.corrupt_budget,
        cache=options.cache,
        service=options.service,
    )
    spec = spec_of(options.network)
    data = sources.load(options.data, mean=spec.mean, std=spec.std)
    shape = _shape(options, spec, data)
    keras.config.set_dtype_policy(options.precision)
    keras.utils.set_random_seed(chosen.seed)
    how = {"classes": len(data.classes), "input_shape": shape, "weights": options.weights}
    model = create(options.network, **how)
    say_epochs = not console.is_terminal
    with progress_on(console) as progress:

        def told(now):
            if now.step == 0 or not say_epochs:
                progress(_line(options.network, now))

        try:
            _, figures = fit(model, chosen, data, options.output, strategy=replicas, execution=execution, progress=told)
        except Preempted as saved:
            say(console, f"se-keras: stopped by SIGTERM. {saved}")
            return EXIT_SAVED
    file = options.output / MODEL_FILE
    answer(f"{file}: test accuracy {figures['val_accuracy'][-1]:.1%} after {len(figures['loss'])} epochs")


def _recipe(options, recipes):
    """The recipe that was asked for; another batch takes the learning rate along."""
    chosen = recipes[options.recipe or ("digits" if options.data == "digits" else "paper_imagenet")]
    if options.batch_size is not None:
        chosen = chosen.scaled_to(options.batch_size)
    fields = ("epochs", "learning_rate", "seed", "sampling")
    return replace(
        chosen, **{field: getattr(options, field) for field in fields if getattr(options, field) is not None}
    )


def _cluster(options, distribution):
    if options.workers is None and options.index is None:
        return None
    if options.strategy != "multi-worker" or options.workers is None or options.index is None:
        raise ValueError(
            "--workers and --index go together, with --strategy multi-worker. "
            f"Received: --strategy {options.strategy}, --workers {options.workers}, --index {options.index}"
        )
    return distribution.Cluster(workers=tuple(options.workers.split(",")), index=options.index)


def _shape(options, spec, data):
    if options.size is not None:
        return (options.size, options.size, len(data.mean))
    images = getattr(data.train, "images", None)
    return spec.input_shape if images is None else images.shape[1:]


def _line(network, now):
    """Where a training is, in one line."""
    parts = [f"training {network}: epoch {now.epoch} of {now.epochs}"]
    if now.step:
        parts.append(f"step {now.step} of {now.steps}, loss {now.loss:.3f}, {now.images_per_second:,.0f} images/s")
    if now.figures:
        parts.append(f"test accuracy {now.figures['val_accuracy'][-1]:.1%}")
    return ", ".join(parts)


def _print_plan(options, chosen):
    """`--dry-run`: the recipe in full, and what it comes to."""
    from se_keras.catalogue import spec_of
    from se_keras.training import sources
    from se_keras.training.schedules import learning_rates

    spec = spec_of(options.network)
    data = sources.load(options.data, mean=spec.mean, std=spec.std)
    steps = len(data.train) // chosen.batch_size
    if not steps:
        raise ValueError(
            f"A batch is at most the {len(data.train)} training images of {data.name}. "
            f"Received: batch_size={chosen.batch_size}"
        )
    schedule = learning_rates(chosen, steps)
    epochs = sorted({0, chosen.warmup_epochs, *(e for e in chosen.decay_epochs if chosen.schedule == "steps"),
                     chosen.epochs // 2, chosen.epochs - 1})  # fmt: skip
    rates = {
        epoch: float(schedule(epoch * steps)) if callable(schedule) else schedule
        for epoch in epochs
        if epoch < chosen.epochs
    }
    told, rates = rates, {}
    for epoch, rate in told.items():  # where it is another than before
        if not rates or rate != list(rates.values())[-1]:
            rates[epoch] = rate
    plan = {
        "network": options.network,
        "data": data.name,
        "training_images": len(data.train),
        "test_images": len(data.test),
        "classes": len(data.classes),
        "steps_per_epoch": steps,
        "learning_rate_at_epoch": rates,
        "recipe": asdict(chosen),
    }
    if options.json:
        return print_json(plan)
    table = new_table(show_header=False, title=f"{options.network} on {data.name}, a dry run")
    for name, value in plan.items():
        if name not in ("recipe", "network", "data", "learning_rate_at_epoch"):
            table.add_row(name.replace("_", " "), f"{value:,}")
    for name, value in plan["recipe"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_text(x)}" for key, x in value.items())
        table.add_row(name.replace("_", " "), _text(value))
    table.add_row("learning rate", ", ".join(f"{rate:.4g} from epoch {epoch + 1}" for epoch, rate in rates.items()))
    Output().print(table)


def _text(value):
    if isinstance(value, tuple):
        return " to ".join(f"{x:.3g}" for x in value) if len(value) == 2 else ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def curves(options, console):
    """`se-keras curves`."""
    from se_keras.training.loop import RUN_FILE
    from se_keras.training.record import draw_curves

    runs = {}
    for folder in options.runs:
        try:
            run = json.loads((Path(folder) / RUN_FILE).read_text())
            name = run["network"] if run["network"] not in runs else f"{run['network']} ({folder})"
            runs[name] = run["figures"]
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no run in {str(folder)!r}: no {RUN_FILE}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(Path(folder) / RUN_FILE)!r} is no record of a run") from None
    draw_curves(options.output, runs)
    answer(f"wrote {options.output}: {', '.join(runs)}")


def pack(options, console):
    """`se-keras pack`."""
    from se_keras.training import shards
    from se_keras.training.data import folder

    with progress_on(console) as progress:
        index = shards.pack(folder(options.images), options.output, shards=options.shards, progress=progress)
    if options.json:
        return print_json(index)
    for name, entries in index["splits"].items():
        images, size = (sum(entry[key] for entry in entries) for key in ("count", "bytes"))
        answer(f"{name}: {images:,} images in {len(entries)} shards, {size / 1e6:,.1f} MB")
