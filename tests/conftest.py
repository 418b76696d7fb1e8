"""Selection of tests by marker, shared fixtures, and measured values in the terminal summary."""

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
        if has("kernel") and not (GPU or INTERPRETED):  # another pytest call runs them
            return False
        if has("compile") and INTERPRETED:
            return False
        if (has("full") or item in repeats) and not full:
            # on a GPU, these tests are fast enough to run without --full
            return GPU and bool(has("kernel") or has("gpu"))
        return acceptance or not has("acceptance")

    config.hook.pytest_deselected(items=[i for i in items if not runs(i)])
    items[:] = [i for i in items if runs(i)]
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _repeats(items):
    """Cases of tests marked each_value whose parameter values all occurred in earlier cases."""
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
    """Makes torch.empty fill tensors with NaN: tests detect elements that no kernel writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return "cuda" if GPU and not INTERPRETED else "cpu"


@pytest.fixture
def figure(record_property):
    """Function (name, value) that adds a measured value to the terminal summary."""
    return lambda name, value: record_property("figure", f"{name:72} {value}")


def pytest_runtest_logreport(report):
    if report.when == "teardown":  # also for tests in worker processes
        FIGURES.extend(value for name, value in report.user_properties if name == "figure")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(FIGURES))
