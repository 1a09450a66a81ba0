"""The metrics log of a training run: each scalar that Megatron gives to TensorBoard, as a line of JSON."""

import json
import math
import time
from pathlib import Path
from typing import Any

from composer_megatron.files import append_json_line, read_json_lines, write_text


class MetricsLog:
    """Lines ``{"iteration": 10, "name": "lm loss", "value": 8.1, "time": 1.7e9}``, one for each scalar of an iteration.

    Takes TensorBoard's place as Megatron's writer where TensorBoard is missing.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Open the log of a run that goes on after iteration `resumed_at` (0: from the start).

        Later lines are dropped: they tell of weights that were never saved, and the run is about to write them anew.
        """
        self.path = path
        lines = read_json_lines(path, repair=True)
        kept = [line for line in lines if line.get("iteration", 0) <= resumed_at]
        if len(kept) < len(lines):
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._seen = {(line.get("iteration"), line.get("name")) for line in kept}

    def add_scalar(self, name: str, value: Any, iteration: int, *_: Any, **__: Any) -> None:
        """Log a scalar, unless it is not finite, was logged, or is a curve over samples instead of iterations."""
        number = float(value)
        if name.endswith(" vs samples") or not math.isfinite(number) or (iteration, name) in self._seen:
            return
        self._seen.add((iteration, name))
        append_json_line(self.path, {"iteration": iteration, "name": name, "value": number, "time": time.time()})

    def flush(self) -> None:
        """Nothing to do: each line is on the disk when `add_scalar` returns."""

    def close(self) -> None:
        """Nothing to do, likewise."""


def tee(log: MetricsLog, writer: Any) -> Any:
    """Megatron's TensorBoard writer with `log` behind it, or `log` alone where there is none."""
    if writer is None:
        return log
    write = writer.add_scalar

    def add_scalar(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        write(name, value, *args, **kwargs)
        log.add_scalar(name, value, *args, **kwargs)

    writer.add_scalar = add_scalar
    return writer
