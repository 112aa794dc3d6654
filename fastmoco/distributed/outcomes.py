"""Results and failures that ranks exchange through the key-value store of the c10d rendezvous."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastmoco.errors import error_named

T = TypeVar("T")
_FAILURE_GRACE_S = 1.0
_POLL_S = (0.01, 0.5)  # first and longest pause; signals are handled in between
_FAILURES, _FIRST_FAILURE = "failures", "first failure"  # keys: their number, and the description of the first


class Store(Protocol):
    """The subset of `torch.distributed.Store` used here. Every method raises RuntimeError once the store is gone."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


class Outcomes:
    """Results and failures of the ranks of one launch."""

    def __init__(self, store: Any) -> None:
        self._store: Store = store

    def publish(self, key: str, function: Callable[[], T]) -> T:
        """Call the function and store its result or error under `key`. The result must survive JSON."""
        try:
            result = function()
        except Exception as error:
            with suppress(RuntimeError):
                self._store.set(key, _serialise(error))
            raise
        self._store.set(key, json.dumps({"result": result}))
        return result

    def wait(self, key: str) -> Any:
        """Wait, without a time limit, for the result under `key`; raises its error, or the first failure of a rank."""
        pause, longest = _POLL_S
        while not self._store.check([key]):
            if (error := self.first_failure()) is not None:
                raise error
            time.sleep(pause)
            pause = min(2 * pause, longest)
        message = self._store.get(key)
        if (error := _deserialise(message)) is not None:
            raise error
        return json.loads(message)["result"]

    def report_failure(self, error: BaseException) -> bool:
        """Record why this rank exits, before the others notice. Returns whether it is the first to fail."""
        try:
            if self._store.add(_FAILURES, 1) > 1:
                return False
            self._store.set(_FIRST_FAILURE, _serialise(error))
        except RuntimeError:  # the store ended with the rank or agent that hosted it
            return True
        return True

    def wait_for_failures(self, ranks: int) -> None:
        """Give all ranks a moment to report their failures before this one, which may host the store, exits."""
        until = time.monotonic() + _FAILURE_GRACE_S
        with suppress(RuntimeError):
            while self._store.add(_FAILURES, 0) < ranks and time.monotonic() < until:
                time.sleep(_POLL_S[0])

    def first_failure(self) -> Exception | None:
        """The error of the first rank that failed, or None."""
        with suppress(RuntimeError):
            if self._store.check([_FIRST_FAILURE]):
                return _deserialise(self._store.get(_FIRST_FAILURE))
        return None


def _serialise(error: BaseException) -> str:
    return json.dumps({"error": type(error).__name__, "message": str(error) or repr(error)})


def _deserialise(message: bytes) -> Exception | None:
    """The error in a message; None if the message is a result."""
    content = json.loads(message)
    return error_named(content["error"], content["message"]) if "error" in content else None
