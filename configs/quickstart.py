"""A small DoublingVNCA that learns to grow digits on two CPU cores while you watch."""

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps_per_doubling = 4
    config.train.updates = 4_500
    config.train.batch_size = 16
    config.train.learning_rate = 2e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 4_500
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
