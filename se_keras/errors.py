"""Messages of errors that other libraries raise."""


def first_line(error: object) -> str:
    """The first line of an error's message; the type of the error if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
