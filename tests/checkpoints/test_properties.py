"""Random configuration files and schedules: each is a valid result or one ValueError line.

`--hypothesis-profile=acceptance` runs 3,000 cases instead of 200 (tests/conftest.py).
"""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, UNet, UNetConfig, load_pretrained, save_pretrained

pytest.importorskip("safetensors")
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies
# the profile's cases are shared by the four tests
quarter = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 4)

CONFIG = UNetConfig(
    sample_size=8, channels=(8, 16), layers=1, attention=(False, True), norm_groups=4
)
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([0, -1, 2**24, 2**31, 2**63, 10**30, 10**400, 1e-320, 1e-300, 1e308]),
    st.floats(),
    st.floats(0, 1),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=8,
)


def outcome(compute):
    """The result of `compute`, or None after a one-line ValueError, within 5 s of CPU time."""
    start = time.process_time()
    try:
        result = compute()
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and "\r" not in text and len(text) < 2000, text
        result = None
    assert time.process_time() - start < 5
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("random") / "model"
    save_pretrained(directory, UNet(CONFIG).eval(), NoiseSchedule.linear(timesteps=10))
    shutil.copytree(directory, directory.with_name("original"))
    return directory


def changed(folder, name, changes):
    """The folder with some keys of one file replaced and the other files restored."""
    original = folder.with_name("original")
    for file in (UNET, SCHEDULER):
        shutil.copy(original / file, folder / file)
    content = json.loads((original / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


def keys_of(file):
    if file == UNET:
        keys = list(CONFIG.to_diffusers())
    else:
        keys = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                "variance_type", "clip_sample", "clip_sample_range", "prediction_type",
                "thresholding", "rescale_betas_zero_snr", "timestep_values", "_class_name",
                "steps_offset", "timestep_spacing"]  # fmt: skip
    return st.sampled_from(keys) | st.text(max_size=6)


def check_checkpoint(checkpoint):
    """A loaded checkpoint has the network of its weights and a schedule without NaN or Inf."""
    assert checkpoint.unet.config.channels == CONFIG.channels
    schedule = checkpoint.schedule
    for name in ("alpha_bar", "noise_var", "posterior_mean_x_0", "posterior_var"):
        values = getattr(schedule, name)
        assert np.isfinite(values).all() and (values >= 0).all()
    assert checkpoint.clip is None or math.isfinite(checkpoint.clip)


@given(st.dictionaries(keys_of(UNET), VALUES, min_size=1, max_size=3))
@quarter
def test_network_configurations(folder, changes):
    checkpoint = outcome(lambda: load_pretrained(changed(folder, UNET, changes)))
    if checkpoint is not None:
        check_checkpoint(checkpoint)


TIMESTEPS = st.integers(1, 2000) | st.sampled_from([2**24 - 1, 2**24, 10**6]) | VALUES
SCHEDULER_CHANGES = st.one_of(
    st.dictionaries(keys_of(SCHEDULER), VALUES, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {
            "beta_schedule": st.sampled_from(
                ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
            ),
            "beta_start": st.floats(0, 1) | st.just(1e-4),
            "beta_end": st.floats(0, 1) | st.just(0.02),
            "num_train_timesteps": st.integers(1, 2000),
            "rescale_betas_zero_snr": st.booleans(),
        }
    ),
    st.lists(st.floats(0, 1), min_size=1, max_size=8).map(
        lambda betas: {"trained_betas": betas, "num_train_timesteps": len(betas)}
    ),
)


@given(SCHEDULER_CHANGES)
@quarter
def test_scheduler_configurations(folder, changes):
    checkpoint = outcome(lambda: load_pretrained(changed(folder, SCHEDULER, changes)))
    if checkpoint is not None:
        check_checkpoint(checkpoint)


@given(st.sampled_from([UNET, SCHEDULER]), st.binary(max_size=64), st.integers(0, 900))
@quarter
def test_files_with_damaged_bytes(folder, name, noise, position):
    changed(folder, name, {})
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:position] + noise + content[position + len(noise) :])
    checkpoint = outcome(lambda: load_pretrained(folder))
    if checkpoint is not None:
        check_checkpoint(checkpoint)


PLAIN = st.one_of(NUMBERS, st.none(), st.text(max_size=3))
SCHEDULES = st.one_of(
    st.tuples(st.sampled_from(["linear", "scaled_linear"]), st.tuples(PLAIN, PLAIN, TIMESTEPS)),
    st.tuples(st.just("cosine"), st.tuples(TIMESTEPS, PLAIN, PLAIN)),
    st.tuples(st.just("sigmoid"), st.tuples(TIMESTEPS, PLAIN, PLAIN, PLAIN, PLAIN)),
    st.tuples(st.sampled_from(["from_betas", "from_alpha_bar"]), st.tuples(VALUES)),
    st.tuples(
        st.sampled_from(["from_betas", "from_alpha_bar"]),
        st.tuples(st.lists(st.floats(0, 1), max_size=6)),
    ),
)


@given(SCHEDULES)
@quarter
@pytest.mark.filterwarnings("error")
def test_schedules(call):
    family, arguments = call
    schedule = outcome(lambda: getattr(NoiseSchedule, family)(*arguments))
    if schedule is None or len(schedule) > 5000:
        return
    assert (schedule.beta > 0).all() and (schedule.beta[:-1] < 1).all() and schedule.beta[-1] <= 1
    assert (np.diff(schedule.alpha_bar) <= 0).all() and "\n" not in repr(schedule)
    assert np.isfinite(schedule.snr).all() and np.isfinite(schedule.posterior_mean_x_t).all()
    assert schedule == NoiseSchedule(schedule.beta) and hash(schedule) == hash(
        NoiseSchedule(schedule.beta)
    )
    rescaled = outcome(schedule.zero_terminal_snr)
    assert rescaled is None or rescaled.alpha_bar[-1] == 0
