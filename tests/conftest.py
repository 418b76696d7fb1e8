import pytest
import torch

from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.testing import interpret_like_a_gpu

try:
    import hypothesis
except ImportError:  # only the property tests need it
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
    parser.addoption("--full", action="store_true", help="run the tests marked full too")
    parser.addoption("--acceptance", action="store_true", help="run the proofs in full size too")


def pytest_collection_modifyitems(config, items):
    repeats = _repeats(items)
    acceptance = config.getoption("--acceptance")
    full = acceptance or config.getoption("--full")

    def runs(item):
        has = item.get_closest_marker
        if has("kernel") and not (GPU or INTERPRETED):  # an invocation of their own interprets them
            return False
        if has("compile") and INTERPRETED:
            return False
        if (has("full") or item in repeats) and not full:  # on a GPU they are quick
            return GPU and bool(has("kernel") or has("gpu"))
        return acceptance or not has("acceptance")

    config.hook.pytest_deselected(items=[i for i in items if not runs(i)])
    items[:] = [i for i in items if runs(i)]
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _repeats(items):
    """Cases of tests marked each_value whose parameters all have values that earlier cases have."""
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

        found = f"triton {triton.__version__}{', interpreting' if INTERPRETED else ''}"
    except ImportError:
        found = "no triton"
    return (
        f"torch {torch.__version__}, {found}, {torch.cuda.get_device_name() if GPU else 'no GPU'}"
    )


@pytest.fixture(autouse=True)
def poison_empty():
    """torch.empty comes filled with NaN, so a kernel that forgets an element fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return "cuda" if GPU and not INTERPRETED else "cpu"


@pytest.fixture
def figure(record_property):
    """figure("what", value): a measured figure, printed at the end of the run."""
    return lambda what, value: record_property("figure", f"{what:72} {value}")


def pytest_runtest_logreport(report):
    if report.when == "teardown":  # also of another process's tests
        FIGURES.extend(value for name, value in report.user_properties if name == "figure")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(FIGURES))
