"""The examples of docs/embedding.md run as they are printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(), re.S)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """The shipped network with one class embedding folded into its time MLP."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("unconditional")
    source = ROOT / "weights" / "fashion-mnist-32"
    unet = diffusers.UNet2DModel.from_pretrained(source, subfolder="unet")
    folded = diffusers.UNet2DModel.from_config(dict(unet.config) | dict(num_class_embeds=None))
    weights = unet.state_dict()
    weights["time_embedding.linear_2.bias"] += weights.pop("class_embedding.weight")[3]
    folded.load_state_dict(weights)
    diffusers.DDPMPipeline(folded, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, unconditional):
    example = EXAMPLES[number]
    conditional = "label" in example
    folder = ROOT / "weights" / "fashion-mnist-32" if conditional else unconditional
    torch.manual_seed(0)
    exec(compile(example, f"docs/embedding.md, example {number}", "exec"), dict(folder=folder))
