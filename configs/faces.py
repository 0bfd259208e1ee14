"""A small DoublingVNCA on faces of 16×16 pixels in colours: the colourful sister of the quickstart.
configs/small_faces.py trains it for longer, for the package.

Run:     python main.py --config=configs/faces.py
Time:    9 minutes on two cores of an AMD EPYC, at 15 to 21 updates/s with light other load. The
         loss, in nats and in bits per dimension, is about 1,640 (3.1) after one minute, 1,190 (2.3)
         after five and 1,120 (2.1) at the end.
Reached: test IWELBO of −1,093.5 ± 2.1 nats, or 2.05 bits per dimension (128 samples, all 3,000
         images). To measure it, add --mode=evaluate to the command (8 minutes). BUILD_NOTES has
         more, and what other numbers of levels gave.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.name = "faces"
    config.model.size = 16
    config.model.colours = 3
    # A colour is one of 0 … 16: the binomial likelihood of 16 tosses. See BUILD_NOTES for others.
    config.model.levels = 16
    config.model.doublings = 4
    config.model.latent_size = 64
    config.model.encoder_width = 16
    config.model.steps_per_doubling = 2
    config.train.updates = 9_500
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 200
    config.train.decay_updates = 9_500
    return config
