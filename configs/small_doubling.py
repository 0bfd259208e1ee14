"""A small DoublingVNCA on the bundled digits. The package includes it, trained.

It is wider than the quickstart's model and is trained for longer.

Run:     python main.py --config=configs/small_doubling.py
Time:    1 h 55 min on two cores of an Intel Xeon (380 GFLOP/s), at 5.8 updates/s.
Reached: test IWELBO of −87.84 ± 0.73 nats (128 samples, bundled set, first 1,000 images of the
         fixed shuffle). To measure it, add --mode=evaluate --config.eval.images=1000 to the
         command. The quick test IWELBO of that run was −136.6 nats at update 1,008, −109.0 at
         4,032, −104.0 at 8,064, −98.5 at 16,128, −91.4 at 32,256 and −90.2 at the end.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.latent_size = 48
    config.model.encoder_width = 16  # 6% of the arithmetic
    config.train.updates = 40_000
    config.train.learning_rate = 1.5e-3
    config.train.decay_updates = 40_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 1_000
    return config
