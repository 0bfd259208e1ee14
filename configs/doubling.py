"""DoublingVNCA as published, with the settings of the reproduction.

Run:    python main.py --config=configs/doubling.py
Time:   40 minutes on a TPU v3-8 (reported by the reproduction).
        On two CPU cores: 12 to 20 s an update, 14 to 23 days in all.
Target: test IWELBO (128 samples) of −84.15 nats (reproduction), −84.23 (paper).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    config = ConfigDict()
    config.seed = 0  # of the initial weights, the data order and all noise

    config.data = data = ConfigDict()
    data.name = "auto"  # larochelle, else bundled, with a warning; or bundled, faces, own: dir's
    data.dir = placeholder(str)  # of larochelle (.amat or .npz; unset: download it) or own images

    config.model = model = ConfigDict()
    model.name = "doubling"  # a file of vnca/models/; as published: doubling, nondoubling, baseline
    model.likelihood = "binomial"  # p(x|z), a function of vnca/likelihoods.py
    model.size = 32  # side of an image, in pixels; smaller images get a border of zeros
    model.colours = 1  # numbers in a pixel: 1, grey; 3, red, green and blue
    model.levels = 1  # coin tosses for a number: 1, black or white; 255, all levels of a byte
    model.latent_size = 256  # size of z; in the published automata also the channels of every cell
    model.encoder_width = 32  # channels of the first layer; each later layer has twice as many
    model.doublings = 5  # of the grid, 1×1 → 32×32
    model.steps_per_doubling = 8  # NCA steps after each doubling

    config.train = train = ConfigDict()
    train.start_from = placeholder(str)  # workdir, checkpoint, packed file, packaged; unset: random
    train.encoder_from = placeholder(str)  # as start_from; this encoder does not learn any more
    train.updates = 100_000  # in the whole run
    train.batch_size = 32  # images in an update, over all devices
    train.learning_rate = 1e-4  # Adam's, at its peak: after the warm-up, before the decay
    train.warmup_updates = 0  # updates in which the learning rate rises linearly
    train.decay_updates = placeholder(int)  # end of a cosine decay to 0; unset: a constant rate
    train.clip_norm = 10.0  # largest norm of the gradient that reaches Adam
    train.kl_weight = 1.0  # of the KL in the training loss, the β of a β-VAE
    train.pool_size = 0  # grown grids to train on again, over all devices; 0: no pool
    train.pool_from = 1  # the first update that takes grids from the pool; before, all grow from z
    train.pool_fresh = placeholder(int)  # images of a batch that are not from the pool; unset: half
    train.damage_size = 16  # side of the square of cells that damage sets to zero
    train.dtype = "float32"  # of the layers; a TPU multiplies in bfloat16 in any case
    train.micro_batch = placeholder(int)  # images at once, at most; unset: fitted to the machine
    train.updates_per_call = placeholder(int)  # in a device call; unset: 3 seconds, at most 125
    train.checkpoint_every = placeholder(int)  # updates between checkpoints; unset: ten minutes

    config.eval = ConfigDict()
    config.eval.every = placeholder(int)  # updates between quick tests; unset: 1 min, 3,200 images
    config.eval.samples = 128  # importance samples in evaluation and study
    config.eval.split = "test"  # images of --mode=evaluate; train: to see how it overfits
    config.eval.images = placeholder(int)  # first n of a fixed shuffle; unset: all (study: 1,000)
    config.eval.chunk = placeholder(int)  # images at once on a device; unset: fitted
    config.eval.precision = "highest"  # of products on accelerators: float32; default: fewer bits
    return config
