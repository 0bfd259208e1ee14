"""What has to be settled before JAX starts: the CPU, seen as eight devices, wherever tests run.

With VNCA_DOOR=shut, layers compute on a CPU as they do elsewhere (`tiny.shut_door`).
pyproject.toml makes errors of the deprecation warnings that our own modules cause.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

import tiny  # noqa: E402

if tiny.DOOR_IS_SHUT:
    tiny.shut_door()
