"""The metrics of a run: metrics.jsonl, the lines for a person, and the training curve."""

import contextlib
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

from vnca.program import VncaError, files
from vnca.program.hosts import is_first
from vnca.program.progress import duration
from vnca.training import METRICS

CURVE_POINTS = 100  # of a training curve


class NotFinite(VncaError):
    """A loss term or a gradient norm of update `update` that is not finite."""

    def __init__(self, message, update):
        super().__init__(message)
        self.update = update


class Metrics:
    """Writes metrics.jsonl, one line for each update, and logs lines for a person.

    The values of a device call are fetched after the next call has begun, so that no device waits
    for the host. Process 0 writes. Every process checks that the values are finite.
    """

    def __init__(self, config, path, done, log):
        self.config, self.path, self.log = config, path, log
        self.waiting = None  # first update, count and values of the running call
        self.lines, self.recent = [], []  # for the file; for the next line that is logged
        self.since, self.shown, self.first = time.monotonic(), done, True
        if is_first():
            files.clean(path.parent)
            kept = _records(path, done)
            if lacking := done - sum(b'"test_iwelbo"' not in line for line in kept):
                log(f"warning: {path} lacks {lacking:,} of the {done:,} updates so far")
            files.write(path, lambda file: file.writelines(kept))

    def add(self, first, count, values):
        """Adds updates first, …, first + count − 1: values [≥ count, 4], still on the devices."""
        waiting, self.waiting = self.waiting, (first, count, values)
        if waiting:
            self._fetch(*waiting)

    def add_test(self, update, bound, images):
        """Adds the quick test IWELBO of so many images, in nats."""
        self._put({"update": update, "test_iwelbo": bound})
        self.log(f"update {update:,}  quick test IWELBO {bound:.2f} nats ({images} images)")

    def flush(self):
        """Fetches the values of the last call, and returns when every record is on the disk."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self._fetch(*waiting)
        self._write(sync=True)

    def _put(self, record):
        self.lines.append(json.dumps(record).encode() + b"\n")

    def _fetch(self, first, count, values):
        for update, row in enumerate(np.asarray(values)[:count].tolist(), first):
            if not np.all(np.isfinite(row)):
                self._write()
                named = ", ".join(f"{n} {v:.4g}" for n, v in zip(METRICS, row, strict=True))
                raise NotFinite(
                    f"update {update:,} is not finite ({named}); all checkpoints are older. Try a "
                    "new --workdir with config.train.learning_rate below "
                    f"{self.config.train.learning_rate:g}, or let --config.train.debug_nans=True "
                    "name the operation that failed",
                    update,
                )
            self._put({"update": update} | dict(zip(METRICS, row, strict=True)))
            self.recent.append(row)
        self._write()
        self._show(first + count - 1)

    def _write(self, sync=False):
        lines, self.lines = self.lines, []
        if not is_first():
            return
        deleted = not os.path.exists(self.path)
        try:
            with open(self.path, "ab") as file:
                file.writelines(lines)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as fault:
            raise files.cannot_write(self.path, fault) from fault
        if deleted:
            self.log(f"warning: {self.path} was deleted; the new one lacks the earlier updates")

    def _show(self, done):
        """Logs a line every `log_every` updates or, if that is unset, every few seconds."""
        train, seconds = self.config.train, time.monotonic() - self.since
        every, updates = train.log_every, train.updates
        if every is None and jax.default_backend() != "cpu":
            every = 1000
        due = done // every > self.shown // every if every else seconds >= 5
        if not (due or self.first or done == updates):
            return
        loss, reconstruction, kl, _ = np.mean(self.recent, axis=0)
        clipped = np.mean([norm > train.clip_norm for *_, norm in self.recent])
        clipped = f"  {clipped:.0%} clipped" if clipped else ""
        rate = (done - self.shown) / seconds
        self.log(
            f"update {done:,}/{updates:,}  loss {loss:.2f} = {reconstruction:.2f} "
            f"reconstruction + {kl:.2f} KL{clipped}  {rate:.3g} updates/s  "
            f"{rate * train.batch_size:,.3g} images/s  ETA {duration((updates - done) / rate)}"
        )
        self.recent, self.since, self.shown, self.first = [], time.monotonic(), done, False


def _records(path, done):
    """The lines of metrics.jsonl up to update `done`, as bytes, each record once.

    Lines that a kill cut off or a loss of power damaged are left out.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise VncaError(f"cannot read {path}: {fault.strerror}; repair or move it") from fault

    kept = {}
    for line in lines:
        # One flipped bit can change a name, too.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if line.endswith(b"}\n") and record["update"] <= done:
                kept.setdefault((record["update"], "test_iwelbo" in record), line)
    return [kept[key] for key in sorted(kept)]


def training_curve(metrics):
    """The training curve from a run's metrics.jsonl, float32 [100, 2].

    Each row has the last update of a hundredth of the run and the mean loss over that hundredth, in
    nats. Without updates, all rows are NaN.
    """
    losses = {}
    with contextlib.suppress(OSError):
        for line in Path(metrics).read_bytes().splitlines():
            # The line may be cut short by a kill, or hold a test IWELBO.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                losses[int(record["update"])] = float(record["loss"])
    if not losses:
        return np.full((CURVE_POINTS, 2), np.nan, np.float32)
    losses = sorted(losses.items())
    ends = np.linspace(0, len(losses), CURVE_POINTS + 1).astype(int)[1:].clip(1)
    starts = np.minimum(np.append(0, ends[:-1]), ends - 1)  # in a short run, some would be empty
    parts = [losses[a:b] for a, b in zip(starts, ends, strict=True)]
    return np.array([(part[-1][0], np.mean(part, axis=0)[1]) for part in parts], np.float32)
