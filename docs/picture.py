"""Draws docs/picture.svg: what SE costs by docs/data/cost.csv, and an SE block before and after lowering.

python docs/picture.py

A row is a bar: the machine, what was measured there, the time of SE-ResNet-50 divided by that of ResNet-50 with a 95 %
interval, and the page of docs/ that has it. Letters are large, so that a phone can show them at half size.
"""

import csv
from pathlib import Path
from xml.sax.saxutils import escape

DATA, PICTURE = (Path(__file__).parent / name for name in ("data/cost.csv", "picture.svg"))

WIDTH, MARGIN, LINE = 640, 24, 30
ZERO, END = 280, 530  # where bars begin, and where the longest interval ends

# A block: its layers as (column, upper edge, words), and its arrows, each through points.
MAIN, SIDE = 70, 218  # the middles of the columns
PUBLISHED = (
    (
        (MAIN, 58, "1x1 conv"),
        (MAIN, 114, "BatchNorm"),
        (SIDE, 182, "mean of 256"),
        (SIDE, 236, "FC, ReLU"),
        (SIDE, 290, "FC, sigmoid"),
    ),
    (
        ((MAIN, 30), (MAIN, 58)),
        ((MAIN, 92), (MAIN, 114)),
        ((MAIN, 148), (MAIN, 332)),
        ((MAIN, 165), (SIDE, 165), (SIDE, 182)),
        ((SIDE, 216), (SIDE, 236)),
        ((SIDE, 270), (SIDE, 290)),
        ((SIDE, 324), (SIDE, 346), (MAIN + 14, 346)),
        ((MAIN, 360), (MAIN, 384)),
    ),
)
LOWERED = (
    (
        (MAIN, 118, "1x1 conv"),
        (SIDE, 64, "mean of 64"),
        (SIDE, 118, "FC, ReLU"),
        (SIDE, 172, "FC, sigmoid"),
    ),
    (
        ((MAIN, 30), (MAIN, 118)),
        ((MAIN, 152), (MAIN, 214)),
        ((MAIN, 46), (SIDE, 46), (SIDE, 64)),
        ((SIDE, 98), (SIDE, 118)),
        ((SIDE, 152), (SIDE, 172)),
        ((SIDE, 206), (SIDE, 228), (MAIN + 14, 228)),
        ((MAIN, 242), (MAIN, 266)),
    ),
)
NOTE = (
    "BatchNorm is folded. The mean",
    "reads the 64 inputs of the conv,",
    "not its 256 outputs. The result",
    "is the same.",
)
BLOCK_HEIGHT = 400

STYLE = """
svg { --card: #fff; --edge: #d1d9e0; --ink: #1f2328; --muted: #59636e; --box: #f6f8fa; --grey: #8c959f;
      --se: #0969da; --se-box: #ddf4ff; --paper: #bc4c00; }
@media (prefers-color-scheme: dark) {
  svg { --card: #0d1117; --edge: #3d444d; --ink: #f0f6fc; --muted: #9198a1; --box: #21262d; --grey: #7d8590;
        --se: #4493f7; --se-box: #0c2d6b; --paper: #f0883e; }
}
text { font: 17px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: var(--ink); }
.title { font-size: 20px; font-weight: 600; }
.note { fill: var(--muted); }
.on-line { stroke: var(--card); stroke-width: 5; paint-order: stroke; }
.card { fill: var(--card); stroke: var(--edge); }
.box { fill: var(--box); stroke: var(--grey); }
.se-box { fill: var(--se-box); stroke: var(--se); }
.line, .se-line, .interval { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.se-line { stroke: var(--se); }
.published { fill: var(--grey); }
.exported { fill: var(--se); }
.paper { fill: var(--paper); }
.limit { stroke: var(--paper); stroke-width: 1.5; stroke-dasharray: 5 4; }
""".strip()


def read(path: Path = DATA) -> list[dict]:
    """The rows of the file. Ratios and intervals are numbers; None where a row has no interval."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row | {key: float(row[key]) if row[key] else None for key in ("ratio", "low", "high")}
            for row in csv.DictReader(file)
        ]


def percent(ratio: float) -> str:
    """What SE adds: `+1.8 %` of 1.018."""
    return f"{100 * (ratio - 1):+.1f} %"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words on the line y; `anchor` is the part of them that is at x."""
    return f'<text x="{x:.4g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def layer(x: float, y: float, words: str) -> str:
    """A layer of a block, by the middle of its upper edge."""
    kind = "se-box" if x == SIDE else "box"
    box = f'<rect x="{x - 65:g}" y="{y:g}" width="130" height="34" rx="6" class="{kind}"/>'
    return box + text(x, y + 23, words, anchor="middle")


def arrow(points: tuple) -> str:
    """A line through the points with a head at the last one; in the colour of SE if it touches SE's column."""
    kind = "se-line" if any(x == SIDE for x, _ in points) else "line"
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}" marker-end="url(#{kind}-head)"/>'


def head(kind: str, color: str) -> str:
    """The head of the arrows of a kind."""
    shape = f'<path d="M0 0 9 4.5 0 9z" fill="var(--{color})"/>'
    return (
        f'<marker id="{kind}-head" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">{shape}</marker>'
    )


def block(left: float, top: float, title: str, layers: tuple, arrows: tuple) -> list[str]:
    """A block under its title, with the product of a tensor and its gates where SE's last arrow ends."""
    product = max(points[-1][1] for points in arrows if points[-1][0] == MAIN + 14)
    return [
        f'<g transform="translate({left:g} {top:g})">',
        text(MAIN - 65, 14, title, "title"),
        *map(arrow, arrows),
        *(layer(*values) for values in layers),
        f'<circle cx="{MAIN}" cy="{product:g}" r="14" class="se-box"/>',
        text(MAIN, product + 6, "×", anchor="middle"),
        "</g>",
    ]


def bar(row: dict, y: float, scale: float) -> list[str]:
    """A row's words, bar, interval and figure, on the line y."""
    kind = "paper" if row["low"] is None else "published" if "published" in row["what"] else "exported"
    low, ratio, high = (
        ZERO + (value - 1) * scale for value in (row["low"] or 1, row["ratio"], row["high"] or row["ratio"])
    )
    parts = [f'<rect x="{ZERO}" y="{y - 15:g}" width="{ratio - ZERO:.1f}" height="18" class="{kind}"/>']
    if row["low"] is not None:
        parts.append(f'<path d="M{low:.1f} {y - 11:g}v10m0 -5H{high:.1f}m0 -5v10" class="interval"/>')
    return [text(MARGIN, y, row["what"]), *parts, text(high + 8, y, percent(row["ratio"]), "on-line")]


def bars(rows: list[dict], top: float) -> tuple[list[str], float]:
    """All bars under the names of their machines, with a line at the paper's figure; and their lower edge."""
    scale = (END - ZERO) / max((row["high"] or row["ratio"]) - 1 for row in rows)
    parts, y, machine = [], top, ""
    for row in rows:
        if row["where"] != machine:
            y, machine = y + LINE, row["where"]
            parts.append(text(MARGIN, y, machine, "note on-line"))
        y += LINE
        parts += bar(row, y, scale)
    paper = next(ZERO + (row["ratio"] - 1) * scale for row in rows if row["low"] is None)
    return [f'<path d="M{paper:.1f} {top + 10:g}V{y + 8:g}" class="limit"/>', *parts], y


def draw(rows: list[dict]) -> str:
    """The picture, with a bar for each row."""
    measured, bottom = bars(rows, top=76)
    top = bottom + 40
    height = top + BLOCK_HEIGHT
    names = [f"{row['what']} ({row['where']})" if row["where"] else row["what"] for row in rows]
    summary = "; ".join(f"{name} {percent(row['ratio'])}" for name, row in zip(names, rows, strict=True))
    right = WIDTH // 2 + 7
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
        f"<title>{escape(f'Time that squeeze-and-excitation adds to ResNet-50. {summary}')}</title>",
        f"<style>\n{STYLE}\n</style>",
        f"<defs>{head('line', 'ink')}{head('se-line', 'se')}</defs>",
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="card"/>',
        text(MARGIN, 42, "Time that SE adds to ResNet-50", "title"),
        text(MARGIN, 70, "224x224, one thread, LiteRT; with 95 % intervals", "note"),
        *measured,
        *block(MARGIN - 5, top, "SE block, as trained", *PUBLISHED),
        *block(right, top, "lowered, as exported", *LOWERED),
        *(text(right + 5, top + 302 + 24 * i, words, "note") for i, words in enumerate(NOTE)),
    ]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(read()), encoding="utf-8")
