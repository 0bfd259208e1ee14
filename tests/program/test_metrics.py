"""The metrics of a run: what a line says, which records are read, and the training curve."""

import json

import numpy as np
import pytest
import tiny

from vnca.program import metrics

RECORD = {"update": 2, "loss": 3.0, "reconstruction": 2.0, "kl": 1.0, "grad_norm": 4.0}


def test_a_line_comes_every_five_seconds_and_is_of_the_updates_since_the_one_before(
    tmp_path, monkeypatch, capsys
):
    now, config = [0.0], tiny.config(train__updates=13)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    found = metrics.Metrics(config, tmp_path / "metrics.jsonl", 0, True)
    for update in range(1, 14):
        now[0] += 1  # of which a half is training, and the other tests and saves
        norm = config.train.clip_norm * (2 if update % 2 else 0.5)
        found.add(update, np.array([[update, 3, 4, norm]]), 0.5)
    assert capsys.readouterr().out == "".join(
        f"update {update}/13  loss {loss:.2f} = 3.00 reconstruction + 4.00 KL  {clipped}% clipped  "
        f"2.00 updates/s  16.00 images/s  ETA {left} s\n"
        for update, loss, clipped, left in (
            (1, 1, 100, 6),
            (6, 4, 40, 4),
            (11, 9, 60, 1),
            (13, 12.5, 50, 0),
        )
    )


def test_a_line_says_the_weight_of_the_kl_where_it_is_not_1(tmp_path, capsys):
    config = tiny.config(train__updates=1, train__kl_weight=0.5)
    found = metrics.Metrics(config, tmp_path / "metrics.jsonl", 0, True)
    found.add(1, np.array([[5, 3, 4, 1]]), 0.5)
    assert "  loss 5.00 = 3.00 reconstruction + 0.5 × 4.00 KL  " in capsys.readouterr().out


def test_bounds_of_colours_are_also_in_bits_per_dimension(tmp_path, capsys):
    colours = {"model__size": 16, "model__colours": 3, "model__levels": 16, "model__doublings": 4}
    nat, path = 768 * np.log(2), tmp_path / "metrics.jsonl"  # so many are a bit per dimension
    found = metrics.Metrics(tiny.config(train__updates=1, **colours), path, 0, True)
    found.add(1, np.array([[2.5 * nat, 2 * nat, 0.5 * nat, 1]]), 0.5)
    found.add_test(1, np.array([-nat, -2 * nat]))
    assert [record["bits_per_dimension"] for record in metrics.records(path)] == [2.5, 1.5]
    update, test = capsys.readouterr().out.splitlines()
    assert " KL = 2.50 bits per dimension  " in update
    in_words = f"{-1.5 * nat:.2f} nats = 1.50 bits per dimension (2 images)"
    assert test == f"update 1  quick test IWELBO {in_words}"
    weighed = tiny.config(train__updates=1, train__kl_weight=0.5, **colours)
    found = metrics.Metrics(weighed, path, 0, True)
    found.add(1, np.array([[2.5 * nat, 2 * nat, nat, 1]]), 0.5)  # this loss is no bound
    assert "bits" not in capsys.readouterr().out


def test_what_is_not_finite_is_an_error_and_no_record(tmp_path):
    found = metrics.Metrics(tiny.config(), tmp_path / "metrics.jsonl", 0, True)
    fault = tiny.fault_of(found.add_test, 7, np.array([1, np.nan]))
    assert fault.startswith("update 7 is not finite (quick test IWELBO")
    for row in np.where(np.eye(4), np.inf, 1):
        fault = tiny.fault_of(found.add, 7, row[None], 1)
        assert fault.startswith("update 7 is not finite") and "learning_rate" in fault
    assert not (tmp_path / "metrics.jsonl").read_bytes()


def test_a_damaged_or_edited_line_is_no_record_and_each_record_is_read_once(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", [RECORD | {"update": n} for n in (1, 2, 3)]
    whole.append({"update": 3, "test_iwelbo": -5.0})
    edited = [{"loss": "3"}, {"kl": float("nan")}, {"update": "2"}, {"update": 0}]
    wrong = [*(RECORD | change for change in edited), {"update": 2, "loss": 1.0}, 7]
    lines = map(json.dumps, [*wrong, whole[2], *whole, whole[1]])
    path.write_bytes("\r\n".join([*lines, '{"update": 3, "lo']).encode() + b"\xff\0\n")
    assert metrics.records(path) == whole and metrics.records(path, 2) == whole[:2]


@pytest.mark.parametrize(
    "older, count, kept",
    [
        (0, 6, []),  # of a run that was killed before its first save
        (0, 7, [2.0] * 7),
        (20, 19, [1.0] * 20),
        (20, 21, [2.0] * 21),
    ],
)
def test_records_of_a_run_that_begins_anew_are_set_aside_if_they_are_more_than_those_that_were(
    tmp_path, older, count, kept
):
    for stem, loss, records in ("metrics.previous", 1.0, older), ("metrics", 2.0, count):
        lines = [json.dumps(RECORD | {"update": n + 1, "loss": loss}) for n in range(records)]
        (tmp_path / f"{stem}.jsonl").write_text("\n".join(lines))
    config = tiny.config(train__checkpoint_every=6)
    metrics.Metrics(config, tmp_path / "metrics.jsonl", 0, True)
    found = metrics.records(tmp_path / "metrics.previous.jsonl")
    assert [record["loss"] for record in found] == kept
    assert not (tmp_path / "metrics.jsonl").read_bytes()


def test_a_training_curve_has_a_hundred_points_of_mean_losses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert np.isnan(metrics.training_curve(path)).all()
    lines = [json.dumps(RECORD | {"update": n, "loss": n}) for n in range(1, 1001)]
    for count, losses in (1000, np.arange(5.5, 1000, 10)), (4, np.repeat([1, 2, 3, 4], 25)):
        path.write_text("\n".join(lines[:count]))
        updates, found = metrics.training_curve(path).T
        assert updates[-1] == count
        np.testing.assert_allclose(found, losses)
