"""A small NonDoublingVNCA on the bundled digits, for two CPU cores, with pool training and damage.

Run:     python main.py --config=configs/small_nondoubling.py
Time:    55 minutes on one core of an AMD EPYC, at 7.5 updates/s.
Reached: not yet run to its end. At update 18,216 its training loss was 160 and its quick test
         IWELBO −131.8 nats; a damaged square began to close at 14,000 (BUILD_NOTES).
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps = 16  # what the border does reaches the centre, 16 cells away
    config.model.train_steps = (14, 18)
    config.train.updates = 24_000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 12_000  # grown from z until then: see BUILD_NOTES
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 24_000
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
