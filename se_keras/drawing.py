"""Pictures of figures: their colors and their files."""

from pathlib import Path
from typing import TYPE_CHECKING

from se_keras import storage
from se_keras.typing import FilePath

if TYPE_CHECKING:  # matplotlib takes half a second
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # for colour-blind readers too: Okabe and Ito
SUFFIXES = (".png", ".svg", ".pdf")


def picture_file(target: FilePath, what: str) -> Path:
    """The path of a picture; raises ValueError unless it is a .png, .svg or .pdf file. `what` is drawn: "Curves"."""
    target = Path(target)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{what} are drawn as .png, .svg or .pdf. Received: {str(target)!r}")
    return target


def save(figure: "Figure", target: Path) -> None:
    """Writes a picture atomically."""
    with storage.staged(target) as path:
        figure.savefig(path)
