"""The metrics of a run: metrics.jsonl, with one line per update and per quick test IWELBO, and the
progress lines."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np

from vnca.program import VncaError, files
from vnca.program.hosts import agree, is_first
from vnca.program.progress import pace, set_aside
from vnca.training import METRICS

CURVE_POINTS = 100  # of a training curve


class NotFinite(VncaError):
    """Update number `update` produced a value that is not finite. what: its name, and its value if
    it is one number."""

    def __init__(self, config, update, what):
        search = ". --config.train.debug_nans=True finds the operation that produced the value"
        super().__init__(
            f"update {update:,} is not finite ({what}); all checkpoints are older. Try a "
            f"config.train.learning_rate below {config.train.learning_rate:g} in a new --workdir"
            f"{'' if config.train.debug_nans else search}"
        )
        self.update = update


class Metrics:
    """Writes metrics.jsonl and the progress lines.

    The values of a device call are fetched after the next call has started, so that no device waits
    for the host. Only process 0 writes. Every process detects values that are not finite.

    done: how many updates the run has made before. `add` and `flush` raise NotFinite, and VncaError
    if the storage fails.
    """

    def __init__(self, config, path, done, log):
        self.config = config
        self.path = path
        self.log = log
        self.waiting = None  # the call that is running: first update, count, values
        self.lines = []  # of metrics.jsonl, to be written
        self.sums = np.zeros(5)  # of METRICS and of clipped updates, since the last progress line
        self.since = time.monotonic()  # time of the last progress line
        self.shown = done  # update of the last progress line
        self.first = True  # no progress line yet
        if is_first():
            files.clean(path.parent)
            kept = _records(path, done)
            if missing := done - sum(b'"test_iwelbo"' not in line for line in kept):
                log(f"warning: {path} lacks {missing:,} of the {done:,} updates so far")
            files.write(path, lambda file: file.writelines(kept))

    def add(self, first, count, values):
        """Adds the values of updates first, …, first + count − 1: [K, 4] on the devices."""
        waiting, self.waiting = self.waiting, (first, count, values)
        if waiting:
            self._fetch(*waiting)

    def add_test(self, update, bound, images):
        """Adds a quick test IWELBO, in nats, the mean over this number of images. Raises NotFinite
        if it is not finite."""
        if not np.isfinite(bound):
            raise NotFinite(self.config, update, f"quick test IWELBO {bound:.4g}")
        self._put({"update": update, "test_iwelbo": bound})
        self.log(f"update {update:,}  quick test IWELBO {bound:.2f} nats ({images} images)")

    @contextlib.contextmanager
    def clock_stopped(self):
        """The seconds in the `with` do not count as training in updates/s and ETA."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def flush(self):
        """Fetches the values of the last call, and returns when every record is on the disk."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self._fetch(*waiting)
        self._write(sync=True)

    def _put(self, record):
        self.lines.append(json.dumps(record, allow_nan=False).encode() + b"\n")

    def _fetch(self, first, count, values):
        for update, row in enumerate(np.asarray(values)[:count].tolist(), first):
            if not np.all(np.isfinite(row)):
                self._write()
                terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(METRICS, row, strict=True))
                raise NotFinite(self.config, update, terms)
            self._put({"update": update} | dict(zip(METRICS, row, strict=True)))
            self.sums += [*row, row[-1] > self.config.train.clip_norm]
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
            self.log(f"warning: {self.path} was deleted. A new file starts without the old records")

    def _show(self, done):
        """Logs a progress line every `log_every` updates. If that is unset: every 5 seconds on a
        CPU, and every 1,000 updates on an accelerator."""
        train, seconds = self.config.train, time.monotonic() - self.since
        every, updates = train.log_every, train.updates
        if every is None and jax.default_backend() != "cpu":
            every = 1000
        due = done // every > self.shown // every if every else seconds >= 5
        if not (due or self.first or done == updates):
            return
        new = done - self.shown
        loss, reconstruction, kl, _, clipped = self.sums / new
        clipped = f"  {clipped:.0%} clipped" if clipped else ""
        speed = pace(seconds, updates - done, updates=new, images=new * train.batch_size)
        self.log(
            f"update {done:,}/{updates:,}  loss {loss:.2f} = {reconstruction:.2f} "
            f"reconstruction + {kl:.2f} KL{clipped}  {speed}"
        )
        self.sums = np.zeros(5)
        self.since = time.monotonic()
        self.shown = done
        self.first = False


def set_older_aside(path, first_checkpoint, log):
    """Renames a metrics.jsonl that has records after update `first_checkpoint`, the first that a
    run saves. They are of a run whose checkpoints are gone, and a new run would replace them.
    Raises VncaError if the storage fails."""
    if agree(lambda: any(json.loads(r)["update"] > first_checkpoint for r in _records(path))):
        set_aside(path, log)


def _records(path, done=math.inf):
    """The lines of metrics.jsonl, as bytes, up to update `done`, with each record once.

    A kill can truncate a line and a loss of power can damage lines. Such lines come after `done`
    and are dropped.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise files.cannot_read(path, fault) from fault

    kept = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line
            record = json.loads(line)
            if record["update"] <= done:  # an editor may have changed the ends of lines
                kept.setdefault((record["update"], "test_iwelbo" in record), line.strip() + b"\n")
    return [kept[key] for key in sorted(kept)]


def training_curve(metrics):
    """The training curve from a run's metrics.jsonl: float32 [100, 2].

    The run is cut into 100 parts. A row has the last update of a part and the mean loss of the
    part, in nats. All rows are NaN if the file has no updates.
    """
    losses = []
    with contextlib.suppress(VncaError):  # the curve is not worth an error
        records = map(json.loads, _records(Path(metrics)))
        losses = [(r["update"], r["loss"]) for r in records if "loss" in r]
    if not losses:
        return np.full((CURVE_POINTS, 2), np.nan, np.float32)
    ends = np.linspace(0, len(losses), CURVE_POINTS + 1).astype(int)[1:].clip(1)
    starts = np.minimum(np.append(0, ends[:-1]), ends - 1)  # parts of a short run overlap
    parts = [losses[a:b] for a, b in zip(starts, ends, strict=True)]
    return np.array([(part[-1][0], np.mean(part, axis=0)[1]) for part in parts], np.float32)
