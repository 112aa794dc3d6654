"""Whether the stand-in CUDA runtime can be used here."""

from __future__ import annotations

import pytest

from tests.standin.build import UnavailableError, build


@pytest.fixture(scope="session", autouse=True)
def standin(request: pytest.FixtureRequest) -> None:
    """Builds it; where that is impossible, skips the tests, or fails them with --require-backends."""
    try:
        build()
    except UnavailableError as error:
        if request.config.getoption("--require-backends"):
            pytest.fail(str(error))
        pytest.skip(str(error))
