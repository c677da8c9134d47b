"""The one exception that means "the input is wrong": printed as one line, exit code 2, no traceback."""


class InputError(Exception):
    """What a person gave is wrong. The message names the thing, what was expected and what to do.

    Raised at every boundary (recipe, data, checkpoint, command line). Entry points print the message
    alone and exit with code 2; any other exception is a fault of ours and keeps its traceback.
    """
