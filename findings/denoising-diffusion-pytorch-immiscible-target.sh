#!/usr/bin/env bash
# denoising-diffusion-pytorch 2.3.4: GaussianDiffusion(immiscible=True) assigns noises to the images it adds them to, but
# trains the network to predict the noises in the order before the assignment.
#
# Guess before: a network that predicts exactly the noise in its input has a loss of 0, with and without immiscible.
# Seen: without it the loss is 0; with it 2.0, as of a network that predicts an independent noise. The permutation is made inside q_sample, on a local name, and p_losses keeps the noise as it was for its target.
#
# PYTHON names an interpreter with torch 2.14.1 and torchvision; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, torchvision, scipy, einops, tqdm" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 scipy einops tqdm 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3 \
  accelerate==1.15.0 pytorch-fid==0.3.0 2>/dev/null
cat > "$folder/loss.py" <<'PY'
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import nn

class Perfect(nn.Module):
    """Predicts the very noise in x_t, as it is told the images."""
    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
    def forward(self, x, t, x_self_cond=None):
        signal = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - signal.sqrt() * images) / (1 - signal).sqrt()

losses = {}
for immiscible in (False, True):
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    diffusion = GaussianDiffusion(Perfect(), image_size=8, objective="pred_noise", auto_normalize=False,
                                  immiscible=immiscible)
    t = torch.randint(100, 900, (64,))
    losses[immiscible] = diffusion.p_losses(images, t).item()
    print(f"immiscible={immiscible}: loss of a perfect predictor {losses[immiscible]:.3f}")
assert losses[False] < 1e-6 and losses[True] > 1, "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/loss.py"
