import pytest
import torch

from ddpm_fast.kernels._triton import INTERPRETED

GPU = torch.cuda.is_available()
FIGURES: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--proof", action="store_true", help="run the long proofs too")


def pytest_collection_modifyitems(config, items):
    reasons = {
        "kernel": None if GPU or INTERPRETED else "no GPU; TRITON_INTERPRET=1 runs it by Triton's interpreter",
        "gpu": None if GPU else "no GPU",
        "compile": "kernels are being interpreted" if INTERPRETED else None,
        "proof": None if config.getoption("--proof") else "long; runs with --proof",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


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
def figure():
    """figure("what", value): a measured figure, printed at the end of the run."""
    return lambda what, value: FIGURES.append(f"{what:72} {value}")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(FIGURES))
