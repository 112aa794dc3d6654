"""Files that grow while a run trains: lines or TensorBoard events, whole ones also after a full disk."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.files import open_to_append


class AppendedFile:
    """A file to append to. What the disk does not take is kept in memory and written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._pending = b""

    def write(self, data: bytes) -> None:
        """Keep the data until `flush`."""
        self._pending += data

    def flush(self) -> None:
        """Write what is kept. Raises OSError; the rest is kept then."""
        try:
            if self._file is None and self._pending:
                self.path.parent.mkdir(exist_ok=True)
                self._file = open_to_append(self.path)
            while self._file is not None and self._pending:  # a disk that fills up accepts a part of the bytes
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error

    def close(self) -> None:
        """Write what is kept, and close the file. Raises OSError."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None


class EventFile:
    """Scalars for TensorBoard, without its writer: that ends, with a traceback, at the first full disk.

    first_step  TensorBoard hides earlier files' values of this and later steps, of a run that was resumed
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # takes half a second to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._records = RecordWriter(self._file)
        events: Any = event_pb2  # its classes are made at import
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._add(file_version="brain.Event:2")
        if first_step is not None:
            self._add(step=first_step, session_log=events.SessionLog(status=events.SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Keep the values of a step until `flush`."""
        for name, value in values.items():
            self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def picture(self, step: int, name: str, image: bytes, size: tuple[int, int]) -> None:
        """Keep an encoded image (PNG or JPEG) of this width and height until `flush`."""
        content = self._summary.Image(encoded_image_string=image, width=size[0], height=size[1], colorspace=3)
        self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=content)]))

    def flush(self) -> None:
        """Write what is kept. Raises OSError; the rest is kept then."""
        self._file.flush()

    def close(self) -> None:
        """Write what is kept, and close the file. Raises OSError."""
        self._file.close()

    def _add(self, **content: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
