"""A small DoublingVNCA on the bundled digits. The package includes it, trained.

It is wider than the quickstart's model, takes fewer steps, and is trained for longer.

Run:     python main.py --config=configs/small_doubling.py
Time:    3 h 20 min on two cores of an Intel Xeon, at 5 updates/s. This is an estimate, because
         half of the run had one core.
Reached: test IWELBO of −86.70 ± 0.73 nats (128 samples, bundled set, first 1,000 images of the
         fixed shuffle). To measure it, add --mode=evaluate --config.eval.images=1000 to the
         command. The quick test IWELBO of that run was −139.1 nats at update 1,008, −110.3 at
         4,032, −105.4 at 8,064, −100.2 at 16,128, −97.6 at 30,240, −91.6 at 40,320, −89.4 at
         50,400 and −88.6 at the end. Its first 30,402 updates had decay_updates=120000, because a
         longer run was planned.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.latent_size = 64
    config.model.steps_per_doubling = 2
    config.model.encoder_width = 16  # the encoder takes 6% of the arithmetic
    config.train.updates = 60_000
    config.train.learning_rate = 1.5e-3
    config.train.decay_updates = 60_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 1_000
    return config
