"""The IWELBO of test or training images, split over the devices (Burda et al. 2016)."""

from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vnca.images import unpack
from vnca.losses import iwelbo
from vnca.noise import normal, stream
from vnca.program import VncaError, check, checkpoint
from vnca.program.devices import local_rows, replicate
from vnca.program.hosts import agree, gather
from vnca.program.method import is_plain, make_method
from vnca.program.order import fixed_shuffle, images_to_evaluate
from vnca.program.progress import collect, read_partial, set_aside, write_partial, write_result
from vnca.program.signals import stop_signals
from vnca.program.workdir import trained_params


def evaluate(config, workdir, log, packaged, make_method=make_method, which=None):
    """Evaluates the IWELBO of the newest checkpoint in `workdir`, and writes evaluation.json.

    which: another checkpoint (`checkpoint.named`). packaged: kind -> (config, params, path). If
    there is no checkpoint, it evaluates that model, provided that its config.model is equal. The
    images are those of `eval.split`, the test or the training set. The results are in nats per
    image. They depend on parameters, images, samples, seed and precision. Devices, chunks and
    interruptions change them by rounding at most, and so should the form, fast or plain. An
    interrupted evaluation raises Stopped, and resumes where it was: each setting has a partial file
    of its own.
    Another result in evaluation.json becomes evaluation.previous.json. Raises VncaError if there is
    nothing to evaluate, if the checkpoint belongs to another config, if eval.images is more than
    there are, or if a result is not finite.
    """
    workdir = Path(workdir)
    config, data, path, params = trained_params(config, workdir, log, packaged, which)
    model = check.trusted(make_method(config), config, log).model
    split, samples = config.eval.split, config.eval.samples
    images = getattr(data, split)
    count = images_to_evaluate(config, len(images))
    log(f"evaluating {path} on {count:,} {data.name} {split} images with {samples} samples each")

    # The partial file holds the estimates for a prefix of the shuffle, so it can be reused for any
    # number of images and any devices.
    file = workdir / "evaluation.json"
    settings = {
        "params": checkpoint.params_sha256(params),
        "data": data.identity,
        "split": split,
        "seed": config.seed,
        "samples": samples,
        "precision": config.eval.precision,
        "plain": is_plain(model, config),  # a fast form may deviate on its platform
    }
    like = {"rows": jax.ShapeDtypeStruct((0, 3), np.float32)}.get

    def read():
        rows = read_partial(file, settings, like).get("rows", np.zeros((0, 3)))
        return rows[: count if np.isfinite(rows).all() else 0].tolist()

    rows = np.array(agree(read), np.float32).reshape(-1, 3)
    if len(rows):
        log(f"{len(rows):,} images were evaluated before")
    if len(rows) < count:
        set_aside(file, log)
    indices = fixed_shuffle(count, len(images))[len(rows) :]
    chunk = min(config.eval.chunk, -(-count // jax.device_count()))  # more would be padding
    parts = image_bounds(
        model, replicate(params), images, indices, samples, chunk, config.seed,
        config.eval.precision,
    )  # fmt: skip

    def checked(parts):
        for part in parts:
            if not np.isfinite(part).all():
                raise VncaError(
                    f"{path}: an IWELBO is not finite ({_words(part)}); choose an older checkpoint "
                    "with --checkpoint"
                )
            yield part

    save = partial(write_partial, file, settings)
    with stop_signals(log) as (stop_asked, patient_log):
        arrays = collect(
            checked(parts), {"rows": rows}, "rows", count, stop_asked, save, patient_log, _words
        )
        rows = arrays["rows"]
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
        write_result(file, result, patient_log)
        patient_log(f"{split} {_words(rows)}; written to {file}")


def _mean(rows):
    """Means of the three columns over the images, and the standard error of the first (the IWELBO),
    None for one image."""
    error = standard_error(rows[:, 0]) if len(rows) > 1 else None
    return rows.mean(axis=0, dtype=np.float64).tolist(), error


def standard_error(values):
    """The standard error of the mean of two or more values: a float."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _words(rows):
    (bound, log_px_z, kl), error = _mean(rows)
    error = "" if error is None else f" ± {error:.2f}"
    return f"IWELBO {bound:.2f}{error} nats (reconstruction {-log_px_z:.2f}, KL {kl:.2f})"


@lru_cache
def estimator(model, devices=None):
    """A function that estimates the IWELBO on these devices (None: all).

    It maps params, packed bits uint8 [D, n, 98], image indices int32 [D, n], samples and seed to
    float32 [D, n, 3]: IWELBO, log p(x|z) and KL, in nats.
    """

    def estimate(params, bits, indices, samples, seed):
        def noise(s):
            # Keyed by image and sample, so that it is the same for every chunk and device count.
            return normal(stream(seed, "evaluation", s), indices, model.latent_size)

        return jnp.stack(iwelbo(model, params, unpack(bits), noise, samples), axis=-1)

    return jax.pmap(estimate, devices=devices, in_axes=(None, 0, 0, None, None))


def image_bounds(model, params, images, indices, samples, chunk, seed, precision="default"):
    """IWELBO, log p(x|z) and KL, in nats, of the images with these indices: yields NumPy
    [≤ D·chunk, 3].

    params: replicated, or on the host; images: packed bits, uint8 [N, 98]; precision: of matrix
    products on accelerators. "default" multiplies in bfloat16 (TPU) or TF32 (GPU), "highest" in
    float32. There is one device call for each D·chunk images. The last call is padded with copies
    of the last image, and their results are dropped.
    """
    devices, rows = jax.device_count(), local_rows()
    for start in range(0, len(indices), devices * chunk):
        part = indices[start : start + devices * chunk]
        padded = np.pad(part, (0, devices * chunk - len(part)), mode="edge")
        local = padded.reshape(devices, chunk)[rows].astype(np.int32)
        with jax.default_matmul_precision(precision):
            result = estimator(model)(params, images[local], local, samples, seed)
        yield gather(result).reshape(-1, 3)[: len(part)]
