"""A small NonDoublingVNCA on the bundled digits, for two CPU cores, that regrows what it loses."""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps = 16  # the border is that far from the farthest cell
    config.model.train_steps = (14, 18)
    config.train.updates = 24_000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 12_000  # grown from z until then, which teaches it four times as fast
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 24_000
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
