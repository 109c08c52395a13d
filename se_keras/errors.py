"""Errors of others in words of ours."""


def first_line(error):
    """What an error says in its first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
