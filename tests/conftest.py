"""What has to be settled before JAX starts: the CPU, seen as eight devices, wherever tests run.

pyproject.toml makes errors of the deprecation warnings that our own modules cause.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
