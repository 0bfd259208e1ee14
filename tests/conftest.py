"""What has to be settled before JAX starts: the CPU, seen as eight devices, wherever tests run.

VNCA_TEST_PLATFORM=tpu or =cuda takes an accelerator instead, and multiplies in float32. The
programs that tests start stay on the CPU. The tests that make sense there are test_layers.py,
test_losses.py, test_models.py and test_optimizer.py, and on eight devices also test_training.py and
test_pool.py.

pyproject.toml makes errors of the deprecation warnings that our own modules cause.
Where pytest-xdist is there, a run that names no files takes two processes, a file at a time.
"""

import gc
import os
import signal

import pytest

# Under nohup or in a script's background job, pytest ignores these, and so would every program that
# a test starts. Programs do not inherit a handler.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

os.environ["JAX_PLATFORMS"] = os.environ.get("VNCA_TEST_PLATFORM") or "cpu"
if os.environ["JAX_PLATFORMS"] != "cpu":
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import jax  # noqa: E402
import tiny  # noqa: E402

# XLA reads them when JAX first looks for its devices.
os.environ["XLA_FLAGS"] = " ".join(
    [tiny.EMITTERS, os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

# Python's garbage collector looks through all of JAX's long-lived objects again and again, which
# took 5% of the time of the quick tests.
gc.freeze()
gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="module")
def quickly_compiled():
    with tiny.fast_compilation():
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
    """Linux allows a process 65,530 memory maps, and LLVM aborts at the limit. The programs of one
    file can take 8,000 of them."""
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which reads these options
def pytest_cmdline_main(config):
    option, is_worker = config.option, hasattr(config, "workerinput")
    if is_worker or option.usepdb or not config.pluginmanager.hasplugin("xdist"):
        return
    whole = config.args_source is config.ArgsSource.TESTPATHS
    if whole and option.numprocesses is None and option.dist == "no":
        option.numprocesses, option.dist = 2, "loadfile"
        option.loadscopereorder = False  # files of many tests are not those that take long
