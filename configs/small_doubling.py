"""A small DoublingVNCA on the bundled digits, the quickstart's for longer: the one in the package.

Run:     python main.py --config=configs/small_doubling.py
Time:    about an hour on one core.
Reached: not yet run.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.encoder_width = 16  # a tenth of the arithmetic even so
    config.train.updates = 18_000
    config.train.decay_updates = 18_000
    return config
