"""DoublingVNCA on CelebA, 64×64 pixels in colours: the paper's code at 641588a (figure 6).

Bring CelebA as published or as on Kaggle: a folder with img_align_celeba and with
list_eval_partition.txt or .csv. It needs Pillow: pip install -e '.[pictures]'.

Run:     python main.py --config=configs/celeba.py --config.data.dir=DIR
Time:    not run: no accelerator, and no CelebA at hand
Differs: the published model starts from 2×2 cells and doubles five times, which comes to the same.
         There, the encoder sees −1…1 and gives log σ, and log-scales have no upper cut.

For figures 7 and 8 (8d1ee6e), the paper's code has four mixtures, another weight of the KL, and
clipped outputs of the encoder, which is a model of its own: --config.model.name=clipped
--config.model.mixtures=4 --config.train.kl_weight=100.0 --config.train.clip_norm=1.0.
"""

from configs import doubling


def get_config():
    config = doubling.get_config()
    config.data.name = "celeba"
    config.model.likelihood = "logistic_mixture"
    del config.model.levels
    config.model.mixtures = 1  # logistics for each pixel, each with 10 logits
    config.model.size = 64
    config.model.colours = 3
    config.model.doublings = 6  # of the grid, 1×1 → 64×64
    return config
