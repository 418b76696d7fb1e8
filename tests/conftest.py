"""Selection of tests by marker, fixtures for every test, and measured figures in the summary."""

import pytest
import torch

from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.testing import interpret_like_a_gpu

try:
    import hypothesis
except ImportError:  # needed by property tests only
    pass
else:
    _options = dict(deadline=None, derandomize=True)
    hypothesis.settings.register_profile("default", max_examples=200, **_options)
    hypothesis.settings.register_profile("acceptance", max_examples=3000, **_options)
    hypothesis.settings.load_profile("default")

GPU = torch.cuda.is_available()
FIGURES: list[str] = []
interpret_like_a_gpu()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    parser.addoption(
        "--acceptance", action="store_true", help="also run the tests marked acceptance"
    )


def pytest_collection_modifyitems(config, items):
    repeats = _repeats(items)
    acceptance = config.getoption("--acceptance")
    full = acceptance or config.getoption("--full")

    def runs(item):
        has = item.get_closest_marker
        if has("kernel") and not (GPU or INTERPRETED):  # a separate pytest call interprets them
            return False
        if has("compile") and INTERPRETED:
            return False
        if (has("full") or item in repeats) and not full:  # fast enough on a GPU
            return GPU and bool(has("kernel") or has("gpu"))
        return acceptance or not has("acceptance")

    config.hook.pytest_deselected(items=[i for i in items if not runs(i)])
    items[:] = [i for i in items if runs(i)]
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _repeats(items):
    """Cases of tests marked each_value in which every parameter's value occurred before."""
    repeats, seen = set(), set()
    for item in items:
        if item.get_closest_marker("each_value"):
            test = (item.path, item.originalname)
            values = {(*test, name, repr(value)) for name, value in item.callspec.params.items()}
            if values <= seen:
                repeats.add(item)
            seen |= values
    return repeats


def pytest_report_header():
    try:
        import triton

        version = f"triton {triton.__version__}{', interpreting' if INTERPRETED else ''}"
    except ImportError:
        version = "no triton"
    gpu = torch.cuda.get_device_name() if GPU else "no GPU"
    return f"torch {torch.__version__}, {version}, {gpu}"


@pytest.fixture(autouse=True)
def poison_empty():
    """Fills torch.empty with NaN, so that a kernel that skips an element fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return "cuda" if GPU and not INTERPRETED else "cpu"


@pytest.fixture
def figure(record_property):
    """Function of a name and a measured value that are printed at the end of the run."""
    return lambda name, value: record_property("figure", f"{name:72} {value}")


def pytest_runtest_logreport(report):
    if report.when == "teardown":  # reports of worker processes included
        FIGURES.extend(value for name, value in report.user_properties if name == "figure")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(FIGURES))
