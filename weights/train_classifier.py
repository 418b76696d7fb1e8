"""Trains the Fashion-MNIST classifier of `ddpm-fast eval --classifier`, in minutes on two cores.

Images are padded from 28x28 to 32x32, as for the diffusion network, and shifted by up to two
pixels. AdamW, one cycle of the learning rate, five epochs.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from ddpm_fast.data.datasets import load_images
from ddpm_fast.data.pixels import from_uint8
from ddpm_fast.evaluation.classifier import Classifier, save_classifier

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--data", default="/usr/share/datasets/fashion-mnist", help="Folder of IDX files."
)
parser.add_argument("--out", default="weights/fashion-mnist-classifier.safetensors", help="File.")
parser.add_argument("--epochs", type=int, default=5, help="Passes over the data.")
args = parser.parse_args()

train, test = (load_images(args.data, 32, "pad", split=split) for split in ("train", "test"))
images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
torch.manual_seed(0)
classifier = Classifier()
batch_size = 128
batches = len(images) // batch_size  # per epoch
steps = args.epochs * batches
optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
start = time.time()
for step in range(steps):
    if step % batches == 0:
        order = torch.randperm(len(images))
    indices = order[step % batches * batch_size :][:batch_size]
    x = from_uint8(images[indices])
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    x = x.roll((dy, dx), dims=(2, 3))  # the border of two pixels is black on every side
    loss = F.cross_entropy(classifier(x), labels[indices])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if (step + 1) % 200 == 0:
        seconds = time.time() - start
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
classifier.eval()
predicted = classifier.probabilities(torch.from_numpy(test.images)).argmax(1)
accuracy = (predicted == torch.from_numpy(test.labels)).float().mean()
save_classifier(args.out, classifier)
print(f"test accuracy {accuracy:.4f}, {time.time() - start:.0f} s -> {args.out}")
