"""The IWELBO of test images, split over the devices (Burda et al. 2016)."""

from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import checkpoint, files
from vnca.program.devices import local_rows, replicate
from vnca.program.hosts import agree, gather
from vnca.program.method import make_method
from vnca.program.order import fixed_shuffle
from vnca.program.progress import collect, read_partial, write_partial
from vnca.program.signals import stop_signals
from vnca.program.workdir import trained_params


def evaluate(config, workdir, log, packaged, make_method=make_method):
    """IWELBO of the newest checkpoint over the test set (`eval.split`: or the training set), nats
    an image; writes evaluation.json.

    Of packaged(name of the model) where there is no checkpoint and the config is of its sizes. A
    function of parameters, images, samples and precision: not, but for rounding, of devices or
    chunk, nor of interruptions, after which the same command goes on where it was. Raises VncaError
    where there is nothing to evaluate, or a checkpoint of another config.
    """
    workdir = Path(workdir)
    config, data, path, params = trained_params(config, workdir, log, packaged)
    model, (split, samples) = make_method(config).model, (config.eval.split, config.eval.samples)
    images = getattr(data, split)
    count = config.eval.images or len(images)
    log(f"evaluating {path} on {count:,} {data.name} {split} images with {samples} samples each")

    # Estimates of a prefix of the shuffle: good for any number of images, on any devices.
    kept = workdir / "evaluation.partial.npz"
    settings = {
        "params": checkpoint.params_sha256(params),
        "data": data.name,
        "split": split,
        "seed": config.seed,
        "samples": samples,
        "precision": config.eval.precision,
    }
    found = agree(lambda: read_partial(kept, settings).get("rows", np.zeros(0)).tolist())
    rows = np.array(found, np.float32).reshape(-1, 3)[:count]
    if found:
        log(f"{len(rows):,} images were evaluated before")
    numbers = fixed_shuffle(count, len(images))[len(rows) :]
    chunk = min(config.eval.chunk, -(-count // jax.device_count()))  # the rest would be padding
    parts = image_bounds(
        model, replicate(params), images, numbers, samples, chunk, config.seed,
        config.eval.precision,
    )  # fmt: skip

    save = partial(write_partial, kept, settings)
    with stop_signals(log) as (stop_asked, log):
        arrays = collect(parts, {"rows": rows}, "rows", count, stop_asked, save, log, _words)
    rows = arrays["rows"]
    if len(rows) < count:
        return
    mean, stderr = _mean(rows)
    result = {
        "iwelbo": mean[0],
        "stderr": stderr,
        "reconstruction": -mean[1],
        "kl": mean[2],
        "samples": samples,
        "images": count,
        "data": data.name,
        "split": split,
        "checkpoint": Path(path).name,
        "config": config.to_dict(),
    }
    files.write_json(workdir / "evaluation.json", result)
    log(f"{split} {_words(rows)}; written to {workdir / 'evaluation.json'}")


def _mean(rows):
    """Means over the images, and the standard error of the first (of the IWELBO)."""
    error = standard_error(rows[:, 0]) if len(rows) > 1 else 0.0
    return rows.mean(axis=0, dtype=np.float64).tolist(), error


def standard_error(values):
    """Of the mean of two values or more, from their spread: a float."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _words(rows):
    (bound, log_px, kl), error = _mean(rows)
    return f"IWELBO {bound:.2f} ± {error:.2f} nats (reconstruction {-log_px:.2f}, KL {kl:.2f})"


@lru_cache
def estimator(model, devices=None):
    """The IWELBO on these devices (None: all): params, packed bits uint8 [D, n, 98], numbers
    int32 [D, n], samples, seed -> float32 [D, n, 3] of IWELBO, log p(x|z) and KL, in nats."""

    def estimate(params, bits, numbers, samples, seed):
        def noise(s):
            # keyed by image and sample: no batch size, chunk or device count can change it
            return normal(stream(seed, "evaluation", s), numbers, model.latent_size)

        return jnp.stack(iwelbo(model, params, unpack(bits), noise, samples), axis=-1)

    return jax.pmap(estimate, devices=devices, in_axes=(None, 0, 0, None, None))


def image_bounds(model, params, images, numbers, samples, chunk, seed, precision="default"):
    """IWELBO, log p(x|z) and KL of the images with these numbers: yields NumPy [≤ D·chunk, 3].

    params replicate or on the host, images uint8 [N, 98]. One device call for each D·chunk images;
    the last is padded with copies of its last image, whose results are dropped. precision is that
    of products on accelerators: "default" multiplies in bfloat16 (TPU) or TF32 (GPU), "highest" in
    float32.
    """
    devices, rows = jax.device_count(), local_rows()
    for start in range(0, len(numbers), devices * chunk):
        part = numbers[start : start + devices * chunk]
        deal = np.pad(part, (0, devices * chunk - len(part)), mode="edge").reshape(devices, chunk)
        local = deal[rows].astype(np.int32)
        with jax.default_matmul_precision(precision):
            result = estimator(model)(params, images[local], local, samples, seed)
        yield gather(result).reshape(-1, 3)[: len(part)]
