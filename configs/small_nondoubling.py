"""A small NonDoublingVNCA on the bundled digits, for two CPU cores, with pool training and damage.

Run:     python main.py --config=configs/small_nondoubling.py
Time:    5.9 updates/s on two cores of an Intel Xeon, an hour.
Reached: test IWELBO (128 samples, first 1,000 images of the fixed shuffle, bundled set) of −120.24
         ± 1.17 nats, by the same command with --mode=evaluate --config.eval.images=1000. After
         the loss of a quarter of their cells some digits regrow whole, others keep a blur there.
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps = 24  # what the border does is 16 steps from the centre
    config.model.train_steps = (20, 28)
    config.train.updates = 21_000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 5000  # grown from z until then: see BUILD_NOTES
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 22_000  # the rate has fallen to 0.5% at the end
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
