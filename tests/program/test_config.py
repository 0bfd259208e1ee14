"""The config: mistakes are named in one line before any work, and nothing is left to guess."""

import json
import math

import pytest
from tiny import CONFIGS, changed, committed

from vnca.program import VncaError, config

every_config = pytest.mark.parametrize("name", CONFIGS)


def as_saved(settings):
    return json.loads(json.dumps(settings.to_dict()))


def fault_of(f, *args):
    with pytest.raises(VncaError) as fault:
        f(*args)
    assert "\n" not in str(fault.value)
    return str(fault.value)


# ---- Committed configs -----------------------------------------------------------------------


def test_there_is_a_config_for_each_published_model():
    assert {"doubling", "nondoubling", "baseline", "quickstart"} <= set(CONFIGS)


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
                "train.pool_from": 1,
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


# ---- Mistakes --------------------------------------------------------------------------------

WRONG = [  # config, field, value
    ("doubling", "train__dtype", "float16"),
    ("doubling", "seed", -1),
    ("doubling", "seed", 2**31),
    ("doubling", "seed", None),
    ("doubling", "seed", 1.5),
    ("doubling", "data__name", "mnist"),
    ("doubling", "data__name", 3),
    ("doubling", "data__dir", ""),
    ("doubling", "data__dir", 7),
    ("doubling", "model__name", "tripling"),
    ("doubling", "model__name", None),
    ("doubling", "model__latent_size", 0),
    ("doubling", "model__latent_size", 256.0),
    ("doubling", "model__latent_size", True),
    ("doubling", "model__encoder_width", "32"),
    ("doubling", "model__doublings", 4),
    ("doubling", "model__steps_per_doubling", 0),
    ("nondoubling", "model__steps", 0),
    ("nondoubling", "model__train_steps", 48),
    ("nondoubling", "model__train_steps", (32,)),
    ("nondoubling", "model__train_steps", (63, 32)),
    ("nondoubling", "model__train_steps", (0, 32)),
    ("nondoubling", "model__train_steps", (32.0, 63)),
    ("nondoubling", "model__train_steps", (True, 63)),
    ("nondoubling", "train__pool_size", 0),
    ("nondoubling", "train__pool_from", 0),
    ("nondoubling", "train__damage_size", 33),
    ("nondoubling", "model__channels", 0),
    ("nondoubling", "model__hidden", 0),
    ("nondoubling", "model__position_waves", 6),
    ("nondoubling", "model__position_waves", None),
    ("nondoubling", "train__pool_fresh", 0),
    ("nondoubling", "train__encoder_from", ""),
    ("doubling", "train__updates", 0),
    ("doubling", "train__updates", 1e5),
    ("doubling", "train__batch_size", -32),
    ("doubling", "train__batch_size", None),
    ("doubling", "train__learning_rate", 0.0),
    ("doubling", "train__learning_rate", -1e-4),
    ("doubling", "train__learning_rate", math.nan),
    ("doubling", "train__learning_rate", math.inf),
    ("doubling", "train__learning_rate", True),
    ("doubling", "train__learning_rate", "1e-4"),
    ("doubling", "train__learning_rate", None),
    ("doubling", "train__warmup_updates", -1),
    ("doubling", "train__decay_updates", 0),
    ("doubling", "train__clip_norm", math.nan),
    ("doubling", "train__clip_norm", 0),
    ("doubling", "train__debug_nans", 1),
    ("doubling", "train__micro_batch", 0),
    ("doubling", "train__updates_per_call", 0),
    ("doubling", "train__checkpoint_every", 0),
    ("doubling", "train__log_every", False),
    ("doubling", "eval__every", 0),
    ("doubling", "eval__samples", 0),
    ("doubling", "eval__images", 10_001),
    ("doubling", "eval__chunk", 2.5),
    ("doubling", "eval__precision", "low"),
    ("doubling", "eval__split", "valid"),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG, ids=str)
def test_a_value_that_makes_no_sense_is_named_with_what_would_do(name, field, value):
    message = fault_of(config.check, changed(name, **{field: value}))
    shown = repr(list(value) if isinstance(value, tuple) else value)
    assert message.startswith(f"config.{field.replace('__', '.')}={shown}: it must be ")
    assert len(message) > len(f"config.{field}={shown}: it must be ")


def test_every_field_has_a_wrong_value_above():
    assert {field.replace("__", ".") for _, field, _ in WRONG} >= set(config.FIELDS)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("train__batchsize", "train.batch_size"),
        ("train__learning_rte", "train.learning_rate"),
        ("model__latent", "model.latent_size"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_field_is_named_with_the_one_that_was_meant(field, meant):
    message = fault_of(config.check, changed("doubling", **{field: 1}))
    assert message.startswith(f"config.{field.replace('__', '.')}: there is no such field")
    assert f"did you mean config.{meant}?" in message


def test_a_field_that_resembles_none_is_still_named():
    message = fault_of(config.check, changed("doubling", xyz=1))
    assert message.startswith("config.xyz: there is no such field") and "--help" in message


@pytest.mark.parametrize("field", sorted(set(config.FIELDS)))
def test_a_field_left_out_is_missed_with_what_would_do(field):
    has_it = next(name for name in CONFIGS if field in config.flatten(committed(name)))
    without = changed(has_it, **{field.replace(".", "__"): ...})
    assert fault_of(config.check, without).startswith(f"config.{field} is missing: it must be ")


def test_a_section_left_out_is_missed():
    assert fault_of(config.check, changed("doubling", eval=...)).startswith("config.eval.")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("baseline", "model__doublings", 5),
        ("baseline", "train__pool_size", 1024),
        ("baseline", "train__encoder_from", "runs/other"),
        ("doubling", "model__channels", 256),
        ("nondoubling", "model__steps_per_doubling", 8),
        ("doubling", "model__train_steps", (32, 63)),
    ],
)
def test_a_field_of_another_model_is_refused(name, field, value):
    message = fault_of(config.check, changed(name, **{field: value}))
    assert message.startswith(f"config.{field.replace('__', '.')}=") and name in message


@pytest.mark.parametrize("what", [None, {}, 3], ids=str)
def test_a_config_file_that_returns_something_else_is_refused(what):
    assert "ConfigDict" in fault_of(config.check, what)


def test_a_whole_number_will_do_for_a_rate():
    config.check(changed("doubling", train__learning_rate=1, train__clip_norm=10))


@pytest.mark.parametrize(("waves", "channels", "least"), [(0, 127, 128), (3, None, 141)], ids=str)
def test_channels_without_room_for_what_a_cell_begins_with_are_refused(waves, channels, least):
    fields = {"model__position_waves": waves, "model__channels": channels}
    message = fault_of(config.check, changed("nondoubling", **fields))
    assert (
        message.startswith(f"config.model.channels={channels}: ") and f"{least} at least" in message
    )
    config.check(changed("nondoubling", **fields | {"model__channels": least}))


def test_damage_that_leaves_no_cell_to_inherit_from_is_refused():
    fields = {"model__position_waves": 1, "model__channels": 200, "train__damage_size": 32}
    message = fault_of(config.check, changed("nondoubling", **fields))
    assert message.startswith("config.train.damage_size=32: ") and "31 would do" in message
    config.check(changed("nondoubling", **fields | {"train__damage_size": 31}))
    config.check(changed("nondoubling", train__damage_size=32))


# ---- Resuming --------------------------------------------------------------------------------


@every_config
def test_a_config_does_not_differ_from_its_own_saved_copy(name):
    assert config.differences(as_saved(committed(name)), committed(name)) == []


def test_a_config_saved_before_there_were_some_fields_is_the_published_one():
    saved = as_saved(committed("nondoubling"))
    for field in config.LATER:
        section, name = field.split(".")
        del saved[section][name]
    assert config.completed(saved) == as_saved(committed("nondoubling"))
    assert config.differences(saved, committed("nondoubling")) == []
    other = as_saved(committed("doubling"))
    del other["eval"]["split"]
    assert config.completed(other) == as_saved(committed("doubling"))


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


def test_another_model_differs_by_the_fields_that_one_of_them_lacks():
    lines = config.differences(as_saved(committed("doubling")), committed("nondoubling"))
    assert "config.model.doublings is None, was 5" in lines
    assert "config.model.train_steps is [32, 63], was None" in lines


def test_how_long_and_how_often_may_change_in_a_run():
    settings = changed(
        "doubling",
        train__updates=5,
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
    settings = changed("nondoubling", train__pool_fresh=2)
    assert config.differences(as_saved(committed("nondoubling")), settings) == []


def test_a_resumed_run_adopts_what_was_fitted_and_found_unless_it_is_set_now():
    saved = as_saved(changed("doubling", data__name="bundled", train__micro_batch=3, eval__chunk=5))
    settings = config.adopt(saved, changed("doubling", eval__chunk=9))
    assert settings.data.name == "bundled"
    assert settings.train.micro_batch == 3
    assert settings.eval.chunk == 9
    assert config.adopt(None, committed("doubling")).to_dict() == committed("doubling").to_dict()
