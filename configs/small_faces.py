r"""The model of configs/faces.py, trained for longer. The package includes it, trained, as
`faces_doubling`.

Training takes three commands. The first gives the KL a tenth of its weight, so that the model
learns to put information into z. The second gives it its whole weight, so that samples from the
prior become faces. The third, with batches of 32, goes on from there.

Run:     python main.py --config=configs/small_faces.py --config.train.start_from=None \
             --config.train.kl_weight=0.1 --config.train.batch_size=16 \
             --config.train.learning_rate=2e-3 --config.train.warmup_updates=1000 \
             --config.train.updates=120000 --config.train.decay_updates=120000 \
             --workdir=runs/small_faces_first
         python main.py --config=configs/small_faces.py \
             --config.train.start_from=runs/small_faces_first \
             --config.train.batch_size=16 --config.train.learning_rate=5e-4 \
             --config.train.updates=98000 --config.train.decay_updates=98000 \
             --workdir=runs/small_faces_second
         python main.py --config=configs/small_faces.py
Time:    2.9 and 2.3 hours on one core of an AMD EPYC, then 2.4 hours on two.
Reached: test IWELBO of −973.9 ± 1.8 nats, or 1.83 bits per dimension (128 samples, all 3,000
         images), by the last command with --mode=evaluate.

What each command reached. The same command with `--mode=study --config.eval.images=3000` measures
the reconstructions of all test faces at z = μ: how many of 256 pixels have changed (median, 90th
percentile), the PSNR, and how many faces are nearest to themselves. The quick test (64 images, 4
samples) is in bits per dimension. The last column is the mean KL at the end.

    command                changed    PSNR  nearest  quick test  KL, nats
    first (KL weight 0.1)     2, 6  33.0 dB   99.97%        1.90        74
    second                    2, 6  32.8 dB    100%         1.84        41
    third                     2, 6  33.4 dB   99.97%        1.84        40

Of 32 samples from the prior, about 10 are not faces after the first command. After the second, all
are. (They were counted by eye. BUILD_NOTES has what a viewer said of those after the third.)

With a rate of 2e-3 in the second command as well, the loss rose from 1,013 to 1,230 nats during the
warm-up of 1,000 updates, and it was no lower 6,000 updates later.

Trials on one core, eight to ten minutes each, with a complete decay: configs/faces.py with other
fields.

    trial                          updates  changed    PSNR  nearest
    rate 1e-3, as in faces.py        5,500   32, 56  22.6 dB   97.0%
    rate 2e-3                        5,500   20, 41  24.4 dB   99.2%
    rate 4e-3                        5,500   16, 36  25.1 dB   99.2%
    rate 8e-3                            –        –        –        –  not finite at update 148
    24 levels                        5,500   26, 48  23.6 dB   98.6%
    batch 8, rate 7e-4              11,000   28, 51  23.1 dB   98.2%
    batch 8, rate 4e-3              11,000   35, 73  21.2 dB   87.2%
    one step after a doubling        9,000   22, 42  24.1 dB   99.1%
    three steps                      3,750   43, 73  21.3 dB   92.2%
    96 channels                      2,500   51, 85  20.2 dB   81.3%
    96 channels, rate 3e-3           2,500   31, 54  22.7 dB   95.9%
    KL weight 0.1, rate 4e-3         5,500   12, 30  26.2 dB   99.7%
      then weight 1, rate 2e-3       5,500  9.5, 26  26.9 dB   99.8%
    KL weight 0.02, rate 4e-3        5,500   12, 30  26.1 dB   99.6%
    KL weight 0.1, and
      32 levels, rate 4e-3           5,500   12, 30  26.2 dB   99.7%
      three steps, rate 4e-3             –        –        –        –  not finite at update 260
      three steps, rate 3e-3         3,750   20, 41  24.4 dB   99.3%
      96 channels, rate 3e-3         2,500   25, 48  23.3 dB   97.8%

Of 32 samples from the prior, 5 were no faces at 1e-3, 1 or 2 at 2e-3, none at 4e-3, about 8 with 24
levels, and about half with one step. With a KL weight of 0.1, about half were no faces, and after
the second run, with weight 1, about 3. (All were counted by eye.)

With the whole KL from the start, longer runs gained little. The two below have a rate of 4e-3 and a
warm-up of 500 updates, and took 44 and 41 minutes on one core. They used z less than the short run
did: the mean KL of their last 200 updates is 34 nats, and that of the short run is 52 nats. In the
quick test, both have 2.00 bits per dimension. The two short runs with weights 0.1 and 1 have 1.98,
and a KL of 54 nats.

    two steps                       26,000   15, 38  24.8 dB   98.8%
    three steps                     17,500   15, 40  24.4 dB   97.9%
"""

from configs import faces


def get_config():
    config = faces.get_config()
    config.train.start_from = "runs/small_faces_second"
    config.train.batch_size = 32
    config.train.updates = 82_000
    config.train.learning_rate = 7e-4
    config.train.warmup_updates = 2_000
    config.train.decay_updates = 82_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 5_000
    return config
