"""DoublingVNCA as published, with the settings of the reproduction.

Run:    python main.py --config=configs/doubling.py
Time:   40 minutes on a TPU v3-8 (reported by the reproduction).
        On two CPU cores: 10 to 13 s an update, 12 to 15 days in all.
Target: test IWELBO (128 samples) of −84.15 nats (reproduction), −84.23 (paper).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    config = ConfigDict()
    config.seed = 0  # of the weights, the data order and all noise

    config.data = data = ConfigDict()
    data.name = "auto"  # larochelle where it can be had, else bundled, with a warning
    data.dir = placeholder(str)  # a folder with the .amat files or one .npz, not the download

    config.model = model = ConfigDict()
    model.name = "doubling"  # which of the three models
    model.latent_size = 256  # of z, and channels of every cell
    model.encoder_width = 32  # channels of the first encoder layer, doubling from there
    model.doublings = 5  # of the grid, 1×1 → 32×32
    model.steps_per_doubling = 8  # NCA steps after each

    config.train = train = ConfigDict()
    train.updates = 100_000  # training steps in all
    train.batch_size = 32  # of all devices together
    train.learning_rate = 1e-4  # of Adam, after the warm-up
    train.warmup_updates = 0  # linear rise to the learning rate
    train.decay_updates = placeholder(int)  # cosine fall to zero at this update; unset: constant
    train.clip_norm = 10.0  # of the gradient, before Adam
    train.debug_nans = False  # name the operation that first made a NaN or an infinity; slow
    train.dtype = "float32"  # of the layers; bfloat16: as a TPU multiplies anyway
    train.micro_batch = placeholder(int)  # images at once on a device, at most; unset: to fit
    train.updates_per_call = placeholder(int)  # in one device call; unset: to fit the machine
    train.checkpoint_every = placeholder(int)  # updates; unset: ten minutes, or a 20th of the run
    train.log_every = placeholder(int)  # updates; unset: every 5 seconds (1,000 on accelerators)

    config.eval = ConfigDict()
    config.eval.every = placeholder(int)  # updates between test IWELBO and pictures; unset: to fit
    config.eval.samples = 128  # importance samples in evaluation and study
    config.eval.split = "test"  # the images of --mode=evaluate; train: how far it overfits
    config.eval.images = placeholder(int)  # first n of a fixed shuffle; unset: all (study: 1,000)
    config.eval.chunk = placeholder(int)  # images decoded at once on a device; unset: to fit
    config.eval.precision = "highest"  # of products on accelerators; default: bfloat16 or TF32
    return config
