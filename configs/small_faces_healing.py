r"""A small HealingVNCA on faces of 16×16 pixels in colours, for two CPU cores. The package includes
it, trained, as `faces_healing`.

Its encoder comes from the model of configs/faces.py, so training takes three commands. In the
third, less of each batch is fresh, so that the grids in the pool grow older.

Run:     python main.py --config=configs/faces.py
         python main.py --config=configs/small_faces_healing.py --config.train.pool_fresh=8 \
             --config.train.updates=3500 --config.train.decay_updates=3500
         python main.py --config=configs/small_faces_healing.py
Time:    9, 14 and 9 minutes on two cores of an AMD EPYC, the last two with other load.
Reached: quick test IWELBO of −1,165 nats, or 2.19 bits per dimension (64 images, 4 samples).
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
    config.train.encoder_from = "runs/faces"
    config.train.damage_size = 8
    config.train.updates = 6_500
    # At 2e-3, with 2 fresh images of 16 from the start, the loss rose from 1,835 to 6,700 nats in
    # the 200 updates after the pool came in.
    config.train.learning_rate = 1e-3
    config.train.decay_updates = 6_500
    return config
