"""The run in a workdir: its config, its data and its newest checkpoint."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vnca.program import VncaError, checkpoint, files
from vnca.program.config import adopt, differences, flatten, kind_of
from vnca.program.data import load
from vnca.program.hosts import agree, from_first, is_first
from vnca.program.machine import fit_to_machine
from vnca.program.method import make_model, param_shapes
from vnca.program.nans import array_not_finite


def open_run(config, workdir, log, which=None, any_data=False):
    """The run in a workdir as (config, data, found, restore), the same on every process.

    The config's fitted fields are set. found has the "path" and the saved "config" (nested dict) of
    the newest checkpoint, or of the one that `which` names (`checkpoint.named`), and restore is a
    function from the shapes of a state to the saved state. Both are None if the run is new. Raises
    VncaError if the checkpoint belongs to a run with another config, or with other images unless
    any_data, or if this process has another config than process 0; restore raises it if an array is
    missing, has another shape or dtype, or is not finite.
    """
    agree_on(config)
    read = []  # what process 0 has read, so that it reads nothing twice

    def find():
        found = checkpoint.named(workdir, which) if which else checkpoint.newest(workdir, log)
        if not found:
            return None
        path, saved, restore = found
        read.append(restore)
        return {"path": str(path), "config": saved}

    def load_data():
        read.append(load(config.data.name, config.data.dir, log=log))
        return [read[-1].name, read[-1].identity]

    found = agree(find)
    config = adopt(found and found["config"], config)
    # Process 0 decides what `auto` means, perhaps by a download. The others follow.
    config.data.name, identity = agree(load_data)
    data = read[-1] if read else load(config.data.name, config.data.dir, log=log)
    if data.identity != identity:
        raise VncaError(
            f"data.dir={config.data.dir} has other images here than on the host of process 0: copy "
            "the same files to every host"
        )
    if data.name == "own":
        with config.data.unlocked():
            config.data.sha256 = data.sha256  # in every checkpoint, and in evaluation.json
    config = fit_to_machine(config)
    if not found:
        return config, data, None, None
    check_same_images(found, config, workdir, log, any_data)
    if lines := differences(found["config"], config):
        flag, value = ("checkpoint", which) if which else ("workdir", workdir)
        raise VncaError(
            f"--{flag}={value} belongs to a run with another config: {'; '.join(lines)}. "
            f"Choose another --{flag}, or restore these fields"
        )

    def restore(shapes):
        state = from_first(read[0](shapes) if is_first() else None, shapes)
        if name := array_not_finite(state):
            remedy = "choose another --checkpoint" if which else "move it away to use an older one"
            raise VncaError(f"{found['path']}: {name} is not finite: {remedy}")
        return state

    return config, data, found, restore


def check_same_images(found, config, workdir, log, any_data):
    """Raises VncaError if the run of the checkpoint `found` was trained on other images of one's
    own. With any_data, `log` gets a warning if it was trained on any others, and found["config"]
    gets the present ones."""
    trained_on = found["config"]["data"]
    was, now = trained_on.get("sha256"), config.data.get("sha256")
    if any_data:
        if (trained_on["name"], was) != (config.data.name, now):
            log(f"warning: {found['path']} was trained on other images ({trained_on['name']})")
        found["config"]["data"] = config.data.to_dict()
    elif config.data.name == "own" and was not in (None, now):
        raise VncaError(
            f"the images in data.dir={config.data.dir} are not those of the run in "
            f"--workdir={workdir} (their SHA-256 is {now[:12]}…, was {was[:12]}…): bring "
            "the files back, or choose another --workdir"
        )


def agree_on(config):
    """Raises VncaError if this process has another config than process 0. Only the places of the
    images may differ: what they hold is compared later."""
    ours = {name: value for name, value in flatten(config).items() if name != "data.dir"}
    theirs = agree(lambda: ours)
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            raise VncaError(
                f"config.{name} is {ours.get(name)!r} on this process and {theirs.get(name)!r} on "
                "process 0: give every process the same flags"
            )


def trained_params(config, workdir, log, packaged, which=None):
    """The trained parameters of a run, as (config, data, path of their file, params).

    They come from the newest checkpoint, or from the one that `which` names. If there is none, they
    are the packaged ones of an equal config.model, and `log` gets a line that says so. The data may
    be other than those of the training; then, too, `log` gets a line. packaged: kind -> (config,
    params, path). Raises VncaError if there are neither, or if the checkpoint is of another config.
    """
    if which or agree(lambda: bool(checkpoint.paths(workdir))):  # before a download
        config, data, found, restore = open_run(config, workdir, log, which, any_data=True)
        agree(lambda: files.make_folder(workdir))  # the checkpoint may lie in another
        shapes = param_shapes(make_model(config.model))
        config.train = ConfigDict(found["config"]["train"])  # the settings that made the parameters
        return config, data, found["path"], restore({"params": shapes})["params"]
    kind = kind_of(config.model.name)
    made, params, path = packaged(kind)
    if flatten(made.model) != flatten(config.model):
        raise VncaError(
            f"--workdir={workdir} has no checkpoint: train first, with --mode=train "
            f"(the packaged model belongs to configs/small_{kind}.py)"
        )
    log(f"{workdir} has no checkpoint: this is the packaged {kind} model")
    agree(lambda: files.make_folder(workdir))
    config, data, _, _ = open_run(config, workdir, log)
    if made.data.name != data.name:
        log(f"warning: {path} was trained on other images ({made.data.name})")
    config.train = made.train
    return config, data, path, params


def given_params(config, model, packaged, log):
    """The trained parameters that a new run starts from, in place of random ones.

    The result is {"encoder": …, "decoder": …}, a part of it, or {}; its arrays are float32, with
    the shapes of model.init's. train.start_from names the run that they come from. If
    train.encoder_from is set, the encoder comes from there. `log` gets a line for each. Both may be
    "packaged", the workdir of a run or a checkpoint. packaged: kind -> (config, params, path).
    Raises VncaError if there is no checkpoint, or if its arrays have other shapes.
    """
    shapes = param_shapes(model)
    kind, given = kind_of(config.model.name), {}

    def params_from(field, source, shapes):
        if source != "packaged":
            return _params_of(field, source, shapes, log)
        _, whole, _ = packaged(kind)
        params = {part: whole[part] for part in shapes}
        if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, shapes):
            raise VncaError(
                f"config.train.{field}=packaged: its parameters have other shapes; use the "
                f"config.model of configs/small_{kind}.py, or name the workdir of a run"
            )
        return params

    for field, words, part in (
        ("start_from", "the parameters of", shapes),
        ("encoder_from", "the encoder of", {"encoder": shapes["encoder"]}),
    ):
        if source := config.train.get(field):
            given |= params_from(field, source, part)
            named = f"the packaged {kind} model" if source == "packaged" else source
            log(f"start    from {words} {named}")
    return given


def _params_of(field, source, shapes, log):
    """The parameters of these shapes from a checkpoint, or from the newest in the workdir of a run,
    on every process. field: the field of config.train that names it, for the message."""
    wanted, read = {"params": shapes}, []

    def find():
        place = os.path.expanduser(source)
        if os.path.isfile(place):
            read.append(checkpoint.load(place)[1](wanted))
        elif found := checkpoint.newest(place, log):
            read.append(found[2](wanted))
        else:
            raise VncaError("there is no checkpoint; train one there first, or use packaged")

    try:
        agree(find)
    except VncaError as fault:
        raise VncaError(f"config.train.{field}={source}: {fault}") from fault
    return from_first(read[0] if read else None, wanted)["params"]


@contextlib.contextmanager
def lock(workdir, log):
    """Makes the workdir and keeps other trainings out of it, until the `with` ends or this process
    dies in any way. Raises VncaError on every process if another training has the workdir."""

    def take():
        files.make_folder(workdir)
        try:
            folder = os.open(workdir, os.O_RDONLY)
            held.callback(os.close, folder)
            # Without a buffer, which on a full disk would be written only at close.
            file = held.enter_context(open(Path(workdir, ".lock"), "ab+", 0))  # noqa: SIM115
        except OSError as fault:
            raise VncaError(f"--workdir={workdir}: {fault.strerror}; choose another") from fault
        # Both: a file is easily deleted, and NFS cannot lock a folder.
        if not any([_take(folder, file, workdir), _take(file, file, workdir)]):
            log(f"warning: {workdir} cannot be locked: start no second training there")
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    with contextlib.ExitStack() as held:
        agree(take)
        yield


def _take(target, file, workdir):
    """Locks an open folder or file. False if that is not possible; `file` names the holder."""
    try:
        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as fault:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another run"
        raise VncaError(
            f"--workdir={workdir} is in use by {holder}: wait until it ends, stop it, or choose "
            "another --workdir"
        ) from fault
    except OSError:
        return False
