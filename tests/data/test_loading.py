"""Every source ends in the same form; every fault ends in one line."""

import http.server
import importlib.util
import logging
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedrobust.data import DataError, load, tfds


def medmnist(num=40, shape=(5, 4), **changes):
    """The arrays of a small file in MedMNIST's layout."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, *shape), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(num) % 3)[:, None].astype(np.uint8)
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


def save(folder, arrays):
    path = folder / "set.npz"
    np.savez_compressed(path, **arrays)
    return path


def assert_in_form(splits, shape, num_classes):
    for data in splits:
        assert (data.image.shape[1:], data.image.dtype) == (shape, np.float32)
        assert (data.label.shape, data.label.dtype) == (data.image.shape[:1], np.int32)
        assert data.num_classes == num_classes
        assert 0 <= data.image.min() <= data.image.max() <= 1
        assert set(np.unique(data.label)) == set(range(num_classes))


def test_digits_are_all_there_once_in_stratified_splits():
    splits = load("digits")
    assert_in_form(splits, (8, 8, 1), 10)
    assert [len(data.label) for data in splits] == [1259, 179, 359]
    source = load_digits()
    images = np.concatenate([data.image for data in splits])[..., 0]
    assert sorted(image.tobytes() for image in images) == sorted(
        (x / 16).astype(np.float32).tobytes() for x in source.images
    )
    for data, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        assert np.abs(np.bincount(data.label) - share * np.bincount(source.target)).max() <= 1


def test_the_seed_alone_decides_the_splits():
    a, b, c = load("digits"), load("digits", seed=0), load("digits", seed=1)
    np.testing.assert_array_equal(a.test.image, b.test.image)
    assert (a.test.image != c.test.image).any()
    with pytest.raises(ValueError, match=r"^seed is "):
        load("digits", seed=-1)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
@pytest.mark.parametrize("flat", [True, False])
def test_npz_keeps_values_order_and_splits(tmp_path, shape, flat):
    arrays = medmnist(shape=shape)
    if flat:
        arrays |= {name: array[:, 0].astype(np.int64) for name, array in arrays.items() if name.endswith("labels")}
    splits = load(str(save(tmp_path, arrays)))
    assert_in_form(splits, (5, 4, shape[2] if len(shape) == 3 else 1), 3)
    for split, data in splits._asdict().items():
        np.testing.assert_allclose(data.image.reshape(-1), arrays[f"{split}_images"].reshape(-1) / 255, rtol=1e-7)
        np.testing.assert_array_equal(data.label, arrays[f"{split}_labels"].reshape(-1))


def test_npz_without_val_gives_a_tenth_of_train_of_each_class(tmp_path):
    arrays = medmnist(num=300, val_images=None, val_labels=None)
    splits = load(str(save(tmp_path, arrays)))
    assert [len(data.label) for data in splits] == [270, 30, 300]
    np.testing.assert_array_equal(np.bincount(splits.val.label), [10, 10, 10])
    both = np.concatenate([splits.train.image, splits.val.image])[..., 0]
    source = (arrays["train_images"] / np.float32(255)).astype(np.float32)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_images": None}, "train_images is missing"),
        ({"test_labels": None}, "test_labels is missing"),
        ({"train_labels": np.full((40, 1), -1)}, "out of range"),
        ({"val_labels": np.full((40, 1), 3)}, r"labels 3 to 3 are out of range: must be in \[0, 3\)"),
        ({"train_labels": np.zeros((40, 1), int)}, "out of range"),
        ({"train_labels": np.full((40, 1), 2**32)}, r"out of range: must be in \[0, 2147483648\)"),
        ({"train_labels": np.zeros((40, 14), int)}, r"labels have shape \(40, 14\)"),
        ({"train_labels": np.zeros((39, 1), int)}, r"labels have shape \(39,\)"),
        ({"train_labels": np.zeros((40, 1))}, "must be whole numbers"),
        ({"test_labels": np.zeros((40, 1))}, "must be whole numbers"),
        ({"train_images": np.zeros((40, 5, 4))}, "images are float64, must be uint8"),
        ({"train_images": np.zeros((40, 20), np.uint8)}, r"shape \(40, 20\)"),
        ({"train_images": np.zeros((40, 2, 5, 4, 1), np.uint8)}, r"shape \(40, 2, 5, 4, 1\)"),
        ({"test_images": np.zeros((40, 6, 4), np.uint8)}, "splits hold images of shapes"),
        ({"train_labels": np.array([{}] * 40)}, "damaged"),
    ],
)
def test_faulty_arrays_are_named_in_one_line(tmp_path, changes, said):
    path = save(tmp_path, medmnist(**changes))
    with pytest.raises(DataError, match=said) as caught:
        load(str(path))
    assert "set.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_npz_is_named_in_one_line(tmp_path):
    whole = save(tmp_path, medmnist()).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    locked = bytearray(whole)
    locked[whole.index(b"PK\x01\x02") + 8] |= 1  # says that the first array has a password
    damaged = {
        "locked.npz": bytes(locked),
        "empty.npz": b"",
        "text.npz": b"no archive",
        "cut.npz": whole[: len(whole) // 2],
        "bit.npz": bytes(flipped),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: damaged") as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        load(str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="damaged"):
        (tmp_path / "folder.npz").mkdir()
        load(str(tmp_path / "folder.npz"))


def test_too_few_examples_for_a_missing_split_are_named(tmp_path):
    path = save(tmp_path, medmnist(num=6, val_images=None, val_labels=None))
    with pytest.raises(DataError, match="too few"):
        load(str(path))


def test_pneumonia_is_read_in_full_and_its_folder_is_left_as_it_was(pneumonia_dir, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(pneumonia_dir / "pneumonia_mnist", folder / "pneumonia_mnist")
    before = sorted(folder.rglob("*"))
    for path in before:
        if path.is_dir():
            path.chmod(0o555)
    folder.chmod(0o555)
    splits = load("pneumonia_mnist", data_dir=folder)
    folder.chmod(0o755)
    assert sorted(folder.rglob("*")) == before
    assert_in_form(splits, (28, 28, 1), 2)
    assert [list(np.bincount(data.label)) for data in splits] == [[1214, 3494], [135, 389], [234, 390]]
    assert splits.train.image.max() > 0.9


def test_the_folder_comes_from_the_environment_if_not_given(pneumonia_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path)):
        load("pneumonia_mnist")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TFDS_DATA_DIR", str(pneumonia_dir))
    monkeypatch.setattr(tfds, "_arrays", lambda where, source: (np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 2))
    assert len(load("pneumonia_mnist").train.label) == 40


def test_a_damaged_prepared_set_is_named_in_one_line(pneumonia_dir, tmp_path):
    shutil.copytree(pneumonia_dir / "pneumonia_mnist", tmp_path / "pneumonia_mnist")
    (tmp_path / "pneumonia_mnist").chmod(0o755)
    (tmp_path / "pneumonia_mnist/1.0.0").chmod(0o755)
    for record in (tmp_path / "pneumonia_mnist/1.0.0").glob("*train*"):
        record.unlink()
    with pytest.raises(DataError, match=r"^pneumonia_mnist: .* cannot be read") as caught:
        load("pneumonia_mnist", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def prepared(monkeypatch):
    """Makes a prepared set of these splits and features, without files."""
    import tensorflow_datasets

    def prepare(splits, **changes):
        kinds = tensorflow_datasets.features
        features = {"image": kinds.Image(shape=(None, None, 1)), "label": kinds.ClassLabel(num_classes=2)} | changes
        info = SimpleNamespace(features=features, splits=splits)
        builder = SimpleNamespace(info=info, as_data_source=splits.get)
        monkeypatch.setattr(tensorflow_datasets.core.read_only_builder, "builder_from_files", lambda *_, **__: builder)

    return prepare


def records(num, height=2):
    return [{"image": np.full((height, 2, 1), i, np.uint8), "label": i % 2} for i in range(num)]


@pytest.mark.parametrize("spelling", ["val", "validation"])
def test_a_split_for_validation_is_found_however_it_is_spelt(prepared, spelling):
    prepared({"train": records(10), spelling: records(6), "test": records(4), "extra": records(8)})
    level = logging.getLogger("absl").level
    assert [len(data.label) for data in load("some_set")] == [10, 6, 4]
    assert logging.getLogger("absl").level == level


def test_a_prepared_set_of_another_kind_is_named_in_one_line(prepared):
    import tensorflow_datasets

    scalar = tensorflow_datasets.features.Scalar(np.int64)
    for splits, features, said in (
        ({"test": records(4)}, {}, r"no split named train \(found: test\)"),
        ({"train": records(4)}, {"label": scalar}, "not an image classification set: has no ClassLabel"),
        ({"train": records(4)}, {"image": scalar}, "not an image classification set: has no Image"),
        ({"train": records(4) + records(4, height=3)}, {}, "split train: images of 2 different shapes"),
    ):
        prepared(splits, **features)
        with pytest.raises(DataError, match=f"^some_set.*{said}") as caught:
            load("some_set")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_set", "MNIST", "", "a b", "/tmp", "digits.np"])
def test_an_unknown_set_is_named_in_one_line(name, tmp_path):
    with pytest.raises(DataError, match="unknown data set") as caught:
        load(name, data_dir=tmp_path)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def assert_says_all(error, *parts):
    for part in (*parts, "pip install -e '.[tfds]'", "--data-dir", ".npz"):
        assert part in str(error)
    assert "\n" not in str(error)


def test_without_tensorflow_the_ways_out_are_given_at_once(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load("mnist", data_dir=tmp_path)
    assert time.monotonic() - start < 10
    assert_says_all(caught.value, "mnist", str(tmp_path), "TensorFlow, which is not installed")


@pytest.fixture
def tensorflow_seems_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "tensorflow" else find(name))


@pytest.mark.usefixtures("tensorflow_seems_installed")
@pytest.mark.parametrize("name", ["mnist", "cifar10", "pneumonia_mnist"])
def test_without_network_the_ways_out_are_given_within_ten_seconds(tmp_path, monkeypatch, name):
    for variable in ("http_proxy", "https_proxy"):  # a proxy that hangs: the slowest way to have no network
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(tfds, "CONNECT_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load(name, data_dir=tmp_path)
    assert time.monotonic() - start < 10 - 5 + 1
    assert_says_all(caught.value, name, str(tmp_path), "did not answer within 1 s")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tensorflow_seems_installed")
def test_with_network_a_set_is_prepared_as_array_records_and_a_failure_is_one_line(tmp_path, monkeypatch):
    import tensorflow_datasets

    asked = []

    def prepare():
        raise OSError("disk\nfull")

    def builder(name, **settings):
        asked.append((name, settings))
        return SimpleNamespace(download_and_prepare=prepare)

    monkeypatch.setattr(tfds, "_answers", lambda url: True)
    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    with pytest.raises(DataError) as caught:
        load("mnist", data_dir=tmp_path)
    assert asked == [("mnist", {"data_dir": tmp_path, "file_format": "array_record"})]
    assert_says_all(caught.value, "mnist", "disk full")


def test_a_server_answers_if_it_says_anything_at_all(monkeypatch):
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert tfds._answers(f"http://127.0.0.1:{server.server_port}/data.zip")
        thread.join()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(tfds, "CONNECT_SECONDS", 0.5)
        start = time.monotonic()
        assert not tfds._answers(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - start < 3
    assert not tfds._answers("http://127.0.0.1:1/")
    assert not tfds._answers("no address")
