#!/usr/bin/env bash
# lightning 2.6.6: with two optimizers (an autoencoder and its discriminator) EMAWeightAveraging with an even
# update_every_n_steps never updates its average, and the end of fit replaces the trained weights with the initial ones.
#
# Guess before: after fit the weights are an average of trained ones, whatever the number of optimizers.
# Seen: weights that go from 0 to 1 in 100 batches. With one optimizer the average ends within 0.2 % of 1 for each
# interval; with two it does for 1 and 3, and is 0 for 2, 4 and 10, without a warning: trainer.global_step counts the
# steps of both optimizers, so the callback, which looks after each batch, sees the odd steps 1, 3, 5 … alone. A
# checkpoint saved during the training has the initial weights as its state_dict too; the trained ones are under
# current_model_state.
#
# PYTHON names an interpreter with torch 2.14.1; without one it is installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" lightning==2.6.6 pytorch-lightning==2.6.6 \
  torchmetrics==1.9.0 lightning-utilities==0.15.3 fsspec packaging PyYAML tqdm typing_extensions 2>/dev/null
cat > "$folder/average.py" <<'PY'
import logging
import sys
import warnings

warnings.simplefilter("ignore")
import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Pair(lightning.LightningModule):
    """Two weights, each drawn from 0 to 1 by an optimizer of its own, or both by one."""

    def __init__(self, optimizers):
        super().__init__()
        self.automatic_optimization = False
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.count = optimizers

    def configure_optimizers(self):
        if self.count == 1:
            return torch.optim.SGD(self.weights, lr=0.1)
        return [torch.optim.SGD([weight], lr=0.1) for weight in self.weights]

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers if self.count == 2 else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(sum((weight - 1).square().sum() for weight in self.weights))
            optimizer.step()
        self.trained = float(self.weights[0])

    def on_train_epoch_end(self):
        self.trainer.save_checkpoint(sys.argv[1])


print("lightning", lightning.__version__)
ends = {}
for optimizers in (1, 2):
    for interval in (1, 2, 3, 4, 10):
        model = Pair(optimizers)
        average = EMAWeightAveraging(decay=0.5, update_every_n_steps=interval)
        trainer = lightning.Trainer(max_epochs=1, callbacks=[average], accelerator="cpu", logger=False,
                                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(100, 1)))
        ends[optimizers, interval] = float(model.weights[0])
        print(f"{optimizers} optimizers, update_every_n_steps={interval}: trained to {model.trained:.3f}, "
              f"after fit {ends[optimizers, interval]:.3f}")
saved = torch.load(sys.argv[1], weights_only=False)
kept = [float(saved[part]["weights.0"]) for part in ("state_dict", "current_model_state")]
print("the last checkpoint of these: state_dict {:.3f}, current_model_state {:.3f}".format(*kept))
wrong = sorted(key for key, end in ends.items() if end == 0)
assert wrong == [(2, 2), (2, 4), (2, 10)] and kept[0] == 0 and kept[1] > 0.99, "the behaviour has changed"
assert all(end > 0.99 for key, end in ends.items() if key not in wrong), "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/average.py" "$folder/saved.ckpt"
