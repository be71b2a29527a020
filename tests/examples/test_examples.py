"""The examples run as they stand, shortened; they differ from usual training in one line; the pool in them keeps its
promises, and so does the coupling."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dansm
from dansm.tiny.digits import load_digits

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
PEERS = {"with_accelerate": ["accelerate"], "with_denoising_diffusion": ["denoising_diffusion_pytorch"],
         "with_diffusers": ["diffusers"], "with_flow_matching": ["flow_matching"], "with_lightning": ["lightning"],
         "with_lora": ["diffusers", "peft", "transformers"], "with_rectified_flow": ["rectified_flow_pytorch"],
         "with_torchcfm": ["torchcfm"]}  # the packages of each example
POOLED = [name for name in EXAMPLES if name != "semidiscrete"]
TRAINED = [pytest.param(name, marks=[pytest.mark.slow] if name != "bare" else [])
           for name in POOLED if name != "with_accelerate"]
ONE_LINE = re.compile(r"^( *)(\w+) = (?:self\.)?pool\((\w+)(?:, \w+)?\) +# was: (.+)$", re.MULTILINE)
SHORT = dict(steps=6, seeds=1, match_size=48)


def load(name: str, change=lambda source: source) -> ModuleType:
    """The example as a module, its source changed before it runs."""
    for peer in PEERS.get(name, ()):
        pytest.importorskip(peer)
    module = ModuleType(name)
    exec(compile(change(EXAMPLES[name].read_text()), EXAMPLES[name], "exec"), module.__dict__)
    return module


def put_back(source: str) -> str:
    """What stood there before in place of the one line."""
    return ONE_LINE.sub(r"\1\4", source)


def measures(rows: list[dict], way: str) -> dict:
    """What is measured in the one row whose way begins so."""
    found, = (row for row in rows if row["way"].startswith(way))
    return {key: value for key, value in found.items() if key != "way"}


class Recorded(dansm.NoisePool):
    """A pool that keeps what it drew, by the number of the pool, and what it handed out."""

    made = ()

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.drew, self.given = {}, []
        Recorded.made = (*Recorded.made, self)

    def _drawn(self, number):
        self.drew[number] = super()._drawn(number)
        return self.drew[number].clone()

    def __call__(self, x, labels=None):
        z = super().__call__(x, labels)
        self.given.append(z.flatten(1).clone())
        return z


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "made", ())
    return lambda: [pool for pool in Recorded.made if pool.match_size > 1]


def in_order(z):
    return z[z[:, 0].argsort()]


# ------------------------------------------------------------------------------- all of them


def test_there_is_an_example_for_each_kind_of_trainer():
    assert list(EXAMPLES) == ["bare", "semidiscrete", *PEERS]


@pytest.mark.parametrize("name", POOLED)
def test_one_line_is_marked_and_it_stood_for_random_noise(name):
    source = EXAMPLES[name].read_text()
    (_, noise, data, before), = ONE_LINE.findall(source)
    assert before == f"{noise} = torch.randn_like({data})"
    assert source.count("# was:") == 1


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_runs_and_its_paths_get_shorter(name, capsys):
    rows = load(name).main(**SHORT)
    for row in rows:
        assert all(math.isfinite(value) for key, value in row.items() if key != "way")
    path = next(key for key in rows[0] if key.startswith("path"))
    assert measures(rows, "pool")[path] < 0.97 * measures(rows, "random")[path]
    out = capsys.readouterr().out
    assert "pool of 48" in out
    for row in rows:  # the table shows what was measured
        assert all(f"{value:.3f}" in out for key, value in row.items() if key not in ("way", "seed"))


@pytest.mark.parametrize("name", [name for name in PEERS if name != "with_diffusers"])
def test_an_example_of_a_trainer_is_short(name):
    assert EXAMPLES[name].read_text().count("\n") <= 60


@pytest.mark.slow
@pytest.mark.parametrize("options, words", [
    (("--steps", "-3"), ["--steps"]),
    (("--steps", "1", "--match-size", "100000000000"), ["match_size", "100,000,000,000"])])
def test_what_an_example_cannot_use_is_said_without_a_traceback(options, words):
    ended = script("bare", *options)
    assert ended.returncode == 2 and all(word in ended.stderr for word in words) and "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", PEERS)
def test_an_example_without_its_package_names_the_extra_in_one_line(name, monkeypatch):
    peer = PEERS[name][0]
    for module in {peer, *(module for module in sys.modules if module.startswith(f"{peer}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES[name]))
    assert peer in ended.value.code and "dansm[peers]" in ended.value.code and "\n" not in ended.value.code


def script(name, *options, **settings):
    """Run an example as a user does, where dansm is installed or on the path."""
    return subprocess.run([sys.executable, EXAMPLES[name], *options], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          text=True, capture_output=True, **settings)


@pytest.mark.parametrize("name", TRAINED)
def test_with_the_line_put_back_it_is_random_pairs_to_the_last_bit(name):
    """Both rows are trained without the pool then: had the script another difference, they would not be equal."""
    rows = load(name, put_back).main(**SHORT)
    assert measures(rows, "pool") == measures(rows, "random")


@pytest.mark.parametrize("name", [param for param in TRAINED if param.values != ("with_lora",)])
def test_a_whole_pool_is_handed_out_as_it_was_drawn(name, recorded):
    module = load(name)
    module.NoisePool = Recorded
    module.main(**SHORT)
    pools = [pool for pool in recorded() if 1 in pool.drew]  # but the one of a resumed run, which continues another
    assert pools
    for pool in pools:
        given = torch.cat(pool.given)
        whole = given[: len(given) // 48 * 48].split(48)
        assert len(whole) >= 2
        for number, noises in enumerate(whole, 1):
            assert in_order(noises).equal(in_order(pool.drew[number]))
            assert not noises.equal(pool.drew[number])


@pytest.mark.slow
def test_an_example_is_a_script(tmp_path):
    ended = script("bare", "--steps", "4", "--seeds", "1", "--match-size", "8", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the same weights to the last bit" in ended.stdout and "pool of 8" in ended.stdout
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- bare


def test_a_stopped_run_resumes_to_the_last_bit():
    assert load("bare").resumes(load_digits(), 9, 100)


def test_without_the_pool_in_the_checkpoint_it_would_be_another_run():
    def forget(source):
        changed = source.replace(', "pool": pool}', "}")
        assert changed != source
        return changed

    assert not load("bare", forget).resumes(load_digits(), 9, 100)


def test_a_run_that_resumes_begins_where_it_stopped(tmp_path):
    bare, images, file = load("bare"), load_digits(), tmp_path / "checkpoint.pt"
    _, before = bare.train(images, 3, 100, seed=0, checkpoint=file)
    _, after = bare.train(images, 8, 100, seed=0, checkpoint=file)
    _, whole = bare.train(images, 8, 100, seed=0)
    assert len(after) == 5 and before + after == whole


def test_bare_sampling_goes_from_noise_to_data():
    """A velocity that leads straight to one image from wherever it is asked."""
    bare, image = load("bare"), load_digits()[:1]
    for steps in (1, 3, 7):
        drawn = bare.sample(lambda x, t: (image - x) / (1 - t), 4, steps, torch.Generator().manual_seed(0))
        assert torch.allclose(drawn, image.expand(4, -1, -1, -1), atol=1e-5)


# ------------------------------------------------------------------------------- diffusers


@pytest.mark.slow
def test_batches_of_one_get_the_noises_of_a_whole_batch(recorded):
    """With gradients accumulated over all of a batch, one at a time: the same noises, and so the same training."""
    diffusers = load("with_diffusers")
    diffusers.NoisePool = Recorded
    scheduler, images = diffusers.FlowMatchEulerDiscreteScheduler(), load_digits()
    nets = [diffusers.train(images, scheduler, 3, 48, 0, micro)[0] for micro in (diffusers.BATCH, 1)]
    whole, alone = recorded()
    assert [len(z) for z in whole.given] == [diffusers.BATCH] * 3 and {len(z) for z in alone.given} == {1}
    assert torch.cat(whole.given).equal(torch.cat(alone.given))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.slow
def test_diffusers_as_a_diffusion():
    rows = load("with_diffusers").main(ddpm=True, **SHORT)
    assert all(math.isfinite(value) for row in rows for key, value in row.items() if key != "way")
    assert list(rows[0])[-3:] == ["2 steps", "5 steps", "10 steps"]


@pytest.mark.slow
def test_diffusers_by_class(monkeypatch):
    """Each noise is of the pool of its image's digit, and samples are asked for by digit."""
    module, given = load("with_diffusers"), []
    kind = type(dansm.NoisePool(2, (1, 8, 8), groups=10))
    match = kind.__call__

    def recorded(pool, x, labels=None):
        given.append((pool.groups, x, labels))
        return match(pool, x, labels)

    monkeypatch.setattr(kind, "__call__", recorded)
    rows = module.main(classes=True, **SHORT | {"match_size": 100})
    assert measures(rows, "pool of 10 for each class")["path length"] < 0.99 * measures(rows, "random")["path length"]
    digits = module.datasets.load_digits().target
    for groups, x, labels in given:
        places = [(load_digits() == image).flatten(1).all(1).nonzero()[0, 0] for image in x[:3]]
        assert groups == 10 and labels[:3].tolist() == digits[places].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_diffusers_time_goes_from_data_to_noise(name, monkeypatch):
    module = load("with_diffusers")
    scheduler, images = getattr(module, name)(), load_digits()[:3]
    noise, ends = torch.randn_like(images), {}
    for drawn in (0, 999):
        monkeypatch.setattr(torch, "randint", lambda high, size, drawn=drawn: torch.full(size, drawn))
        noisy, timesteps, target = module.add_noise(scheduler, images, noise)
        ends[timesteps[0].item() > 500] = noisy
        assert target.equal(noise if name == "DDPMScheduler" else noise - images)
    assert (ends[False] - images).abs().max() < 0.05
    assert (ends[True] - noise).abs().max() < 0.05


@pytest.mark.slow
def test_diffusers_flow_sampling_goes_from_noise_to_data():
    module, image = load("with_diffusers"), load_digits()[:1]

    def unet(x, t, class_labels):
        return SimpleNamespace(sample=(x - image) / (t / 1000))

    scheduler = module.FlowMatchEulerDiscreteScheduler()
    for steps in (1, 3, 7):
        drawn = module.sample_flow(unet, scheduler, 4, steps, torch.Generator().manual_seed(0))
        assert torch.allclose(drawn, image.expand(4, -1, -1, -1), atol=1e-5)
    assert len(scheduler.timesteps) == 1000  # that of training is left as it was


# ------------------------------------------------------------------------------- torchcfm


@pytest.mark.slow
def test_in_torchcfm_the_pool_makes_paths_at_least_as_short_as_optimal_transport_does():
    rows = load("with_torchcfm").main(**SHORT)
    random, planned, pool = (measures(rows, way)["path length"] for way in ("random", "batch OT", "pool"))
    assert planned < 0.97 * random and pool < 0.97 * random


# ------------------------------------------------------------------------------- accelerate


TWICE = """
import sys
from pathlib import Path

import torch
from dansm.scale.matching.pool import FastPool

given, match = [], FastPool.__call__

def recorded(pool, x, labels=None):
    given.append(match(pool, x, labels))
    return given[-1]

FastPool.__call__ = recorded
source = Path(sys.argv[1]).read_text().replace(*sys.argv[2:]).replace("accelerator.end_training()", "")
example = {"__name__": "example"}
exec(source, example)
for folder, steps in ("whole", 8), ("halves", 4), ("halves", 4):
    example["main"](Path(folder), steps, 48)
same = torch.equal(*torch.stack(given).split(8))
torch.save((same, torch.cat(given[:8])), f"noises-{torch.distributed.get_rank()}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("registered", ["Pools([pool])", "pool"])
def test_two_processes_resume_with_the_noises_of_both(registered, tmp_path):
    """Without `Pools` accelerate keeps the first process's pool alone, and the other goes on with other noises."""
    pytest.importorskip("accelerate")
    (tmp_path / "twice.py").write_text(TWICE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "twice.py"]
    command += [EXAMPLES["with_accelerate"], "Pools([pool])", registered]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                           capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    same, (first, second) = zip(*(torch.load(tmp_path / f"noises-{rank}.pt") for rank in range(2)), strict=True)
    assert same == (True, registered != "pool")
    assert not torch.isin(first[:, 0], second[:, 0]).any()  # each process has noises of its own
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "halves")]
    assert (weights[0] == weights[1]) == (registered != "pool")


@pytest.mark.slow
def test_the_example_starts_two_processes_and_the_next_call_resumes(tmp_path):
    pytest.importorskip("accelerate")
    for _ in range(2):
        for _ in range(3):  # gloo's threads abort a process at times as it ends, after all is saved
            ended = script("with_accelerate", "--steps", "2", "--match-size", "8", cwd=tmp_path, timeout=300)
            if "terminate called without an active exception" not in ended.stderr:
                break
        assert ended.returncode == 0, ended.stderr
        assert {f"process {rank}" in ended.stdout for rank in range(3)} == {True, False}
    assert len(list((tmp_path / "runs" / "with_accelerate").glob("random_states_*"))) == 2


# ------------------------------------------------------------------------------- Lightning


@pytest.mark.slow
def test_lightnings_checkpoint_has_the_pool(tmp_path):
    module, x = load("with_lightning"), load_digits()[:64].flatten(1)
    quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def trained(seed, steps, checkpoint=None):
        torch.manual_seed(0)
        flow, trainer = module.Flow(dansm.NoisePool(100, (64,), seed=seed)), module.Trainer(max_steps=steps, **quiet)
        trainer.fit(flow, module.DataLoader(x, batch_size=16), ckpt_path=checkpoint)
        return flow, trainer

    flow, trainer = trained(1, 4)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed, _ = trained(2, 4, tmp_path / "saved.ckpt")
    assert len(resumed.lengths) == 0
    assert resumed.pool(x).equal(flow.pool(x))


# ------------------------------------------------------------------------------- LoRA


@pytest.mark.slow
def test_batches_of_one_of_three_shapes_train_a_lora_alone(monkeypatch):
    module, given, nets = load("with_lora"), [], []
    kind, unet = type(dansm.NoisePool(2, (1, 8, 8), grid=(4, 4))), module.UNet2DConditionModel
    match = kind.__call__

    def recorded(pool, x, labels=None):
        given.append((id(pool), tuple(x.shape)))
        return match(pool, x, labels)

    def made(**settings):
        net = unet(**settings)
        nets.append((net, {name: weight.clone() for name, weight in net.named_parameters()}))
        return net

    monkeypatch.setattr(kind, "__call__", recorded)
    module.UNet2DConditionModel = made
    module.train(load_digits(), 6, 48, 0)
    assert [shape for _, shape in given] == [(1, 1, 8, 8), (1, 1, 8, 12), (1, 1, 12, 8)] * 2
    assert len({pool for pool, _ in given}) == 1
    (net, before), = nets
    frozen = {name.replace(".base_layer", ""): weight for name, weight in net.named_parameters() if "lora" not in name}
    assert all(weight.equal(before[name]) for name, weight in frozen.items()) and frozen.keys() == before.keys()
    assert any(weight.any() for name, weight in net.named_parameters() if "lora_B" in name)  # they begin as zeros


# ------------------------------------------------------------------------------- lucidrains, flow_matching


@pytest.mark.slow
@pytest.mark.parametrize("immiscible", [False, True])
def test_a_perfect_predictor_of_the_pools_noises_has_no_loss(immiscible, monkeypatch):
    """What the example says of the package's own option, which is not to be used with a pool."""
    module, images = load("with_denoising_diffusion"), load_digits()[:64]

    class Perfect(torch.nn.Module):
        channels = out_dim = 1
        self_condition = random_or_learned_sinusoidal_cond = False

        def forward(self, x, t, x_self_cond=None):
            signal = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
            return (x - signal.sqrt() * images) / (1 - signal).sqrt()

    diffusion = module.GaussianDiffusion(Perfect(), image_size=8, objective="pred_noise", immiscible=immiscible)
    t = torch.randint(100, 900, (64,))
    random = diffusion.p_losses(images, t).item()
    matched = diffusion.p_losses(images, t, noise=dansm.NoisePool(1000, (1, 8, 8), seed=0)(images)).item()
    assert (random > 1.5) == immiscible
    assert immiscible or matched < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("with_rectified_flow", "RectifiedFlow"),
                                        ("with_denoising_diffusion", "GaussianDiffusion")])
def test_the_pool_sees_images_as_lucidrains_trains_on_them(name, kind):
    module, seen = load(name), []
    pool = module.NoisePool

    class Seeing(pool):
        def __call__(self, x):
            seen.append(x)
            return super().__call__(x)

    module.NoisePool = Seeing
    module.train((load_digits() + 1) / 2, 1, 48, 0)
    assert (seen[0].min(), seen[0].max()) == (-1, 1)


# ------------------------------------------------------------------------------- semidiscrete


def short_rows(trainer, monkeypatch):
    module = load("semidiscrete")
    monkeypatch.setattr(module, "load_digits", lambda: load_digits()[:300])
    return module.main(trainer, steps=6, seeds=1)


def test_a_coupled_loader_makes_paths_shorter(monkeypatch, capsys):
    random, coupled = short_rows("plain", monkeypatch)
    assert coupled["path length"] < 0.95 * random["path length"]
    assert "Digits and mirror images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
def test_every_trainer_with_a_coupled_loader_ends_with_the_same_numbers(trainer, monkeypatch):
    pytest.importorskip(trainer)
    assert short_rows(trainer, monkeypatch) == short_rows("plain", monkeypatch)


def test_a_trainer_that_is_missing_is_named_before_anything_is_solved(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError, match="lightning"):
        load("semidiscrete").main("lightning")


def test_all_mirror_images_are_samples_of_their_own():
    images = load_digits()[:5]
    data = load("semidiscrete").Mirrored(images)
    assert torch.stack([data[number] for number in range(len(data))]).equal(torch.cat([images, images.flip(-1)]))
