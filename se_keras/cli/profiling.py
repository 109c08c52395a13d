"""What the command profiles: where a LiteRT file spends its time, and what squeeze-and-excitation added."""

from rich.markup import escape

from .screen import Output, answer, new_table, print_json, progress_on

SLOWEST = 10


def profile(options, console):
    """`se-keras profile`."""
    from se_keras.export.benchmark.profiler import PARTS, profile
    from se_keras.export.litert.file import load_litert

    with progress_on(console) as progress:
        found = {}
        for side, path in (("file", options.file), ("against", options.against)):
            if path is not None:
                progress(f"profiling {path}")
                found[side] = profile(load_litert(path), threads=options.threads, runs=options.runs)
    if options.json:
        return print_json({side: one.to_json() for side, one in found.items()})
    one, other = found["file"], found.get("against")
    beside = f" beside {options.against}" if other else ""
    table = new_table("", *PARTS, "all", title=escape(f"{options.file}{beside}, us by stage and part"))
    sums = [x.by("stage", "part") for x in (one, other) if x]
    for stage in dict.fromkeys(row.stage for x in (one, other) if x for row in x.rows):
        values = [[side.get((stage, part), 0.0) for part in PARTS] for side in sums]
        table.add_row(stage or "outside", *_cells([[*x, sum(x)] for x in values]))
    totals = [
        [sum(row.microseconds for row in x.rows if row.part == part) for part in PARTS] for x in (one, other) if x
    ]
    table.add_row("all", *_cells([[*x, sum(x)] for x in totals]))
    Output().print(table)
    slowest = new_table("slowest", "operator", "us", "kernel")
    for row in sorted(one.rows, key=lambda row: -row.microseconds)[:SLOWEST]:
        slowest.add_row(row.layer or "-", row.operator, f"{row.microseconds:,.0f}", row.kernel)
    Output().print(slowest)
    for path, x in zip((options.file, options.against), (one, other), strict=True):
        if x:
            more = f"; not on XNNPACK: {', '.join(x.others)}" if x.others else ""
            answer(
                f"{path}: {x.told_us:,.0f} us in operators, of which {x.unplaced:,.0f} in none of the file's; "
                f"a run takes {x.run_us:,.0f} us, {x.profiled_us:,.0f} with the profiler{more}"
            )


def _cells(sides):
    """One file's values, or what it takes more than the other, with a sign."""
    if len(sides) == 1:
        return [f"{value:,.0f}" for value in sides[0]]
    return [f"{a:,.0f} ({a - b:+,.0f})" for a, b in zip(*sides, strict=True)]
