"""Baselines: engines that run the same weights, each with a forward pass and a sampling loop.

Each loop uses the engine's scheduler and noise. To compare another engine, write a class that
implements `Baseline` and pass its name as `package.module:Class`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.diffusers import scheduler_config
from ..diffusion.presets import EXACT
from ..diffusion.timesteps import choose_timesteps
from ..models.unet import UNet, channels_last
from .workload import Cause, Unavailable, Workload


class Baseline(Protocol):
    """Engine of a benchmark, created with a `Workload`.

    Attributes:
        name: Display name.
    """

    name: str

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the network's output.

        Args:
            x_t: [B, C, H, W], fp32.
            t: [B], int64.
            labels: [B], int64; None for a network without classes.

        Returns:
            [B, C or 2 C, H, W], fp32.
        """
        ...

    def loop(self, count: int, steps: int) -> Tensor:
        """Returns images [count, C, H, W], floating point, sampled in `steps` steps."""
        ...


class DdpmFast:
    """`Sampler` with the engine that it selects, or with the named one."""

    def __init__(self, workload: Workload, engine: str = "auto") -> None:
        self.sampler = workload.sampler(engine)
        self.name = f"ddpm_fast {self.sampler.engine.name} {workload.dtype}"
        self.reason = self.sampler.engine.reason
        self._graph: tuple[int, Any, Any] | None = None

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        args = (x_t, t) if labels is None else (x_t, t, labels)
        engine: Any = self.sampler.engine
        if engine.name == "cpu":
            return engine(*args)
        if engine.name != "fused":
            return engine.call(x_t.to(self.sampler.dtype), *args[1:]).float()
        fused, graph = self._captured(engine, args)
        plan = fused.load(*args)
        graph()
        return plan.maps[plan.out].pixels.float().clone()

    def _captured(self, engine: Any, args: tuple[Tensor, ...]) -> tuple[Any, Callable[[], object]]:
        """Returns the network and its graph: the graphs of `Sampler` contain the whole step."""
        batch = len(args[0])
        if self._graph is None or self._graph[0] != batch:
            self.release()
            fused = engine.network(batch)
            run = fused.load(*args).run
            self._graph = batch, fused, engine.graph(run) if engine.graph is not None else run
        return self._graph[1:]

    def release(self) -> None:
        """Releases the device memory that forward passes hold in addition to loops."""
        self._graph = None

    def loop(self, count: int, steps: int) -> Tensor:
        return self.sampler.sample(count, steps=steps, batch_size=count, output="float")


class Plain:
    """The reference UNet in a plain PyTorch loop: channels-last, no synchronization."""

    def __init__(self, workload: Workload, compiled: bool = False) -> None:
        self.name = f"{'torch.compile' if compiled else 'plain PyTorch'} {workload.dtype}"
        self.workload, self.dtype = workload, workload.torch_dtype
        unet = channels_last(
            UNet(workload.unet.config).eval().requires_grad_(False).to(workload.device, self.dtype)
        )
        unet.load_state_dict(workload.unet.state_dict())
        self.model: Callable[..., Tensor] = _compiled(unet, workload) if compiled else unet

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x_t.to(self.dtype), t, *(() if labels is None else (labels,))).float()

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        w, c = self.workload, self.workload.checkpoint
        timesteps = choose_timesteps(len(c.schedule), steps)
        table = EXACT.table(c.schedule, "ddpm", timesteps, c.prediction, "fixed_large", c.clip)
        x, labels = w.x_T(count), w.labels(count)
        for t, row in zip(table.t, table.coef.tolist(), strict=True):
            x_0_x, x_0_out, clip, mean_x_0, mean_x, _, _, sigma, *_ = row
            out = self.forward(x, torch.full((count,), int(t), device=w.device), labels)
            x_0 = (x_0_x * x + x_0_out * out[:, : x.shape[1]]).clamp(-clip, clip)
            x = mean_x_0 * x_0 + mean_x * x + sigma * torch.randn_like(x)
        return x


def _compiled(model: nn.Module, workload: Workload) -> Callable[..., Tensor]:
    import torch._inductor.config as inductor

    # one for each batch size; beyond the limit torch silently runs eagerly
    torch._dynamo.config.recompile_limit = 1000
    on_gpu = workload.device.type == "cuda"
    inductor.freezing = not on_gpu  # weights as constants, packed for the CPU
    return torch.compile(model, mode="reduce-overhead" if on_gpu else None, dynamic=False)


class Diffusers:
    """diffusers' UNet2DModel and DDPMScheduler in a loop, with labels if there are classes."""

    def __init__(self, workload: Workload) -> None:
        try:
            from diffusers import DDPMScheduler
        except ImportError:
            raise Unavailable("diffusers is not installed", Cause.NOT_INSTALLED) from None
        self.name = f"diffusers {workload.dtype}"
        self.workload, self.dtype = workload, workload.torch_dtype
        model: Any = DiffusersUNet(workload.unet)
        self.model: Any = model.to(workload.device, self.dtype)
        if self.dtype != torch.float32:
            self.model.to(memory_format=torch.channels_last)
        c = workload.checkpoint
        config = scheduler_config(c.schedule, c.prediction, c.variance, c.clip)
        self.scheduler: Any = DDPMScheduler.from_config(config)

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x_t.to(self.dtype), t, labels).float()

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        labels = self.workload.labels(count)
        self.scheduler.set_timesteps(steps, device=self.workload.device)
        x = self.workload.x_T(count, self.dtype)
        for t in self.scheduler.timesteps:
            out = self.output(x, t.expand(count).contiguous(), labels)
            x = self.scheduler.step(out, t, x).prev_sample
        return x

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Network output for the scheduler."""
        return self.model(x, t, labels)


class DiffusersUNet(nn.Module):
    """UNet2DModel with the weights and the call signature of a `UNet`."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        if len(set(unet.config.levels_of("layers"))) > 1:
            raise Unavailable(
                f"has one layers_per_block for all levels; this network has {unet.config.layers}"
            )
        try:
            config = unet.config.to_diffusers()
        except ValueError as error:
            raise Unavailable(f"cannot express this network: {error}") from None
        self.unet: Any = UNet2DModel.from_config(config)
        self.unet.load_state_dict(unet.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]


class Pipeline(Diffusers):
    """`DDPMPipeline`, for networks without classes: the pipeline passes no labels."""

    def __init__(self, workload: Workload) -> None:
        if workload.unet.config.num_classes is not None:
            raise Unavailable("passes no labels, which this network needs")
        if workload.shape[1:] != workload.unet.config.size:
            raise Unavailable("samples images of the training size only")
        if workload.dtype == "bf16":
            raise Unavailable("returns images through numpy, which has no bf16")
        super().__init__(workload)
        import diffusers

        self.name = f"DDPMPipeline {workload.dtype}"
        pipeline: Any = diffusers.DDPMPipeline
        self.pipeline = pipeline(self.model.unet, self.scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        images = self.pipeline(batch_size=count, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


class OnnxRuntime(Diffusers):
    """diffusers' network, exported once and run by ONNX Runtime, with diffusers' scheduler."""

    label = "ONNX Runtime"

    def __init__(self, workload: Workload) -> None:
        if workload.device.type != "cpu" or workload.dtype != "fp32":
            raise Unavailable("is compared in fp32 on a CPU only")
        super().__init__(workload)
        self.name = f"{self.label} fp32"
        self._run: dict[int, Callable[..., Tensor]] = {}

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        batch = len(x_t)
        if batch not in self._run:
            self._run[batch] = self.session(self._exported(batch))
        return self._run[batch](*(v.numpy() for v in (x_t, t, labels) if v is not None))

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.forward(x, t, labels)

    def _exported(self, batch: int) -> Path:
        assert self.workload.folder is not None
        path = self.workload.folder / f"batch-{batch}.onnx"
        if not path.exists():
            try:
                torch.onnx.export(
                    self.model, self.workload.inputs(batch), path, dynamo=True, verbose=False
                )
            except ImportError as error:
                reason = f"export failed: {error}"
                raise Unavailable(reason, Cause.NOT_INSTALLED) from None
        return path

    def session(self, path: Path) -> Callable[..., Tensor]:
        try:
            import onnxruntime
        except ImportError:
            raise Unavailable("onnxruntime is not installed", Cause.NOT_INSTALLED) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        names = [i.name for i in session.get_inputs()]
        return lambda *args: torch.from_numpy(
            session.run(None, dict(zip(names, args, strict=True)))[0]
        )


class OpenVINO(OnnxRuntime):
    """The same export, run by OpenVINO in fp32."""

    label = "OpenVINO"

    def session(self, path: Path) -> Callable[..., Tensor]:
        try:
            import openvino
        except ImportError:
            raise Unavailable("openvino is not installed", Cause.NOT_INSTALLED) from None
        hints = dict(
            INFERENCE_PRECISION_HINT="f32",
            PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
        )
        request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
        return lambda *args: torch.from_numpy(np.array(request.infer(list(args))[0]))


BASELINES: dict[str, Callable[[Workload], Baseline]] = {
    "ddpm_fast": DdpmFast,
    "plain PyTorch": Plain,
    "torch.compile": lambda workload: Plain(workload, compiled=True),
    "diffusers": Diffusers,
    "DDPMPipeline": Pipeline,
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVINO,
}


def baseline(name: str, workload: Workload) -> Baseline:
    """Creates a baseline by its name in `BASELINES` or by its class `package.module:Class`.

    Raises:
        ValueError: No baseline has that name.
        Unavailable: It is not installed, or does not support the workload.
    """
    if name in BASELINES:
        return BASELINES[name](workload)
    module, _, attribute = name.partition(":")
    try:
        create: Callable[[Workload], Baseline] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        known = f"{', '.join(BASELINES)}, or package.module:Class"
        raise ValueError(f"baseline is {name!r}; expected one of {known}") from None
    return create(workload)
