"""A small BaselineVAE on the bundled digits, for two CPU cores: quickstart's sibling.

Run:     python main.py --config=configs/small_baseline.py
Time:    12 minutes on one core of an AMD EPYC, at 14 to 23 updates/s; 21 on an Intel Xeon, at 12.
Reached: test IWELBO (128 samples, first 1,000 images of the fixed shuffle, bundled set) of −86.75
         ± 0.71 nats, by the same command with --mode=evaluate --config.eval.images=1000.
"""

from configs import baseline


def get_config():
    config = baseline.get_config()
    config.data.name = "bundled"
    config.model.latent_size = 32
    config.model.encoder_width = 12
    config.train.updates = 15_000
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 100
    config.train.decay_updates = 15_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 1_000
    return config
