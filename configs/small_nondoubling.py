"""A small NonDoublingVNCA on the bundled digits that heals, for two CPU cores: the one in the
package.

Its cells keep z and their position, and a lost cell has both from those around it; its encoder is a
baseline's. So there are three commands; in the second grids grow less old:

Run:     python main.py --config=configs/small_baseline.py --config.model.latent_size=16
             --config.train.updates=6000 --config.train.decay_updates=6300 --workdir=runs/encoder
         python main.py --config=configs/small_nondoubling.py --config.train.pool_fresh=4
             --config.train.updates=4000
         python main.py --config=configs/small_nondoubling.py
Time:    7, 29 and 32 minutes on two cores of an AMD EPYC with other load, at 2 to 2.7 updates/s.
Reached: test IWELBO (128 samples, first 1,000 images of the fixed shuffle, bundled set) of −96.00
         ± 0.86 nats, by the last command with --mode=evaluate --config.eval.images=1000. Of what a
         16×16 loss costs a tenth is left 38 steps later (--mode=study).
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 16
    config.model.encoder_width = 12
    config.model.steps = 12
    config.model.train_steps = (8, 16)
    config.model.channels = 40  # a logit and 11 more that steps change, 12 of its position, 16 of z
    config.model.hidden = 96
    config.model.position_waves = 3
    config.train.encoder_from = "runs/encoder"
    config.train.updates = 8000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 500  # grown from z until then: see BUILD_NOTES
    config.train.pool_fresh = 2  # so that most grids are old, and learn to stay as they are
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 8200  # the rate has fallen to 0.15% at the end
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
