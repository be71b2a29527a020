"""A run killed by kill -9 in the middle of saves resumes from the last whole checkpoint, to the very same end."""

import sys

import pytest
from support import TINY, make_images
from train.soak import compare_with_never_stopped, soak

SLOW_SAVES = """if True:
    import os, time, dansm
    from dansm.scale.model import checkpoint
    bring_to_disk = os.fsync
    os.fsync = lambda descriptor: time.sleep(0.2) or bring_to_disk(descriptor)  # so that a kill meets a save
    dansm.NETWORKS["small"] = {network}
    dansm.main({arguments})
"""


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_from_its_last_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("train.soak.LATEST", 0.5)
    images = make_images(tmp_path / "images", count=24, width=8, height=8)

    def train_into(out):
        def command(steps):
            arguments = ["train", images, "--network", "small", "--batch", 8, "--match-size", 10, "--sample-steps", 1,
                         "--save-minutes", 0.001 if steps == 10**9 else 5, "--device", "cpu", "--steps", steps, "--out",
                         out]
            return [sys.executable, "-c", SLOW_SAVES.format(network=TINY, arguments=[*map(str, arguments)])]

        return command

    out, beside = tmp_path / "run", tmp_path / "never stopped"
    killed = soak(train_into(out), out, kills=4, seed=0)
    assert len(killed) == 4 and killed[1]["in_save"] and killed[3]["in_save"]
    assert all(kill["resumed"] == kill["saved"] for kill in killed)
    assert all(kill["saving"] > kill["saved"] for kill in killed if kill["in_save"])
    assert compare_with_never_stopped(train_into(out), out, train_into(beside), beside) > killed[-1]["saved"]
