"""benchmark.compare and ddpm-fast bench: values, accuracy checks, comparison with older results."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from bench.workloads import ROOT, TINY_UNET
from ddpm_fast import Checkpoint, NoiseSchedule, UNet, save_pretrained
from ddpm_fast.benchmark import Effort, Stage, compare, results
from ddpm_fast.benchmark.baselines import Pipeline, baseline
from ddpm_fast.benchmark.check import ReferenceCheck
from ddpm_fast.benchmark.engines import LocalEngine
from ddpm_fast.benchmark.kernels import ceilings, kernel_times
from ddpm_fast.benchmark.rounds import interval, summarize, turns
from ddpm_fast.benchmark.workload import Cause, Setting, Unavailable, Workload
from ddpm_fast.utils.environment import peak_memory
from ddpm_fast.utils.numerics import relative_error

stats = pytest.importorskip("scipy.stats")
QUICK = Effort(seconds=0, burst=0.002, rest=0, steps=2)


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    return Checkpoint(UNet(TINY_UNET).eval(), NoiseSchedule.linear(timesteps=100))


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_pretrained(folder, checkpoint.unet, checkpoint.schedule)
    return folder


def run(weights, engines, effort=QUICK):
    """(the case of batch size 2, messages of engines that are left out)"""
    reported = []
    result = compare(
        weights, [2], engines=engines, effort=effort, roofline=False, progress=reported.append
    )
    assert not result["kernels"] and len(result["cases"]) == 1
    return result["cases"][0], [p for p in reported if p.stage is Stage.LEFT_OUT]


# ---- statistics


@pytest.mark.parametrize("n", [6, 7, 9, 10, 17, 40, 101])
def test_interval_is_the_narrowest_with_the_probability(n):
    """The number of values below a median is binomial(n, 1/2)."""
    median, low, high = interval(range(1, n + 1))
    k = int(low)
    assert (median, high) == ((n + 1) / 2, n + 1 - k)
    outside = lambda k: 2 * stats.binom.cdf(k - 1, n, 0.5)
    assert outside(k) <= 0.05 < outside(k + 1)


def test_interval_of_few_values_is_their_range():
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert interval([5.0]) == (5.0, 5.0, 5.0)


def test_interval_contains_the_median_with_the_probability():
    generator = np.random.default_rng(0)
    intervals = [interval(generator.lognormal(size=12)) for _ in range(2000)]
    share = np.mean([low <= 1 <= high for _, low, high in intervals])
    assert share == pytest.approx(1 - 2 * stats.binom.cdf(2, 12, 0.5), abs=0.015)  # 0.961


def test_speedup_is_a_ratio_of_times_of_one_round():
    """A machine that is ten times slower in one round changes no ratio."""
    s = summarize([2.0, 20.0, 4.0, 2.0, 2.0, 2.0], [1.0, 10.0, 2.0, 1.0, 1.0, 1.0])
    assert (s["ms"], s["speedup"], s["speedup_range"]) == (2000.0, 2.0, [2.0, 2.0])


def test_turns_leave_out_removed_engines():
    engines = ["a", "b", "c"]
    order = []
    for engine in turns(engines, rounds=3, rest=0):
        order.append(engine)
        if len(order) == 3:
            engines.remove("b")
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert sorted(order[3:5]) == sorted(order[5:]) == ["a", "c"]


# ---- compare


def test_speedups_are_those_of_the_raw_times(checkpoint, monkeypatch):
    raw = {}
    request = LocalEngine.request

    def recording(self, do, batch, **arguments):
        answer = request(self, do, batch, **arguments)
        if "times" in answer:
            raw.setdefault((batch, self.engine, do), []).append(np.median(answer["times"]))
        return answer

    monkeypatch.setattr(LocalEngine, "request", recording)
    names, reported = ["ddpm_fast", "plain PyTorch", "os:nothing"], []
    effort = replace(QUICK, steps={1: 3, 2: 2})
    result = compare(checkpoint, [1, 2], None, names, effort, progress=reported.append)
    assert json.loads(json.dumps(result)) == result
    assert [p.stage for p in reported if p.stage is not Stage.STARTING] == [
        Stage.LEFT_OUT,
        *(Stage.TIMING, Stage.CASE) * 2,
        Stage.ROOFLINE,
    ]
    assert result["network"]["timesteps"] == 100 and result["kernels"] and result["ceilings"]
    for case, batch, steps in zip(result["cases"], (1, 2), (3, 2), strict=True):
        assert (case["batch"], case["steps"], case["rounds"], case["dtype"]) == (
            batch,
            steps,
            6,
            "fp32",
        )
        assert "expected one of ddpm_fast" in case["left_out"]["os:nothing"]
        assert [row["engine"] for row in case["rows"]] == names[:2]
        for row in case["rows"]:
            assert 0 < row["error"] < 1e-5 and row["first_image_s"] > 0
            for do, images in (("forward", batch), ("loop", batch * steps)):
                times = np.array(raw[batch, row["engine"], do])
                ratios = times / np.array(raw[batch, "ddpm_fast", do])
                expected = dict(ms=1e3 * np.median(times) / images, speedup=np.median(ratios))
                expected |= dict(low=1e3 * min(times) / images, high=1e3 * max(times) / images)
                assert {k: row[do][k] for k in expected} == pytest.approx(expected, rel=1e-3)
                assert row[do]["speedup_range"] == pytest.approx(
                    [min(ratios), max(ratios)], rel=1e-3
                )
            assert row["images_per_s"] == pytest.approx(1e3 / (row["loop"]["ms"] * 100), rel=1e-3)


@pytest.mark.full
def test_each_engine_has_a_process_and_starts_twice(weights):
    pytest.importorskip("diffusers")
    case, left_out = run(
        weights, ["ddpm_fast", "DDPMPipeline"], replace(QUICK, warm_start_limit=100)
    )
    assert not left_out and not case["left_out"]
    rows = {row["engine"]: row for row in case["rows"]}
    assert [*rows] == ["ddpm_fast", "DDPMPipeline"]
    for row in rows.values():
        assert (
            0 < row["error"] < 1e-5
            and row["forward"]["low"] <= row["forward"]["ms"] <= row["forward"]["high"]
        )
        assert row["images_per_s"] == pytest.approx(1e3 / (row["loop"]["ms"] * 100), rel=1e-3)
        assert (
            50e6 < row["peak_bytes"] < 4e9
            and row["first_image_s"] > 0
            and row["warm_first_image_s"] > 0
        )
    assert rows["ddpm_fast"]["loop"]["speedup_range"] == [1, 1] and case["rounds"] >= 6
    text = results.table_of(case, dict(name="tiny", parameters=1, gflop_per_image=1, timesteps=100))
    assert "ddpm_fast cpu fp32" in text and "DDPMPipeline fp32" in text and "s cached" in text


PLANTED = """
from ddpm_fast.benchmark.baselines import DdpmFast, Plain

class WrongNetwork(Plain):
    def forward(self, x, t, labels=None):
        return 1.0001 * super().forward(x, t, labels)

class WrongEnd(Plain):
    def loop(self, count, steps):
        return 2 * super().loop(count, steps)

class WrongCount(Plain):
    def loop(self, count, steps):
        return super().loop(1, steps)

class WrongStep(DdpmFast):
    def loop(self, count, steps):
        return 0.999 * super().loop(count, steps)

class DiesLater(Plain):
    calls = 0
    def loop(self, count, steps):
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("out of memory")
        return super().loop(count, steps)

class Dies(Plain):
    def loop(self, count, steps):
        import os
        os._exit(9)
"""


WRONG = {
    "planted:WrongNetwork": "error of its output is 1.0e-04; expected at most 1.0e-05",
    "planted:WrongEnd": "the images of its loop are out of range or not finite",
    "planted:WrongCount": "its loop returned images of shape (1, 3, 8, 8); expected (2, 3, 8, 8)",
    "planted:WrongStep": "error of its steps is 1.0e-03; expected at most 1.0e-04",
    "planted:DiesLater": "RuntimeError: out of memory",  # in a later round
    "planted:None": "expected one of ddpm_fast, plain PyTorch",
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)  # worker processes import from here
    monkeypatch.syspath_prepend(tmp_path)  # this process
    yield
    sys.modules.pop("planted", None)


def check_left_out(case, left_out, wrong):
    assert [row["engine"] for row in case["rows"]] == ["ddpm_fast"]
    assert [p.cause for p in left_out] == [Cause.FAILED] * len(wrong)
    for name, reason in wrong.items():
        assert reason in case["left_out"][name]


def test_wrong_engines_are_not_timed(checkpoint, planted):
    check_left_out(*run(checkpoint, ["ddpm_fast", *WRONG]), WRONG)


@pytest.mark.full
def test_wrong_engine_processes_are_not_timed(weights, planted):
    wrong = WRONG | {"planted:Dies": "the process ended with code 9"}
    check_left_out(*run(weights, ["ddpm_fast", *wrong]), wrong)


def test_nothing_is_timed_if_the_first_engine_is_wrong(checkpoint, weights, planted):
    with pytest.raises(RuntimeError, match="planted:WrongStep: not timed"):
        run(checkpoint, ["planted:WrongStep", "plain PyTorch"])
    with pytest.raises(RuntimeError, match="planted:Dies: the process ended with code 9"):
        run(weights, ["planted:Dies", "plain PyTorch"])


def test_the_example_of_the_documentation_runs(capsys):
    text = (ROOT / "docs" / "benchmarking.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code.replace("Effort(seconds=0)", "Effort(0, burst=0.002, rest=0, steps=2)"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line[:17] for line in lines[-2:]] == ["batch 1: speedup ", "batch 4: speedup "]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(engines=[]), "engines is empty"),
        (dict(batches=[4, 0]), r"batches is \[4, 0\]; expected positive integers"),
        (dict(dtypes=["fp4"]), "dtype is 'fp4'; expected one of fp32, fp16"),
        (dict(dtypes=["fp8"]), "fp8 is unsupported on cpu; give fp32"),
        (dict(effort=Effort(steps=200)), "steps is 200; expected at most 100, the timesteps"),
    ],
)
def test_compare_refuses_invalid_arguments(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(checkpoint, **arguments)


def test_unavailable_baselines_give_the_reason():
    labelled = Workload(Checkpoint(UNet(replace(TINY_UNET, num_classes=3)), NoiseSchedule.linear()))
    with pytest.raises(Unavailable, match="passes no labels"):
        Pipeline(labelled)
    other_size = Workload(Checkpoint(UNet(TINY_UNET), NoiseSchedule.linear()), size=(16, 8))
    with pytest.raises(Unavailable, match="samples images of the training size only"):
        Pipeline(other_size)
    with pytest.raises(ValueError, match="names no sample_size"):
        _ = Workload(
            Checkpoint(UNet(replace(TINY_UNET, sample_size=None)), NoiseSchedule.linear())
        ).shape
    with pytest.raises(Unavailable, match="does not compute in fp8"):
        baseline("plain PyTorch", replace(labelled, dtype="fp8"))
    with pytest.raises(Unavailable, match="compared in fp32 on a CPU only"):
        baseline("ONNX Runtime", replace(labelled, dtype="bf16"))


@pytest.mark.parametrize("name", ["ddpm_fast", "plain PyTorch", "diffusers"])
def test_loops_sample_networks_with_classes(name):
    if name == "diffusers":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    workload = Workload(
        Checkpoint(UNet(replace(TINY_UNET, num_classes=3)).eval(), NoiseSchedule.linear())
    )
    images = baseline(name, workload).loop(4, 5)
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all() and images.abs().max() <= 1.0001


def test_peak_memory_of_a_process_excludes_its_parent():
    allocated = torch.ones(2**28)  # a gigabyte
    code = "import torch; from ddpm_fast.utils.environment import peak_memory; "
    code += "print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20e6 < int(done.stdout) < 0.9 * allocated.nbytes < peak_memory(torch.device("cpu"))


# ---- the roofline


def test_costs_of_instructions_are_those_of_the_network():
    """As many FLOP as torch counts, without attention, Winograd's form and padded channels."""
    from ddpm_fast.engines.cpu.codegen import vector_width
    from ddpm_fast.engines.cpu.cost import costs
    from ddpm_fast.engines.cpu.lowering import UNetProgram
    from ddpm_fast.models.flops import unet_cost

    two = (False, False)
    c = replace(
        TINY_UNET,
        sample_size=4,
        in_channels=16,
        out_channels=16,
        attention=two,
        up_attention=two,
        mid_attention=False,
    )
    program = UNetProgram(UNet(c).eval(), (16, 4, 4), vector_width())
    computed = costs(program)
    products = sum(flops for what, flops, _ in computed if what == "gemm")
    with torch.device("meta"):
        unet = UNet(c)
    embedding = sum(2 * m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))
    assert products == unet_cost(c).flops - embedding
    # a product moves its input, its weights, its output and a residual once each
    maps = {
        "conv_in": (16 * 16, 16 * 16, 0),
        "down_blocks.0.downsamplers.0.conv": (16 * 16, 4 * 16, 0),
    }
    for (name, (into, out, residual)), number in zip(maps.items(), (0, 3), strict=True):
        moved = [moved for what, _, moved in computed if what == "gemm"][number]
        assert moved == 4 * (into + out + residual + unet.get_submodule(name).weight.numel())


def test_every_instruction_is_timed():
    torch.manual_seed(0)
    workload = Workload(Checkpoint(UNet(TINY_UNET).eval(), NoiseSchedule.linear()))
    points = kernel_times(workload, 1)
    assert {"gemm", "normalise", "channel_sums", "softmax", "place", "take"} <= {
        p["what"] for p in points
    }
    assert all(p["seconds"] > 0 and p["times"] > 0 and p["bytes"] > 0 for p in points)
    threads = torch.get_num_threads()
    roofs = ceilings(torch.device("cpu"), "fp32", tiny=True)
    assert torch.get_num_threads() == threads
    assert [c["kind"] for c in roofs] == ["flops", "bytes", "bytes"] and all(
        c["per_s"] > 1e6 for c in roofs
    )


# ---- comparison with an older result


def result(ddpm_fast, plain, spread=0.01, steps=10):
    """Result of one case with invented times in ms, and intervals of +- `spread`."""

    def of(ms):
        ratio = ms / ddpm_fast
        near = lambda v: dict(low=v * (1 - spread), high=v * (1 + spread))
        return dict(
            ms=ms,
            **near(ms),
            speedup=ratio,
            speedup_range=[ratio * (1 - spread), ratio * (1 + spread)],
        )

    rows = [dict(engine="ddpm_fast", forward=of(ddpm_fast), loop=of(ddpm_fast))]
    if plain is not None:
        rows.append(dict(engine="plain PyTorch", forward=of(plain), loop=of(plain)))
    case = dict(
        batch=1, dtype="fp32", size=[8, 8], device_name="CPU", threads=2, steps=steps, rows=rows
    )
    return dict(network=dict(name="tiny", parameters=9), cases=[case])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (result(2.0, 8.0), result(2.4, 8.0), [0.2, 0.2]),
        (result(2.0, 8.0), result(4.0, 16.0), []),  # the machine is slower, not ddpm_fast
        (result(2.0, 8.0), result(2.0, 4.0), [1.0, 1.0]),  # the machine is faster, ddpm_fast is not
        (result(2.0, 8.0), result(2.04, 8.0), []),  # within the threshold
        (result(2.0, 8.0), result(2.4, 8.0, spread=0.3), []),  # within the noise
        (result(2.0, 8.0), result(1.5, 8.0), []),
        (
            result(2.0, None),
            result(2.4, 8.0),
            [0.2, 0.2],
        ),  # without plain PyTorch, milliseconds are compared
        (
            result(2.0, 8.0),
            result(2.4, 8.0, steps=4),
            [0.2],
        ),  # loops of different lengths are not compared
    ],
)
def test_slowdowns_beyond_the_noise_are_detected(old, new, expected):
    worse = results.slower(results.changes(old, new), 0.05)
    assert [c.change for c in worse] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(network=dict(name="tiny", parameters=8)),
            "of another network: parameters is 8 there, 9 here",
        ),
        (dict(batch=7), "no case of batch 1, .*; its first is of batch 7"),
        (dict(threads=1), "threads 2; its first is of .*threads 1"),
        (dict(device_name="another"), "device_name CPU, .* device_name another"),
    ],
)
def test_different_cases_are_not_compared(changed, message):
    old = result(1.0, 2.0)
    old["cases"][0].update({k: v for k, v in changed.items() if k != "network"})
    old["network"] = changed.get("network", old["network"])
    with pytest.raises(ValueError, match=message):
        results.changes(old, result(1.0, 2.0))


def test_faster_baselines_are_reported():
    case = result(2.0, 1.5)["cases"][0]
    for row, name in zip(case["rows"], ("ddpm_fast fp32", "plain PyTorch fp32"), strict=True):
        row.update(name=name, reason="llvmlite is missing")
    assert results.faster_baselines(case)[0] == (
        "plain PyTorch fp32 is 33% faster (forward) than ddpm_fast fp32: llvmlite is missing"
    )


# ---- the command


def call(capsys, *arguments):
    main = import_module("ddpm_fast.cli.main").main
    with pytest.raises(SystemExit) as end:
        main(["bench", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def test_commands(weights, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("ddpm_fast.cli.actions.bench.Effort", partial(Effort, burst=0.002, rest=0))
    out = tmp_path / "a.json"
    options = ("--weights", weights, "--seconds", 0, "--steps", 2, "--baselines", "plain PyTorch")
    code, text, _ = call(capsys, "sweep", *options, "--batch-sizes", "1,3", "--out", out)
    assert (
        code == 0
        and f"-> {out}, {tmp_path / 'a.png'}" in text
        and text.count("plain PyTorch fp32") >= 2
    )
    written = json.loads(out.read_text())
    assert [case["batch"] for case in written["cases"]] == [1, 3]
    assert written["kernels"] and written["ceilings"] and written["network"]["timesteps"] == 100
    assert written["environment"]["torch"] == torch.__version__
    assert (tmp_path / "a.png").stat().st_size > 10_000
    for row in written["cases"][0]["rows"]:  # as if ddpm_fast had been a thousand times faster
        for what in ("forward", "loop"):
            row[what]["speedup"] *= 1000
            row[what]["speedup_range"] = [1000 * v for v in row[what]["speedup_range"]]
    (tmp_path / "old.json").write_text(json.dumps(written))
    files = ("--out", tmp_path / "b.json", "--compare", tmp_path / "old.json")
    # without --steps, as many as in the older file
    code, text, err = call(capsys, "latency", *options[:4], *options[6:], *files, "--json")
    assert code == 1 and "2 of 2 times are longer by more than 5 %" in err
    report = json.loads(text)
    assert (
        len(report["slower"]) == 2
        and "relative to plain PyTorch" in report["slower"][0]
        and "warm_first_image_s" in report["cases"][0]["rows"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--baselines", "tensorflow"),
            "--baselines is 'tensorflow'; expected some of plain PyTorch",
        ),
        (("--out", "a.txt"), "expected the name of a .json file"),
        (("--out", "no/such/folder/a.json"), "in an existing folder"),
        (("--compare", "nothing.json"), "nothing.json is not a result of ddpm-fast bench"),
        (("--dtype", "fp4"), "'fp4' is not one of"),
        (("--device", "abacus"), "--device is 'abacus'"),
        (("--steps", "200"), "steps is 200; expected at most 100, the timesteps"),
        (("--dtype", "fp8"), "fp8 is unsupported on cpu"),
    ],
)
def test_bad_input_is_one_line(weights, capsys, arguments, message):
    code, _, err = call(capsys, "throughput", "--weights", weights, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_file_to_compare_with_is_not_overwritten(weights, capsys, tmp_path):
    for name in ("bench.json", "older.json"):
        (tmp_path / name).write_text(json.dumps(result(1.0, 2.0)))
    line = ("latency", "--weights", weights, "--out", tmp_path / "bench.json", "--compare")
    code, _, err = call(capsys, *line, tmp_path / "bench.json")
    assert code == 2 and "the file that --out would overwrite" in err
    code, _, err = call(capsys, *line, tmp_path / "older.json")  # refused before the first engine
    assert code == 2 and "of another network" in err
    assert json.loads((tmp_path / "bench.json").read_text()) == result(1.0, 2.0)


def test_invalid_sweeps_are_refused(weights, capsys):
    for arguments in (
        ("--batch-sizes", "1,0"),
        ("--batch-sizes", "many"),
        ("--dtypes", "fp32,fp4"),
    ):
        code, _, err = call(capsys, "sweep", "--weights", weights, *arguments)
        assert code == 2 and arguments[1] in err and err.count("\n") == 1


def test_bf16_is_compared_with_fp64(weights):
    workload = Setting(str(weights), "bf16").workload()
    error = ReferenceCheck(workload).error(LocalEngine("plain PyTorch", workload), 2)
    assert 1e-3 < error < 0.05
    inputs = workload.inputs(2)
    exact = UNet(workload.unet.config).double()
    exact.load_state_dict(workload.unet.state_dict())
    with torch.no_grad():
        output = baseline("plain PyTorch", workload).forward(*inputs)
        expected = exact(inputs[0].double(), inputs[1])
    assert error == pytest.approx(relative_error(output, expected))
