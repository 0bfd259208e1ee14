"""NonDoublingVNCA as published, with pool training and damage; settings of the reproduction.

Run:    python main.py --config=configs/nondoubling.py
Time:   2.5 hours on a TPU v3-8 (reported by the reproduction).
        On two CPU cores: 36 s an update, 6 weeks in all.
Disk:   a checkpoint holds the pool, 512 MiB, beside 60 MB of parameters and moments; two are kept.
Target: test IWELBO (128 samples) of −89.3 nats (reproduction), −90.97 (paper).
"""

from ml_collections.config_dict import placeholder

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.model.name = "nondoubling"
    config.model.latent_size = 128
    del config.model.doublings
    del config.model.steps_per_doubling
    config.model.steps = 36  # NCA steps at evaluation
    config.model.train_steps = (32, 63)  # drawn anew for each update, both ends included
    config.model.channels = placeholder(int)  # of every cell; unset, as published: those of z
    config.model.hidden = placeholder(int)  # channels of a step's hidden layer; unset: a cell's
    config.model.position_waves = 0  # above 0: lost cells inherit position, 4 channels each, and z
    config.train.batch_size = 128  # half of it from the pool
    config.train.pool_size = 1024  # images and their cells, of all devices together
    config.train.pool_from = 1  # the update that first takes cells from the pool
    config.train.damage_size = 16  # side of the square of cells set to zero in damage
    config.train.pool_fresh = placeholder(int)  # fresh images of a batch; unset, as published: half
    config.train.encoder_from = placeholder(str)  # workdir whose encoder is kept; unset: it learns
    return config
