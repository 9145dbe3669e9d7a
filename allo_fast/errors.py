"""What is said to whoever made the mistake."""


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints it without a traceback."""


def first_line(error: Exception) -> str:
    """What an error of a library says in one line, which a file may have made endless; its name where it is silent."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
