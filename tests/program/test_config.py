"""Promise 10: a run keeps its settings and its images, and the published configs are the published
experiments. test_errors.py has the values that fields may have."""

import numpy as np
import pytest
import tiny
from fates import arguments, contents

from vnca import likelihoods
from vnca.model import settings_of
from vnca.program import config, store
from vnca.program.learner import own_fields, validate_model

FIELDS = config.FIELDS.keys() | {
    field for model in config.listed_models() for field in own_fields(model)
}

# ---- The configs ---------------------------------------------------------------------------------

SHARED = {
    "model.likelihood": "binomial",
    "model.size": 32,
    "model.colours": 1,
    "model.levels": 1,
    "model.encoder_width": 32,
    "train.updates": 100_000,
    "train.learning_rate": 1e-4,
    "train.warmup_updates": 0,
    "train.clip_norm": 10,
    "train.kl_weight": 1,
    "train.pool_from": 1,
    "train.damage_size": 16,
    "train.dtype": "float32",
    "eval.split": "test",
    "eval.samples": 128,
    "eval.precision": "highest",
}
PUBLISHED = {
    "doubling": {
        "model.latent_size": 256,
        "model.doublings": 5,
        "model.steps_per_doubling": 8,
        "train.batch_size": 32,
    },
    "nondoubling": {
        "model.latent_size": 128,
        "model.steps": 36,
        "model.train_steps": [32, 63],
        "train.batch_size": 128,
        "train.pool_size": 1024,
    },
    "baseline": {"model.latent_size": 256, "model.drawn_size": 28, "train.batch_size": 32},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_published_experiment(name):
    flat = config.flatten(tiny.committed(name))
    expected = {"model.name": name, "data.name": "auto"} | SHARED | PUBLISHED[name]
    assert {field: flat[field] for field in expected} == expected
    # The seed is 0, and only the non-doubling model has a pool.
    assert not any(flat[field] for field in flat.keys() - expected.keys())


def test_a_config_has_the_fields_of_its_model_and_every_field_is_one_of_a_config():
    found = set()
    for name in tiny.CONFIGS:
        made = tiny.committed(name)
        config.validate(made)
        validate_model(made)
        of_likelihood = settings_of(getattr(likelihoods, made.model.likelihood))
        others = config.OF_SOME_LIKELIHOODS - {f"model.{field}" for field in of_likelihood}
        of_model = (config.FIELDS.keys() - others) | own_fields(made.model.name).keys()
        assert config.flatten(made).keys() == of_model
        found |= of_model
    assert found == FIELDS


EARLIER = {  # fields of what had a pool, before every config had them
    "nondoubling": {"pool_size", "damage_size"},
    "healing": {"pool_size", "damage_size", "pool_from", "pool_fresh", "encoder_from"},
}
POOL = EARLIER["healing"]
LATER = "likelihood", "size", "colours", "levels", "drawn_size"  # which no config had


@pytest.mark.parametrize(
    "name",  # but those that no earlier version had
    sorted({*tiny.CONFIGS} - {"growing", "faces", "small_faces", "small_faces_healing", "celeba"}),
)
def test_a_header_of_a_file_that_had_fewer_fields_is_completed_as_the_same_config(name):
    made = tiny.committed(name)
    saved = made.to_dict()
    for field in LATER:
        saved["model"].pop(field, None)
    for field in POOL - EARLIER.get(made.model.name, set()):
        del saved["train"][field]
    del saved["train"]["kl_weight"]
    assert config.completed(saved) == made.to_dict()
    assert config.completed(made.to_dict()) == made.to_dict()


def test_a_run_on_own_images_that_were_stored_otherwise_is_refused_and_told_so():
    saved, made = (tiny.config().to_dict() for _ in range(2))
    del saved["model"]["likelihood"]
    for header, sha256 in (saved, "a"), (made, "b"):
        header["data"]["sha256"] = sha256
    [words] = config.differences(config.completed(saved), made)
    assert words.startswith("config.data.sha256 is 'b', was 'of images stored as 28×28")
    assert config.completed(made) == made


# ---- Resuming ------------------------------------------------------------------------------------

FREE = {  # fields that may change in a run, with other values than the tiny config's
    "train.updates": 1,
    "train.decay_updates": 9,
    "train.micro_batch": 4,
    "train.updates_per_call": 2,
    "train.checkpoint_every": 3,
    "eval.every": 4,
    "eval.samples": 5,
    "eval.split": "train",
    "eval.images": 6,
    "eval.chunk": 7,
    "eval.precision": "default",
}
BOUND = {  # fields that may not, of any model
    "seed": 1,
    "data.name": "bundled",
    "model.latent_size": 3,
    "model.encoder_width": 2,
    "train.batch_size": 64,
    "train.start_from": "packaged",
    "train.learning_rate": 0.5,
    "train.warmup_updates": 7,
    "train.clip_norm": 8.5,
    "train.kl_weight": 2.0,
    "train.dtype": "bfloat16",
}
OF_MODEL = {  # and those of one model
    "baseline": {"model.drawn_size": 30},
    "doubling": {"model.doublings": 6, "model.steps_per_doubling": 2},
    "healing": {
        "model.train_steps": (1, 3),
        "model.channels": 13,
        "model.hidden": 7,
        "model.position_waves": 2,
        "train.pool_size": 128,
        "train.damage_size": 15,
        "train.pool_from": 3,
        "train.encoder_from": "packaged",
    },
}


GROWING = {"model.start": 8, "model.rate": 0.25}
LIKELIHOOD = {"model.size": 64, "model.colours": 3, "model.levels": 16}  # which need other images


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The config that a run on one's own images saved; and of starts of it and of others: exit
    status, what it said, and whether the workdir is as it was."""
    folder, random = tmp_path_factory.mktemp("resumed"), np.random.default_rng(0)
    one = random.random((88, 28, 28)) < 0.5
    files = {"images": one, "moved": one, "others": ~one, "coloured": np.stack([one] * 3, axis=-1)}
    for name, images in files.items():
        np.savez(folder / name, train=images[:80], test=images[80:])
    own = {"data.name": "own", "data.dir": folder / "images.npz", "train.updates_per_call": None}
    run = folder / "baseline"
    fields = own | {"train.updates": 2}
    with tiny.Command(
        f"--workdir={run}", name="baseline", before=tiny.NO_PICTURES, **fields
    ) as first:
        assert first.end() == 0, first.complained()
    header, arrays = store.load(store.checkpoint(run, 2))
    # As a run that was started on another machine, with data.name=auto.
    data, train = {"name": "bundled", "dir": None}, header["train"] | {"micro_batch": 4}
    elsewhere = header | {"data": data, "train": train}
    others = {
        name: tiny.config(name, train__micro_batch=4, data__name="larochelle").to_dict()
        for name in ("doubling", "growing", "healing")
    }
    for name, saved in (others | {"elsewhere": elsewhere}).items():
        (folder / name).mkdir()
        store.save(store.checkpoint(folder / name, 2), saved, arrays)
    coloured = own | {"data.dir": folder / "coloured.npz", "model.drawn_size": 64}
    cases = {
        "free": ("baseline", run, own | FREE | {"data.dir": folder / "moved.npz"}),
        "others": ("baseline", run, own | {"data.dir": folder / "others.npz"}),
        "another likelihood": ("baseline", run, coloured | LIKELIHOOD),
        "another model": ("doubling", run, own),
        "elsewhere": ("baseline", folder / "elsewhere", {"data.name": "auto"}),
        "growing": ("growing", folder / "growing", GROWING),  # in bfloat16, it is refused before
        "fresh": ("healing", folder / "healing", {"train.pool_fresh": 16, "model.steps": 3}),
    } | {name: (name, folder / name, BOUND | fields) for name, fields in OF_MODEL.items()}
    before = [contents(workdir) for _, workdir, _ in cases.values()]
    found = tiny.outcomes(
        [
            arguments(workdir, name=name, **{"train.updates": 2} | fields)
            for name, workdir, fields in cases.values()
        ]
    )
    return header, {
        case: (status, out + err, contents(cases[case][1]) == was)
        for case, (status, out, err), was in zip(cases, found, before, strict=True)
    }


def test_a_run_goes_on_with_settings_that_may_change_and_from_another_machine(resumed):
    for case in ("free", "elsewhere"):
        status, said, is_as_it_was = resumed[1][case]
        assert status == 0 and "nothing to do" in said and is_as_it_was, said
        assert "download" not in said  # data.name=auto is what it was
    for field in "train.pool_fresh", "model.steps":
        assert field not in resumed[1]["fresh"][1]


REFUSED = {model: [*BOUND, *fields] for model, fields in OF_MODEL.items()}
REFUSED |= {
    "growing": [*GROWING],
    "others": ["data.sha256"],
    "another model": ["model.name"],
    "another likelihood": [*LIKELIHOOD],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_on_other_images_and_with_every_field_that_must_not_change(resumed, case):
    status, said, is_as_it_was = resumed[1][case]
    assert status == 1 and said.splitlines()[-1].startswith("error: ") and is_as_it_was, said
    for field in REFUSED[case]:
        assert f"config.{field} is " in said, field


def test_every_field_either_may_change_or_must_not():
    of_models = (field for fields in OF_MODEL.values() for field in fields)
    tested = [*FREE, *BOUND, *LIKELIHOOD, *GROWING, *of_models]
    alone = ["model.name", "model.likelihood", "model.steps", "train.pool_fresh", "data.dir"]
    alone += ["model.mixtures"]  # no other field but that of binomial depends on a likelihood
    celeba = tiny.committed("celeba")
    saved = celeba.to_dict()
    celeba.model.mixtures = 4
    assert config.differences(saved, celeba) == ["config.model.mixtures is 4, was 1"]
    assert sorted([*tested, *alone]) == sorted(FIELDS)


def test_a_run_keeps_only_the_micro_batch_of_what_was_fitted_to_its_machine(resumed):
    saved = config.flatten(resumed[0])
    assert saved["train.micro_batch"] == 16
    for field in ("train.updates_per_call", "train.checkpoint_every", "eval.every", "eval.chunk"):
        assert saved[field] is None
