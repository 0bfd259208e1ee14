"""GrowingVNCA on the bundled digits, for two CPU cores: an example of an automaton of your own.

Run:     python main.py --config=configs/growing.py
Time:    24 minutes on two cores with other load, and 6 more for updates 4,001 to 6,000
Reached: test IWELBO of −190.7 ± 2.4 nats (128 samples, first 500 images of the fixed shuffle) after
         6,000 updates, by the same command with --config.train.updates=6000
         --config.train.decay_updates=6000, and then --mode=evaluate --config.eval.images=500 added.
         It has learned where a digit is, how wide, and some of its outline. BUILD_NOTES shows a
         picture, and says what was tried.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.name = "growing"
    del config.model.doublings
    del config.model.steps_per_doubling
    config.model.latent_size = 16
    config.model.steps = 12  # NCA steps in evaluation
    config.model.train_steps = (10, 14)  # drawn anew for each update, both ends included
    config.model.channels = 24  # of a cell: 1 logit, 1 life, 16 for z, 5 more, 1 random number
    config.model.hidden = 48  # channels of a step's hidden layer
    config.model.start = 20  # side of the square that is alive at first
    config.model.rate = 0.75  # the probability that a step changes a cell: above 0, at most 1
    config.train.updates = 4_000
    config.train.decay_updates = 4_000
    # At 2e-3, all cells died when the pool came in. With a rate of 0.5 and up to 16 steps, some
    # losses were above 10,000 nats.
    config.train.learning_rate = 5e-4
    config.train.pool_size = 64  # grown grids to train on again, over all devices
    config.train.pool_from = 1000  # the first update that takes grids from the pool
    return config
