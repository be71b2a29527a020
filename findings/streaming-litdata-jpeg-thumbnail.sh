#!/usr/bin/env bash
# mosaicml-streaming 0.13.0 and litdata 0.2.76 with Pillow 13.0.0: a JPEG that was opened and then shrunk in place by
# Pillow's thumbnail() is stored in its full size, because both writers copy the file it was opened from.
#
# Guess before: a 64×64 image given to MDSWriter's column "jpeg", or returned by the function of litdata's optimize, is
# 64×64 when it is read.
# Seen: both read 256×256. The image in memory has the size (64, 64), but it still is a JpegImageFile with a filename.
# What resize() returns is a new image and is stored as 64×64, and so is what thumbnail() makes of a PNG. litdata's page
# names JpegImageFile as a way to store JPEGs, and advises to resize, without a word about the file that it copies.
#
# PYTHON names an interpreter with torch 2.14.1, torchvision 0.29.1 and numpy; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, torchvision" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" mosaicml-streaming==0.13.0 litdata==0.2.76 \
  pillow==13.0.0 numpy==2.1.3 boto3 botocore jmespath python-dateutil six s3transfer urllib3 requests certifi idna \
  charset-normalizer Brotli zstd python-snappy==0.7.3 cramjam xxhash catalogue==2.0.10 tifffile obstore filelock tqdm \
  lightning-utilities==0.15.3 packaging typing_extensions 2>/dev/null
cat > "$folder/store.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import litdata
import numpy as np
from PIL import Image
from streaming import MDSWriter, StreamingDataset

folder = Path(sys.argv[1])


def shrunk(name):
    image = Image.open(folder / name)
    image.thumbnail((64, 64))
    return image


def resized(name):
    return Image.open(folder / name).resize((64, 64))


def thumbnail(name):
    return {"image": shrunk(name)}


def by_streaming(image, out):
    with MDSWriter(out=str(out), columns={"image": "jpeg"}) as writer:
        writer.write({"image": image})
    return StreamingDataset(local=str(out), batch_size=1)[0]["image"].size


def by_litdata(out):
    litdata.optimize(thumbnail, ["a.jpg"], str(out), chunk_size=1, num_workers=1, verbose=False)
    return tuple(litdata.StreamingDataset(str(out))[0]["image"].shape)


if __name__ == "__main__":
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(pixels).save(folder / name)
    print(*(f"{name} {version(name)}" for name in ("mosaicml-streaming", "litdata", "pillow")))
    seen = [by_streaming(shrunk("a.jpg"), folder / "mds"), by_streaming(resized("a.jpg"), folder / "resized"),
            by_streaming(shrunk("a.png"), folder / "png"), by_litdata(folder / "lit")]
    print(f"in memory after thumbnail(): {shrunk('a.jpg').size}")
    print("read from MDS: thumbnail() of a JPEG {}, resize() of it {}, thumbnail() of a PNG {}".format(*seen))
    print(f"read from litdata: thumbnail() of a JPEG {seen[3]}")
    assert seen == [(256, 256), (64, 64), (64, 64), (3, 256, 256)], "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/store.py" "$folder"
