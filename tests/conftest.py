import numpy as np
import pytest
import torch

from ddpm_fast.kernels._triton import INTERPRETED

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


def pytest_addoption(parser):
    parser.addoption("--proof", action="store_true", help="run the long proofs too")


def pytest_collection_modifyitems(config, items):
    if not (GPU or INTERPRETED):  # they run in an invocation of their own, by the interpreter
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("kernel")])
        items[:] = [i for i in items if not i.get_closest_marker("kernel")]
    reasons = {
        "gpu": None if GPU else "no GPU",
        "compile": "kernels are being interpreted" if INTERPRETED else None,
        "proof": None if config.getoption("--proof") else "long; runs with --proof",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


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
def sums_as_on_a_gpu(monkeypatch):
    """The interpreter adds a tile's pixels one after another; a GPU's threads add as a tree, and so does numpy along a row."""
    if INTERPRETED:
        summed = np.sum

        def tree(x, axis=None, keepdims=False):
            if axis is None:
                return summed(x, keepdims=keepdims)
            y = summed(np.ascontiguousarray(np.moveaxis(x, axis, -1)), axis=-1)
            return np.expand_dims(y, axis) if keepdims else y

        monkeypatch.setattr(np, "sum", tree)


@pytest.fixture
def device():
    return "cuda" if GPU and not INTERPRETED else "cpu"


@pytest.fixture
def figure():
    """figure("what", value): a measured figure, printed at the end of the run."""
    return lambda what, value: FIGURES.append(f"{what:72} {value}")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(FIGURES))
