"""dansm encode: shards and their index, what a stopped encode leaves, and how latents are read back."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import CPU, as_folder, in_processes, limited_files, lsun, needs_gloo, packed

from dansm import BadInput
from dansm.scale.data import latents
from dansm.scale.data.labels import load_labels
from dansm.scale.data.loader import batches, load_images
from dansm.scale.data.pictures import Reading, read_image
from dansm.scale.data.read import Source, files_of

pytest.importorskip("diffusers")

from dansm.scale.data.autoencoder import Encoder, read_autoencoder


@pytest.fixture
def expected(photographs, weights):
    """Mean and log-variance of the images of the lmdb, and of each mirrored one behind it."""
    images = [read_image(Path(key), lambda key=key: photographs[key], Reading(16), set())[0]
              for key in sorted(photographs)]
    both = np.stack([side for image in images for side in (image, image[..., ::-1])])
    return Encoder(read_autoencoder(weights), CPU).moments(torch.from_numpy(both))


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


def test_an_lmdb_is_encoded_into_shards_with_an_index(encoded, contents, expected, weights, source):
    out = encoded()
    index = json.loads((out / "index.json").read_text())
    found = load_images(str(out))
    assert isinstance(found, latents.Shards) and found.shape == (9, 4, 4, 4) and found.dtype == np.float16
    assert np.allclose(found[:], expected[::2, :4], atol=2e-3)
    assert sorted(contents(out)) == ["index.json", *(f"latents-0000{i}.{kind}" for i in range(3)
                                                     for kind in ("json", "npy"))]
    assert [(note["file"], note["count"], note["shape"]) for note in latents.read_notes(out)] == [
        ("latents-00000.npy", 4, [4, 4, 4]), ("latents-00001.npy", 4, [4, 4, 4]), ("latents-00002.npy", 1, [4, 4, 4])]
    assert index["images"] == 9 and index["factor"] == 0.18215 and index["size"] == 16
    assert index["autoencoder"] == read_autoencoder(weights).digest and index["source"] == str(source)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_folders_and_archives_give_the_same_latents(kind, encoded, photographs, tmp_path):
    named = {f"{key}{'.webp' if photographs[key][8:12] == b'WEBP' else '.jpg'}": photographs[key]
             for key in sorted(photographs)}
    other = as_folder(tmp_path / "images", named) if kind == "folder" else packed(tmp_path / f"images.{kind}", named)
    assert np.array_equal(load_images(str(encoded("other", source=other)))[:], load_images(str(encoded()))[:])


def test_a_tar_out_of_order_is_encoded_whole(encoded, photographs, tmp_path):
    names = sorted(photographs, key=lambda key: key[::-1])
    source = packed(tmp_path / "a.tar", {f"{name}.jpg": photographs[name] for name in names})
    found, images = load_images(str(encoded("other", source=source)))[:], load_images(str(encoded()))[:]
    assert np.allclose(found, images[[sorted(names).index(name) for name in names]], atol=1e-3)


def test_flips_follow_each_latent(encoded, expected):
    found = load_images(str(encoded("flipped", "--flips")))
    assert len(found) == 18 and np.allclose(found[:], expected[:, :4], atol=2e-3)
    assert not np.array_equal(found[1], found[0][..., ::-1])  # a mirrored latent is not the latent of the mirrored


def test_a_second_call_does_nothing_and_other_settings_are_refused(encoded, not_encoded, other_weights, photographs,
                                                                   tmp_path):
    before = stamps(encoded())
    assert stamps(encoded()) == before
    message = not_encoded("latents", "--size", 24)
    assert "size 16 → 24" in message and "--out" in message
    other = lsun(tmp_path / "other_lmdb", dict(list(photographs.items())[:3]))
    assert "other images" in not_encoded(source=other)
    assert "another autoencoder" in not_encoded(weights=other_weights)
    assert stamps(tmp_path / "latents") == before


def test_what_cannot_be_encoded_is_refused(encoded, not_encoded, source, tmp_path):
    assert "--size is 18" in not_encoded("x", "--size", 18)
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 4), np.float16))
    assert "a.npy" in not_encoded(source=tmp_path / "a.npy")
    assert "nowhere" in not_encoded(source=tmp_path / "nowhere")
    (tmp_path / "strange").mkdir()
    np.save(tmp_path / "strange" / "a.npy", np.zeros((2, 4, 4, 4), np.float16))
    assert "a.npy" in not_encoded("strange")
    (encoded() / "index.json").unlink()
    assert "latents-00000.npy" in not_encoded()
    (source / "data.mdb").write_bytes((source / "data.mdb").read_bytes()[:9000])
    assert str(source) in not_encoded("x")


def test_unreadable_images_are_named_or_left_out(encoded, not_encoded, contents, photographs, tmp_path):
    unreadable = {**dict.fromkeys(("!0", "!1", "!2", "!3", "fffff"), b"none"), "00000": photographs["00000"][:90]}
    broken = lsun(tmp_path / "broken_lmdb", {**photographs, **unreadable})
    assert f"{broken / '!0'} cannot be read" in not_encoded(source=broken)
    out = encoded("others", "--skip-unreadable", source=broken)
    notes = latents.read_notes(out)
    assert [note["count"] for note in notes] == [0, 3, 4, 1]  # of the first nothing is left
    assert [name for note in notes for name in note["left_out"]] == [str(broken / name) for name in sorted(unreadable)]
    assert len(load_images(str(out))) == 8 and "latents-00000.npy" not in contents(out)
    none = lsun(tmp_path / "none_lmdb", {"0": b"none"})
    assert str(none) in not_encoded("none", "--skip-unreadable", source=none)


def test_latents_that_are_not_finite_name_the_image(not_encoded, photographs, monkeypatch):
    real = Encoder.moments

    def broken(self, images):
        found = real(self, images)
        found[-1] = torch.nan
        return found

    monkeypatch.setattr(Encoder, "moments", broken)
    assert f"{sorted(photographs)[2]} encodes to NaN" in not_encoded()


# ------------------------------------------------------------------------------- stopped and resumed


def test_killed_at_any_moment_it_resumes_and_ends_with_the_same_bytes(run, encoded, encode_command, killed, contents):
    whole = contents(encoded())
    for moment, number in (("before", 2), ("after", 2), ("after", 5)):  # of the files, one after the other
        killed(lambda: run(*encode_command("killed")), moment, number)
    assert contents(encoded("killed")) == whole


def test_a_full_disk_is_one_line_and_what_was_encoded_is_usable(run, encoded, encode_command, contents, tmp_path,
                                                               monkeypatch):
    whole, sync, calls = contents(encoded()), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # after the settings, a shard and its note, each with its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, out, err = run(*encode_command("full"))
    assert code == 2 and err.count("\n") == 1 and "No space left on device" in err and "the same command resumes" in out
    assert not list((tmp_path / "full").glob("*.partial"))
    assert len(load_images(str(tmp_path / "full"))) == 4
    assert contents(encoded("full")) == whole


def test_a_file_that_may_not_grow_is_called_so(not_encoded):
    with limited_files(10_000):
        assert "File too large" in not_encoded("latents", "--size", 64, "--shard", 8)


@pytest.mark.parametrize("options", [(), ("--moments", "--flips")])
def test_an_unfinished_encode_is_read_as_what_it_is_and_ended(options, encoded, stopped, contents, capsys):
    whole, part = encoded("whole", *options), stopped("part", *options)
    found, all_of_them = load_images(str(part)), load_images(str(whole))
    assert "4 of 9 images" in capsys.readouterr().out
    assert found.shape == (4 * (1 + ("--flips" in options)), 4, 4, 4) and found.moments == ("--moments" in options)
    assert np.array_equal(found[:], all_of_them[: len(found)])
    ended = load_images(str(encoded("part", *options)))
    assert found.about == ended.about == all_of_them.about
    assert contents(part) == contents(whole)


def test_what_an_unreadable_image_stopped_resumes_without_it(run, encoded, encode_command, contents, photographs,
                                                            tmp_path):
    broken = lsun(tmp_path / "broken_lmdb", {**photographs, "fffff": b"no image"})
    code, out, err = run(*encode_command(source=broken))
    assert code == 2 and "fffff cannot be read" in err and "the same command resumes" in out
    out = encoded("latents", "--skip-unreadable", source=broken)
    assert contents(out) == contents(encoded("at once", "--skip-unreadable", source=broken))


def test_an_encode_of_no_whole_shard_cannot_be_read_yet(stopped, not_loaded):
    assert "0 of 9 images" in not_loaded(stopped(before=0))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def smaller(path):
    np.save(path, np.zeros((3, 4, 4, 4), np.float16))


def empty_note(path):
    path.with_suffix(".json").write_text("")


def poor_note(path):
    path.with_suffix(".json").write_text(json.dumps({"file": path.name, "shape": [4, 4, 4], "left_out": []}))


@pytest.mark.parametrize(("how", "finished"), [(Path.unlink, True), (cut, False), (smaller, True), (smaller, False),
                                               (empty_note, True), (empty_note, False), (poor_note, True)])
def test_a_shard_that_is_lost_or_cut_off_is_made_again_and_no_other(how, finished, run, encoded, stopped, contents,
                                                                    encode_command, not_loaded):
    out, whole = encoded() if finished else stopped(before=2), contents(encoded("whole"))
    lost = out / "latents-00001.npy"
    how(lost)
    kept = {name: stamp for name, stamp in stamps(out).items() if name.endswith(".npy") and name != lost.name}
    if how is not smaller:
        assert "dansm encode" in not_loaded(out)
    code, said, err = run(*encode_command())
    assert code == 0 and contents(out) == whole, err
    assert f"9 images, {4 if finished else 5} of them" in said
    assert kept.items() <= stamps(out).items()


def test_an_index_that_lacks_something_is_named(encoded, not_encoded, not_loaded):
    path = encoded() / "index.json"
    index = json.loads(path.read_text())
    for name in ("flips", "images"):
        path.write_text(json.dumps({key: value for key, value in index.items() if key != name}))
        assert f"{path} lacks {name}" in not_loaded(path.parent)
        assert f"{path} lacks {name}" in not_encoded()


def test_a_disk_without_room_is_told_before_anything_is_encoded(encoded, not_encoded, monkeypatch, tmp_path):
    usage, needed = shutil.disk_usage(tmp_path), 9 * 2 * 4 * 4 * 4 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    assert "the latents of 9 images take" in not_encoded("latents", "--flips")
    assert [path.name for path in (tmp_path / "latents").iterdir()] == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert len(load_images(str(encoded("latents", "--flips")))) == 18


def test_what_is_left_of_a_damaged_encode_stays_usable_while_it_is_mended(encoded, stopped):
    (encoded() / "latents-00000.npy").unlink()
    assert len(load_images(str(stopped(before=0)))) == 5
    assert len(load_images(str(encoded()))) == 9


@needs_gloo
@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(encoded, encode_command, contents, tmp_path):
    whole = contents(encoded())
    codes, said = in_processes(tmp_path, encode_command("both"))
    assert codes == [[0], [0]], said
    assert contents(tmp_path / "both") == whole and "9 latents" in said[0] and not said[1].strip()


# ------------------------------------------------------------------------------- read back


@pytest.fixture
def classes(photographs, tmp_path):
    """The photographs in folders, and a class of which no image can be read."""
    content = {f"{name}/{key}.jpg": photographs[key] for name, key in zip("abcaabbcc", photographs, strict=True)}
    return as_folder(tmp_path / "classes", content | {"a/0.jpg": b"none", "bad/0.jpg": b"none"})


def labels_in(out):
    index = json.loads((out / "index.json").read_text())
    return index.get("labels"), index.get("classes")


@pytest.mark.parametrize("options", [(), ("--flips", "--moments")])
def test_the_index_keeps_the_labels_of_all_latents(encoded, classes, contents, options):
    options = ("--skip-unreadable", *options)
    out = encoded("latents", *options, source=classes)
    sides = 1 + ("--flips" in options)
    names = sorted(path.name for path in classes.iterdir())
    expected = [names.index(name) for name in "aaabbbccc" for _ in range(sides)]
    assert labels_in(out) == (expected, names) == (expected, ["a", "b", "bad", "c"])
    found = load_images(str(out))
    labels = load_labels(str(out), "auto", len(found))
    assert labels.numbers.tolist() == expected and labels.names == names
    before = stamps(out)
    assert stamps(encoded("latents", *options, source=classes)) == before
    (out / "latents-00000.npy").unlink()
    whole = contents(encoded("whole", *options, source=classes))
    assert contents(encoded("latents", *options, source=classes)) == whole


def test_labels_may_be_added_to_latents_and_replaced(run, encoded, encode_command, classes):
    options = ("--skip-unreadable", "--labels")
    out = encoded("latents", *options, "none", source=classes)
    assert labels_in(out) == (None, None)
    before = {name: stamp for name, stamp in stamps(out).items() if name != "index.json"}
    code, said, err = run(*encode_command("latents", *options, "folders", source=classes))
    assert code == 0 and "nothing to do" in said and labels_in(out)[1] == ["a", "b", "bad", "c"], err
    assert before.items() <= stamps(out).items()
    np.save(classes / "labels.npy", [0, 1, 2, 3, 3, 0, 1, 2, 0, 0, 1])  # a/0.jpg and bad/0.jpg are the places 0 and 7
    encoded("latents", *options, "auto", source=classes)
    assert labels_in(out) == ([1, 2, 3, 3, 0, 1, 0, 0, 1], ["0", "1", "2", "3"])


def test_wrong_labels_are_refused_before_anything_is_encoded(not_encoded, source, tmp_path):
    np.save(source / "labels.npy", np.arange(8))
    assert "8 labels" in not_encoded()
    assert [path.name for path in (tmp_path / "latents").iterdir()] == [".lock"]


def test_a_shard_is_the_file_that_numpy_writes(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 5)).astype(np.float16)
    latents.write_shard(tmp_path, 7, array, [])
    np.save(tmp_path / "numpy.npy", array)
    assert latents.shard_path(tmp_path, 7).read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_batches_of_shards_are_those_of_one_array(encoded):
    shards = load_images(str(encoded()))
    for resident in (None, True, False):
        ours, plain = batches(shards, 4, resident=resident), batches(torch.from_numpy(shards[:]), 4)
        for _ in range(5):
            assert torch.equal(next(ours), next(plain))
        ours.close()
        plain.close()


def test_shards_are_indexed_as_an_array(encoded):
    shards = load_images(str(encoded()))
    array = np.asarray(shards)
    assert array.shape == shards.shape and len(shards) == 9 and shards.nbytes == array.nbytes
    for rows in (3, -1, slice(2, 7), slice(None, None, 3), np.array([8, 0, 8, 4])):
        assert np.array_equal(shards[rows], array[rows])
    assert np.array_equal(np.take(shards, [7, 1], axis=0), array[[7, 1]])
    assert len(np.take(shards, [], axis=0)) == 0
    for wrong in ([9], [0, 12]):
        with pytest.raises(IndexError):
            shards.take(wrong)


def test_moments_are_drawn_from_each_time_and_the_same_for_any_count_of_ranks(encoded, expected):
    shards = load_images(str(encoded("moments", "--moments")))
    assert shards.shape == (9, 4, 4, 4) and shards.moments and shards.stored == (8, 4, 4)
    assert np.allclose(shards.take(np.arange(9)), expected[::2], atol=2e-2)
    assert np.allclose(shards[:], expected[::2, :4], atol=2e-3)
    alone = batches(shards, 6, flip=False, seed=1)
    several = [batches(shards, 6, flip=False, seed=1, rank=rank, ranks=2, resident=True) for rank in range(2)]
    first = [next(alone) for _ in range(4)]
    assert all(torch.equal(x, torch.cat([next(part) for part in several])) for x in first)
    assert torch.equal(next(batches(shards, 6, flip=False, seed=1, start=2)), first[2])
    order = np.random.default_rng([1, 0]).permutation(9)[:6]
    mean, log_variance = torch.from_numpy(shards.take(order)).float().chunk(2, 1)
    noise = (first[0] - mean) / (log_variance / 2).exp()
    assert first[0].shape == (6, 4, 4, 4) and abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2


def test_damaged_shards_are_refused(encoded, not_loaded):
    out = encoded()
    assert "--size is 16" in not_loaded(out, size=16)
    np.save(out / "latents-00001.npy", np.zeros((3, 4, 4, 4)))
    assert "float64" in not_loaded(out)
    (out / "latents-00001.npy").unlink()
    assert "latents-00001.npy cannot be read" in not_loaded(out)
    (out / "index.json").write_text(json.dumps({"dansm_latents": 3}))
    assert "version 3" in not_loaded(out)


def as_version_1(out):
    """Latents as version 1 finished them: the index holds the notes of all shards."""
    index, notes = json.loads((out / "index.json").read_text()), latents.read_notes(out)
    del index["images"]
    left_out = [name for note in notes for name in note["left_out"]]
    index |= {"dansm_latents": 1, "count": sum(note["count"] for note in notes), "left_out": left_out,
              "shards": [note for note in notes if note["count"]]}
    (out / "index.json").write_text(json.dumps(index))
    for path in out.glob("latents-*.json"):
        path.unlink()


def test_latents_that_version_1_finished_are_read_and_the_same_encode_has_nothing_to_do(run, encoded, encode_command,
                                                                                        not_encoded, capsys):
    out = encoded("latents", "--flips")
    expected = load_images(str(out))[:]
    as_version_1(out)
    assert np.array_equal(load_images(str(out))[:], expected) and "so far" not in capsys.readouterr().out
    before = {name: stamp for name, stamp in stamps(out).items() if name.endswith(".npy")}
    code, said, err = run(*encode_command("latents", "--flips"))
    assert code == 0 and "9 images already: nothing to do" in said, err
    assert before.items() <= stamps(out).items() and np.array_equal(load_images(str(out))[:], expected)
    as_version_1(out)
    assert "flips True → False" in not_encoded()


def test_a_shard_that_latents_of_version_1_have_lost_is_made_again(run, encoded, encode_command):
    out = encoded()
    expected = load_images(str(out))[:]
    as_version_1(out)
    (out / "latents-00001.npy").unlink()
    code, said, err = run(*encode_command())
    assert code == 0 and "9 images, 4 of them to encode" in said, err
    assert np.array_equal(load_images(str(out))[:], expected)


def test_more_shards_than_a_process_may_have_files_open(encoded, monkeypatch):
    out = encoded("many", "--shard", 1, "--batch", 1)
    limit, opened = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 4, limit[1]))
    try:
        shards = load_images(str(out))
        assert len(next(batches(shards, 9, flip=False))) == len(shards.on(CPU)) == 9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    def failing(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(np.lib.format, "open_memmap", failing)
    with pytest.raises(BadInput, match="Too many open files"):
        load_images(str(out))


def test_the_papers_layout_is_read_also_beside_an_index_of_another_program(tmp_path):
    (tmp_path / "index.json").write_text("no JSON")
    array = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    for number, latent in enumerate(array):
        np.save(tmp_path / f"{number}.npy", latent)
    assert np.array_equal(load_images(str(tmp_path)), array)


def test_transparent_pixels_are_encoded_over_the_background_and_counted(tmp_path, run, encode_command, not_encoded):
    for name, alpha in (("transparent", 0), ("opaque", 255)):
        (tmp_path / name).mkdir()
        for number in range(5):
            pixels = np.full((16, 16, 4), 0 if alpha else 9 * number, np.uint8)  # seen over black, all are black
            pixels[..., 3] = alpha
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    source = tmp_path / "transparent"
    code, out, _ = run(*encode_command("a", "--background", "black", source=source))
    assert code == 0 and "5 images have transparent pixels, laid over black" in out
    run(*encode_command("b", source=tmp_path / "opaque"))
    a, b = (np.concatenate([np.load(path) for path in sorted((tmp_path / name).glob("*.npy"))]) for name in "ab")
    assert np.array_equal(a, b)
    assert "background black → white" in not_encoded("a", source=source)


@pytest.mark.parametrize("read_as", ["1 16", f"2 {Reading(16, channels=3)}"])  # by versions 1 and 2 of reading
def test_what_an_earlier_version_finished_is_kept_and_what_it_began_is_refused(encoded, not_encoded, source, run,
                                                                               encode_command, read_as):
    out = encoded()
    index = json.loads((out / "index.json").read_text())
    index["source_digest"] = Source(source, files_of(source)).digest_for(read_as)
    if read_as == "1 16":
        del index["background"]
    (out / "index.json").write_text(json.dumps(index))
    before = stamps(out)
    code, said, err = run(*encode_command())
    assert code == 0 and "earlier version" in said and "nothing to do" in said, err
    assert stamps(out) == before
    next(out.glob("*.npy")).unlink()
    assert "earlier version" in not_encoded()
