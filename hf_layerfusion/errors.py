"""The one error this library raises for input it cannot use."""


class LayerFusionError(ValueError):
    """Bad input: the message names the offending value and says what to do about it.

    The command line turns it into one line on standard error and exit status 1.
    """
