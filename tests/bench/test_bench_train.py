"""`dansm bench train`: the whole of it on the CPU with a tiny network, and what only a GPU's kernels would show, on
names and times made up."""

import contextlib
import csv
import io
import json
from types import SimpleNamespace

import pytest
import torch
from dansm.scale.bench import train
from dansm.scale.bench import train as bench_train
from dansm.scale.bench.train import EAGER, OURS, PAPER, PLAIN, REST, UNMATCHED, Case, by_kind, cases, compare, kind_of
from dansm.scale.commands.main import main
from PIL import Image
from rich.console import Console

import dansm

TINY = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.1)
CPU = torch.device("cpu")
CASE = Case("small", (3, 8, 8), 4)
NAME = "small 3×8×8, batch 4"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(dansm.NETWORKS, "small", TINY)
    monkeypatch.setattr(bench_train, "IMAGES", 40)
    monkeypatch.chdir(tmp_path)


def measure(out, **settings):
    """The bench of the tiny network, without what runs in other processes: (what it found, what it printed)."""
    console = Console(file=io.StringIO(), width=120)
    settings = dict(samples=3, first_step=False, seed=0, device=CPU, out=out, console=console) | settings
    return train.bench_train([CASE], 16, **settings), console.file.getvalue()


# ------------------------------------------------------------------------------- the whole


def test_the_command_measures_every_part_and_writes_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", "--network", "small", "--batch", "4", "--shape", "3x8x8", "--match-size", "16",
                    "--samples", "3", "--device", "cpu", "--out", str(tmp_path / "out")])
    said, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.csv", "train.json", "train.png"]
    assert all(word in said for word in (OURS, UNMATCHED, EAGER, PLAIN, "input alone", "sampling 3 images", "written"))

    bench = json.loads((tmp_path / "out" / "train.json").read_text())
    assert bench["left_out"] == {} and bench["hardware"]["device"] == "cpu" and bench["match_size"] == 16
    steps = {row["way"]: row for row in bench["steps"]}
    assert list(steps) == [OURS, UNMATCHED, EAGER, PLAIN] and {row["case"] for row in bench["steps"]} == {NAME}
    for row in bench["steps"] + bench["input"] + bench["sampling"]:
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"]
    for row in steps.values():
        assert row["steps"] == 2 and row["images_per_second"] == pytest.approx(4000 / row["median_ms"], rel=1e-2)
    for way in OURS, EAGER, PLAIN:
        assert steps[way]["first_step_s"] > 0 and steps[way]["peak_gib"] > 0 and 0 < steps[way]["matching_share"] < 1
    difference = 1 - steps[UNMATCHED]["mean_ms"] / steps[OURS]["mean_ms"]
    assert steps[OURS]["matching_share_by_difference"] == pytest.approx(difference, abs=1e-3)
    assert [row["way"] for row in bench["input"]] == ["on the device", "memory-mapped"]
    assert bench["input"][0]["times_the_step"] == pytest.approx(
        bench["input"][0]["images_per_second"] / steps[OURS]["images_per_second"], abs=0.1)
    assert bench["sampling"][0]["images"] == 3 and "5 Euler steps" in bench["sampling"][0]["way"]
    assert [row["way"] for row in bench["start"]] == ["import dansm, scale.command"]

    with open(tmp_path / "out" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == [*["steps"] * 4, *["input"] * 2, "sampling", "start"]
    assert float(rows[0]["median_ms"]) == steps[OURS]["median_ms"] and rows[0]["way"] == OURS
    assert Image.open(tmp_path / "out" / "train.png").width > 1000


def test_what_fails_is_left_out_with_a_word_and_the_rest_goes_on(tmp_path, monkeypatch):
    def new_run(case, way, device, made=train.new_run):
        if way == EAGER:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return made(case, way, device)

    def fail(*_):
        raise RuntimeError("no disk\nand more")
        yield

    monkeypatch.setattr(bench_train, "new_run", new_run)
    monkeypatch.setattr(bench_train, "importing", fail)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    bench, said = measure(tmp_path)
    assert bench["left_out"] == {f"{NAME}, {EAGER}": "not enough memory", "import": "no disk"}
    assert f"left out: {NAME}, {EAGER}: not enough memory" in said and "left out: import: no disk" in said
    assert [row["way"] for row in bench["steps"]] == [OURS, UNMATCHED, PLAIN] and bench["sampling"]
    assert json.loads((tmp_path / "train.json").read_text())["left_out"] == bench["left_out"]
    assert torch.backends.cudnn.benchmark is False


def test_what_was_measured_is_on_the_disk_when_the_run_is_cut_off(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(bench_train, "inputs", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert [row["way"] for row in json.loads((tmp_path / "train.json").read_text())["steps"]] == [
        OURS, UNMATCHED, EAGER, PLAIN]


def test_a_pool_that_does_not_fit_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(dansm.BadInput, match="match_size is 10,000,000,000: the pool needs"):
        train.bench_train([CASE], 10**10, samples=1, first_step=False, seed=0, device=CPU, out=tmp_path,
                                console=Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- what is measured


def test_the_papers_settings_are_measured_with_two_images_on_a_cpu():
    assert cases(None, 7, (1, 4, 4), torch.device("cuda")) == list(PAPER)
    assert [case.name for case in PAPER] == ["ncsnpp 4×32×32, batch 250", "ddpm 3×32×32, batch 128"]
    assert [case.batch for case in cases(None, 7, (1, 4, 4), CPU)] == [2, 2]
    assert cases("small", 4, (3, 8, 8), CPU) == [CASE]


@pytest.mark.parametrize(("network", "shape", "words"), [
    ("vit", (3, 8, 8), "--network is 'vit': expected one of ncsnpp"),
    ("small", (3, 8, 4), "--shape is 3x8x4: expected square images"),
    ("small", (8,), "--shape is 8: expected square images"),
    ("ncsnpp", (3, 12, 12), "12 pixels wide: expected a multiple of 8"),
])
def test_a_network_or_images_that_do_not_go_are_refused(network, shape, words):
    with pytest.raises(dansm.BadInput, match=words):
        cases(network, 4, shape, CPU)


def test_a_step_trains_on_the_next_batch_and_its_matched_noises():
    run, pool = train.new_run(CASE, OURS, CPU), dansm.NoisePool(16, CASE.shape, seed=0)
    seen, batches = [], iter(torch.randn(3, 4, *CASE.shape))
    run.gradients = lambda flow, x, z, made=run.gradients: (seen.append((x, z)), made(flow, x, z))
    begin, before, after = next(train.steps(run, batches, pool, CPU))
    assert run.step == 1 and pool.left == 12 and len(list(batches)) == 2 and begin <= before < after
    ((x, z),) = seen
    assert torch.equal(z, dansm.NoisePool(16, CASE.shape, seed=0)(x))


def test_a_step_counts_from_its_beginning_to_that_of_the_next(monkeypatch):
    """Times made up: steps of 10 ms that begin with 2 ms of input and 3 of matching; one between is not counted."""
    monkeypatch.setattr(bench_train, "moment", lambda _: 0.03)
    row = train.timed_steps(iter([(b, b + 0.002, b + 0.005) for b in (0.0, 0.01, 0.02)]), CASE, 16, CPU)
    assert (row["median_ms"], row["steps"], row["matching_ms"], row["matching_share"]) == (10, 2, 3, 0.3)
    assert row["images_per_second"] == 400 and "mfu" not in row


def test_mfu_is_the_floor_over_the_time(monkeypatch):
    monkeypatch.setattr(train.step, "peak", lambda _: 1e12)
    monkeypatch.setattr(train.step, "operations_per_image", lambda _: 1e9)
    monkeypatch.setattr(bench_train, "moment", lambda _: 0.03)
    row = train.timed_steps(iter([(b, b, b) for b in (0.0, 0.01, 0.02)]), CASE, 16, CPU)
    assert (row["floor_ms"], row["mfu"]) == (4, 0.4)


def test_latents_are_kept_as_float16_and_images_as_bytes():
    assert train.made_up(CASE, 0, CPU).dtype == torch.uint8
    latents = train.made_up(Case("small", (4, 8, 8), 4), 0, CPU)
    assert latents.dtype == torch.float16 and latents.shape == (40, 4, 8, 8)


def test_the_first_step_of_the_command_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(dansm.NETWORKS, "small", dict(width=64, multipliers=(1, 2, 2), blocks=2, dropout=0.0))
    table, row = next(train.starting(Case("small", (1, 8, 8), 2), 4, 0, CPU))
    assert (table, row["way"]) == ("start", "dansm train --compile") and row["median_ms"] > 100


def test_a_command_that_ends_before_its_first_step_is_told_with_its_last_word(tmp_path, monkeypatch):
    (tmp_path / "dansm.py").write_text("import sys; print('reading images'); sys.exit('dansm: ' + sys.argv[2])")
    monkeypatch.setattr(dansm, "__file__", str(tmp_path / "dansm.py"))
    with pytest.raises(RuntimeError, match=r"^dansm: missing$"):
        train.seconds_to_first_step(["missing"], tmp_path / "out")


# ------------------------------------------------------------------------------- kernels by kind


@pytest.mark.parametrize(("kernel", "kind"), [
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution, forward"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_128x128>", "convolution, forward"),
    ("void implicit_convolve_sgemm<float, float, 1024, 5, 5>", "convolution, forward"),
    ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32", "convolution, input gradient"),
    ("sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32", "convolution, weight gradient"),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, float>", "casts and copies"),
    ("nvjet_tst_128x64_64x9_2x1_v_bz_TNT", "matrix products"),
    ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>", "matrix products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
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
    ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>", "casts and copies"),
    ("Memcpy DtoD (Device -> Device)", "casts and copies"),
    ("Memset (Device)", "casts and copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>>", "concatenation"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t>>", "reductions"),
    ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor>",
     "optimizer and averages"),
    ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, LpNormFunctor<float>>",
     "optimizer and averages"),
    ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, TernaryOpScalarFunctor, LerpFunctor>",
     "optimizer and averages"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", REST),
    ("my_forward_kernel", REST),
])
def test_a_kernel_is_of_a_kind(kernel, kind):
    assert kind_of(kernel) == kind


def test_kinds_are_summed_a_step_the_longest_first():
    rows = list(by_kind(CASE, [("_forward", 1.0), ("_halve", 3.0), ("_sum", 3.0), *[("_forward", 0.5)] * 2]))
    assert [row for table, row in rows if table == "profile"] == [
        {"case": NAME, "kind": "sums and resampling", "ms": 6.0, "share": 0.75},
        {"case": NAME, "kind": "norm, SiLU and dropout", "ms": 2.0, "share": 0.25}]
    kernels = {row["kernel"]: row for table, row in rows if table == "kernels"}
    assert kernels["_forward"]["ms"] == 2 and kernels["_forward"]["calls"] == round(3 / train.PROFILED, 2)


def event(name, microseconds, device="CUDA", **more):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, time_range=span, device_type=getattr(torch.autograd.DeviceType, device), **more)


def listening(monkeypatch, events):
    """A profiler that hears these events in the place of the GPU's."""
    heard = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr("torch.profiler.profile", lambda activities: contextlib.nullcontext(heard))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    for name in "DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI":
        monkeypatch.setenv(name, "1")


def test_the_profile_counts_kernels_alone_and_one_step(monkeypatch):
    listening(monkeypatch, [
        event("_forward", 1000 * train.PROFILED), event("cudaGraphLaunch", 5e6, "CPU"),
        event("Optimizer.step#Adam.step", 5e6), event("a note", 5e6, is_user_annotation=True)])
    made = iter(range(100))
    rows = [row for table, row in train.profile(CASE, made) if table == "profile"]
    assert rows == [{"case": NAME, "kind": "norm, SiLU and dropout", "ms": 1.0, "share": 1.0}]
    assert next(made) == 1 + train.PROFILED


def test_a_profiler_that_hears_nothing_says_so(monkeypatch):
    listening(monkeypatch, [event("cudaGraphLaunch", 5e6, "CPU")])
    with pytest.raises(dansm.BadInput, match="saw no kernel"):
        list(train.profile(CASE, iter(range(100))))


# ------------------------------------------------------------------------------- what is shown


def on_a_gpu() -> dict:
    """Figures made up, as a GPU's would be."""
    bench = {"hardware": {"gpu": "NVIDIA H100 80GB HBM3"}, "match_size": 10_000, "left_out": {}, "kernels": [],
             "measured_before": {case.name: list(train.BEFORE[case]) for case in PAPER},
             "steps": [], "input": [], "sampling": [], "profile": [], "start": []}
    for case in PAPER:
        for way, ms in (OURS, 60.0), (UNMATCHED, 59.0), (EAGER, 150.0), (PLAIN, 210.0):
            row = {"case": case.name, "way": way, "median_ms": ms, "mean_ms": ms, "least_ms": 0.9 * ms,
                   "most_ms": 1.2 * ms, "steps": 40, "images_per_second": 1000 * case.batch / ms, "mfu": 0.25,
                   "floor_ms": 16.5}
            bench["steps"].append(row if way == UNMATCHED else {**row, "peak_gib": 9.5, "first_step_s": 20.0,
                                                               "matching_share": 0.012})
        kernels = [("_forward", 20.0), ("sm90_xmma_wgrad_implicit_gemm", 15.0), ("_sum", 10.0), ("nvjet", 5.0)]
        for table, row in by_kind(case, kernels):
            bench[table].append(row)
    compare(bench)
    return bench


def test_the_table_shows_each_network_its_shares_and_what_was_measured_before():
    console = Console(file=io.StringIO(), width=80)
    train.print_tables(on_a_gpu(), console)
    said = console.file.getvalue()
    assert said.count("A training step") == said.count("by kind of work") == 2
    for words in ("4,167", "60.0", "25.0 %", "9.5", "20.0", "1.2 %", "convolution, weight gradient", "30.0 %",
                  "1.7 % by the difference", "the paper's code, 795 images/s", "torchcfm's UNet, no matching, 1,017",
                  "measured before on an H100", "NVIDIA H100 80GB HBM3"):
        assert words in said
    assert "…" not in said


def test_the_sum_of_a_steps_kernels_stands_beside_its_time():
    ours = [row for row in on_a_gpu()["steps"] if row["way"] == OURS]
    assert [row["kernels_ms"] for row in ours] == [50, 50]


def test_the_picture_has_a_bar_for_each_way_and_one_of_kinds_for_each_network(monkeypatch, tmp_path):
    import matplotlib.pyplot as plt

    bench, figure = on_a_gpu(), plt.figure()
    left, right = figure.subplots(1, 2)
    train.draw_rates(bench, left)
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels.count(OURS) == labels.count(PLAIN) == 2
    assert sum("measured before on an H100" in label for label in labels) == 2
    train.draw_profile(bench, right)
    assert right.get_legend_handles_labels()[1] == list(dict.fromkeys(row["kind"] for row in bench["profile"]))
    assert [text.get_text() for text in right.texts] == ["floor 16.5 ms"] * 2
    plt.close(figure)
    train.draw(bench, tmp_path / "train.png")
    assert Image.open(tmp_path / "train.png").width > 1000
