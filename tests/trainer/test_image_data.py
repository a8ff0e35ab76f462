"""Image folders, zip files and tables: what is read, and the error of each kind of broken image."""

import io
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from image_samples import captioned_images, colour_image, image_folder, image_settings, zipped
from PIL import Image
from trainer_samples import write_csv, write_jsonl

from sera_serve.trainer.data.images import load_image_classify_data, load_retrieve_data
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.tables import image_files
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tables.image_files import FolderSource, ImageStore
from support.vision import image_file, picture


def names(rows: list[Any]) -> list[tuple[str, str]]:
    return [(row.row.where, row.target) for row in rows]


def load(folder: Path, train: Path, **options: Any) -> Any:
    return load_image_classify_data(image_settings(folder, train, **options))


def refused(folder: Path, train: Path, **options: Any) -> str:
    with pytest.raises(InvalidData) as caught:
        load(folder, train, **options)
    return caught.value.message


def test_a_folder_without_splits_is_training_rows_and_a_part_is_held_out(tmp_path: Path) -> None:
    data = load(tmp_path, image_folder(tmp_path / "rows"), eval_fraction=0.25)
    assert data.labels == ["blue", "red"]
    assert (len(data.train), len(data.eval), len(data.test)) == (18, 6, 0)
    assert sorted(label for _, label in names(data.eval)) == ["blue"] * 3 + ["red"] * 3
    assert names(data.train)[0][0].startswith("blue/")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("as_zip", [False, True])
def test_splits_are_used_by_their_names(tmp_path: Path, wrapped: bool, as_zip: bool) -> None:
    root = tmp_path / "outer"
    image_folder(root / "cracks" if wrapped else root, 4, ("train", "val", "test"))
    data = load(tmp_path, zipped(root, tmp_path / "rows.zip") if as_zip else root)
    assert [len(part) for part in (data.train, data.eval, data.test)] == [8, 8, 8]
    assert {name.split("/")[-3] for name, _ in names(data.test)} == {"test"}
    assert all(f"/{label}/" in name for name, label in names(data.train))


def test_a_folder_reads_as_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    root = image_folder(tmp_path / "rows", 3, ("train", "validation", "test"))
    reference = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    data = load(tmp_path, root)
    for split, rows in (("train", data.train), ("validation", data.eval), ("test", data.test)):
        part = reference[split]
        label_names = part.features["label"].names
        theirs = {(row["image"].tobytes(), label_names[row["label"]]) for row in part}
        assert {(data.images.image(row.image).tobytes(), row.target) for row in rows} == theirs
        assert len(rows) == len(part)


def test_an_own_file_wins_over_the_split_of_the_folder(tmp_path: Path) -> None:
    root, other = image_folder(tmp_path / "rows", 4, ("train", "test")), image_folder(tmp_path / "other", 3)
    data = load(tmp_path, root, test=other, eval=root / "test")
    assert [len(part) for part in (data.train, data.eval, data.test)] == [8, 8, 6]
    assert "has the splits test, train and none for eval" in refused(tmp_path, root, eval=root)


def test_clutter_and_other_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    for clutter in (".DS_Store", "red/Thumbs.db", "__MACOSX/red/._0.png"):
        (root / clutter).parent.mkdir(parents=True, exist_ok=True)
        (root / clutter).write_bytes(b"x")
    (root / "LICENSE.txt").write_text("mine")
    data = load(tmp_path, root, eval_fraction=0)
    assert len(data.train) == 8
    assert data.notes == [f"1 files of {root} are no images and were left out: LICENSE.txt"]


def test_tables_name_images_by_paths(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    rows = [[f"{label}/{i}.png", label] for label in ("blue", "red") for i in range(4)]
    csv_file = write_csv(root / "rows.csv", rows, ("image", "label"))
    assert len(load(tmp_path, csv_file, eval_fraction=0).train) == 8
    records = [{"photo": image, "kind": label} for image, label in rows]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", records)
    options = {"image_column": "photo", "label_column": "kind", "eval_fraction": 0, "images": root}
    by_folder = load(tmp_path, jsonl, **options)
    by_zip = load(tmp_path, jsonl, **options | {"images": zipped(root, tmp_path / "images.zip")})
    assert [row.image for row in by_folder.train] == [row.image for row in by_zip.train]
    assert by_folder.digests == by_zip.digests


def test_labels_that_pandas_wrote_with_a_point_are_whole_numbers(tmp_path: Path) -> None:
    image_folder(tmp_path / "rows", 2)
    paths = [f"{colour}/{i}.png" for colour in ("red", "blue") for i in range(2)]
    train, other = tmp_path / "rows" / "train.csv", tmp_path / "rows" / "eval.csv"
    train.write_text("image,label\n" + "".join(f"{path},{i // 2}.0\n" for i, path in enumerate(paths)))
    other.write_text(f"image,label\n{paths[0]},0\n{paths[3]},1.0\n")
    data = load(tmp_path, train, eval=other)
    assert data.labels == ["0", "1"]
    assert [row.target for row in data.train + data.eval] == ["0", "0", "1", "1", "0", "1"]


def test_a_parquet_file_of_datasets_holds_its_images(tmp_path: Path) -> None:
    values = [{"bytes": colour_image(label, i), "path": None} for i, label in enumerate(["red", "blue"] * 4)]
    table = pyarrow.table({"image": values, "label": ["red", "blue"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    data = load(tmp_path, tmp_path / "rows.parquet", eval_fraction=0)
    assert data.images.image(data.train[1].image).size == (24, 20)
    raw = pyarrow.table({"image": [value["bytes"] for value in values], "label": ["red", "blue"] * 4})
    pyarrow.parquet.write_table(raw, tmp_path / "raw.parquet")
    again = load(tmp_path, tmp_path / "raw.parquet", eval_fraction=0)
    assert [row.image for row in again.train] == [row.image for row in data.train]


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    root = image_folder(tmp_path / "rows", 3, ("train", "test"))
    datasets.disable_progress_bars()
    whole = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    whole.save_to_disk(str(tmp_path / "saved"))
    saved = tmp_path / "saved"
    data = load(tmp_path, saved, test=saved, eval_fraction=0)
    assert (data.labels, len(data.train), len(data.test)) == (["blue", "red"], 6, 6)
    assert data.images.image(data.test[0].image).tobytes() == whole["test"][0]["image"].tobytes()


def test_a_folder_with_metadata_is_its_table(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    rows = [[f"{label}/{i}.png", "warm" if label == "red" else "cold"] for label in ("blue", "red") for i in range(4)]
    write_csv(root / "metadata.csv", rows, ("file_name", "label"))
    assert load(tmp_path, root, eval_fraction=0).labels == ["cold", "warm"]


def break_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def break_text(path: Path) -> None:
    path.write_text("this is a web page that says 404")


def break_empty(path: Path) -> None:
    path.write_bytes(b"")


def break_bomb(path: Path) -> None:
    # A header that claims 60,000 x 60,000 pixels.
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(data))


def break_gif(path: Path) -> None:
    path.write_bytes(image_file(picture(1), "GIF"))


BROKEN = {
    break_truncated: "cannot be decoded",
    break_text: "no JPEG, PNG or WebP image",
    break_empty: "is empty",
    break_bomb: "pixels",
    break_gif: "no JPEG, PNG or WebP image",
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_image_is_named_by_file_and_by_row(tmp_path: Path, damage: Any, says: str) -> None:
    root = image_folder(tmp_path / "rows", 4)
    damage(root / "red" / "2.png")
    rows = [[f"{label}/{i}.png", label] for label in ("blue", "red") for i in range(4)]
    message = refused(tmp_path, root)
    assert "red/2.png" in message
    assert says in message
    message = refused(tmp_path, write_csv(root / "rows.csv", rows, ("image", "label")))
    assert "row 7 (line 8): image: " in message
    assert says in message
    message = refused(tmp_path, zipped(root, tmp_path / "rows.zip"))
    assert "red/2.png" in message


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "link.png", "blue/../../secret.png", "absent.png", "blue", "a\0b", "..\\x"]
)
def test_paths_that_leave_the_folder_or_lead_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    root = image_folder(tmp_path / "rows", 4)
    (tmp_path / "secret.png").write_bytes(colour_image("red", 0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [{"image": f"{label}/{i}.png", "label": label} for label in ("blue", "red") for i in range(4)]
    rows.append({"image": name, "label": "red"})
    message = refused(tmp_path, write_jsonl(root / "rows.jsonl", rows))
    assert "row 9 (line 9): image: " in message


def test_a_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    root, other = image_folder(tmp_path / "rows", 4), image_folder(tmp_path / "other", 4)
    (root / "green").symlink_to(other / "red")
    assert "is a link to a folder" in refused(tmp_path, root)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (None, "image: the cell is empty"),
        ("", "image: the cell is empty"),
        (7, "image: int is no image"),
        (["a.png"], "image: list is no image"),
        ({"bytes": None, "path": None}, "image: the cell is empty"),
        ({"url": "http://example.com/a.png"}, "image: dict is no image"),
    ],
)
def test_cells_that_are_no_images_are_refused(tmp_path: Path, cell: Any, says: str) -> None:
    rows = [{"image": "0.png", "label": label} for label in "abab"] + [{"image": cell, "label": "a"}]
    (tmp_path / "0.png").write_bytes(colour_image("red", 0))
    assert f"row 5 (line 5): {says}" in refused(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(("label", "says"), [(" ", "label is empty"), ("x" * 513, "label has 513 characters")])
def test_folders_whose_names_are_no_labels_are_refused(tmp_path: Path, label: str, says: str) -> None:
    root = zipped(image_folder(tmp_path / "rows", 4), tmp_path / "rows.zip")
    with zipfile.ZipFile(root, "a") as archive:
        archive.writestr(f"rows/{label}/0.png", colour_image("red", 0))
    message = refused(tmp_path, root)
    assert f"rows/{label}/0.png: {says}" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_column", "photo"),
        ("label_column", "kind"),
        ("images", Path("photos")),
        ("delimiter", ";"),
        ("encoding", "latin1"),
    ],
)
def test_options_of_tables_are_refused_where_nothing_reads_them(tmp_path: Path, option: str, value: Any) -> None:
    root = image_folder(tmp_path / "rows", 4)
    with pytest.raises(InvalidData, match=r"is for tables, and .* is read as label/file; leave it out") as caught:
        load(tmp_path, root, **{option: value})
    assert caught.value.param == option
    # A table beside the folder reads them.
    if option in ("image_column", "label_column"):
        names = {"image_column": "image", "label_column": "label", option: value}
        header = (names["image_column"], names["label_column"])
        table = write_csv(root / "eval.csv", [[f"{label}/0.png", label] for label in ("blue", "red")], header)
        assert len(load(tmp_path, root, eval=table, **{option: value}).eval) == 2


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "rows", 4)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "red":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{root / 'red'} cannot be read: Permission denied; check its permissions" in refused(tmp_path, root)


def test_layouts_that_lose_images_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    (root / "stray.png").write_bytes(colour_image("red", 0))
    assert "stray.png is not in a folder named by its label" in refused(tmp_path, root)
    (root / "stray.png").rename(root / "stray.gif")
    assert "1 images that are not JPEG, PNG or WebP, such as stray.gif" in refused(tmp_path, root)
    unlabelled = tmp_path / "unlabelled"
    for split, label in (("train", "red"), ("test", "blue")):
        shutil.copytree(root / label, unlabelled / split)
    assert "has the folders of splits (test, train) and none of labels" in refused(tmp_path, unlabelled)
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused(tmp_path, tmp_path / "empty")


def test_zip_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    whole = zipped(root, tmp_path / "rows.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    assert "is no complete zip file" in refused(tmp_path, tmp_path / "cut.zip")
    assert "cannot be read: No such file" in refused(tmp_path, tmp_path / "absent.zip")
    with zipfile.ZipFile(tmp_path / "rows.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("rows/red/0.png", b"again")
    assert "has 'rows/red/0.png' twice" in refused(tmp_path, tmp_path / "rows.zip")
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 20] ^= 255
    (tmp_path / "damaged.zip").write_bytes(bytes(damaged))
    assert "Bad CRC-32" in refused(tmp_path, tmp_path / "damaged.zip")


def test_an_image_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 100)
    root = image_folder(tmp_path / "rows", 4)
    assert "is larger than" in refused(tmp_path, root)
    assert "is larger than" in refused(tmp_path, zipped(root, tmp_path / "rows.zip"))


def test_labels_of_other_files_must_be_known(tmp_path: Path) -> None:
    root, other = image_folder(tmp_path / "rows", 4), image_folder(tmp_path / "other", 4)
    (other / "red").rename(other / "green")
    assert "green/0.png: label 'green' is not in the training data" in refused(tmp_path, root, eval=other)


def test_equal_images_stay_on_one_side(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 20)
    for i in range(10, 20):
        shutil.copy(root / "red" / f"{i - 10}.png", root / "red" / f"{i}.png")
    data = load(tmp_path, root, eval_fraction=0.3)
    assert not {row.image for row in data.train} & {row.image for row in data.eval}
    assert len(data.images) == 30


def test_captions_are_rows_and_their_image_is_one(tmp_path: Path) -> None:
    table = captioned_images(tmp_path / "photos", 12, 3)
    data = load_retrieve_data(image_settings(tmp_path, table, task="retrieve", eval_fraction=0.25))
    assert (len(data.train), len(data.eval), len(data.images)) == (27, 9, 12)
    assert not {row.image for row in data.train} & {row.image for row in data.eval}
    records = [{"image": f"{i}.png", "caption": ["one", "two"]} for i in range(4)]
    lists = write_jsonl(tmp_path / "photos" / "lists.jsonl", records)
    data = load_retrieve_data(image_settings(tmp_path, lists, task="retrieve", eval_fraction=0))
    assert [row.target for row in data.train] == ["one", "two"] * 4


@pytest.mark.parametrize("caption", [None, "", "  ", 5, [], ["fine", ""]])
def test_rows_without_a_caption_are_refused(tmp_path: Path, caption: Any) -> None:
    captioned_images(tmp_path, 4)
    rows = [{"image": f"{i}.png", "caption": "x"} for i in range(3)] + [{"image": "3.png", "caption": caption}]
    table = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InvalidData, match=r"row 4 \(line 4\): caption has no text"):
        load_retrieve_data(image_settings(tmp_path, table, task="retrieve"))


def test_retrieval_needs_captions_and_two_images(tmp_path: Path) -> None:
    captioned_images(tmp_path / "photos", 4)
    one = write_jsonl(tmp_path / "photos" / "one.jsonl", [{"image": "0.png", "caption": c} for c in "abcd"])
    with pytest.raises(InvalidData, match="has one image"):
        load_retrieve_data(image_settings(tmp_path, one, task="retrieve"))
    with pytest.raises(InvalidData, match="has images without captions"):
        load_retrieve_data(image_settings(tmp_path, tmp_path / "photos", task="retrieve"))
    two = write_jsonl(tmp_path / "photos" / "two.jsonl", [{"image": f"{i}.png", "caption": "x"} for i in range(2)])
    with pytest.raises(InvalidData, match="too few images to hold some out"):
        load_retrieve_data(image_settings(tmp_path, two, task="retrieve", eval_fraction=0.5))


def test_decoded_images_are_kept_up_to_a_bound(tmp_path: Path) -> None:
    store = ImageStore(cache_bytes=3 * 24 * 20 * 3 + 10)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(colour_image("red", i))
    digests = [store.add(FolderSource(tmp_path), f"{i}.png") for i in range(6)]
    assert sum(pixels.nbytes for pixels in store._cache.values()) == 3 * 24 * 20 * 3
    for i, digest in enumerate(digests):
        assert store.image(digest).tobytes() == Image.open(io.BytesIO(colour_image("red", i))).tobytes()
    assert sum(pixels.nbytes for pixels in store._cache.values()) == 3 * 24 * 20 * 3


def test_an_image_that_changes_during_training_is_noticed(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "rows", 4)
    store = ImageStore(cache_bytes=0)
    digest = store.add(FolderSource(root), "red/0.png")
    (root / "red" / "0.png").write_bytes(colour_image("blue", 1))
    with pytest.raises(InvalidData, match=r"red/0\.png changed"):
        store.image(digest)


def test_the_settings_name_what_belongs_to_image_tasks(tmp_path: Path) -> None:
    def message(**options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            image_settings(tmp_path, tmp_path / "rows.csv", **options)
        return str(caught.value)

    assert "--max-length is for tasks" in message(max_length=16)
    assert "--augment is for tasks" in message(task="classify", augment=True)
    assert "--margin is for task retrieve" in message(margin=0.5)
    assert "--batch-size 1 leaves an image" in message(task="retrieve", batch_size=1)
    assert "head-only has no head to train for task retrieve" in message(task="retrieve", method="head-only")
    assert "--augment is not for method head-only" in message(method="head-only", augment=True)
    both = image_settings(tmp_path, tmp_path / "rows.csv", task="retrieve")
    assert both.target_modules == ("q_proj", "v_proj")
    everything = image_settings(tmp_path, tmp_path / "rows.csv", task="retrieve", target_modules="all-linear")
    assert everything.identity() != both.identity()


@pytest.mark.parametrize(("name", "value"), [("patience", 1), ("select_by", "loss")])
def test_what_evaluations_decide_takes_the_validation_rows_of_a_folder(tmp_path: Path, name: str, value: Any) -> None:
    root = image_folder(tmp_path / "split", 2, ("train", "validation"))
    options: dict[str, Any] = {"eval_fraction": 0, name: value}
    assert len(load(tmp_path, root, **options).eval) == 4
    whole = image_folder(tmp_path / "whole", 2)
    for train in (whole, image_folder(tmp_path / "tested", 2, ("train", "test"))):
        said = refused(tmp_path, train, **options)
        assert f"has no validation rows, and {flag(name)} needs evaluations; give --eval" in said
    assert load(tmp_path, whole, eval=root, **options).eval


def test_no_part_is_held_out_beside_validation_rows_of_a_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "split", 4, ("train", "validation"))
    data, whole = load(tmp_path, root, eval_fraction=0.25), image_folder(tmp_path / "whole", 4)
    assert (len(data.train), len(data.eval)) == (8, 8)
    said = f"{root} has validation rows, so --eval-fraction holds no training rows out"
    assert said in data.notes
    for others in (load(tmp_path, root), load(tmp_path, whole, eval_fraction=0.25)):
        assert others.eval and not any("--eval-fraction" in note for note in others.notes)
