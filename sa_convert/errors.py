"""The errors that users see. Every message names what is wrong (file, key, line, layer) and what to do about it.

`sa_convert.commands.main` is the one place that turns them into an exit status.
"""


class SaConvertError(Exception):
    """Something the user can mend. The message is one line."""

    exit_code = 1


class CheckpointError(SaConvertError):
    """The model's files are missing, damaged, or contradict each other."""


class UnsupportedModelError(SaConvertError):
    """The model is of a kind that cannot share attention, or not yet."""


class RecipeError(SaConvertError):
    """The recipe cannot be read, or asks for something impossible."""


class PlanError(SaConvertError):
    """A plan breaks a rule of a treatment; the message names the layer, and the head or KV group."""


class OutputError(SaConvertError):
    """The result cannot be written."""


class DataError(SaConvertError):
    """Text for calibration or validation cannot be used."""


class EndedElsewhere(SaConvertError):
    """Another process of a launch has told what is wrong, and with which exit status all end."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class SessionError(SaConvertError):
    """A conversation cannot be kept, or what was kept is of no use here."""


class GateRefused(SaConvertError):
    """The converted model is not good enough to be published."""

    exit_code = 3
