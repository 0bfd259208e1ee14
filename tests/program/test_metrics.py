"""The metrics of a run: what a line says of its speed, and that a record is always JSON."""

import json

import numpy as np
import pytest
import tiny

from vnca.program import files, metrics
from vnca.program.progress import pace

CONFIG = tiny.config(train__updates=100, train__log_every=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_the_seconds_of_a_quick_test_are_no_training(tmp_path, clock):
    lines = []
    found = metrics.Metrics(CONFIG, tmp_path / "metrics.jsonl", 0, lines.append)
    for first in (1, 3):
        clock[0] += 2
        found.add(first, 2, np.ones((2, 4)))
        found.flush()
        with found.clock_stopped():
            clock[0] += 1000
    assert [line.split("  ")[-3] for line in lines] == ["1 updates/s"] * 2
    assert lines[-1].endswith("ETA 96 s")


@pytest.mark.parametrize(
    "every, platform, shown",
    [
        (10, "cpu", [1, 10, 20, 30, 35]),
        (None, "cpu", [1, 6, 11, 16, 21, 26, 31, 35]),  # a line in 5 seconds
        (None, "tpu", [1, 35]),  # a line in 1,000 updates
    ],
)
def test_a_line_is_shown_when_it_is_due_and_is_of_the_updates_since_the_one_before(
    tmp_path, clock, monkeypatch, every, platform, shown
):
    monkeypatch.setattr(metrics.jax, "default_backend", lambda: platform)
    config, lines = tiny.config(train__updates=35, train__log_every=every), []
    found = metrics.Metrics(config, tmp_path / "metrics.jsonl", 0, lines.append)
    for update in range(1, 36):
        clock[0] += 1
        norm = config.train.clip_norm * (2 if update % 2 else 0.5)
        found.add(update, 1, np.array([[update, 3, 4, norm]]))
        found.flush()
    assert [int(line.split("/")[0].removeprefix("update ")) for line in lines] == shown
    for line, before, last in zip(lines, [0, *shown], shown, strict=False):
        updates = np.arange(before + 1, last + 1)
        assert f"loss {updates.mean():.2f} = 3.00 reconstruction + 4.00 KL" in line
        assert f"  {np.mean(updates % 2):.0%} clipped  1 updates/s" in line


def test_a_resumed_run_has_the_speed_of_its_own_updates(tmp_path, clock):
    lines = []
    found = metrics.Metrics(CONFIG, tmp_path / "metrics.jsonl", 90, lines.append)
    clock[0] += 5
    found.add(91, 10, np.ones((10, 4)))
    found.flush()
    assert f"  2 updates/s  {2 * CONFIG.train.batch_size} images/s" in lines[-1]


def test_records_whose_line_ends_an_editor_has_changed_are_kept(tmp_path):
    path, records = tmp_path / "metrics.jsonl", [{"update": i, "loss": 1.0} for i in (1, 2, 3)]
    lines = [json.dumps(record).encode() for record in records]
    path.write_bytes(b"\r\n".join(lines))
    said = []
    found = metrics.Metrics(CONFIG, path, 3, said.append)
    assert not said and path.read_bytes() == b"".join(line + b"\n" for line in lines)
    found.add(4, 1, np.ones((1, 4)))
    found.flush()
    updates = [json.loads(line)["update"] for line in path.read_bytes().splitlines()]
    assert updates == [1, 2, 3, 4]


@pytest.mark.parametrize(("last", "aside"), [(None, False), (10, False), (11, True)])
def test_records_of_a_run_whose_checkpoints_are_gone_are_set_aside(tmp_path, last, aside):
    path, said = tmp_path / "metrics.jsonl", []
    if last:
        path.write_bytes(b'{"update": 1, "loss": 1.0}\n{"update": %d, "loss": 1.0}\n{"upd' % last)
        before = path.read_bytes()
    metrics.set_older_aside(path, 10, said.append)
    assert said == ["the earlier metrics.jsonl is now metrics.previous.jsonl"] * aside
    if aside:
        assert path.with_name("metrics.previous.jsonl").read_bytes() == before
    assert path.exists() == (last == 10)


@pytest.mark.parametrize(("rate", "words"), [(7.021, "7.02"), (999, "999"), (1234.5, "1,234")])
def test_fast_work_has_its_speed_in_whole_numbers(rate, words):
    assert pace(10, 60 * rate, images=10 * rate) == f"{words} images/s  ETA 60 s"


def test_a_quick_test_that_is_not_finite_is_an_error_and_no_record(tmp_path):
    found = metrics.Metrics(CONFIG, tmp_path / "metrics.jsonl", 0, print)
    with pytest.raises(metrics.NotFinite, match=r"^update 7 is not finite \(quick test IWELBO nan"):
        found.add_test(7, float("nan"), 64)
    found.flush()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_nobody_is_told_to_set_what_is_set():
    config = CONFIG.copy_and_resolve_references()
    assert "debug_nans" in str(metrics.NotFinite(config, 7, "loss nan"))
    config.train.debug_nans = True
    assert "debug_nans" not in str(metrics.NotFinite(config, 7, "loss nan"))


def test_what_is_not_finite_is_null_in_json(tmp_path):
    value = {"a": [1.5, float("nan")], "b": (float("inf"), None)}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": [None, None]}
