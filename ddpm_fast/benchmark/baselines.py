"""What a user would run instead, behind one face: a forward pass and a whole sampling loop, with the same weights.

A loop is the engine's own: its scheduler, its noise, its way to go from step to step. Whoever wants another engine compared writes
a class like these and names it `package.module:Class`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.diffusers import scheduler_config
from ..diffusion.presets import EXACT
from ..diffusion.timesteps import choose_timesteps
from ..engines.fused.calibration import Calibration
from ..models.unet import UNet, channels_last
from ..sampling.sampler import Sampler

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Missing(Exception):
    """This engine cannot be had here, or does not do what is asked: the reason, for people."""


@dataclass(frozen=True)
class Subject:
    """What all engines run.

    checkpoint  its network in fp32, on the device
    dtype       of the network's arithmetic, a key of `engines.base.DTYPES`
    folder      where an engine may keep what it makes once
    size        (H, W); default: as trained
    calibration of fp8 layers
    """

    checkpoint: Checkpoint
    dtype: str = "fp32"
    folder: Path | None = None
    size: tuple[int, int] | None = None
    calibration: Calibration | None = None

    @property
    def unet(self) -> UNet:
        return self.checkpoint.unet

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def shape(self) -> tuple[int, int, int]:
        size = self.size or self.unet.config.size
        if size is None:
            raise ValueError("the network names no sample_size; give a size (height, width)")
        return self.unet.config.in_channels, *size

    @property
    def half(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise Missing(f"does not compute in {self.dtype}")
        return DTYPES[self.dtype]

    def sampler(self, engine: str = "auto", dtype: str | None = None, model: Callable[..., Tensor] | None = None) -> Sampler:
        """For this network, or for another function of its kind."""
        c = self.checkpoint
        rules = (c.prediction, c.variance, c.clip, self.unet.config.num_classes, self.device)
        return Sampler(model or c.unet, c.schedule, self.shape, *rules, engine, dtype or self.dtype, self.calibration)

    def labels(self, count: int) -> Tensor | None:
        classes = self.unet.config.num_classes
        return None if classes is None else torch.arange(count, device=self.device) % classes

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """x_t, t and, where there are classes, labels: the same for every engine."""
        g = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, *self.shape, generator=g).contiguous(memory_format=torch.channels_last)
        t = torch.randint(0, len(self.checkpoint.schedule), (batch,), generator=g)
        labels = self.labels(batch)
        return x.to(self.device), t.to(self.device), *(() if labels is None else (labels,))

    def x_T(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise, as a user of plain PyTorch draws it."""
        x = torch.randn(count, *self.shape, device=self.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)


class Baseline(Protocol):
    """forward(x_t [B, C, H, W] fp32, t int64 [B], labels int64 [B] or None) -> the network's output, fp32
    loop(count, steps) -> images [count, C, H, W], floating, drawn from noise in so many steps
    """

    name: str

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor: ...
    def loop(self, count: int, steps: int) -> Tensor: ...


class Ours:
    """`Sampler`, with the engine that it chooses, or another of its own."""

    def __init__(self, subject: Subject, engine: str = "auto") -> None:
        self.sampler = subject.sampler(engine)
        self.name = f"ddpm_fast {self.sampler.engine.name} {subject.dtype}"
        self.reason = self.sampler.engine.reason
        self._graph: tuple[int, Any, Any] | None = None

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        given = (x_t, t) if labels is None else (x_t, t, labels)
        engine: Any = self.sampler.engine
        if engine.name == "cpu":
            return engine(*given)
        if engine.name != "fused":
            return engine.call(x_t.to(self.sampler.dtype), *given[1:]).float()
        fused, graph = self._captured(engine, given)
        plan = fused.load(*given)
        graph()
        return plan.maps[plan.out].pixels.float().clone()

    def _captured(self, engine: Any, given: tuple[Tensor, ...]) -> tuple[Any, Callable[[], object]]:
        """The network alone as one graph: what `Sampler` captures is the whole step."""
        batch = len(given[0])
        if self._graph is None or self._graph[0] != batch:
            self.forget()
            fused = engine.network(batch)
            run = fused.load(*given).run
            self._graph = batch, fused, engine.graph(run) if engine.graph is not None else run
        return self._graph[1:]

    def forget(self) -> None:
        """Gives back what forward passes hold besides what loops do."""
        self._graph = None

    def loop(self, count: int, steps: int) -> Tensor:
        return self.sampler.sample(count, steps=steps, batch_size=count, output="float")


class Plain:
    """The usual loop in plain PyTorch, as fast as it gets without kernels of one's own: channels-last, no wait for the device."""

    def __init__(self, subject: Subject, compiled: bool = False) -> None:
        self.name = f"torch.compile {subject.dtype}" if compiled else f"plain PyTorch {subject.dtype}"
        self.subject, self.dtype = subject, subject.half
        unet = channels_last(UNet(subject.unet.config).eval().requires_grad_(False).to(subject.device, self.dtype))
        unet.load_state_dict(subject.unet.state_dict())
        self.model: Callable[..., Tensor] = _compiled(unet, subject) if compiled else unet

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x_t.to(self.dtype), t, *(() if labels is None else (labels,))).float()

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        s, c = self.subject, self.subject.checkpoint
        table = EXACT.table(c.schedule, "ddpm", choose_timesteps(len(c.schedule), steps), c.prediction, "fixed_large", c.clip)
        x, labels = s.x_T(count), s.labels(count)
        for at, row in zip(table.t, table.coef.tolist(), strict=True):
            x_0_x, x_0_out, clip, mean_x_0, mean_x, _, _, sigma, *_ = row
            out = self.forward(x, torch.full((count,), int(at), device=s.device), labels)[:, : x.shape[1]]
            x = mean_x_0 * (x_0_x * x + x_0_out * out).clamp(-clip, clip) + mean_x * x + sigma * torch.randn_like(x)
        return x


def _compiled(model: nn.Module, subject: Subject) -> Callable[..., Tensor]:
    if subject.folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(subject.folder / "inductor")
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = 1000  # one for each batch size; past its limit it would go on eagerly, without a word
    on_gpu = subject.device.type == "cuda"
    inductor.freezing = not on_gpu  # weights as constants, laid out for the CPU's products
    return torch.compile(model, mode="reduce-overhead" if on_gpu else None, dynamic=False)


class Diffusers:
    """diffusers' network and scheduler in a loop that passes labels where the network has classes."""

    def __init__(self, subject: Subject) -> None:
        try:
            from diffusers import DDPMScheduler
        except ImportError:
            raise Missing("diffusers is not installed") from None
        self.name, self.subject, self.dtype = f"diffusers {subject.dtype}", subject, subject.half
        model: Any = DiffusersUNet(subject.unet)
        self.model: Any = model.to(subject.device, self.dtype)
        if self.dtype != torch.float32:
            self.model.to(memory_format=torch.channels_last)
        c = subject.checkpoint
        config = scheduler_config(c.schedule, c.prediction, c.variance, c.clip)
        self.scheduler: Any = DDPMScheduler.from_config(config)

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(x_t.to(self.dtype), t, labels).float()

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        labels = self.subject.labels(count)
        self.scheduler.set_timesteps(steps, device=self.subject.device)
        x = self.subject.x_T(count, self.dtype)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.output(x, t.expand(count).contiguous(), labels), t, x).prev_sample
        return x

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the scheduler's step is given."""
        return self.model(x, t, labels)


class DiffusersUNet(nn.Module):
    """UNet2DModel with our weights, called as ours is."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        if len(set(unet.config.levels_of("layers"))) > 1:
            raise Missing(f"has one layers_per_block for all levels; this network has {unet.config.layers}")
        self.unet: Any = UNet2DModel.from_config(unet.config.to_diffusers())
        self.unet.load_state_dict(unet.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]


class Pipeline(Diffusers):
    """`DDPMPipeline`, for networks without classes: it passes no labels."""

    def __init__(self, subject: Subject) -> None:
        if subject.unet.config.num_classes is not None:
            raise Missing("passes no labels, which this network needs")
        if subject.shape[1:] != subject.unet.config.size:
            raise Missing("draws images of the size that the network was trained at")
        if subject.dtype == "bf16":
            raise Missing("hands images over through numpy, which has no bf16")
        super().__init__(subject)
        import diffusers

        self.name = f"DDPMPipeline {subject.dtype}"
        pipeline: Any = diffusers.DDPMPipeline
        self.pipeline = pipeline(self.model.unet, self.scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def loop(self, count: int, steps: int) -> Tensor:
        images = self.pipeline(batch_size=count, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


class OnnxRuntime(Diffusers):
    """diffusers' network, exported once and run by ONNX Runtime; diffusers' scheduler."""

    label = "ONNX Runtime"

    def __init__(self, subject: Subject) -> None:
        if subject.device.type != "cpu" or subject.dtype != "fp32":
            raise Missing("compared in fp32 on a CPU only")
        super().__init__(subject)
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
        assert self.subject.folder is not None
        path = self.subject.folder / f"batch-{batch}.onnx"
        if not path.exists():
            try:
                torch.onnx.export(self.model, self.subject.inputs(batch), path, dynamo=True, verbose=False)
            except ImportError as error:
                raise Missing(f"cannot be exported to: {error}") from None
        return path

    def session(self, path: Path) -> Callable[..., Tensor]:
        try:
            import onnxruntime
        except ImportError:
            raise Missing("onnxruntime is not installed") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda *given: torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])


class OpenVINO(OnnxRuntime):
    """The same export, run by OpenVINO in fp32."""

    label = "OpenVINO"

    def session(self, path: Path) -> Callable[..., Tensor]:
        try:
            import openvino
        except ImportError:
            raise Missing("openvino is not installed") from None
        hints = dict(INFERENCE_PRECISION_HINT="f32", PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=torch.get_num_threads())
        request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
        return lambda *given: torch.from_numpy(np.array(request.infer(list(given))[0]))


BASELINES: dict[str, Callable[[Subject], Baseline]] = {
    "ddpm_fast": Ours,
    "plain PyTorch": Plain,
    "torch.compile": lambda subject: Plain(subject, compiled=True),
    "diffusers": Diffusers,
    "DDPMPipeline": Pipeline,
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVINO,
}


def baseline(name: str, subject: Subject) -> Baseline:
    """The engine of that name, or of that class `package.module:Class`. ValueError for none; `Missing` where it cannot be had."""
    if name in BASELINES:
        return BASELINES[name](subject)
    module, _, attribute = name.partition(":")
    try:
        made: Callable[[Subject], Baseline] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        known = f"{', '.join(BASELINES)}, or package.module:Class"
        raise ValueError(f"baseline {name!r}; expected one of {known}") from None
    return made(subject)
