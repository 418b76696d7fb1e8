"""pytest plugin that runs diffusers' own tests on accelerated pipelines and fused schedulers.

    python -m pytest -p diffusers_exchange tests/pipelines/ddpm ...     in a checkout of diffusers

Classes are exchanged after collection: pipelines are accelerated as soon as they are constructed;
schedulers are replaced in the namespaces of the test modules and in the lists of the test classes.
"""

import copy
import functools

import diffusers

from ddpm_fast import accelerate, schedulers


def pytest_collection_modifyitems(items):
    for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        kind.__init__ = accelerated_init(kind.__init__)
    exchanged = {getattr(diffusers, name): getattr(schedulers, name) for name in schedulers.__all__}
    for item in items:
        for name, value in list(vars(item.module).items()):
            if isinstance(value, type) and value in exchanged:
                setattr(item.module, name, exchanged[value])
        classes = getattr(item.cls, "scheduler_classes", None)
        if classes is not None:
            item.cls.scheduler_classes = tuple(exchanged.get(c, c) for c in classes)


def accelerated_init(init):
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        fast = accelerate(copy.copy(self), otherwise="diffusers")
        object.__setattr__(self, "__class__", type(fast))
        vars(self).update(vars(fast))

    return __init__
