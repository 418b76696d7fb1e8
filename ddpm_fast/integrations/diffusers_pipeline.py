"""Accelerated sampling loop of diffusers' DDPMPipeline and DDIMPipeline."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..engines.base import dtype_name
from ..sampling.batch_sampler import BatchSampler
from ..sampling.request import check_indices, indices_tensor
from ..utils.validation import seed_bits
from .diffusers_call import EXTRAS, Call, labels_of, parsed
from .diffusers_networks import identity, shared_unet, unwrapped
from .diffusers_tables import SchedulerTable, UnsupportedError, check_scheduler, scheduler_table


@cache
def accelerated_class(original: type) -> type:
    """Subclass of a pipeline class whose calls run the accelerated loop.

    It has the name and module of the original, which diffusers writes into saved folders.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._ddpm_fast_accelerator.call(self, *args, **kwargs)

    signature = inspect.signature(original.__call__)  # type: ignore[operator]
    extras = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in EXTRAS.items()
    ]
    __call__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extras]
    )
    __call__.__doc__ = original.__call__.__doc__

    def report(self: Any) -> dict[str, Any]:
        """Engine, reason, noise, dtype, and whether images are batch-invariant."""
        return self._ddpm_fast_accelerator.report()

    def reduce(self: Any, protocol: int) -> Any:
        a = self._ddpm_fast_accelerator
        return a.accelerate, (a.original, a.engine, a.dtype, a.otherwise)

    namespace = dict(
        __module__=original.__module__,
        __qualname__=original.__qualname__,
        __doc__=original.__doc__,
        __call__=__call__,
        __reduce_ex__=reduce,
        report=property(report),
    )
    return type(original.__name__, (original,), namespace)


class Accelerator:
    """Engine of an accelerated pipeline; follows changes of its network and scheduler.

    Args:
        original: The pipeline.
        kind: DDPMPipeline or DDIMPipeline, whose loop the original has.
        engine, dtype, otherwise: See `accelerate`.
        accelerate: That function, by which copies and unpickled pipelines are made.
    """

    def __init__(
        self,
        original: Any,
        kind: type,
        engine: str,
        dtype: Any,
        otherwise: str,
        accelerate: Callable[..., Any],
    ) -> None:
        self.original, self.kind, self.accelerate = original, kind, accelerate
        self.engine, self.dtype, self.otherwise = engine, dtype, otherwise
        self._sampler: BatchSampler | None = None
        self._identity: tuple[Any, ...] = ()
        self._noise, self._refusal = "torch", ""
        self._warned: set[str] = set()

    def start(self, fast: Any) -> None:
        """Builds the engine, so that what cannot be accelerated is reported at once."""
        try:
            sampler = self.sampler(fast)
            check_scheduler(fast.scheduler)
            scheduler = copy.deepcopy(fast.scheduler)
            scheduler.set_timesteps(min(2, scheduler.config.num_train_timesteps))
            self._check_channels(sampler, scheduler_table(scheduler))
        except UnsupportedError as error:
            self._refused(error)

    def sampler(self, fast: Any) -> BatchSampler:
        """The sampler of the pipeline's network; rebuilt if the network has changed."""
        timesteps = int(fast.scheduler.config.num_train_timesteps)
        key = (*identity(fast.unet), timesteps)
        if self._sampler is None or key != self._identity:
            self.free()
            devices = range(torch.cuda.device_count())
            with torch.random.fork_rng(devices):  # building the engine draws nothing
                unet = shared_unet(fast.unet)
                size = unet.config.size
                if size is None:
                    raise UnsupportedError("the network has no sample_size")
                dtype = self._dtype(fast.unet)
                shape = (unet.config.in_channels, *size)
                schedule = NoiseSchedule.linear(timesteps=timesteps)  # tables have coefficients
                self._sampler = BatchSampler(unet, schedule, shape, engine=self.engine, dtype=dtype)
            self._identity = key
        self._sampler.refresh()
        return self._sampler

    def _dtype(self, network: Any) -> str:
        return dtype_name(next(network.parameters()).dtype if self.dtype is None else self.dtype)

    def free(self) -> None:
        """Releases the engine."""
        if self._sampler is not None:
            self._sampler.engine.free()
        self._sampler = None

    def report(self) -> dict[str, Any]:
        """See `accelerated_class`."""
        if self._sampler is None:
            return dict(engine="diffusers", reason=self._refusal, noise="torch", dtype=None)
        engine = self._sampler.engine
        return dict(
            engine=engine.name,
            reason=engine.reason,
            noise=self._noise,
            dtype=self._sampler.precision,
            invariant=engine.invariant,
        )

    # ---- calls

    @torch.no_grad()
    def call(self, fast: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the accelerated loop, or with otherwise="diffusers" that of diffusers."""
        call = parsed(type(fast), args, kwargs)
        try:
            sampler = self.sampler(fast)
        except UnsupportedError as error:
            self._refused(error)
            self._check_no_extras(call, error)
            return self._original_loop(fast, fast.unet, args, kwargs)
        try:
            check_scheduler(fast.scheduler)
            fast.scheduler.set_timesteps(call.steps)
            table = scheduler_table(fast.scheduler, call.eta, call.use_clipped_model_output)
            self._check_channels(sampler, table)
        except UnsupportedError as error:
            self._refused(error)
            self._check_no_extras(call, error)
            from .diffusers_unet import accelerated_unet

            network = accelerated_unet(unwrapped(fast.unet), self.engine, self.dtype)
            return self._original_loop(fast, network, args, kwargs)
        image = self._sample(fast, sampler, table, call)
        return self._output(fast, image, call)

    def _refused(self, error: UnsupportedError) -> None:
        self.free()
        self._refusal = str(error)
        if self.otherwise == "error":
            raise ValueError(f"not accelerated: {error}; or give otherwise='diffusers'") from None
        if self._refusal not in self._warned:
            self._warned.add(self._refusal)
            warnings.warn(f"not accelerated: {error}", stacklevel=4)

    def _check_no_extras(self, call: Call, error: UnsupportedError) -> None:
        for name in ("class_labels", "seed", "callback"):
            if getattr(call, name) is not None:
                argument = "callback_on_step_end" if name == "callback" else name
                raise ValueError(
                    f"{argument} needs the accelerated loop, and {error}; leave {argument} out"
                ) from None

    def _original_loop(
        self, fast: Any, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        pipe = copy.copy(self.original)
        vars(pipe).update({k: v for k, v in vars(fast).items() if k != "_ddpm_fast_accelerator"})
        vars(pipe)["unet"] = network
        kwargs = {k: v for k, v in kwargs.items() if k not in EXTRAS}
        return self.kind.__call__(pipe, *args, **kwargs)  # type: ignore[operator]

    def _check_channels(self, sampler: BatchSampler, table: SchedulerTable) -> None:
        c, out = sampler.shape[0], sampler.model.config.out_channels  # type: ignore[attr-defined]
        if out != (2 * c if table.steps.learned else c):
            raise UnsupportedError(
                f"the network has {out} output channels for {c} input channels, which the "
                "scheduler does not expect"
            )

    # ---- the loop

    def _sample(
        self, fast: Any, sampler: BatchSampler, table: SchedulerTable, call: Call
    ) -> Tensor:
        philox = call.seed is not None
        self._noise = "philox" if philox else "torch"
        shape = (call.batch_size, *sampler.shape)
        dtype = next(fast.unet.parameters()).dtype
        draw = self._drawing(call.generator, shape, sampler.device)
        indices: Iterable[int] = range(call.batch_size) if call.images is None else call.images
        image = indices_tensor(check_indices(indices)).to(sampler.device)
        labels = labels_of(call, sampler.num_classes, sampler.device)
        x_T = None if philox else draw(dtype).float()
        seed = seed_bits(call.seed) if philox else 0
        with sampler.begin(image, seed, labels, x_T, given_noise=not philox) as state:
            noise_dtype = torch.float32 if table.draws_fp32 else dtype

            def fill(step: int, z: Tensor) -> None:
                if table.draws[step]:
                    z.copy_(draw(noise_dtype))

            done, count = 0, len(table.steps)
            callback = None if call.callback is None else self._callback(fast, call, state)
            with fast.progress_bar(total=count) as bar:
                for completed in sampler.steps(
                    state, table.steps, callback, draw=None if philox else fill
                ):
                    bar.update(completed - done)
                    done = completed
            return state.x.clone(memory_format=torch.contiguous_format)

    def _drawing(
        self, generator: Any, shape: Sequence[int], device: torch.device
    ) -> Callable[[torch.dtype], Tensor]:
        from diffusers.utils.torch_utils import randn_tensor

        return lambda dtype: randn_tensor(
            tuple(shape), generator=generator, device=device, dtype=dtype
        )

    def _callback(self, fast: Any, call: Call, state: Any) -> Callable[[int, int, Tensor], None]:
        def after_step(step: int, t: int, x: Tensor) -> None:
            outputs = call.callback(fast, step, t, {"latents": x})  # type: ignore[misc]
            replaced = (outputs or {}).get("latents", x)
            if replaced is not x:
                state.x.copy_(replaced)

        return after_step

    def _output(self, fast: Any, image: Tensor, call: Call) -> Any:
        from diffusers import ImagePipelineOutput

        image = (image / 2 + 0.5).clamp(0, 1)
        dtype = next(fast.unet.parameters()).dtype
        result: Any
        if call.output_type == "pt":
            result = image.to(dtype)
        else:
            result = image.cpu().permute(0, 2, 3, 1).numpy()  # NumPy has no bf16
            if call.output_type == "pil":
                result = fast.numpy_to_pil(result)
        fast.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if call.return_dict else (result,)
