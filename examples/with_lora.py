"""The pool where diffusers trains a text-to-image LoRA by peft: batches of one, buckets of three shapes, tiny networks.

One line differs from diffusers' own training; "was:" shows what it replaces. A coarse pool for each caption serves all
shapes. (Many texts are put into clusters by their embeddings, and the pool is given those: docs/conditions.md.)

    python examples/with_lora.py        seconds on two cores; it downloads nothing
"""
import sys
from functools import partial
from statistics import fmean

import torch
import torch.nn.functional as F

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare_lengths, run
from dansm.tiny.digits import load_digits

try:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")

CAPTIONS = torch.tensor([[0, 2, 1], [0, 3, 1]])  # tokens: begin, "thin" or "bold", end
BUCKETS = (1, 8, 8), (1, 8, 12), (1, 12, 8)
TEXT = dict(vocab_size=4, bos_token_id=0, eos_token_id=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
UNET = dict(in_channels=1, out_channels=1, block_out_channels=(16,), norm_num_groups=8, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))


def train(images: torch.Tensor, steps: int, match_size: int, seed: int) -> dict:
    """Returns the mean length of the paths. images: (N, 1, 8, 8). match_size 1: random pairs."""
    torch.manual_seed(seed)
    scheduler, text_encoder, unet = DDPMScheduler(), CLIPTextModel(CLIPTextConfig(**TEXT)), UNet2DConditionModel(**UNET)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer, lengths = torch.optim.AdamW(filter(lambda weight: weight.requires_grad, unet.parameters()), lr=1e-3), []
    pool = NoisePool(match_size, BUCKETS[0], grid=(4, 4), groups=2, seed=seed)
    for step in range(steps):
        latents = F.interpolate(images[torch.randint(len(images), (1,))], BUCKETS[step % 3][1:])
        caption = (latents.mean((1, 2, 3)) > -0.4).long()
        noise = pool(latents, caption)  # was: noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (1,))
        encoder_hidden_states = text_encoder(CAPTIONS[caption])[0]
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states).sample
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(path_length(latents, noise))
    return {"path length": fmean(lengths)}


def main(steps: Steps = 120, seeds: Seeds = 1, match_size: MatchSize = 100):
    return compare_lengths(partial(train, load_digits(), steps), seeds, f"LoRA, {steps:,} steps of one", match_size)


if __name__ == "__main__":
    run(main)
