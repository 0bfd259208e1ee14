"""NonDoublingVNCA as published, with pool training and damage; settings of the reproduction.

Run:    python main.py --config=configs/nondoubling.py
Time:   2.5 hours on a TPU v3-8 (reported by the reproduction).
        On two CPU cores: 35 to 60 s an update, 6 to 10 weeks in all (estimated from BUILD_NOTES).
Disk:   a checkpoint takes 512 MiB for the pool and 60 MB for parameters and moments. Two are kept.
Target: test IWELBO (128 samples) of −89.3 nats (reproduction), −90.97 (paper).
"""

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.model.name = "nondoubling"
    config.model.latent_size = 128
    del config.model.doublings
    del config.model.steps_per_doubling
    config.model.steps = 36  # NCA steps in evaluation
    config.model.train_steps = (32, 63)  # drawn anew for each update, both ends included
    config.train.batch_size = 128  # images in an update, over all devices; half are from the pool
    config.train.pool_size = 1024  # grown grids to train on again, over all devices
    return config
