"""The one exception that means "the input is wrong": printed as one line, exit code 2, no traceback."""


class InputError(Exception):
    """What a person gave is wrong. The message names the thing, what was expected and what to do.

    Raised at every boundary (recipe, data, checkpoint, command line). Entry points print the message
    alone and exit with code 2; any other exception is a fault of ours and keeps its traceback.
    """


def of_a_file(error: OSError) -> str:
    """One line about a path that the system refuses. Raises the error again where it is of no path, and so a fault of ours."""
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}; give the path of a file or folder that can be read"


def one_line(error: BaseException) -> str:
    """The first line of what a library says, or the kind of error where it says nothing."""
    said = next(iter(str(error).strip().splitlines()), "")
    kind = type(error).__name__
    return (f"{kind}: {said}" if isinstance(error, KeyError) else said or kind)[:300]
