"""Schedulers of diffusers with a fused `step`: one kernel instead of some fifty operations.

Drop-in replacements of diffusers' classes of the same names, also in saved folders. Coefficients
are computed in fp32 in the order of diffusers, for the row that is asked for. What one row of the
step table cannot express runs the `step` of diffusers: dynamic thresholding, learned variances in
the DDPMScheduler form "learned", DPM-Solver of order 3 or without "++", other than 4-D samples.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..kernels.ddpm_step import COLUMNS, ddpm_step

FIXED = ("fixed_small", "fixed_small_log", "fixed_large")


def fused_step(
    sample: Tensor,
    out: Tensor,
    columns: dict[str, Any],
    z: Tensor | None,
    learned: bool = False,
    old: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step with one row of coefficients.

    Args:
        sample: x_t [B, C, H, W] floating.
        out: Output of the network, [B, C, H, W], or [B, 2C, H, W] if `learned`.
        columns: Coefficients by name, see `kernels.ddpm_step.COLUMNS`; absent ones are 0.
        z: Noise like `sample`, or None for none.
        learned: The network predicts the variance.
        old: x_0 of the step before, fp32 like `sample`; not modified.

    Returns:
        (x_{t-1}, x_0), each in the dtype that PyTorch gives to sums of `sample` and `out`.
    """
    dtype = torch.result_type(sample, out)
    row = torch.tensor([[float(columns.get(name, 0)) for name in COLUMNS]], dtype=torch.float32)
    x = _dense(sample).clone(memory_format=torch.preserve_format)
    if z is None:
        z = torch.zeros_like(x)
    x_0 = torch.zeros_like(x) if old is None else torch.empty_like(x).copy_(old)
    index = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    noise = torch.empty_like(x).copy_(z)
    ddpm_step(x, _dense(out, out.dtype), row.to(x.device), index, index, index, learned, x_0, noise)
    return x.to(dtype), x_0.to(dtype)


def _dense(v: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor in channels-first or channels-last memory."""
    v = v.to(dtype)
    is_dense = v.is_contiguous() or v.is_contiguous(memory_format=torch.channels_last)
    return v if is_dense else v.contiguous()


def _x_0_columns(prediction: str, signal: Tensor, noise: Tensor) -> dict[str, Any]:
    """signal = alpha_bar^0.5, noise = (1 - alpha_bar)^0.5."""
    if prediction == "epsilon":
        return dict(x_0_x=1 / signal, x_0_out=-noise / signal)
    if prediction == "sample":
        return dict(x_0_out=1)
    return dict(x_0_x=signal, x_0_out=-noise)


def _clip(config: Any) -> float:
    return config.clip_sample_range if config.clip_sample else float("inf")


def _is_supported(scheduler: Any, sample: Tensor, out: Tensor) -> bool:
    predictions = ("epsilon", "sample", "v_prediction")
    return (
        sample.ndim == 4
        and out.ndim == 4
        and sample.dtype.itemsize <= 4
        and not scheduler.config.thresholding
        and scheduler.config.prediction_type in predictions
        and not (torch.is_grad_enabled() and (sample.requires_grad or out.requires_grad))
    )


class DDPMScheduler(diffusers.DDPMScheduler):
    """DDPMScheduler of diffusers with a fused `step` (Ho et al. 2020, eq. 7)."""

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """See diffusers.DDPMScheduler.step."""
        t, c = int(timestep), sample.shape[1]
        learned = self.variance_type == "learned_range"
        supported = learned or self.variance_type in FIXED
        supported &= model_output.shape[1] == (2 * c if learned else c)
        if not (supported and _is_supported(self, sample, model_output)):
            return super().step(model_output, timestep, sample, generator, return_dict)
        z = None
        if t > 0:
            shape, kwargs = (len(sample), *sample.shape[1:]), dict(dtype=model_output.dtype)
            z = randn_tensor(shape, generator=generator, device=model_output.device, **kwargs)
        columns = self._columns(t, learned)
        x, x_0 = fused_step(sample, model_output, columns, z, learned)
        return DDPMSchedulerOutput(x, x_0) if return_dict else (x, x_0)

    def _columns(self, t: int, learned: bool) -> dict[str, Any]:
        prev_t = int(self.previous_timestep(t))
        abar = self.alphas_cumprod[t].cpu()
        abar_prev = self.alphas_cumprod[prev_t].cpu() if prev_t >= 0 else self.one.cpu()
        alpha = abar / abar_prev
        beta = 1 - alpha
        columns = _x_0_columns(self.config.prediction_type, abar**0.5, (1 - abar) ** 0.5)
        columns |= dict(
            clip=_clip(self.config),
            mean_x_0=abar_prev**0.5 * beta / (1 - abar),
            mean_x=alpha**0.5 * (1 - abar_prev) / (1 - abar),
        )
        if t > 0 and learned:
            variance = torch.clamp((1 - abar_prev) / (1 - abar) * beta, min=1e-20)
            columns |= dict(sigma=1, log_sigma_min=variance.log() / 2, log_sigma_max=beta.log() / 2)
        elif t > 0:
            variance = self._get_variance(t)
            is_sigma = self.variance_type == "fixed_small_log"
            columns["sigma"] = variance if is_sigma else variance**0.5
        return columns


class DDIMScheduler(diffusers.DDIMScheduler):
    """DDIMScheduler of diffusers with a fused `step` (Song et al. 2021, eqs. 12 and 16)."""

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """See diffusers.DDIMScheduler.step."""
        if (
            self.num_inference_steps is None
            or (eta > 0 and generator is not None and variance_noise is not None)
            or model_output.shape != sample.shape
            or not _is_supported(self, sample, model_output)
        ):
            options = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *options)
        z = variance_noise if eta > 0 else None
        if eta > 0 and z is None:
            kwargs = dict(device=model_output.device, dtype=model_output.dtype)
            z = randn_tensor(model_output.shape, generator=generator, **kwargs)
        columns = self._columns(int(timestep), eta, bool(use_clipped_model_output))
        x, x_0 = fused_step(sample, model_output, columns, z)
        return DDIMSchedulerOutput(x, x_0) if return_dict else (x, x_0)

    def _columns(self, t: int, eta: float, use_clipped_model_output: bool) -> dict[str, Any]:
        prev_t = t - self.config.num_train_timesteps // self.num_inference_steps
        abar = self.alphas_cumprod[t].cpu()
        abar_prev = (self.alphas_cumprod[prev_t] if prev_t >= 0 else self.final_alpha_cumprod).cpu()
        signal, noise = abar**0.5, (1 - abar) ** 0.5
        sigma = eta * self._get_variance(t, prev_t).cpu() ** 0.5
        toward_eps = (1 - abar_prev - sigma**2) ** 0.5
        prediction = self.config.prediction_type
        columns = _x_0_columns(prediction, signal, noise) | dict(clip=_clip(self.config))
        columns |= dict(sigma=sigma if eta > 0 else 0, mean_x_0=abar_prev**0.5)
        if use_clipped_model_output:  # eps = (x_t - signal x_0) / noise
            columns["mean_x_0"] = abar_prev**0.5 - toward_eps * signal / noise
            eps_x, eps_out = 1 / noise, 0
        elif prediction == "epsilon":
            eps_x, eps_out = 0, 1
        elif prediction == "sample":
            eps_x, eps_out = 1 / noise, -signal / noise
        else:
            eps_x, eps_out = noise, signal
        return columns | dict(mean_x=toward_eps * eps_x, mean_out=toward_eps * eps_out)


class DPMSolverMultistepScheduler(diffusers.DPMSolverMultistepScheduler):
    """DPMSolverMultistepScheduler of diffusers with a fused `step` (Lu et al. 2022b)."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """See diffusers.DPMSolverMultistepScheduler.step."""
        c = self.config
        if (
            self.num_inference_steps is None
            or c.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++")
            or c.solver_order > 2
            or c.use_flow_sigmas
            or model_output.shape != sample.shape
            or not _is_supported(self, sample, model_output)
        ):
            options = (generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *options)
        if self.step_index is None:
            self._init_step_index(timestep)
        z = None
        if c.algorithm_type.startswith("sde"):
            z = variance_noise
            if z is None:
                kwargs = dict(device=model_output.device, dtype=torch.float32)
                z = randn_tensor(model_output.shape, generator=generator, **kwargs)
        columns = self._columns()
        x, x_0 = fused_step(
            sample,
            model_output,
            columns,
            z,
            old=self.model_outputs[-1] if columns["mean_old"] else None,
        )
        self.model_outputs = [*self.model_outputs[1:], x_0]
        self.lower_order_nums = min(self.lower_order_nums + 1, c.solver_order)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _columns(self) -> dict[str, Any]:
        c, i = self.config, self.step_index
        before, now, then = (self.sigmas[k] for k in (max(i - 1, 0), i, i + 1))
        (signal_b, noise_b), (signal, noise), (signal_to, noise_to) = (
            self._sigma_to_alpha_sigma_t(v) for v in (before, now, then)
        )
        lam_b, lam, lam_to = (
            torch.log(a) - torch.log(s)
            for a, s in ((signal_b, noise_b), (signal, noise), (signal_to, noise_to))
        )
        h, sde = lam_to - lam, c.algorithm_type.startswith("sde")
        gain = signal_to * (1 - torch.exp(-2 * h if sde else -h))
        decay = torch.exp(-h) if sde else 1
        columns = _x_0_columns(c.prediction_type, signal, noise) | dict(clip=float("inf"))
        columns["mean_x"] = noise_to / noise * decay
        if sde:
            columns["sigma"] = noise_to * torch.sqrt(1 - torch.exp(-2 * h))
        weight = torch.zeros(())
        if not self._is_first_order():
            exponent = 2 * h if sde else h
            heun = signal_to * ((torch.exp(-exponent) - 1) / exponent + 1)
            weight = (gain / 2 if c.solver_type == "midpoint" else heun) * h / (lam - lam_b)
        return columns | dict(mean_x_0=gain + weight, mean_old=-weight)

    def _is_first_order(self) -> bool:
        c, count = self.config, len(self.timesteps)
        final = self.step_index == count - 1 and (
            c.euler_at_final
            or (c.lower_order_final and count < 15)
            or c.final_sigmas_type == "zero"
        )
        return c.solver_order == 1 or self.lower_order_nums < 1 or final


def _unpickled(name: str) -> Any:
    kind = globals()[name]
    return kind.__new__(kind)


def _reduce(self: Any, protocol: int) -> Any:
    return _unpickled, (type(self).__name__,), vars(self)


for _fused in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
    _original: Any = getattr(diffusers, _fused.__name__)
    _fused.step.computes = _original.step  # type: ignore[attr-defined]
    # saved folders name diffusers' class, so that they load without ddpm_fast
    _fused.__module__ = _original.__module__
    _fused.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]
