"""The metrics of a run: what a line says, which records are read, and the training curve."""

import json

import numpy as np
import pytest
import tiny

from vnca.program import metrics

RECORD = {"loss": 3.0, "reconstruction": 2.0, "kl": 1.0, "grad_norm": 4.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_every_five_seconds_and_is_of_the_updates_since_the_one_before(
    tmp_path, clock, capsys
):
    config = tiny.config(train__updates=35)
    found = metrics.Metrics(config, tmp_path / "metrics.jsonl", 0, True)
    for update in range(1, 36):
        clock[0] += 1  # of which a half is training, and the other tests and saves
        norm = config.train.clip_norm * (2 if update % 2 else 0.5)
        found.add(update, np.array([[update, 3, 4, norm]], np.float32), 0.5)
    lines = capsys.readouterr().out.splitlines()
    shown = [int(line.split("/")[0].removeprefix("update ")) for line in lines]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 35]
    for line, before, last in zip(lines, [0, *shown], shown, strict=False):
        updates = np.arange(before + 1, last + 1)
        assert f"loss {updates.mean():.2f} = 3.00 reconstruction + 4.00 KL" in line
        assert f"  {np.mean(updates % 2):.0%} clipped  2.00 updates/s  16.00 images/s  ETA" in line
        assert line.endswith(f"ETA {(35 - last) / 2:.0f} s")
    records, _ = tiny.metrics(tmp_path)
    assert [record["update"] for record in records] == [*range(1, 36)]
    assert [record["loss"] for record in records] == [*range(1, 36)]


def test_what_is_not_finite_is_an_error_and_no_record(tmp_path):
    found = metrics.Metrics(tiny.config(), tmp_path / "metrics.jsonl", 0, True)
    with pytest.raises(metrics.VncaError, match=r"^update 7 is not finite \(quick test IWELBO"):
        found.add_test(7, float("nan"), 64)
    for column in range(4):
        values = np.where(np.arange(12).reshape(3, 4) == 4 + column, np.inf, 1)
        with pytest.raises(metrics.VncaError, match="^update 8 is not finite .*learning_rate"):
            found.add(7, values, 1)
    assert not (tmp_path / "metrics.jsonl").read_bytes()


def test_a_damaged_or_edited_line_is_no_record_and_each_record_is_read_once(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", [{"update": n} | RECORD for n in (1, 2, 3)]
    whole.append({"update": 3, "test_iwelbo": -5.0})
    wrong = [whole[1] | {"loss": "3"}, {"update": 2, "loss": 1.0}, whole[1] | {"kl": float("nan")}]
    wrong += [RECORD | {"update": "2"}, RECORD | {"update": 0}, {"test_iwelbo": 1.0}, [1], 7]
    lines = [json.dumps(record) for record in [*wrong, whole[2], *whole, whole[1]]]
    path.write_bytes("\r\n".join([*lines, '{"update": 3, "lo']).encode() + b"\xff\0\n")
    assert metrics.records(path) == whole and metrics.records(path, 2) == whole[:2]


def test_a_training_curve_has_a_hundred_points_of_mean_losses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert np.isnan(metrics.training_curve(path)).all()
    records = [{"update": n} | RECORD | {"loss": float(n)} for n in range(1, 1001)]
    for count, losses in (1000, np.arange(5.5, 1000, 10)), (4, np.repeat([1, 2, 3, 4], 25)):
        path.write_text("\n".join(map(json.dumps, records[:count])))
        updates, found = metrics.training_curve(path).T
        assert updates[-1] == count
        np.testing.assert_allclose(found, losses)
