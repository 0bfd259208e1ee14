"""A small DoublingVNCA on faces of 16×16 pixels in colours: the colourful sister of the quickstart.

Run:     python main.py --config=configs/faces.py
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.name = "faces"
    config.model.size = 16
    config.model.colours = 3
    # A colour is one of 0 … 16: the binomial likelihood of 16 tosses. See BUILD_NOTES for others.
    config.model.levels = 16
    config.model.doublings = 4
    config.model.latent_size = 64
    config.model.encoder_width = 16
    config.model.steps_per_doubling = 2
    config.train.updates = 9_500
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 200
    config.train.decay_updates = 9_500
    return config
