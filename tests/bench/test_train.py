"""dansm bench train: the whole of it on the CPU with a tiny network, and what only a GPU's kernels would show, on
synthetic names and times."""

import contextlib
import csv
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support import CPU, files_of

import dansm
from dansm.scale.base.text import console
from dansm.scale.bench import clock, train
from dansm.scale.bench.train import EAGER, OURS, PAPER, PLAIN, PROFILED, REST, UNMATCHED, Case, kind_of, profile

CASE = Case("small", (3, 8, 8), 4)
NAME = "small 3×8×8, batch 4"
COMMAND = ("bench", "train", "--network", "small", "--batch", 4, "--shape", "3x8x8", "--device", "cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(train, "IMAGES", 40)


def test_every_part_is_measured_and_written(run, tmp_path):
    code, said, err = run(*COMMAND, "--match-size", 16, "--samples", 3, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert files_of(tmp_path / "out") == ["train.csv", "train.json", "train.png"]
    assert all(word in said for word in (OURS, UNMATCHED, EAGER, PLAIN, "input alone", "sampling", "written"))
    bench = json.loads((tmp_path / "out" / "train.json").read_text())
    rows = bench["rows"]
    assert bench["left_out"] == {} and bench["hardware"]["device"] == "cpu" and bench["match_size"] == 16
    assert [row["part"] for row in rows] == [*["steps"] * 4, *["input"] * 2, "sampling"]
    assert [row["way"] for row in rows[:6]] == [OURS, UNMATCHED, EAGER, PLAIN, "on the device", "memory-mapped"]
    assert {row["case"] for row in rows} == {NAME}
    for row in rows:
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"]
    for row in rows[:4]:
        assert row["calls"] == 2 and row["images_per_second"] == pytest.approx(4000 / row["median_ms"], rel=1e-2)
        assert row["way"] == UNMATCHED or (row["first_step_s"] > 0 and 0 < row["matching_share"] < 1)
    difference = 1 - rows[1]["mean_ms"] / rows[0]["mean_ms"]
    assert rows[0]["matching_share_by_difference"] == pytest.approx(difference, abs=1e-3)
    assert rows[6]["images"] == 3 and "5 Euler steps" in rows[6]["way"]
    with open(tmp_path / "out" / "train.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["median_ms"]) == rows[0]["median_ms"] and lines[0]["way"] == OURS
    assert Image.open(tmp_path / "out" / "train.png").width > 1000


def test_a_way_that_fails_leaves_torch_as_it_was(monkeypatch):
    def fail(*_):
        assert torch.backends.cudnn.benchmark
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(train, "new_run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        next(train.training(CASE, OURS, 16, 0, CPU))
    assert torch.backends.cudnn.benchmark is False


def test_a_pool_that_does_not_fit_is_refused_before_anything_is_measured(refused, tmp_path):
    error = refused(*COMMAND, "--match-size", 10**10, "--out", tmp_path / "out")
    assert "--match-size is 10,000,000,000" in error and files_of(tmp_path / "out") == []


# ------------------------------------------------------------------------------- what is measured


def test_the_papers_settings_are_measured_with_two_images_on_a_cpu(run, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "parts_of", lambda cases, *_: seen.extend(cases) or [])
    assert run("bench", "train", "--device", "cpu")[0] == 0
    assert [case.name for case in seen] == ["ncsnpp 4×32×32, batch 2", "ddpm 3×32×32, batch 2"]
    assert [case.name for case in PAPER] == ["ncsnpp 4×32×32, batch 250", "ddpm 3×32×32, batch 128"]


@pytest.mark.parametrize(("network", "shape", "words"), [
    ("vit", "3x8x8", "--network"), ("small", "3x8x4", "3x8x4"), ("small", "8", "--shape"),
    ("ncsnpp", "3x12x12", "size is 12")])
def test_a_network_or_images_that_do_not_go_are_refused(refused, network, shape, words):
    assert words in refused("bench", "train", "--network", network, "--shape", shape, "--device", "cpu")


def test_a_step_trains_on_the_next_batch_and_its_matched_noises():
    run, pool = train.new_run(CASE, OURS, CPU), dansm.NoisePool(16, CASE.shape, seed=0)
    seen, batches = [], iter(torch.randn(3, 4, *CASE.shape))
    run.gradients = lambda flow, x, z, made=run.gradients: (seen.append((x, z)), made(flow, x, z))
    begin, before, after = next(train.steps(run, batches, pool, CPU))
    assert run.step == 1 and pool.left == 12 and len(list(batches)) == 2 and begin <= before < after
    (x, z), = seen
    assert torch.equal(z, dansm.NoisePool(16, CASE.shape, seed=0)(x))


def test_a_step_counts_from_its_beginning_to_that_of_the_next(monkeypatch):
    """Synthetic times: steps of 10 ms that begin with 2 ms of input and 3 of matching; one between is not counted."""
    monkeypatch.setattr(train, "moment", lambda _: 0.03)
    moments = [(begin, begin + 0.002, begin + 0.005) for begin in (0.0, 0.01, 0.02)]
    row = train.timed_steps(iter(moments), CASE, OURS, 16, CPU)
    assert (row["median_ms"], row["calls"], row["matching_ms"], row["matching_share"]) == (10, 2, 3, 0.3)
    assert row["images_per_second"] == 400 and "mfu" not in row


def test_mfu_is_the_floor_over_the_time(monkeypatch):
    monkeypatch.setattr(train, "peak", lambda _: 1e12)
    monkeypatch.setattr(train, "operations_per_image", lambda _: 1e9)
    monkeypatch.setattr(train, "moment", lambda _: 0.03)
    row = train.timed_steps(iter([(begin, begin, begin) for begin in (0.0, 0.01, 0.02)]), CASE, OURS, 16, CPU)
    assert (row["floor_ms"], row["mfu"]) == (4, 0.4)


def test_latents_are_kept_as_float16_and_images_as_bytes():
    assert train.synthetic(CASE, 0, CPU).dtype == torch.uint8
    latents = train.synthetic(Case("small", (4, 8, 8), 4), 0, CPU)
    assert latents.dtype == torch.float16 and latents.shape == (40, 4, 8, 8)


@pytest.mark.slow  # two processes that import torch
def test_the_first_step_of_the_command_itself(monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", dict(width=64, multipliers=(1, 2, 2), blocks=2, dropout=0.0))
    rows = list(train.starting(Case("small", (1, 8, 8), 2), 4, 0, CPU))
    assert [row["way"] for row in rows] == ["dansm train --compile", "dansm train --no-compile"]
    assert all(100 < row["median_ms"] < 60_000 for row in rows)


# ------------------------------------------------------------------------------- kernels by kind


@pytest.mark.parametrize(("kernel", "kind"), [
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution, forward"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_128x128>", "convolution, forward"),
    ("void implicit_convolve_sgemm<float, float, 1024, 5, 5>", "convolution, forward"),
    ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32", "convolution, input gradient"),
    ("sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32", "convolution, weight gradient"),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, float>", "casts and copies"),
    ("nvjet_tst_128x64_64x9_2x1_v_bz_TNT", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>", "matrix products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
    ("_forward", "norm, SiLU and dropout"),
    ("_backward", "norm, SiLU and dropout"),
    ("_forward_0d1d2d3d", "norm, SiLU and dropout"),
    ("_sum", "sums and resampling"),
    ("_sum_backward", "sums and resampling"),
    ("_halve", "sums and resampling"),
    ("_double", "sums and resampling"),
    ("_shortlist", "matching"),
    ("_choose", "matching"),
    ("_hand_out", "matching"),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_tn_align1>", "matching"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "casts and copies"),
    ("Memcpy DtoD (Device -> Device)", "casts and copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>>", "concatenation"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t>>", "reductions"),
    ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor>",
     "optimizer and averages"),
    ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, TernaryOpScalarFunctor, LerpFunctor>",
     "optimizer and averages"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", REST),
    ("my_forward_kernel", REST),
])
def test_a_kernel_is_of_a_kind(kernel, kind):
    assert kind_of(kernel) == kind


def test_kinds_are_summed_the_longest_first(monkeypatch):
    kernels = [("_forward", 1.0), ("_halve", 3.0), ("_sum", 3.0), *[("_forward", 0.5)] * 2]
    listening(monkeypatch, [event(name, 1000 * ms * PROFILED) for name, ms in kernels])
    rows = list(profile(NAME, iter(range(100))))
    assert [row for row in rows if row["part"] == "profile"] == [
        {"part": "profile", "case": NAME, "kind": "sums and resampling", "ms": 6.0, "share": 0.75},
        {"part": "profile", "case": NAME, "kind": "norm, SiLU and dropout", "ms": 2.0, "share": 0.25}]
    kernels = {row["kernel"]: row for row in rows if row["part"] == "kernels"}
    assert kernels["_forward"]["ms"] == 2 and kernels["_forward"]["calls"] == round(3 / PROFILED, 2)


def event(name, microseconds, device="CUDA", note=False):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, time_range=span, device_type=getattr(torch.autograd.DeviceType, device),
                           is_user_annotation=note)


def listening(monkeypatch, events):
    """A profiler that hears these events in the place of the GPU's."""
    heard = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr("torch.profiler.profile", lambda activities: contextlib.nullcontext(heard))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    for name in "DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI":
        monkeypatch.setenv(name, "1")


def test_the_profile_counts_kernels_alone_and_one_step(monkeypatch):
    listening(monkeypatch, [
        event("_forward", 1000 * PROFILED), event("cudaGraphLaunch", 5e6, "CPU"),
        event("Optimizer.step#Adam.step", 5e6), event("a note", 5e6, note=True)])
    moments = iter(range(100))
    rows = [row for row in profile(NAME, moments) if row["part"] == "profile"]
    assert [(row["kind"], row["ms"], row["share"]) for row in rows] == [("norm, SiLU and dropout", 1.0, 1.0)]
    assert next(moments) == 1 + PROFILED


def test_a_profiler_that_hears_nothing_is_an_error(monkeypatch):
    listening(monkeypatch, [event("cudaGraphLaunch", 5e6, "CPU")])
    with pytest.raises(RuntimeError, match="saw no kernel"):
        list(profile(NAME, iter(range(100))))


# ------------------------------------------------------------------------------- what is shown


def on_a_gpu(cases):
    """Synthetic figures, as a GPU's would be."""
    rows = []
    for case in cases:
        for way, ms in (OURS, 60.0), (UNMATCHED, 59.0), (EAGER, 150.0), (PLAIN, 210.0):
            rows.append({"part": "steps", "case": case.name, "way": way, "median_ms": ms, "mean_ms": ms,
                         "least_ms": 0.9 * ms, "most_ms": 1.2 * ms, "calls": 40, "mfu": 0.25, "floor_ms": 16.5,
                         "images_per_second": 1000 * case.batch / ms, "peak_mb": 9500.0, "first_step_s": 20.0,
                         "matching_share": 0.012})
        rows += [{"part": "profile", "case": case.name, "kind": kind, "ms": ms, "share": ms / 45} for kind, ms in (
            ("norm, SiLU and dropout", 20.0), ("convolution, weight gradient", 15.0), ("sums and resampling", 10.0))]
    return rows


def test_tables_that_fit_a_terminal_and_a_figure_show_each_network(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "parts_of", lambda cases, *_: [("all", on_a_gpu(cases))])
    monkeypatch.setattr(clock, "draw", lambda *arguments, draw=clock.draw: (drawn.append(arguments), draw(*arguments)))
    monkeypatch.setattr(console, "width", 80)
    code, said, err = run("bench", "train", "--device", "cpu", "--out", tmp_path)
    assert (code, err) == (0, "")
    for words in ("ncsnpp 4×32×32, batch 2", "ddpm 3×32×32, batch 2", "33.3", "60.0", "25.0 %", "9,500", "20.0",
                  "1.2 %", "convolution, weight gradient"):
        assert words in said
    assert "…" not in said
    (_, bars, kinds, _), = drawn
    assert list(kinds) == [label for label in bars if label.startswith(f"{OURS}\n")] and len(bars) == 8
    assert all(list(ms.values()) == [20, 15, 10] for ms in kinds.values())
    assert Image.open(tmp_path / "train.png").width > 1000
