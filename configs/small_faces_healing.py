r"""A small HealingVNCA on faces of 16×16 pixels in colours, for two CPU cores. The package includes
it, trained, as `faces_healing`.

Its encoder is that of the packaged `faces_doubling`.

Run:     python main.py --config=configs/small_faces_healing.py
Time:    2.2 hours on one core of an AMD EPYC.
Reached: test IWELBO of −999.6 ± 3.3 nats, or 1.88 bits per dimension (128 samples, 1,000
         images), by the same command with --mode=evaluate --config.eval.images=1000. Of the pixels
         that losing 8×8 cells changes, 23% still differ 38 steps later (BUILD_NOTES).
"""

from configs import small_healing


def get_config():
    config = small_healing.get_config()
    config.data.name = "faces"
    config.model.size = 16
    config.model.colours = 3
    config.model.levels = 16
    config.model.latent_size = 64
    config.model.encoder_width = 16
    config.model.channels = 112  # 3 logits, 33 more that change, 12 for the position, 64 for z
    config.model.hidden = 128
    config.train.encoder_from = "vnca/program/packaged_faces_doubling.npz"
    config.train.pool_fresh = 4
    config.train.damage_size = 8
    config.train.updates = 28_000
    # When the pool comes in, at update 500, the loss rises from 1,823 to 4,006 nats (means of 20
    # updates). At update 682 it is lower than before. At 2e-3, with a warm-up of 100 updates, 2
    # fresh images of 16 and the encoder of configs/faces.py, it rose from 1,835 to 6,700 nats.
    config.train.learning_rate = 3e-3
    config.train.warmup_updates = 500
    config.train.decay_updates = 28_000
    return config
