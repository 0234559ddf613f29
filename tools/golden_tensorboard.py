"""A small TensorBoard event file, written by TensorBoard's own classes.

    pip install tensorboard
    python tools/golden_tensorboard.py

writes crates/blip2-train/tests/golden/events.out.tfevents.1700000000.golden, which our writer must equal byte for
byte. The same steps are written out in crates/blip2-train/src/log/tensorboard.rs.

    python tools/golden_tensorboard.py --read DIR

prints what TensorBoard reads from a run's directory, for checking a real run by eye.
"""

import argparse
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

GOLDEN = Path(__file__).parent.parent / "crates/blip2-train/tests/golden/events.out.tfevents.1700000000.golden"

STEPS = [
    (42, 1700000001.25, [("loss/itc", 4.125), ("temperature", 0.07), ("learning_rate", 1e-6)]),
    (300, 1700000002.5, [("loss/itc", float("nan")), ("temperature", -0.0), ("größe", 3e9)]),
    (5000000000, 1700000003.0, [("long/" * 60, 1.0)]),
]


def write():
    with open(GOLDEN, "wb") as file:
        writer = RecordWriter(file)
        start = 1700000000.5
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        session = SessionLog(status=SessionLog.START)
        writer.write(Event(wall_time=start, step=42, session_log=session).SerializeToString())
        for step, time, values in STEPS:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values])
            writer.write(Event(wall_time=time, step=step, summary=summary).SerializeToString())
        writer.flush()
    print(GOLDEN, GOLDEN.stat().st_size, "bytes")


def read(directory):
    run = EventAccumulator(str(directory)).Reload()
    for tag in run.Tags()["scalars"]:
        events = run.Scalars(tag)
        print(tag, len(events), "steps:", [(event.step, event.value) for event in events[:3]], "...", events[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, help="a run's directory to read instead")
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
    else:
        write()
