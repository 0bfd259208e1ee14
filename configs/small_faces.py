"""The model of configs/faces.py, trained for longer.

Run:     python main.py --config=configs/small_faces.py
Time:    1.5 hours on two cores, by the speed of configs/faces.py (an estimate: it was not run yet).
"""

from configs import faces


def get_config():
    config = faces.get_config()
    config.train.updates = 100_000
    config.train.warmup_updates = 1_000
    config.train.decay_updates = 100_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 5_000
    return config
