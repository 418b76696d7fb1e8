"""Trains the provisional Fashion-MNIST network: `python weights/train_provisional.py --seconds 1200`.

Class-conditional, 28x28 padded to 32x32, eps-prediction, simple loss (Ho et al. 2020, algorithm 1), AdamW, EMA.
Data: Debian's package dataset-fashion-mnist. The state is kept in --run, and a killed run goes on from there; the EMA
weights end up in --out as a diffusers folder.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ddpm_fast import NoiseSchedule, UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    channels=(16, 32, 64),
    layers=1,
    attention=(False, False, True),
    head_dim=32,
    norm_groups=8,
    downsample_padding=1,
    num_classes=10,
)
DATA = Path("/usr/share/datasets/fashion-mnist")


def read_idx(name: str, header: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(gzip.decompress((DATA / name).read_bytes()), np.uint8, offset=header).copy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200, help="training time, all runs together")
    parser.add_argument("--run", type=Path, default=Path("weights/.run"), help="where the resumable state is kept")
    parser.add_argument("--out", type=Path, default=Path("weights/fashion-mnist-32"))
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    images = read_idx("train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    labels = read_idx("train-labels-idx1-ubyte.gz", 8).long()
    x_all = F.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    alpha_bar = torch.from_numpy(NoiseSchedule.linear().alpha_bar.copy()).float()

    torch.manual_seed(0)
    unet = UNet(CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    ema = {k: v.clone() for k, v in unet.state_dict().items()}
    step, spent, losses = 0, 0.0, []
    state_file = args.run / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        unet.load_state_dict(state["unet"]), optimizer.load_state_dict(state["optimizer"])
        ema, step, spent, losses = state["ema"], state["step"], state["spent"], state["losses"]
    generator = torch.Generator().manual_seed(step)

    def save() -> None:
        args.run.mkdir(parents=True, exist_ok=True)
        state = dict(unet=unet.state_dict(), optimizer=optimizer.state_dict(), ema=ema, step=step, spent=spent, losses=losses)
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    began, saved, total = time.time() - spent, time.time(), 0.0
    while spent < args.seconds:
        pick = torch.randint(0, len(x_all), (args.batch_size,), generator=generator)
        t = torch.randint(0, len(alpha_bar), (args.batch_size,), generator=generator)
        x_0 = x_all[pick]
        eps = torch.randn(x_0.shape, generator=generator)
        bar = alpha_bar[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(unet(bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, t, labels[pick]), eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        # warm-up, then constant, then linearly to zero over the last third of the time
        rate = 1e-3 * min(1.0, (step + 1) / 200, 3 * max(0.0, 1 - spent / args.seconds))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        for k, v in unet.state_dict().items():
            ema[k].lerp_(v, 1 - decay)
        total, spent = total + loss.item(), time.time() - began
        if step % 100 == 0:
            losses.append((step, round(spent), total / 100))
            print(f"step {step}  {spent:.0f} s  loss {total / 100:.4f}  {step * args.batch_size / spent:.0f} img/s", flush=True)
            total = 0.0
        if time.time() - saved > 120:
            save()
            saved = time.time()
    save()

    from ddpm_fast.checkpoint import save_pretrained

    unet.load_state_dict(ema)
    save_pretrained(args.out, unet, NoiseSchedule.linear())
    print(f"{step} steps of {args.batch_size}, {spent:.0f} s -> {args.out}")


if __name__ == "__main__":
    main()
