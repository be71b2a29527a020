#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process on a machine with CPUs only, and says
# nothing of it.
#
# Expected, by the script that was written for it: two processes, as its help says: "The total number of processes to be
# launched in parallel". (Noted down after it was seen.)
# Seen: the script runs once, as process 0 of 1, with no WORLD_SIZE. launch_command has no way of several processes on
# CPUs: what is not multi_gpu, tpu and the like goes to simple_launcher. torchrun with the same script starts two, and
# Accelerator takes them.
#
# PYTHON names an interpreter with torch 2.14.1 and what accelerate needs; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, numpy, packaging, psutil, yaml, huggingface_hub, safetensors" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy packaging psutil pyyaml huggingface_hub safetensors 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" accelerate==1.15.0 2>/dev/null
cat > "$folder/say.py" <<'PY'
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}\n", end="", flush=True)
PY
export PYTHONPATH="$folder/site" CUDA_VISIBLE_DEVICES= HF_HOME="$folder"
launched=$("$python" -m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no \
  --dynamo_backend no "$folder/say.py" 2>/dev/null)
by_torchrun=$("$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/say.py" 2>/dev/null | sort)
echo "accelerate launch --cpu --num_processes 2: $launched"
echo "torchrun --nproc-per-node 2: $(echo $by_torchrun)"
[ "$launched" = "process 0 of 1" ] && [ "$(echo $by_torchrun)" = "process 0 of 2 process 1 of 2" ]
