"""TensorBoard's event files, written by the training itself.

torch's SummaryWriter hands events to a thread that dies, with a traceback, when the disk is full; this writer keeps them
until there is room. The records and messages are TensorBoard's own.
"""

import os
import socket
import time
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from smolds_dist.train.append import AppendedFile


class EventFile:
    """One event file in `folder`.

    Args:
        purge_step: TensorBoard forgets what older files say of this step and later ones, which are trained again.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        seconds, fraction = divmod(time.time_ns(), 10**9)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{seconds:010}.{fraction:09}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: dict[str, float | None], step: int) -> None:
        """Adds a point to the curve of each name; None is left out."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def _write(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def close(self) -> None:
        self._file.close()
