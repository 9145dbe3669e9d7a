"""What is said to whoever made the mistake."""

import difflib
import os


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints it without a traceback."""


def no_such(path: str | os.PathLike[str], kind: str = "file") -> str:
    """What is said of a path that leads nowhere, with what is nearly called so in its folder, or to no file."""
    if os.path.lexists(path):
        return (
            f"{path}: a folder, where a file was expected" if os.path.isdir(path) else f"{path}: no file that is read"
        )
    return f"{path}: no such {kind}{nearest(path)}"


def nearest(path: str | os.PathLike[str]) -> str:
    """What of the path's folder is called nearly as it, as the end of a message; nothing where nothing is."""
    if os.path.lexists(path):
        return ""
    folder, name = os.path.split(os.path.normpath(path))
    names = os.listdir(folder or ".") if os.access(folder or ".", os.R_OK | os.X_OK) else []
    near = difflib.get_close_matches(name, names, 1, cutoff=0.75)
    return f"; nearest: {os.path.join(folder, near[0])}" if near else ""


def first_line(error: Exception) -> str:
    """What an error of a library says in one line, which a file may have made endless; its name where it is silent."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
