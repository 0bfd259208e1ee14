"""BaselineVAE as in the reproduction: the same encoder, and a convolutional decoder.

Run:    python main.py --config=configs/baseline.py
Time:   10 minutes on a TPU v3-8 (reported by the reproduction).
        On two CPU cores: 0.2 s an update, 6 hours in all.
Target: test IWELBO (128 samples) of −84.64 nats (reproduction).
"""

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.model.name = "baseline"
    del config.model.doublings
    del config.model.steps_per_doubling
    return config
