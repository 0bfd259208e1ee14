"""How many devices a CPU is: as many as have work, unless the environment says how many."""

import os
import re

import pytest
import tiny

from vnca.program import devices
from vnca.program.config import cores


@pytest.mark.parametrize(
    ("count", "name", "batch", "expected"),
    [
        (2, "baseline", 16, 2),
        (3, "baseline", 16, 2),  # three would not divide it
        (64, "baseline", 16, 4),  # four images each
        (64, "baseline", 128, 8),
        (3, "baseline", 12, 3),
        (1, "baseline", 16, None),
        (2, "baseline", 4, None),
        (2, "nondoubling", 12, None),  # two would have to divide a quarter of it
    ],
)
def test_a_cpu_is_as_many_devices_as_have_work(monkeypatch, count, name, batch, expected):
    monkeypatch.setenv("XLA_FLAGS", "")  # put back at the end
    monkeypatch.setattr("vnca.program.devices.cores", lambda: count)
    config = tiny.config(name, train__batch_size=batch)
    devices.split_cpu(config)
    said = re.search(r"device_count=(\d+)", os.environ["XLA_FLAGS"])
    assert (said and int(said[1])) == expected


def test_what_the_environment_says_of_devices_stands(monkeypatch):
    monkeypatch.setattr("vnca.program.devices.cores", lambda: 2)
    for said in (
        "--xla_force_host_platform_device_count=1 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
        "flags.txt",
    ):
        monkeypatch.setenv("XLA_FLAGS", said)
        devices.split_cpu(tiny.config("baseline", train__batch_size=16))
        assert os.environ["XLA_FLAGS"] == said


def test_the_program_starts_with_the_devices_that_it_has_chosen(tmp_path):
    chosen = {1: "the device", 2: "each of 2 devices", 3: "each of 2 devices"}
    arguments = "--config=configs/quickstart.py", "--mode=summary", f"--workdir={tmp_path}"
    with tiny.Process("main.py", *arguments, XLA_FLAGS="") as program:
        assert program.end() == 0, program.complained()
        assert f"memory of {chosen.get(cores(), 'each of 4 devices')}" in program.printed()
        assert program.complained() == ""
