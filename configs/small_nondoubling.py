"""A small NonDoublingVNCA on the bundled digits, for two CPU cores, with pool training and damage.

Run:     python main.py --config=configs/small_nondoubling.py
Time:    8.8 updates/s on two cores of an Intel Xeon, 39 minutes at this rate.
Reached: test IWELBO (128 samples, first 1,000 images of the fixed shuffle, bundled set) of −125.84
         ± 1.11 nats, by the same command with --mode=evaluate --config.eval.images=1000. Where
         a quarter of the cells was lost, strokes grow back, blurred.
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps = 16  # what the border does reaches the centre, 16 cells away
    config.model.train_steps = (14, 18)
    config.train.updates = 20_400
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 12_000  # grown from z until then: see BUILD_NOTES
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 24_000  # the rate has fallen to 5% at the end
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
