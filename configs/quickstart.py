"""A small DoublingVNCA. It learns to grow digits on two CPU cores while you watch.

Run:     python main.py --config=configs/quickstart.py
Time:    8 to 10 minutes on two cores. The first loss comes after 11 seconds, or 5 at later
         starts.
Reached: test IWELBO of about −98.5 nats (128 samples, bundled set, first 500 images of the fixed
         shuffle). To measure it, add --mode=evaluate --config.eval.images=500 to the command
         (2 minutes). BUILD_NOTES lists five runs.
"""

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 8
    config.model.steps_per_doubling = 4
    config.train.updates = 4_500
    config.train.batch_size = 16
    config.train.learning_rate = 2e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 4_500
    config.train.checkpoint_every = 500
    config.eval.every = 500
    return config
