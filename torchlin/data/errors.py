"""The one error that bad data raises."""


class DataError(ValueError):
    """Data on disk that cannot be used as it is; the message names the path and what would work."""
