"""The one error of this room."""


class DataError(ValueError):
    """A data set that is unknown, absent, damaged or of the wrong kind. The message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
