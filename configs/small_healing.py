r"""A small non-doubling model that heals, on the bundled digits, for two CPU cores. The package
includes it, trained.

It deviates from the published NonDoublingVNCA and is a model of its own, healing: each cell keeps z
and its position, and a damaged cell inherits both from its neighbours. Its encoder comes from a
baseline. So training takes three commands. In the second, more of each batch is fresh, so that the
grids in the pool stay younger.

Run:     python main.py --config=configs/small_baseline.py --config.model.latent_size=16 \
             --config.train.updates=6000 --config.train.decay_updates=6300 --workdir=runs/encoder
         python main.py --config=configs/small_healing.py --config.train.pool_fresh=4 \
             --config.train.updates=4000
         python main.py --config=configs/small_healing.py
Time:    7, 29 and 32 minutes on two cores of an AMD EPYC with other load. The last two
         made 2 to 2.7 updates/s.
Reached: test IWELBO (128 samples, first 1,000 images of the fixed shuffle, bundled set) of −96.00
         ± 0.86 nats, by the last command with --mode=evaluate --config.eval.images=1000. Of the
         pixels that losing 16×16 cells changes, a tenth still differ 38 steps later (--mode=study).
"""

from configs import nondoubling


def get_config():
    config = nondoubling.get_config()
    config.data.name = "bundled"
    config.model.name = "healing"
    config.model.latent_size = 16
    config.model.encoder_width = 12
    config.model.steps = 12
    config.model.train_steps = (8, 16)
    config.model.channels = 40  # 1 logit, 11 more that steps change, 12 for the position, 16 for z
    config.model.hidden = 96  # channels of a step's hidden layer
    config.model.position_waves = 3  # frequencies, each in 4 channels
    config.train.encoder_from = "runs/encoder"  # as start_from; this encoder does not learn
    config.train.updates = 8000
    config.train.batch_size = 16
    config.train.pool_size = 64
    config.train.pool_from = 500  # the first update with grids from the pool: see BUILD_NOTES
    config.train.pool_fresh = 2  # of 16 images; the other 14 are older grids
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    # The rate has fallen to 0.15% at the end.
    config.train.decay_updates = 8200
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
