"""What fits the machine: the devices of a CPU, the batch that devices divide, and unset fields."""

import os
import re
from types import SimpleNamespace

import jax
import pytest
import tiny
from tiny import CONFIGS, changed, committed

from vnca.program import VncaError, config, machine
from vnca.program.machine import cores

every_config = pytest.mark.parametrize("name", CONFIGS)


# ---- Devices ---------------------------------------------------------------------------------


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
    monkeypatch.setattr("vnca.program.machine.cores", lambda: count)
    machine.split_cpu(tiny.config(name, train__batch_size=batch))
    said = re.search(r"device_count=(\d+)", os.environ["XLA_FLAGS"])
    assert (said and int(said[1])) == expected


def test_what_the_environment_says_of_devices_stands(monkeypatch):
    monkeypatch.setattr("vnca.program.machine.cores", lambda: 2)
    for said in (
        "--xla_force_host_platform_device_count=1 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
        "flags.txt",
    ):
        monkeypatch.setenv("XLA_FLAGS", said)
        machine.split_cpu(tiny.config("baseline", train__batch_size=16))
        assert os.environ["XLA_FLAGS"] == said


def test_the_program_starts_with_the_devices_that_it_has_chosen(tmp_path):
    chosen = {1: "the device", 2: "each of the 2 devices", 3: "each of the 2 devices"}
    arguments = "--config=configs/quickstart.py", "--mode=summary", f"--workdir={tmp_path}"
    with tiny.Process("main.py", *arguments, XLA_FLAGS="") as program:
        assert program.end() == 0, program.complained()
        assert f"memory of {chosen.get(cores(), 'each of the 4 devices')}" in program.printed()
        assert program.complained() == ""


@every_config
def test_every_committed_config_fits_one_device(name):
    machine.check_batch(committed(name), 1)


@pytest.mark.parametrize("name", ["doubling", "nondoubling", "baseline"])
def test_the_published_configs_fit_the_eight_cores_of_the_reported_runs(name):
    machine.check_batch(committed(name), 8)


# ---- Batches and devices ---------------------------------------------------------------------


def test_a_batch_that_the_devices_do_not_divide_is_refused_with_those_near_that_fit():
    settings = changed("doubling", train__batch_size=20)
    machine.check_batch(settings, 4)
    message = tiny.fault_of(machine.check_batch, settings, 8)
    assert message.startswith("config.train.batch_size=20: ") and "16 or 24" in message


def test_a_batch_may_be_the_whole_training_set_and_no_more():
    machine.check_images(changed("doubling", train__batch_size=32), 32)
    message = tiny.fault_of(machine.check_images, changed("doubling", train__batch_size=32), 31)
    assert message.startswith("config.train.batch_size=32: the training set has only 31 images")


def test_a_batch_smaller_than_the_devices_is_refused_with_the_least_that_fits():
    message = tiny.fault_of(machine.check_batch, changed("doubling", train__batch_size=3), 8)
    assert message.endswith(": 8 would do, or another number of devices")


def test_a_batch_with_a_pool_is_a_multiple_of_four_for_each_device():
    machine.check_batch(changed("nondoubling", train__batch_size=96), 8)
    message = tiny.fault_of(machine.check_batch, changed("nondoubling", train__batch_size=104), 8)
    assert "96 or 128" in message


def test_a_pool_that_the_devices_do_not_divide_or_smaller_than_a_batch_is_refused():
    message = tiny.fault_of(machine.check_batch, changed("nondoubling", train__pool_size=1020), 8)
    assert message.startswith("config.train.pool_size=1020: ") and "1016 or 1024" in message
    message = tiny.fault_of(machine.check_batch, changed("nondoubling", train__pool_size=64), 8)
    assert message.startswith("config.train.pool_size=64: ") and "128" in message


def test_fresh_images_that_do_not_divide_the_batch_or_over_the_devices_are_refused():
    def refusal(fresh):
        fields = {"train__batch_size": 128, "train__pool_size": 1024, "train__pool_fresh": fresh}
        return tiny.fault_of(machine.check_batch, changed("small_nondoubling", **fields), 8)

    for fresh in 48, 128, 4:  # does not divide the batch; is more than half of it; 8 devices
        assert refusal(fresh).startswith(f"config.train.pool_fresh={fresh}: it must divide the bat")
        assert refusal(fresh).endswith(
            "of the devices, 8: 8 or 16 or 32 or 64 would do, or another number of devices"
        )


# ---- What is fitted to the machine -----------------------------------------------------------


def fitted(settings):
    return machine.fit_to_machine(settings)


@every_config
def test_fitting_leaves_nothing_open_that_the_program_needs(name):
    settings = fitted(committed(name))
    flat = config.flatten(settings)
    left = {field for field, value in flat.items() if value is None}
    # No folder: download. No run: random parameters. No decay: constant. No lines: by the clock.
    # No number: all images.
    unset = {"data.dir", "train.start_from", "train.decay_updates", "train.log_every"}
    assert left <= unset | {"eval.images"}
    config.check(settings)


@every_config
def test_fitting_changes_no_field_that_is_set(name):
    before = config.flatten(committed(name))
    after = config.flatten(fitted(committed(name)))
    assert after.keys() == before.keys()
    assert {f: after[f] for f, v in before.items() if v is not None} == {
        f: v for f, v in before.items() if v is not None
    }
    chosen = {
        "train__micro_batch": 3,
        "train__updates_per_call": 7,
        "train__checkpoint_every": 11,
        "eval__every": 13,
        "eval__chunk": 5,
    }
    settings = changed(name, **chosen)
    assert config.flatten(fitted(settings)) == config.flatten(settings)


@every_config
def test_fitting_gives_the_same_each_time_and_leaves_the_config_alone(name):
    settings = committed(name)
    once, again = fitted(settings), fitted(settings)
    assert once.to_dict() == again.to_dict() == fitted(once).to_dict()
    assert settings.to_dict() == committed(name).to_dict()


@pytest.mark.parametrize(
    "text, expected", [("150000 100000\n", 2), ("20000 100000", 1), ("max 100000", 64), (None, 64)]
)
def test_a_container_may_have_fewer_cores(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    if text:
        machine.QUOTA.write_text(text)
    assert machine.cores() == expected


def test_hosts_with_other_cores_fit_a_config_as_process_0_does(monkeypatch):
    settings = committed("quickstart")
    monkeypatch.setattr(machine, "cores", lambda: 1)
    alone = fitted(settings)
    monkeypatch.setattr(machine, "agree", lambda decide: decide() + 3)
    assert fitted(settings).train.updates_per_call > alone.train.updates_per_call


def test_hosts_must_have_equally_many_devices(monkeypatch):
    devices = [SimpleNamespace(process_index=n) for n in (0, 1, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(VncaError, match="process 0 has 1, process 1 has 2"):
        machine.find_devices()


@pytest.mark.parametrize("cores", [None, 1, 256])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_fitting_makes_sense_on_machines_small_and_large(monkeypatch, tmp_path, cores, backend):
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "none")
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    assert machine.cores() == (cores or 1)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    smallest = changed(
        "doubling", model__latent_size=1, model__encoder_width=1, train__batch_size=1
    )
    largest = changed("doubling", model__latent_size=4096, train__batch_size=60_000)
    for settings in (smallest, largest, *map(committed, CONFIGS)):
        config.check(fitted(settings))


def test_an_accelerator_saves_and_tests_at_least_twenty_times_in_a_run():
    for updates, every in ((100_000, 5_000), (20, 1), (19, 1)):
        settings = changed("doubling", train__updates=updates, train__batch_size=4096)
        settings = machine.fit_to_machine(settings, "gpu", 1, "NVIDIA H100 80GB HBM3")
        assert settings.train.checkpoint_every <= every and settings.eval.every <= every
    config = machine.fit_to_machine(committed("doubling"), "gpu", 1, "NVIDIA H100 80GB HBM3")
    assert config.train.checkpoint_every == 5_000


def test_an_evaluation_call_takes_as_long_on_more_devices(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 64)
    chunks = []
    for devices in (1, 2):
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        chunks.append(fitted(changed("doubling", eval__samples=64)).eval.chunk)
    assert chunks == [12, 6]  # images of a device: neither the least, 4, nor the most, 16


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"eval__precision": "default"}, 32),  # as many as fit on the chip
        ({"eval__precision": "highest"}, 16),  # as many as take five seconds
        ({"eval__precision": "default", "model__doublings": 6, "model__latent_size": 64}, 32),
        ({"eval__precision": "default", "model__doublings": 5, "model__latent_size": 64}, 128),
    ],
)
def test_an_evaluation_call_fits_on_an_accelerators_chip_and_into_five_seconds(fields, images):
    settings = machine.fit_to_machine(changed("doubling", **fields), "tpu", 8)
    assert settings.eval.chunk == images


@pytest.mark.parametrize(
    ("kind", "precision", "images"),
    [
        ("NVIDIA H100 80GB HBM3", "highest", 32),  # as many as fit its L2 cache
        ("NVIDIA A100-SXM4-40GB", "highest", 16),  # as many as take five seconds at its floor
        ("Tesla T4", "default", 16),  # fewer would wait for the start of kernels
    ],
)
def test_an_evaluation_call_fits_the_card(kind, precision, images):
    settings = changed("doubling", eval__precision=precision)
    assert machine.fit_to_machine(settings, "gpu", 1, kind).eval.chunk == images


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA A100-SXM4-40GB", 60.6e12),
        ("NVIDIA A100-SXM4-80GB", 68.7e12),
        ("NVIDIA L4", 14.4e12),
        ("NVIDIA L40S", 20e12),  # whose name only begins with that of another card
        ("NVIDIA T400", 20e12),
        ("NVIDIA GH200 480GB", 20e12),
        ("", 20e12),
    ],
)
def test_the_rate_of_a_card_is_found_by_whole_words_of_its_name(kind, rate):
    assert machine.gpu_rate(kind) == rate


def test_a_slower_card_saves_and_tests_after_fewer_updates():
    cards = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "an unknown card", "Tesla T4"
    fits = [machine.fit_to_machine(committed("doubling"), "gpu", 1, card) for card in cards]
    every = [settings.eval.every for settings in fits]
    assert every == sorted(every, reverse=True) and every[0] > every[-1]
    assert {settings.train.micro_batch for settings in fits} == {32}


def test_a_larger_model_saves_as_often_by_the_clock_so_more_often_by_updates():
    small, large = (fitted(committed(name)).train for name in ("baseline", "doubling"))
    assert small.checkpoint_every > large.checkpoint_every >= 1


def test_each_kind_of_processor_keeps_its_compiled_programs_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.config, "update", lambda *pair: found.append(pair))
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    found = []
    intel = "processor: 0\nmodel name: Xeon\nflags: fpu avx\n"
    arm = "processor: 0\nFeatures: fp asimd\nCPU implementer: 0x41\nCPU part: 0xd{}\n"
    for text in intel, intel.replace("0", "1"), arm.format("0c"), arm.format("4f"), "":
        monkeypatch.setattr(machine.Path, "read_text", lambda _, text=text: text)
        machine.keep_compiled()
    folders = [value for name, value in found if name == "jax_compilation_cache_dir"]
    assert folders[0] == folders[1] and len(folders) == 5 and len({*folders}) == 4


@pytest.mark.parametrize("mode", ["train", "benchmark", "compile"])
def test_where_the_time_to_compile_is_a_result_no_program_is_loaded(monkeypatch, mode):
    changed_settings = {}
    monkeypatch.setattr(jax.config, "update", changed_settings.__setitem__)
    monkeypatch.setattr(machine, "mend_cache", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", "")  # put back at the end
    machine.prepare(committed("quickstart"), mode, one_process=False)
    is_enabled = changed_settings.get("jax_enable_compilation_cache", True)
    assert is_enabled == (mode == "train")


def test_a_driver_that_fails_costs_a_line_that_says_how_to_go_on(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver (you may need to, or)")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for wanted, line in (
        (None, "^Unable .*: no driver, but 8 × cpu is available: .* or set JAX_PLATFORMS=cpu$"),
        ("cuda", r"^JAX_PLATFORMS=cuda is not available .*'\.\[cuda\]'"),
    ):
        monkeypatch.setattr(type(jax.config), "jax_platforms", wanted)
        assert re.search(line, tiny.fault_of(machine.find_devices))


def test_all_reduces_are_joined_unless_the_environment_says_how(monkeypatch):
    flag = "--xla_gpu_all_reduce_combine_threshold_bytes"
    for given, wanted in ("", f" {flag}={1 << 30}"), (f"{flag}=5", f"{flag}=5"):
        monkeypatch.setenv("XLA_FLAGS", given)
        machine.join_all_reduces()
        assert machine.os.environ["XLA_FLAGS"] == wanted
