"""Every launch of the networks' plans compiles as meant for sm_90; `make compile-check` has the other architectures."""

import pytest

pytest.importorskip("triton")
from bench.compile_check import Case, compile_all, distinct, faults, key_of, launches_of
from bench.networks import NETWORKS

pytestmark = pytest.mark.compile


def test_every_launch_compiles_as_meant(figure):
    cases = distinct(NETWORKS, [1, 256], ["bf16"], 90)
    known = {key_of(c.launch) for c in cases}
    cases += [c for c in distinct(NETWORKS, [256], ["fp8"], 90) if key_of(c.launch) not in known]
    wrong, serial = [], 0.0
    for case, result, seconds in compile_all(cases):
        serial += seconds
        found = [result] if isinstance(result, str) else faults(case, result)
        wrong += [f"{case.kernel} in {case.where}: {'; '.join(found)}"] if found else []
    figure("launches of four networks, sm_90, bf16 and fp8: distinct, seconds to compile one by one", f"{len(cases)}, {serial:.0f}")
    assert not wrong


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_few_compilations_for_the_cifar10_network(batch, figure):
    count = len({key_of(launch) for _, launch in launches_of("cifar10", batch, "bf16", 90)})
    figure(f"distinct compilations, CIFAR-10 network, batch {batch}", count)
    assert count < 40


def test_a_batch_that_16_divides_compiles_no_other_kernels():
    """Sizes that follow the batch are not specialised on; only the height of tiles follows it."""

    def keys(batch):
        return {key_of(launch) for _, launch in launches_of("cifar10", batch, "bf16", 90)}

    assert keys(256) == keys(255) == keys(257) and keys(1) == keys(2)


def test_faults_are_seen():
    """A convolution of too many registers spills; one whose operand cannot stay in shared memory says so."""
    cases = distinct(["cifar10"], [256], ["bf16"], 90)
    conv = next(c for c in cases if c.kernel == "_conv3x3_kernel" and c.launch.args["RESIDUAL"])
    spilling = Case(
        90, conv.where, type(conv.launch)(conv.launch.kernel, (1,), conv.launch.args, dict(conv.launch.options, maxnreg=96))
    )
    large = Case(
        90, conv.where, type(conv.launch)(conv.launch.kernel, (1,), conv.launch.args, dict(conv.launch.options, num_stages=7))
    )
    for case, message in ((spilling, "local-memory"), (large, "shared memory")):
        _, result, _ = next(compile_all([case]))
        assert any(message in fault for fault in ([result] if isinstance(result, str) else faults(case, result)))
