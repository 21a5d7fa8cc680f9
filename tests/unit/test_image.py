"""Images: readers and what they refuse, transforms, sums of an evaluation, corruption of small pictures, export."""

import io
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from image_data import image_config, pictures, prepared, write_class_folders, write_idx_folder

from megadsl.errors import UserError
from megadsl.tasks.image.options import ImageOptions
from megadsl.tasks.image.prepare import Preparation, prepare_images
from megadsl.tasks.image.prepared import Prepared
from megadsl.tasks.image.statistics import patches_of
from megadsl.tasks.image.transforms import Augmentation, cutmix, mixup


def test_idx_npz_and_folders_give_the_same_images(tmp_path):
    images, labels = pictures(240)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images[:60], y_test=labels[:60])
    forms = {"idx": write_idx_folder(tmp_path / "idx"), "npz": tmp_path / "set.npz"}
    found = {}
    for name, source in forms.items():
        manifest, reused = prepare_images(source, tmp_path / f"{name}-out", Preparation())
        assert not reused and manifest["splits"] == {"train": 216, "validation": 24, "test": 60}
        found[name] = Prepared(tmp_path / f"{name}-out").train
    assert np.array_equal(found["idx"].images, found["npz"].images) and np.array_equal(found["idx"].labels, found["npz"].labels)
    described = Prepared(tmp_path / "idx-out").described
    pixels = described.normalised(found["idx"].images)
    assert pixels.mean() == pytest.approx(0, abs=1e-4) and pixels.var() == pytest.approx(1, rel=1e-3)
    manifest, _ = prepare_images(write_class_folders(tmp_path / "png"), tmp_path / "png-out", Preparation(size=8, channels=1))
    assert (manifest["height"], manifest["channels"], sum(manifest["splits"].values())) == (8, 1, 24)


def test_a_damaged_folder_is_found_and_made_again(tmp_path):
    folder = prepared(tmp_path)
    path = folder / "train.images.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    manifest, reused = prepare_images(tmp_path / "source", folder, Preparation())
    assert not reused and prepare_images(tmp_path / "source", folder, Preparation()) == (manifest, True)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="damaged .*cut short"):
        Prepared(folder)
    (folder / "images.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="images.json is damaged"):
        Prepared(folder)


def _nan(images, labels):
    images = images / 255.0
    images[7, 3, 3] = np.nan
    return images, labels


def _label(images, labels):
    labels = labels.astype(int)
    labels[5] = -1
    return images, labels


BAD = {"NaN": (_nan, "x.npz, row 7: .*NaN"), "label": (_label, "x.npz, row 5: label -1 is out of range"),
       "channels": (lambda i, y: (np.repeat(i, 2, axis=3), y), "row .*2 channels"),
       "counts": (lambda i, y: (i, y[:-1]), "holds 40 images, but .* 39 labels")}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(tmp_path, case):
    change, said = BAD[case]
    images, labels = change(*pictures(40))
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    with pytest.raises(UserError, match=said):
        prepare_images(tmp_path / "x.npz", tmp_path / "out", Preparation())
    if case in ("NaN", "label"):
        manifest, _ = prepare_images(tmp_path / "x.npz", tmp_path / "out", Preparation(skip_bad_rows=True))
        assert manifest["skipped_rows"] == 1 and sum(manifest["splits"].values()) == 39


def test_bad_folders_are_named(tmp_path):
    source = write_class_folders(tmp_path / "png")
    broken = next(source.rglob("*.png"))
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=re.escape(str(broken))):
        prepare_images(source, tmp_path / "out", Preparation())
    (source / "class-9").mkdir()
    with pytest.raises(UserError, match="class-9 holds no picture"):
        prepare_images(source, tmp_path / "out", Preparation())
    folder = write_idx_folder(tmp_path / "idx")
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte is no complete idx file"):
        prepare_images(folder, tmp_path / "out", Preparation())


@pytest.mark.parametrize("sections, said", [
    ({"task": {"patch_size": 5}}, "task.patch_size 5 does not divide"), ({"model": {"seq_length": 9}}, "set model.seq_length=10"),
    ({"model": {"position_embedding_type": "rope"}}, "knows one direction"), ({"training": {"eval_iters": 9}}, "more than the 24 images"),
])
def test_what_does_not_fit_is_a_sentence(tmp_path, sections, said):
    from megadsl.tasks.registry import task_of

    with pytest.raises(UserError, match=said):
        task_of(image_config(prepared(tmp_path), tmp_path, **sections)).check()


def test_transforms(tmp_path):
    rng = np.random.RandomState(0)
    one, other = np.zeros((8, 8, 1), np.uint8), np.full((8, 8, 1), 100, np.uint8)
    blended, kept = mixup(one, other, 0.25, rng)
    assert kept == 0.25 and np.allclose(blended, 75.0)
    for _ in range(20):
        pasted, kept = cutmix(one, other, 0.6, rng)
        assert kept == pytest.approx(float((pasted == 0).mean()))
    data = Prepared(prepared(tmp_path))
    options = ImageOptions(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.2, crop_padding=2, horizontal_flip=True)
    augmentation = Augmentation(options, data.described, data.train)
    first, again = (augmentation.sample(3, np.random.RandomState([1, 2])) for _ in range(2))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert first[1].sum() == pytest.approx(1.0) and first[1].min() >= 0.2 / 4 - 1e-6
    assert not np.array_equal(first[0], augmentation.sample(3, np.random.RandomState([1, 3]))[0])


def test_patches_are_those_of_a_convolution():
    pixels, weight = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4)
    theirs = torch.nn.functional.conv2d(pixels, weight, stride=4).flatten(2).transpose(1, 2)
    ours = torch.from_numpy(patches_of(pixels.numpy(), 4)) @ weight.flatten(1).T
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_calibration_and_confusion_are_those_of_the_definition():
    from megadsl.tasks.image.evaluation import BINS, Tally, tally_batch

    logits, label = 2 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 7
    tally = Tally.of(tally_batch(logits[:200], label[:200]) + tally_batch(logits[200:], label[200:]), 7)
    confidence, answer = logits.double().softmax(-1).max(-1)
    right, error = (answer == label).double(), 0.0
    for low in range(BINS):
        inside = (confidence >= low / BINS) & (confidence < (low + 1) / BINS)
        if inside.any():
            error += float(inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
    assert tally.calibration_error == pytest.approx(error) and tally.accuracy == pytest.approx(float(right.mean()))
    assert tally.confusion.sum() == 500 and float(tally.confusion.diagonal().sum()) == float(right.sum())


def test_small_grey_pictures_are_corrupted_alike_every_time():
    from megadsl.tasks.image.corruptions import corrupt, corruption_names

    image, before = pictures(1, size=28)[0][0], np.random.get_state()[1].copy()
    for name in corruption_names():
        found = corrupt(image, name, 3, seed=5)
        assert found.shape == image.shape and found.dtype == np.uint8 and not np.array_equal(found, image)
        assert np.array_equal(found, corrupt(image, name, 3, seed=5))
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("positions", ["learned_absolute", "sinusoidal"])
def test_transformers_gives_the_same_logits(make_stack, tmp_path, positions):
    config = image_config(prepared(tmp_path), tmp_path, model={"position_embedding_type": positions})
    stack, plan = make_stack(config, 4)

    class Model:
        network = stack

        def __call__(self, batch):
            return stack(stack.definition.inputs_of(batch))

    with redirect_stdout(io.StringIO()):
        name, error = stack.task.export_huggingface(Model(), plan, tmp_path / "hf")
    assert name == "ViTForImageClassification" and error < 1e-4
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
