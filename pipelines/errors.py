"""Errors about data and backends. Messages are one line: the actual value, what was expected, and the remedy."""


class DataError(ValueError):
    """An image, folder, index or manifest that cannot be used (exit code 3)."""


class BackendMissingError(ValueError):
    """A backend that was requested is not installed or has no device; names the install command (exit code 2)."""


def how_to_install(extra: str) -> str:
    """The command that adds an extra of pyproject.toml to a checkout, and keeps what else is installed."""
    return f"uv sync --inexact --extra {extra}"
