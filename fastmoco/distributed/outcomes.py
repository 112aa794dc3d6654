"""What one rank did and the others must know: told through a key-value store that all of them reach."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastmoco.errors import error_named

T = TypeVar("T")
_LINGER_S = 1.0
_POLL_S = (0.01, 0.5)  # the first pause and the longest: signals are seen in between


class Store(Protocol):
    """What is needed of `torch.distributed.Store`. Every method raises RuntimeError once the store is gone."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


class Outcomes:
    """Results, errors and last words of the ranks of one start of a run."""

    def __init__(self, store: Any) -> None:
        self._store: Store = store

    def lead(self, key: str, function: Callable[[], T]) -> T:
        """Calls the function and tells under `key` how it went. Its result must survive JSON."""
        try:
            result = function()
        except Exception as error:
            with suppress(RuntimeError):
                self._store.set(key, _described(error))
            raise
        self._store.set(key, json.dumps({"result": result}))
        return result

    def follow(self, key: str) -> Any:
        """The result told under `key`, waited for however long; raises the error, or one that a rank ended with."""
        pause, longest = _POLL_S
        while not self._store.check([key]):
            if (error := self.first_failure()) is not None:
                raise error
            time.sleep(pause)
            pause = min(2 * pause, longest)
        said = self._store.get(key)
        if (error := _restored(said)) is not None:
            raise error
        return json.loads(said)["result"]

    def report_failure(self, error: BaseException) -> bool:
        """Leaves word of why this rank ends, before the others find it gone. Whether it is the first to."""
        try:
            if self._store.add("notes", 1) > 1:
                return False
            self._store.set("note", _described(error))
        except RuntimeError:  # the store went with the rank or the agent that kept it
            return True
        return True

    def linger(self, ranks: int) -> None:
        """Waits a moment for the last words of the others: where this rank keeps the store, it goes with it."""
        until = time.monotonic() + _LINGER_S
        with suppress(RuntimeError):
            while self._store.add("notes", 0) < ranks and time.monotonic() < until:
                time.sleep(_POLL_S[0])

    def first_failure(self) -> Exception | None:
        """The error that the first rank to end has left word of."""
        with suppress(RuntimeError):
            if self._store.check(["note"]):
                return _restored(self._store.get("note"))
        return None


def _described(error: BaseException) -> str:
    return json.dumps({"error": type(error).__name__, "message": str(error) or repr(error)})


def _restored(said: bytes) -> Exception | None:
    """The error in a message of `_described`; None in one of success."""
    content = json.loads(said)
    return error_named(content["error"], content["message"]) if "error" in content else None
