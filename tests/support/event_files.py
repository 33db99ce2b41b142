"""What TensorBoard would show of a folder."""

from __future__ import annotations

from pathlib import Path


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of all event files below a folder, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.*")):
        reader = EventAccumulator(str(file))
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in reader.Scalars(name)})
    return found
