"""The figures of a run: each is drawn, is a picture, and shows what its name says."""

import numpy as np
import pytest
import tiny
from test_pictures import decode, decode_all

from vnca import VncaError, figures, train

NAMES = {
    "doubling": ["growth", "growth_animated", "interpolation", "interpolation_animated"],
    "nondoubling": ["channels", "growth", "recovery", "recovery_animated", "stability"],
    "baseline": ["interpolation"],
}


@pytest.fixture(scope="module", params=NAMES)
def drawn(request, tmp_path_factory):
    """A kind of model, the workdir of a run of one update, and what was said of its figures."""
    kind, workdir, lines = request.param, tmp_path_factory.mktemp("figures"), []
    with tiny.fast_compilation():
        train.train(tiny.config(kind, train__updates=1), workdir, lambda line: None)
        figures.figures(tiny.config(kind, train__updates=1), workdir, lines.append)
    return kind, workdir / "figures", lines


def test_every_figure_of_a_model_is_a_picture_and_is_named(drawn):
    kind, folder, lines = drawn
    names = sorted(path.stem for path in folder.iterdir())
    assert names == sorted(["reconstructions", "samples", *NAMES[kind]])
    assert "checkpoint_00000001.npz" in lines[0] and len(lines) == 1 + len(names)
    for name in names:
        frames = decode_all((folder / f"{name}.png").read_bytes())
        assert len(frames) > 5 if name.endswith("animated") else len(frames) == 1
        assert any(f"{name}.png  " in line for line in lines)


def test_the_damage_is_a_quarter_of_the_cells_and_no_more(drawn):
    kind, folder, _ = drawn
    if kind != "nondoubling":
        pytest.skip("recovery is of the non-doubling model")
    # Columns: grown, damaged, and after more steps; each image fourfold, a border of two between.
    page = decode((folder / "recovery.png").read_bytes())[::4, ::4].astype(int)
    grown, damaged = (page[2:34, 2 + 34 * j :][:, :32] for j in (0, 1))
    hole = np.zeros((32, 32), bool)
    hole[8:24, 8:24] = True
    assert np.abs(damaged[hole] - 127.5).max() < 1  # a logit of 0 is a probability of one half
    np.testing.assert_array_equal(damaged[~hole], grown[~hole])


def test_without_a_checkpoint_nothing_is_drawn(tmp_path):
    with pytest.raises(VncaError, match="has no checkpoint: train first"):
        figures.figures(tiny.config(), tmp_path, print)
    assert not list(tmp_path.iterdir())
