"""Arrays that are split over devices: their slots are read and written as if they were whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vnca.devices import places, put, take

SIZE, COUNT = 64, 16  # slots of an array, and how many of them are read or written
every_number = pytest.mark.parametrize("devices", [1, 2, 4, 8])


def across(devices, function, *arrays):
    """The whole result of devices that each have their part of the arrays."""
    parts = [a.reshape(devices, -1, *a.shape[1:]) for a in arrays]
    split = jax.vmap(function, axis_name="devices")(*parts)
    return split.reshape(-1, *split.shape[2:])


@every_number
def test_the_places_of_all_devices_together_are_those_of_one(devices):
    found = across(devices, lambda part: places(len(part)), np.zeros(COUNT))
    assert found.tolist() == list(range(COUNT)) and found.dtype == np.int32


@every_number
@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)], ids=str)
def test_slots_are_read_and_overwritten_on_whichever_device_has_them(shape, devices):
    random = np.random.RandomState(0)
    array, new = (random.randn(n, *shape).astype(np.float32) for n in (SIZE, COUNT))
    slots = random.permutation(
        [*range(10), 31, 32, 40, 47, 48, SIZE - 1]
    )  # some at the ends of a part
    taken = across(devices, lambda array: take(array, slots), array)
    np.testing.assert_array_equal(taken, array[slots])
    after = across(devices, lambda array, new: put(array, slots, new), array, new)
    np.testing.assert_array_equal(after, jnp.asarray(array).at[slots].set(new))


class Rows:
    """Stands in for an array: records the indices that are written and the promises about them."""

    def __init__(self, count):
        self.count, self.at = count, self

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        self.indices = indices
        return self

    def set(self, new, **promised):
        self.promised = promised
        return self.indices


def test_the_slots_that_are_overwritten_are_distinct_as_is_promised():
    for seed in range(10):
        slots = jax.random.permutation(jax.random.key(seed), SIZE)[:COUNT]
        array = Rows(SIZE // 8)
        indices = jax.vmap(lambda new: put(array, slots, new), axis_name="devices")(  # noqa: B023
            np.zeros((8, COUNT // 8))
        )
        assert array.promised == {"mode": "drop", "unique_indices": True}
        assert all(len(set(row)) == COUNT for row in indices.tolist())
        written = [8 * n + i for n, row in enumerate(indices.tolist()) for i in row if i < 8]
        assert sorted(written) == sorted(slots.tolist())
