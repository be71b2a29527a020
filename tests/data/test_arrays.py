"""Arrays in files: uint8 images and float latents, as .npy, .npz, .safetensors or .pt, one or many in a folder."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import picture

from dansm import BadInput
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import batches, check_latents, load_images, stream_images
from dansm.scale.data.pictures import square

SUFFIXES = [".npy", ".npz", ".safetensors", ".pt"]


def write(path, array, name="latents", **others):
    """The array in a file of any kind, with others where the kind has room for some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.as_tensor(array) for name, array in {name: array, **others}.items()}
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def latents(*shape, dtype=np.float16):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def read(source, **settings):
    return np.asarray(load_images(str(source), **settings))


# ------------------------------------------------------------------------------- images

LAYOUTS = {"channels first": (lambda x: x), "channels last": (lambda x: x.transpose(0, 2, 3, 1))}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uint8_arrays_are_images(tmp_path, suffix, channels, layout):
    images = pixels(7, channels, 6, 5)
    stored = np.ascontiguousarray(LAYOUTS[layout](images))
    path = write(tmp_path / f"a{suffix}", stored, name="arr_0")
    found = load_images(str(path))
    assert str(found.dtype).endswith("uint8") and np.array_equal(np.asarray(found), images)
    x = next(batches(found, 7, flip=False))
    assert x.shape == images.shape and x.min() >= -1 and x.max() <= 1
    with stream_images(str(path), channels=channels).open() as (count, entries):
        assert count == 7 and all(np.array_equal(image()[0], images[place]) for place, _, image in entries)


def test_grey_images_need_no_channels(tmp_path):
    images = pixels(7, 6, 5)
    assert np.array_equal(read(write(tmp_path / "a.npy", images)), images[:, None])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_of_arrays_of_images_is_one_set(tmp_path, suffix):
    images = pixels(9, 3, 4, 5)
    write(tmp_path / "a" / f"0{suffix}", images[:4], name="images")
    write(tmp_path / "a" / f"1{suffix}", images[4:8], name="images")
    write(tmp_path / "a" / f"2{suffix}", images[8].transpose(1, 2, 0), name="images")
    for settings in ({}, {"cache": tmp_path / "cache"}):
        assert np.array_equal(read(tmp_path / "a", **settings), images)


@pytest.mark.parametrize("shape", [(3, 3, 9, 7), (3, 1, 9, 7)])
def test_size_makes_arrays_squares_like_images(tmp_path, shape):
    images = pixels(*shape)
    expected = [square(Image.fromarray(image.transpose(1, 2, 0).squeeze()), 4) for image in images]
    for source in (write(tmp_path / "a.npy", images), write(tmp_path / "b" / "a.npz", images).parent):
        found = read(source, size=4)
        assert np.array_equal(found.transpose(0, 2, 3, 1).squeeze(), expected)


@pytest.mark.parametrize("shape", [(4, 2, 6, 5), (4, 6, 5, 4), (4, 6), (0, 3, 6, 5), (2, 3, 4, 5, 3)])
def test_arrays_that_are_no_images_are_refused_with_their_shape(tmp_path, not_loaded, shape):
    message = not_loaded(write(tmp_path / "a.npy", pixels(*shape)))
    assert str(tmp_path / "a.npy") in message and str(shape) in message and "(N, H, W, 1 or 3)" in message


def test_images_and_latents_in_one_folder_are_refused_naming_both(tmp_path, not_loaded):
    for first, second in ((pixels(2, 3, 4, 4), latents(2, 3, 4, 4)), (latents(2, 3, 4, 4), pixels(2, 3, 4, 4))):
        write(tmp_path / "a.npy", first)
        write(tmp_path / "b.npy", second)
        assert str(tmp_path / "b.npy") in not_loaded(tmp_path)


# ------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("name", ["labels", "arr_1"])
def test_labels_lie_next_to_the_samples_in_a_file(tmp_path, suffix, name):
    for folder, count in (("b", 5), ("b", 3)):
        write(tmp_path / folder / f"{count}{suffix}", pixels(count, 3, 4, 4), "arr_0", **{name: np.arange(count) % 2})
    labels = load_labels(str(tmp_path / "b" / f"5{suffix}"), "auto", 5)
    assert labels.numbers.tolist() == [0, 1, 0, 1, 0] and labels.names == ["0", "1"]
    assert load_labels(str(tmp_path / "b"), "auto", 8).numbers.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert load_labels(str(tmp_path / "b"), "none", 8) is None


def test_labels_of_one_file_alone_are_refused(tmp_path):
    write(tmp_path / "0.npz", pixels(2, 3, 4, 4), labels=np.array([[0], [1]]))
    write(tmp_path / "1.npz", pixels(2, 3, 4, 4))
    assert load_labels(str(tmp_path / "0.npz"), "auto", 2).numbers.tolist() == [0, 1]
    write(tmp_path / "pairs" / "0.npz", pixels(2, 3, 4, 4), labels=np.array([0, 1]))
    write(tmp_path / "pairs" / "1.npz", pixels(2, 3, 4, 4), labels=np.array([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match=r"1\.npz holds int64 \(2, 2\): expected labels \(N,\)"):
        load_labels(str(tmp_path / "pairs"), "auto", 4)
    with pytest.raises(ValueError, match=r"1\.npz holds no labels, .*0\.npz does: expected"):
        load_labels(str(tmp_path), "auto", 4)


# ------------------------------------------------------------------------------- latents


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_of_every_kind_of_file(tmp_path, suffix, dtype):
    x = latents(6, 4, 3, 2, dtype=dtype)
    for place, latent in enumerate(x):
        write(tmp_path / "one" / f"{place}{suffix}", latent)
    for name, part in {"0": x[:2], "1": x[2:]}.items():
        write(tmp_path / "many" / f"{name}{suffix}", part)
    for source in (write(tmp_path / f"a{suffix}", x), tmp_path / "one", tmp_path / "many"):
        found = read(source)
        assert found.dtype == dtype and np.array_equal(found, x)
        check_latents(str(source))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_becomes_float32(tmp_path, suffix):
    x = torch.randn(3, 4, 2, 2).bfloat16()
    found = read(write(tmp_path / f"a{suffix}", x))
    assert found.dtype == np.float32 and np.array_equal(found, x.float().numpy())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_latents_of_another_type_are_refused_with_the_types_of_such_a_file(tmp_path, not_loaded, suffix, dtype):
    x = torch.zeros(3, 4, 2, 2, dtype=dtype)
    torches = suffix in (".safetensors", ".pt")
    if dtype.itemsize == 1 and not torches:
        pytest.skip("NumPy has no float8")
    line = not_loaded(write(tmp_path / f"a{suffix}", x if torches else x.numpy()))
    assert "float8" in line.lower() or "float64" in line
    assert line.endswith("of float16, bfloat16 or float32" if torches else "of float16 or float32")


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_latents_are_found_next_to_what_trainers_keep_with_them(tmp_path, suffix):
    x = latents(4, 3, 2)
    write(tmp_path / "0" / f"a{suffix}", x, "latents_24x16", latents_flipped_24x16=x[..., ::-1].copy(),
          original_size=np.array([24, 16]))
    write(tmp_path / "1" / f"a{suffix}", x, prompt_embeds=latents(1, 7, 5))
    for folder in "01":
        assert np.array_equal(read(tmp_path / folder), x[None])


def test_a_tensor_alone_or_that_wants_gradients_is_latents(tmp_path):
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    torch.save(x, tmp_path / "a.pt")
    assert np.array_equal(read(tmp_path / "a.pt"), x.detach().numpy())
    torch.save(x, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(read(tmp_path / "b.pt"), x.detach().numpy())


class Bomb:
    """Pickled, it is the order to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_code_in_a_file_runs(tmp_path, not_loaded, suffix):
    bomb = Bomb(tmp_path / "bang")
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, np.array([[[bomb]]], object))
    else:
        torch.save({"latents": torch.zeros(1, 4, 2, 2), "bomb": bomb}, path)
    assert str(path) in not_loaded(path) and not (tmp_path / "bang").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_refused_by_name(tmp_path, not_loaded, suffix):
    path = write(tmp_path / f"a{suffix}", latents(50, 4, 2, 2))
    whole = path.read_bytes()
    for content in (b"", b"a text", whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(content)
        assert str(path) in not_loaded(path)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_file_with_several_arrays_or_none_is_refused_with_what_it_holds(tmp_path, not_loaded, suffix):
    x = latents(2, 4, 2, 2)
    message = not_loaded(write(tmp_path / f"a{suffix}", x, "one", other=x + 1))
    assert "one (2, 4, 2, 2), other (2, 4, 2, 2)" in message and str(tmp_path / f"a{suffix}") in message
    assert "weight (2, 4)" in not_loaded(write(tmp_path / f"b{suffix}", latents(2, 4), "weight"))


@pytest.mark.parametrize("content", [[torch.zeros(4, 2, 2)], (torch.zeros(2, 4, 2, 2), torch.zeros(2)), "text", 3])
def test_a_pt_file_of_another_kind_is_refused_with_its_kind(tmp_path, not_loaded, content):
    torch.save(content, tmp_path / "a.pt")
    assert f"{tmp_path / 'a.pt'} holds a {type(content).__name__}: expected a tensor" in not_loaded(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_latents_that_are_not_finite_are_named(tmp_path, not_loaded, suffix):
    x = latents(5, 4, 2, 2)
    x[3, 0, 0, 0] = np.nan
    path = write(tmp_path / "a" / f"b{suffix}", x)
    for source in (path, path.parent):
        assert f"{path} holds NaN or infinite numbers, in latent 3" in not_loaded(source)


def test_a_missing_package_for_safetensors_is_named(tmp_path, monkeypatch, run):
    path = write(tmp_path / "a.safetensors", latents(5, 4, 2, 2))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, _, err = run("train", path, "--network", "small", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "safetensors" in err and "pip install 'dansm[train]'" in err


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_arrays_train(tmp_path, trained, suffix):
    labels = np.arange(8) % 2
    for name, array in (("images", pixels(8, 8, 8, 3)), ("latents", latents(8, 4, 8, 8))):
        code, out, _ = trained(write(tmp_path / f"{name}{suffix}", array, name, labels=labels), 1, "--labels", "auto",
                               "--out", tmp_path / name)
        assert code == 0 and f"8 {name} of" in out and "2 classes" in out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_are_encoded_and_decoded(tmp_path, suffix, encoded, weights, run):
    images = pixels(5, 3, 16, 16)
    source = write(tmp_path / f"a{suffix}", images, "images")
    (tmp_path / "files").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "files" / f"{number}.png")
    x, y = read(encoded("a", source=source)), read(encoded("b", source=tmp_path / "files"))
    assert np.array_equal(x, y)
    for name, data in (("a", tmp_path / "a"), ("c", write(tmp_path / f"c{suffix}", x))):
        out = tmp_path / f"{name}-out"
        code, _, err = run("decode", data, "--autoencoder", weights, "--device", "cpu", "--out", out)
        assert code == 0, err
    decoded = [[np.array(Image.open(tmp_path / f"{name}-out" / f"{number:06d}.png")) for number in range(5)]
               for name in "ac"]
    assert np.array_equal(*decoded)


FLOATS = {"0 to 1": (pixels(4, 3, 6, 5) / 255, 1), "channels last": (pixels(4, 6, 5, 3), 255),
          "grey": (pixels(4, 1, 6, 5), 255), "4 channels": (pixels(4, 4, 6, 5), None),
          "-1 to 1": (pixels(4, 3, 6, 5) / 127.5 - 1, None), "16 bits": (257.0 * pixels(4, 3, 6, 5), None)}


@pytest.mark.parametrize("way", [*SUFFIXES, "folder", "cached"])
@pytest.mark.parametrize("kind", FLOATS)
def test_a_line_tells_of_latents_that_look_like_images(tmp_path, capsys, way, kind):
    array, most = FLOATS[kind]
    path = write(tmp_path / "data" / f"a{way if way in SUFFIXES else '.npy'}", array.astype(np.float32))
    source, settings = (path, {}) if way in SUFFIXES else (path.parent, {})
    if way == "cached":
        settings = {"cache": tmp_path / "cache"}
    for _ in range(2):  # also what a cache holds
        assert read(source, **settings).dtype == np.float32
        told = [line for line in capsys.readouterr().out.splitlines() if "floating-point" in line]
        assert len(told) == (most is not None)
        assert not told or f"{source} holds floating-point numbers from 0 to {most}, " in told[0]


# ------------------------------------------------------------------------------- .npy


def stack(count, dtype=np.float16, shape=(4, 2, 3)):
    return latents(count, *shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_file_of_latents_stays_on_the_disk(tmp_path, dtype):
    np.save(tmp_path / "a.npy", stack(50, dtype))
    found = load_images(str(tmp_path / "a.npy"))
    assert isinstance(found, np.memmap) and found.dtype == dtype and (found == stack(50, dtype)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_folder_of_latents_comes_in_the_order_of_the_names_one_a_file_or_many(tmp_path, dtype):
    x = stack(30, dtype)
    for name in ("one", "shards"):
        (tmp_path / name).mkdir()
    for i, latent in enumerate(x):
        np.save(tmp_path / "one" / f"{i:03d}.npy", latent)
    for name, part in (("shards/c", x[17:]), ("shards/a", x[:5]), ("shards/b", np.asfortranarray(x[5:6])),
                       ("shards/bb", x[6:17])):
        np.save(tmp_path / f"{name}.npy", part)
    for folder in ("one", "shards"):
        found = load_images(str(tmp_path / folder))
        assert found.dtype == torch.from_numpy(x).dtype and torch.equal(found, torch.from_numpy(x))
        assert (load_images(str(tmp_path / folder), cache=tmp_path / "cache") == x).all()


def bad_latents(folder):
    """Files that are no latents, by what their refusal says."""
    spoiled = {"NaN": stack(2000), "inf": stack(5)}
    spoiled["NaN"][1999, 0, 1, 1], spoiled["inf"][0, 0, 0, 0] = np.nan, -np.inf
    np.save(folder / "nan.npy", spoiled["NaN"])
    np.save(folder / "inf.npy", spoiled["inf"])
    np.save(folder / "integers.npy", stack(5).astype(int))
    np.save(folder / "doubles.npy", stack(5).astype(float))
    np.save(folder / "other order.npy", stack(5).astype(">f4"))
    np.save(folder / "flat.npy", stack(5).reshape(5, -1))
    np.save(folder / "none.npy", stack(0))
    np.save(folder / "code.npy", np.array([[[[Bomb(folder / "bang")]]]], object), allow_pickle=True)
    np.savez(folder / "several.npz", stack(5))
    (folder / "several.npz").rename(folder / "several.npy")
    np.save(folder / "whole.npy", stack(5))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-1])
    (folder / "whole.npy").unlink()
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_bytes(b"a text")
    return sorted(folder.glob("*.npy"))


def test_bad_latents_are_refused_by_name_and_no_code_in_them_runs(tmp_path, not_loaded):
    paths = bad_latents(tmp_path)
    assert len(paths) == 12
    for path in paths:
        assert str(path) in not_loaded(path)
        (folder := tmp_path / path.stem).mkdir()
        np.save(folder / "a.npy", stack(5))
        path.rename(folder / "b.npy")
        assert str(folder / "b.npy") in not_loaded(folder)
    assert not (tmp_path / "bang").exists()


def test_a_latent_of_one_large_file_is_named_by_its_number(tmp_path, not_loaded):
    array = np.zeros((3000, 4, 4, 4), np.float16)
    array[2345, 3, 1, 2] = np.inf
    np.save(tmp_path / "a.npy", array)
    assert "a.npy holds NaN or infinite numbers, in latent 2345" in not_loaded(tmp_path / "a.npy")


def test_latents_of_unequal_shape_or_type_are_refused_naming_two(tmp_path, not_loaded):
    np.save(tmp_path / "a.npy", stack(2)[0])
    for other, word in (stack(1, np.float32)[0], "types"), (stack(1, shape=(4, 3, 3))[0], "shapes"), (stack(1), ""):
        np.save(tmp_path / "b.npy", other)
        message = not_loaded(tmp_path)
        assert "b.npy" in message and f"expected {'equal ' * bool(word)}{word}" in message


@pytest.mark.parametrize("shape", [(768,), (7, 768), (1, 4, 2, 2, 2)])
def test_a_folder_of_latents_of_another_form_is_refused_by_file_and_shape(tmp_path, not_loaded, shape):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones(shape, np.float32))
    line = not_loaded(tmp_path)
    assert f"{tmp_path / 'a.npy'} holds float32 {shape}: " in line and "(C, H, W)" in line


def test_latents_are_not_resized(tmp_path, not_loaded):
    np.save(tmp_path / "a.npy", stack(2))
    for source in (tmp_path, tmp_path / "a.npy"):
        assert "--size is 64" in not_loaded(source, size=64)


def test_an_unreadable_file_of_latents_may_be_left_out(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", stack(3)[i])
    (tmp_path / "1.npy").write_bytes(b"")
    left_out = []
    found = load_images(str(tmp_path), skip_unreadable=True, left_out=left_out)
    assert (found.numpy() == stack(3)[[0, 2]]).all() and left_out == [tmp_path / "1.npy"]


def test_images_next_to_latents_are_refused(tmp_path, not_loaded):
    np.save(tmp_path / "a.npy", stack(2))
    (tmp_path / "b.png").write_bytes(picture(0))
    message = not_loaded(tmp_path)
    assert "a.npy" in message and "b.png" in message
    with pytest.raises(BadInput, match=r"a\.npy"):
        stream_images(str(tmp_path / "a.npy"))
