"""A small DoublingVNCA on the bundled digits. The package includes it, trained.

It is wider than the quickstart's model, takes fewer steps, and is trained for longer.

Run:     python main.py --config=configs/small_doubling.py
Time:    8.2 hours on two cores of an AMD EPYC, at 7 updates/s, with
         --config.train.checkpoint_every=2500 --config.eval.every=10000.
Reached: test IWELBO of −84.87 ± 0.22 nats (128 samples, all 10,000 images of the bundled set). To
         measure it, add --mode=evaluate to the command. On two cores with other load, this took
         45 minutes.

The table has the mean loss of the 1,000 updates before, and the quick test IWELBO (64 images, 4
samples), in nats:

    update               10,000  20,000  40,000  80,000  120,000  160,000  210,000
    loss                  108.9   104.6   100.8    96.5     93.6     90.4     88.8
    quick test IWELBO    −102.8   −99.1   −95.3   −92.1    −89.1    −87.4    −86.4
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.latent_size = 64
    config.model.steps_per_doubling = 2
    # The encoder takes 6% of the arithmetic.
    config.model.encoder_width = 16
    config.train.updates = 210_000
    config.train.learning_rate = 1e-3
    config.train.warmup_updates = 2_000
    config.train.decay_updates = 210_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 1_000
    return config
