"""The CPU's door: elsewhere the program is the one that a reader of the layers expects."""

import importlib
from collections import Counter

import jax
import pytest
import tiny
from jax.extend.mlir import passmanager

from vnca import training
from vnca.models import make_model

pytestmark = pytest.mark.skipif(tiny.DOOR_IS_SHUT, reason="the door is shut")


def traced(name):
    """An update call of a published config on one device, traced."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.train.update(micro_batch=config.train.batch_size, updates_per_call=3)
    model = make_model(config.model)
    images = jax.ShapeDtypeStruct((60_000, 98), "uint8")
    state = jax.eval_shape(lambda images: training.init_state(model, config, images), images)
    fresh = config.train.batch_size
    if model.develop:
        fresh //= 2
        whole = state["pool"]
        state["pool"] = {k: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for k, x in whole.items()}
    order = jax.ShapeDtypeStruct((1, 3, fresh), "int32")
    count = jax.ShapeDtypeStruct((), "int32")
    call = training.make_update_call(model, config)
    return jax.jit(lambda *a: call(*a)).trace(state, images, order, count)


def inside(operation):
    """The operation, and all in its regions, the inner ones first."""
    for region in operation.regions:
        for block in region:
            for inner in list(block):
                yield from inside(inner.operation)
    yield operation


def counted(traced, platform):
    """How often each operation is in the program for a platform, less what any compiler drops
    first: choices of one way, what is computed twice, and what nobody uses."""
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir()
    for choice in [o for o in inside(module.operation) if o.name == "stablehlo.case"]:
        if len(choice.regions) == 1:
            *body, end = (o.operation for o in list(choice.regions[0].blocks[0]))
            for operation in body:
                operation.move_before(choice)
            for old, new in zip(choice.results, end.operands, strict=True):
                old.replace_all_uses_with(new)
            choice.erase()
    with module.context:
        passes = "builtin.module(inline,cse,symbol-dce)"
        passmanager.PassManager.parse(passes).run(module.operation)
    return Counter(operation.name for operation in inside(module.operation))


@pytest.mark.parametrize("name", tiny.OF_MODELS)
def test_the_update_for_a_tpu_or_gpu_has_the_operations_of_a_program_without_the_door(
    name, monkeypatch
):
    with_door = traced(name)
    on_cpu = counted(with_door, "cpu")
    tiny.shut_door(monkeypatch)
    without = traced(name)
    for platform in ("tpu", "cuda"):
        expected = counted(without, platform)
        assert counted(with_door, platform) == expected != on_cpu
        assert expected["stablehlo.convolution"] > 10
