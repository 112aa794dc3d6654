"""What can be wrong with the data or a backend. Messages are one line: what was found, expected, and what to do."""


class DataError(ValueError):
    """An image, folder, index or manifest that cannot be used (exit code 3)."""


class BackendMissingError(ValueError):
    """A backend that was requested is not installed or has no device; names the install command (exit code 2)."""
