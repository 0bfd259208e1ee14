"""A small NonDoublingVNCA on the bundled digits, for two CPU cores, that heals.

Run:     python main.py --config=configs/small_baseline.py --config.model.latent_size=16
           --config.train.updates=6000 --config.train.decay_updates=6300 --workdir=runs/encoder
         python main.py --config=configs/small_nondoubling.py
         The first command trains an encoder, in six minutes, which the second one keeps.
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 16
    config.model.encoder_width = 12
    config.model.channels = 32
    config.model.hidden = 96
    config.model.place_waves = 3
    config.model.steps = 12
    config.model.train_steps = (8, 16)
    config.train.updates = 18_000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 1500  # grown from z until then: see BUILD_NOTES
    config.train.damaged = 6
    config.train.pool_fresh = 4
    config.train.goal_weight = 0.01
    config.train.loss_limit = 1000.0
    config.train.encoder_from = "runs/encoder"
    config.train.learning_rate = 7e-4
    config.train.warmup_updates = 100
    config.train.decay_updates = 18_500  # the rate has fallen to 0.2% at the end
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
