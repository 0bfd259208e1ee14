"""The config: mistakes are named in one line before any work, and nothing is left to guess."""

import json
import math

import pytest
import tiny
from tiny import CONFIGS, changed, committed

from vnca.program import config

every_config = pytest.mark.parametrize("name", CONFIGS)


def as_saved(settings):
    return json.loads(json.dumps(settings.to_dict()))


# ---- Committed configs -----------------------------------------------------------------------


@every_config
def test_every_committed_config_passes(name):
    config.check(committed(name))


SHARED = {
    "model.encoder_width": 32,
    "train.updates": 100_000,
    "train.learning_rate": 1e-4,
    "train.warmup_updates": 0,
    "train.decay_updates": None,
    "train.clip_norm": 10,
    "eval.split": "test",
    "eval.samples": 128,
    "eval.images": None,
}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (
            "doubling",
            {
                "model.name": "doubling",
                "model.latent_size": 256,
                "model.doublings": 5,
                "model.steps_per_doubling": 8,
                "train.batch_size": 32,
            },
        ),
        (
            "nondoubling",
            {
                "model.name": "nondoubling",
                "model.latent_size": 128,
                "model.steps": 36,
                "model.train_steps": [32, 63],
                "train.batch_size": 128,
                "train.pool_size": 1024,
                "train.damage_size": 16,
            },
        ),
        (
            "baseline",
            {"model.name": "baseline", "model.latent_size": 256, "train.batch_size": 32},
        ),
    ],
)
def test_the_published_settings_are_those_of_the_reproduction(name, published):
    flat = config.flatten(committed(name))
    expected = SHARED | published
    assert {field: flat[field] for field in expected} == expected


# ---- The table -------------------------------------------------------------------------------

WHOLE = {  # the smallest and the largest whole number of a field
    "seed train.warmup_updates": (0, 2**31 - 1),
    "model.latent_size": (1, 4096),
    "model.encoder_width": (1, 512),
    "model.doublings": (5, 8),
    "model.channels": (29, 4096),  # with 16 channels of z and 3 waves
    "model.hidden": (1, 4096),
    "model.position_waves": (1, 5),
    "model.steps_per_doubling model.steps": (1, 1000),
    "train.batch_size train.pool_size train.micro_batch eval.images": (1, 1_000_000),
    "train.damage_size": (1, 32),
    "train.pool_fresh": (1, 500_000),
    "train.updates train.decay_updates train.checkpoint_every train.pool_from": (1, 2**31 - 1),
    "train.log_every eval.every eval.samples": (1, 2**31 - 1),
    "train.updates_per_call eval.chunk": (1, 10_000),
}
WHOLE = {field: ends for fields, ends in WHOLE.items() for field in fields.split()}
GOOD = WHOLE | {
    "data.name": ("auto", "larochelle", "bundled", "own"),
    "data.dir": ("word",),
    "model.name": ("doubling",),  # a config of another model would lack fields
    "model.train_steps": ((1, 1000), (7, 7), (1, 2)),
    "train.encoder_from": ("word",),
    "train.start_from": ("word", "packaged"),
    "train.learning_rate": (1, 0.5, 1.5, 1e-30, 10),
    "train.clip_norm": (1, 48, 0.5, 1.5, 1e-30, 1e9),
    "train.dtype": ("float32", "bfloat16"),
    "train.debug_nans": (True, False),
    "eval.split": ("test", "train"),
    "eval.precision": ("highest", "default"),
}
UNSET = {  # sections: fields that may be
    "data": ["dir"],
    "train": ["pool_fresh", "encoder_from", "start_from", "decay_updates", "micro_batch"]
    + ["updates_per_call", "checkpoint_every", "log_every"],
    "eval": ["images", "every", "chunk"],
}
UNSET = [f"{section}.{name}" for section, names in UNSET.items() for name in names]
ODD = [None, True, "", "word", -1, 1.5, 0.0, 1e-31, math.nan, math.inf, [], 48, (32,)]
ODD += [(63, 32), (0, 32), (32.0, 63), (True, 63), (1, 1001), (1, 2, 3)]


def first_with(field):
    """The first committed config that has the field."""
    order = ["doubling", "nondoubling", *CONFIGS]
    return next(name for name in order if field in config.flatten(committed(name)))


def with_value(field, value):
    return changed(first_with(field), **{field.replace(".", "__"): value})


def same(one, other):
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("field", config.FIELDS)
def test_a_field_takes_the_values_it_must_and_no_other(field):
    good = [*GOOD[field], *([None] if field in UNSET else [])]
    for value in good:
        made = with_value(field, value)
        made.eval.split = "train" if field == "eval.images" else made.eval.split
        config.check(made)
    low, high = WHOLE.get(field, (0, 0))
    beyond = [low - 1, high + 1] if field in WHOLE else []
    within = [v for v in ODD if type(v) is int and low <= v <= high]
    refused = [v for v in ODD if not any(same(v, other) for other in [*good, *within])]
    for value in [*refused, *beyond]:
        message = tiny.fault_of(config.check, with_value(field, value))
        shown = repr(list(value) if isinstance(value, tuple) else value)
        assert message.startswith(f"config.{field}={shown}: it must be "), value
        assert len(message) > len(f"config.{field}={shown}: it must be ")


def test_every_field_says_what_it_is():
    assert set(GOOD) == set(config.FIELDS)
    for field in config.FIELDS.values():
        assert len(field.meaning.split()) > 2 and "\n" not in field.meaning + field.values.words


# ---- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("train__batchsize", "train.batch_size"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_field_is_named_with_the_one_that_was_meant(field, meant):
    message = tiny.fault_of(config.check, changed("doubling", **{field: 1}))
    assert message.startswith(f"config.{field.replace('__', '.')}: there is no such field")
    assert f"did you mean config.{meant}?" in message


def test_a_field_that_resembles_none_is_still_named():
    message = tiny.fault_of(config.check, changed("doubling", xyz=1))
    assert message.startswith("config.xyz: there is no such field") and "--help" in message


@pytest.mark.parametrize("field", config.FIELDS)
def test_a_field_left_out_is_missed_with_what_would_do(field):
    assert tiny.fault_of(config.check, with_value(field, ...)).startswith(
        f"config.{field} is missing: it must be "
    )


def test_a_section_left_out_is_missed():
    assert tiny.fault_of(config.check, changed("doubling", eval=...)).startswith("config.eval.")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("baseline", "model__doublings", 5),
        ("baseline", "train__pool_size", 1024),
        ("baseline", "train__encoder_from", "runs/other"),
        ("nondoubling", "model__channels", 128),
        ("nondoubling", "model__position_waves", 3),
        ("nondoubling", "train__pool_from", 1),
        ("small_nondoubling", "model__doublings", 5),
        ("nondoubling", "model__steps_per_doubling", 8),
        ("doubling", "model__train_steps", (32, 63)),
    ],
)
def test_a_field_of_another_model_is_refused(name, field, value):
    message = tiny.fault_of(config.check, changed(name, **{field: value}))
    model = committed(name).model.name
    assert message.startswith(f"config.{field.replace('__', '.')}=")
    assert f"the model {model} has no such field" in message


@pytest.mark.parametrize("what", [None, {}, 3], ids=str)
def test_a_config_file_that_returns_something_else_is_refused(what):
    assert "ConfigDict" in tiny.fault_of(config.check, what)


@pytest.mark.parametrize(("waves", "least"), [(1, 21), (3, 29)])
def test_cells_without_channels_for_logit_position_and_z_are_refused(waves, least):
    fields = {"model__position_waves": waves, "model__channels": least - 1}
    message = tiny.fault_of(config.check, changed("small_nondoubling", **fields))
    assert message.startswith(f"config.model.channels={least - 1}: it must be at least {least}, ")
    config.check(changed("small_nondoubling", **fields | {"model__channels": least}))


def test_damage_that_leaves_no_cell_to_inherit_from_is_refused():
    message = tiny.fault_of(config.check, changed("small_nondoubling", train__damage_size=32))
    assert message.startswith("config.train.damage_size=32: ") and message.endswith("at most 31")
    config.check(changed("small_nondoubling", train__damage_size=31))
    config.check(changed("nondoubling", train__damage_size=32))


def test_more_images_than_the_test_set_has_are_refused_and_the_training_set_has_more():
    message = tiny.fault_of(config.check, changed("doubling", eval__images=10_001))
    assert message.startswith("config.eval.images=10001: the test set has 10,000 images")
    config.check(changed("doubling", eval__images=10_000))
    config.check(changed("doubling", eval__images=60_000, eval__split="train"))


# ---- Resuming --------------------------------------------------------------------------------


@every_config
def test_a_config_saved_today_is_complete_and_does_not_differ(name):
    saved = config.complete(as_saved(committed(name)))
    assert saved == as_saved(committed(name))
    assert config.differences(saved, committed(name)) == []


# What version 0.1.0 wrote into every nondoubling config besides the published fields.
BOTH_IN_ONE = {
    "model": {"channels": None, "hidden": None, "position_waves": 0},
    "train": {"pool_from": 1, "pool_fresh": None, "encoder_from": None},
}


def as_saved_before(settings, **more):
    """The saved config of a nondoubling model as version 0.1.0 wrote it, which had no healing."""
    saved = as_saved(settings)
    saved["model"]["name"] = "nondoubling"
    for section, fields in BOTH_IN_ONE.items():
        saved[section] = fields | saved[section] | more.get(section, {})
    return saved


def test_a_nondoubling_config_saved_before_goes_on_as_the_published_one():
    published = committed("nondoubling")
    for more in (
        {},
        {"model": {"channels": 128, "hidden": 128}},  # the published values, in words
        {"train": {"pool_fresh": 64}},
    ):
        saved = config.complete(as_saved_before(published, **more))
        assert saved == as_saved(published)
        assert config.differences(saved, published) == []
    oldest = as_saved(published)  # before there were those fields, and eval.split
    del oldest["eval"]["split"]
    assert config.complete(oldest) == as_saved(published)


def test_a_config_saved_before_with_positions_is_the_healing_model():
    small = committed("small_nondoubling")
    saved = as_saved_before(small)
    assert saved["model"]["name"] == "nondoubling" and saved["model"]["position_waves"] == 3
    assert config.complete(saved) == as_saved(small)
    assert config.differences(saved, small) == []
    older = as_saved_before(small, model={"hidden": None})  # a hidden layer as wide as a cell
    for name in ("pool_fresh", "encoder_from"):
        del older["train"][name]
    completed = config.complete(older)
    assert completed["model"]["hidden"] == 40
    assert (completed["train"]["pool_fresh"], completed["train"]["encoder_from"]) == (None, None)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "channels", 200),
        ("model", "hidden", 96),
        ("train", "pool_from", 500),
        ("train", "pool_fresh", 8),
        ("train", "encoder_from", "runs/encoder"),
    ],
)
def test_a_config_saved_before_that_is_neither_model_is_refused(section, name, value):
    saved = as_saved_before(committed("nondoubling"), **{section: {name: value}})
    message = tiny.fault_of(config.complete, saved)
    assert f"{name}={value!r}" in message and "use the version that made it" in message


def test_what_may_not_change_in_a_run_is_listed_with_both_values():
    saved = as_saved(committed("doubling"))
    settings = changed(
        "doubling",
        seed=1,
        model__latent_size=128,
        train__batch_size=64,
        train__learning_rate=1e-3,
        train__updates_per_call=3,
    )
    assert config.differences(saved, settings) == [
        "config.model.latent_size is 128, was 256",
        "config.seed is 1, was 0",
        "config.train.batch_size is 64, was 32",
        "config.train.learning_rate is 0.001, was 0.0001",
        "config.train.updates_per_call is 3, was None",
    ]


def test_another_model_differs_by_its_name_alone():
    lines = config.differences(as_saved(committed("doubling")), committed("nondoubling"))
    assert lines == ["config.model.name is 'nondoubling', was 'doubling'"]


def test_how_long_and_how_often_may_change_in_a_run():
    settings = changed(
        "doubling",
        train__updates=5,
        train__decay_updates=4,
        train__log_every=6,
        train__checkpoint_every=7,
        eval__every=8,
        eval__samples=9,
        eval__images=10,
        eval__chunk=11,
        eval__precision="default",
        eval__split="train",
    )
    assert config.differences(as_saved(committed("doubling")), settings) == []
    saved = as_saved(committed("small_nondoubling"))
    assert config.differences(saved, changed("small_nondoubling", train__pool_fresh=4)) == []
    settings = changed("small_nondoubling", train__encoder_from="another")
    assert config.differences(saved, settings) == [
        "config.train.encoder_from is 'another', was 'runs/encoder'"
    ]


def test_a_resumed_run_adopts_what_was_fitted_and_found_unless_it_is_set_now():
    saved = as_saved(changed("doubling", data__name="bundled", train__micro_batch=3, eval__chunk=5))
    settings = config.adopt(saved, changed("doubling", eval__chunk=9))
    assert settings.data.name == "bundled"
    assert settings.train.micro_batch == 3
    assert settings.eval.chunk == 9
    settings = config.adopt(saved, changed("doubling", data__dir="a folder"))
    assert settings.data.name == "auto"  # which then is larochelle
    assert config.adopt(None, committed("doubling")).to_dict() == committed("doubling").to_dict()
