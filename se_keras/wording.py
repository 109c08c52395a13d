"""Numbers in messages."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 class", "2,048 images"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
