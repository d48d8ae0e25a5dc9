"""Folders of images as sources: captions, splits, and what is said about broken ones."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest
from absl import logging
from PIL import Image

from latent_diffusion_jax.data import folders
from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError


def level(record) -> int:
    """The grey level that a record's image shows."""
    return images.decode(record["image"]).getpixel((0, 0))[0]


def everything(source) -> list:
    return [source[i] for i in range(len(source))]


def raises_user_error(*parts: str):
    """Expects a UserError of one line that says each of these."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(UserError, match=rf"^{pattern}[^\n]*$")


def table(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def captions(folder: pathlib.Path, split: str, **options) -> dict[str, list[str]]:
    """Captions by file name."""
    records = everything(open_source(str(folder), split, **options))
    found = {str(pathlib.Path(r["name"]).relative_to(folder)): r["captions"] for r in records}
    assert len(found) == len(records)
    return found


def all_captions(folder: pathlib.Path, **options) -> dict[str, list[str]]:
    return captions(folder, "train", **options) | captions(folder, "test", **options)


def test_metadata_table(make_folder, png):
    folder = make_folder(
        {
            "a.png": png(1),
            "deep/er/b.png": png(2),
            "metadata.jsonl": table(
                {"file_name": "a.png", "text": "one", "seed": 3},
                {"file_name": "deep/er/b.png", "text": ["two", "zwei"]},
            )
            + "\n",
        }
    )
    assert all_captions(folder) == {"a.png": ["one"], "deep/er/b.png": ["two", "zwei"]}
    for split in ("train", "test"):
        for record in everything(open_source(str(folder), split)):
            assert level(record) == (1 if record["captions"] == ["one"] else 2)
            assert record["label"] is None


def test_metadata_tables_in_subfolders(make_folder):
    folder = make_folder(
        {
            "x/a.png": None,
            "x/metadata.jsonl": table({"file_name": "a.png", "text": "one"}),
            "y/a.png": None,
            "y/metadata.jsonl": table({"file_name": "a.png", "text": "two"}),
        }
    )
    assert all_captions(folder) == {"x/a.png": ["one"], "y/a.png": ["two"]}


def test_text_files_beside_images(make_folder):
    folder = make_folder(
        {"a.png": None, "a.txt": " one\n", "sub/B.JPG": None, "sub/B.txt": "zwölf", "x.md": "no"}
    )
    assert all_captions(folder) == {"a.png": ["one"], "sub/B.JPG": ["zwölf"]}


def test_caption_with_unusual_line_separators(make_folder):
    # They are no line ends in JSON Lines, and json.dumps(ensure_ascii=False) leaves them as is.
    text = "first\u2028second\x85third"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    folder = make_folder({"a.png": None, "metadata.jsonl": row + "\n"})
    assert captions(folder, "test", holdout_share=1.0) == {"a.png": [text]}


def test_caption_template_for_folders(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "one", "b.png": None, "b.txt": "{}"})
    found = all_captions(folder, caption_template="a photo of {}")
    assert found == {"a.png": ["a photo of one"], "b.png": ["a photo of {}"]}


@pytest.mark.parametrize("held_out", ["test", "validation", "valid", "val"])
def test_split_subfolders(make_folder, held_out):
    folder = make_folder(
        {
            "train/a.png": None,
            "train/a.txt": "one",
            f"{held_out}/b.png": None,
            f"{held_out}/b.txt": "two",
        }
    )
    assert captions(folder, "train") == {"train/a.png": ["one"]}
    assert captions(folder, "test") == {f"{held_out}/b.png": ["two"]}


def many(count: int, prefix: str = "") -> dict[str, str | None]:
    """Files of a folder with `count` captioned images."""
    files: dict[str, str | None] = {}
    for i in range(count):
        files |= {f"{prefix}{i:04d}.png": None, f"{prefix}{i:04d}.txt": f"number {i}"}
    return files


@pytest.mark.parametrize("prefixes", [("train/",), ("test/", "")], ids=["no test/", "no train/"])
def test_nothing_is_in_both_splits_where_one_subfolder_is_missing(make_folder, prefixes):
    for prefix in prefixes:
        folder = make_folder(many(60, prefix))
    train = captions(folder, "train", holdout_share=0.3)
    test = captions(folder, "test", holdout_share=0.3)
    assert train and test
    assert not train.keys() & test.keys()


def test_hash_holdout_is_a_partition_of_about_the_asked_share(make_folder):
    folder = make_folder(many(600))
    for share in (0.05, 0.3):
        train = captions(folder, "train", holdout_share=share)
        test = captions(folder, "test", holdout_share=share)
        assert not train.keys() & test.keys()
        assert len(train) + len(test) == 600
        assert len(test) / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)


def test_hash_holdout_stays_when_images_are_added(make_folder):
    folder = make_folder(many(100))
    before = {split: captions(folder, split, holdout_share=0.2) for split in ("train", "test")}
    make_folder(many(100, "a_") | many(100, "new/"))
    after = {split: captions(folder, split, holdout_share=0.2) for split in ("train", "test")}
    for split in ("train", "test"):
        assert before[split].keys() < after[split].keys()


def test_a_small_folder_still_holds_one_image_out(make_folder):
    folder = make_folder(many(3))
    assert len(captions(folder, "test", holdout_share=0.0)) == 1
    assert len(captions(folder, "train", holdout_share=0.0)) == 2


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_folder(name):
    with raises_user_error(name, "does not exist"):
        open_source(name, "train")


def test_empty_folder(make_folder):
    folder = make_folder({"readme.md": "nothing here"})
    with raises_user_error(str(folder), "'train'", "metadata.jsonl", ".txt"):
        open_source(str(folder), "train")


def test_folder_with_one_image_has_nothing_to_train_on(make_folder):
    folder = make_folder(many(1))
    with raises_user_error(str(folder), "'train'"):
        open_source(str(folder), "train")


def test_unknown_split_of_a_folder(make_folder):
    with raises_user_error("'train[:50%]'", "train and test"):
        open_source(str(make_folder(many(2))), "train[:50%]")


GOOD_ROW = '{"file_name": "a.png", "text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param('{"image": "a.png", "text": "x"}', ["image", "file_name"], id="no file_name"),
        pytest.param('{"file_name": "a.png", "caption": "x"}', ["caption", "text"], id="no text"),
        pytest.param("[1, 2]", ["list", "file_name", "text"], id="a list"),
        pytest.param("{'file_name': 'a.png'}", ["JSON"], id="not JSON"),
        pytest.param('{"file_name": "a.png", "text": "x', ["JSON"], id="cut off"),
        pytest.param('{"file_name": "a.png", "text": 3}', ["text", "string"], id="a number"),
        pytest.param('{"file_name": "a.png", "text": []}', ["text", "string"], id="no caption"),
        pytest.param('{"file_name": "a.png", "text": ["x", 1]}', ["text"], id="mixed captions"),
        pytest.param('{"file_name": "b.png", "text": "x"}', ["'b.png'", "exist"], id="missing"),
        pytest.param('{"file_name": "../b.png", "text": "x"}', ["'../b.png'"], id="out of it"),
        pytest.param('{"file_name": "/b.png", "text": "x"}', ["'/b.png'"], id="absolute"),
        pytest.param('{"file_name": "x/../a.png", "text": "x"}', ["leads out"], id="out and in"),
    ],
)
def test_bad_row_is_named_by_file_and_line(make_folder, png, line, said):
    folder = make_folder({"a.png": None, "metadata.jsonl": GOOD_ROW + line + "\n"})
    (folder.parent / "b.png").write_bytes(png())  # there, and still not to be read
    with raises_user_error(f"{folder / 'metadata.jsonl'}, line 2", *said):
        open_source(str(folder), "train")


def test_link_out_of_the_folder(make_folder, tmp_path, png):
    (tmp_path / "secret.png").write_bytes(png())
    folder = make_folder({"metadata.jsonl": GOOD_ROW})
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    with raises_user_error(f"{folder / 'metadata.jsonl'}, line 1", "'a.png'"):
        open_source(str(folder), "train")


def test_what_nobody_names_may_be_a_link(make_folder, tmp_path, png):
    """A folder put together of links: only tables, which are others' texts, cannot lead out."""
    elsewhere = make_folder({"a.png": png(3), "a.txt": "one"})
    folder = tmp_path / "links"
    folder.mkdir()
    for name in ("a.png", "a.txt"):
        (folder / name).symlink_to(elsewhere / name)
    for key, captions in ({}, ["one"]), ({"caption_key": ""}, [""]):
        (record,) = open_source(str(folder), "test", **key)
        assert record["captions"] == captions and record["image"] == png(3)


def test_links_within_the_folder_and_to_whole_folders_are_followed(make_folder, tmp_path, png):
    folder = make_folder({"big/a.png": png(7), "big/a.txt": "one", "b.png": None, "b.txt": "two"})
    (folder / "c.png").symlink_to("big/a.png")
    (folder / "c.txt").symlink_to(folder / "big" / "a.txt")
    assert all_captions(folder) == {"big/a.png": ["one"], "c.png": ["one"], "b.png": ["two"]}
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        (tmp_path / "other" / split).symlink_to(folder / "big")
    assert captions(tmp_path / "other", "train") == {"train/a.png": ["one"]}
    elsewhere = make_folder({"a.png": png(9), "a.txt": "three"}, "elsewhere")
    (folder / "linked").symlink_to(elsewhere)  # a class, say
    (folder / "big" / "back").symlink_to(folder)  # a ring
    assert all_captions(folder) == {
        "big/a.png": ["one"], "c.png": ["one"], "b.png": ["two"], "linked/a.png": ["three"]
    }  # fmt: skip
    (folder / "d.png").symlink_to("d.png")  # a ring
    (folder / "metadata.jsonl").write_text(table({"file_name": "d.png", "text": "one"}))
    with raises_user_error("'d.png' does not exist"):
        open_source(str(folder), "train")


def test_a_folder_with_several_names_is_read_once(make_folder, tmp_path, monkeypatch, caplog):
    outside = make_folder({"x/a.png": None}, "outside")
    folder = make_folder({"m/b.png": None})
    for name, target in {"a": "m", "z": outside, "k": outside / "x", "l": outside / "x"}.items():
        (folder / name).symlink_to(target)
    scandir, found = os.scandir, []
    for order in (False, True):

        @contextlib.contextmanager
        def scan(path, order=order):
            with scandir(path) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=order)

        monkeypatch.setattr(os, "scandir", scan)
        with caplog.at_level("WARNING", logger="absl"):
            found.append([str(path.relative_to(folder)) for path in folders._files(folder)])
    # The real folder before links to it, else the first link; `z` is read, for what else it has.
    assert sorted(found[0]) == sorted(found[1]) == ["k/a.png", "m/b.png"]
    said = "3 folders in {}, a the first, are read once, under their other names"
    assert [record.getMessage() for record in caplog.records] == [said.format(folder)] * 2


def test_links_that_double_the_paths_at_every_level(make_folder):
    folder = make_folder({f"{i:02d}/{name}": None for i in range(20) for name in ["x.png"]})
    for i in range(19):
        for name in ("left", "right"):
            (folder / f"{i:02d}" / name).symlink_to(folder / f"{i + 1:02d}")
    assert len(list(folders._files(folder))) == 20


def test_folders_that_lie_too_deep(make_folder):
    folder = make_folder({"/".join(["d"] * 100 + ["a.png"]): None, "b.png": None})
    assert len(all_captions(folder, caption_key="")) == 2
    make_folder({"/".join(["d"] * 150 + ["a.png"]): None})
    with raises_user_error(f"data folder {folder} has over 100 folders one within the other: d/d"):
        open_source(str(folder), "train", caption_key="")


def test_names_that_are_no_text(make_folder):
    folder = make_folder(many(3))
    for kind in (b"png", b"txt"):
        path = os.fsencode(folder) + b"/0000." + kind
        os.rename(path, os.fsencode(folder) + b"/\xff1." + kind)
    assert len(all_captions(folder)) == 3
    assert open_source(str(folder), "train").identity


def test_folders_that_cannot_be_read_are_not_left_out(make_folder, monkeypatch):
    folder = make_folder({"big/a.png": None, "small/b.png": None})
    scandir, unreadable = os.scandir, ["small", "lost+found"]

    def scan(path):
        if pathlib.Path(path).name in unreadable:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    (folder / "lost+found").mkdir()
    with raises_user_error(f"cannot read data folder {folder / 'small'}: Permission denied"):
        open_source(str(folder), "train", caption_key="")
    unreadable.remove("small")
    assert len(open_source(str(folder), "train", caption_key="")) > 0


def test_captions_that_are_no_files_or_too_large_are_refused(make_folder, monkeypatch):
    folder = make_folder({"a.png": None})
    os.mkfifo(folder / "metadata.jsonl")  # of which reading would wait for ever
    with raises_user_error(f"cannot read {folder / 'metadata.jsonl'}: it is no ordinary file"):
        open_source(str(folder), "train")
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.jsonl").open("wb") as file:
        file.truncate(2**40)
    with raises_user_error("metadata.jsonl: its 1048576 MiB are more than the 4096 allowed"):
        open_source(str(folder), "train")
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_bytes(b"a" * (2**20 + 1))
    with raises_user_error(f"{folder / 'a.txt'}: its 2 MiB are more than the 1 allowed"):
        open_source(str(folder), "train")


def test_rows_and_captions_that_are_too_long_are_refused(make_folder, monkeypatch):
    path = make_folder({"a.png": None}) / "metadata.jsonl"
    path.write_text(GOOD_ROW + table({"file_name": "a.png", "text": "x" * (2**20 + 1)}))
    with raises_user_error(f"{path}, line 2: text has more than 1048576 characters"):
        open_source(str(path.parent), "train")
    path.write_text(GOOD_ROW + " " * 2**24 + GOOD_ROW)
    with raises_user_error(f"cannot read {path}: line 2 has more than 16777216 characters"):
        open_source(str(path.parent), "train")


def test_text_with_a_mark_of_its_order_of_bytes(make_folder):
    """Windows' editors begin files of UTF-8 with one."""
    folder = make_folder({"a.png": None, "a.txt": "\ufeffzwölf\r\nEnten\r\n"})
    assert captions(folder, "test") == {"a.png": ["zwölf\nEnten"]}
    make_folder({"metadata.jsonl": "\ufeff" + GOOD_ROW})
    assert captions(folder, "test") == {"a.png": ["one"]}


def test_an_image_in_several_rows_has_all_their_captions(make_folder):
    rows = [("a.png", "one"), ("x/b.png", "two"), ("./a.png", ["three", "four"]), ("x//b.png", "5")]
    rows = [{"file_name": name, "text": text} for name, text in rows]
    folder = make_folder({"a.png": None, "x/b.png": None, "metadata.jsonl": table(*rows)})
    make_folder({"x/metadata.jsonl": table({"file_name": "b.png", "text": "six"})})
    assert all_captions(folder) == {
        "a.png": ["one", "three", "four"],
        "x/b.png": ["two", "5", "six"],
    }


def test_image_without_caption(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "one", "sub/b.png": None, "sub/c.png": None})
    with raises_user_error(str(folder), "2 of 3", "sub/b.png", "b.txt"):
        open_source(str(folder), "train")


def test_caption_file_that_is_not_utf8(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "schön".encode("latin-1")})
    with raises_user_error(str(folder / "a.txt"), "UTF-8"):
        open_source(str(folder), "train")


def test_table_that_is_not_utf8(make_folder):
    row = '{"file_name": "a.png", "text": "schön"}\n'.encode("latin-1")
    folder = make_folder({"a.png": None, "metadata.jsonl": row})
    with raises_user_error(str(folder / "metadata.jsonl"), "UTF-8"):
        open_source(str(folder), "train")


def test_an_image_that_vanishes_is_a_damaged_record(make_folder):
    folder = make_folder(many(2))
    source = open_source(str(folder), "train")
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(RecordError, match="No such file") as raised:
        source[0]
    assert raised.value.name.startswith(str(folder)) and raised.value.name.endswith(".png")


def fail_reads(monkeypatch, *codes):
    """Makes the first reads of images fail, one for each code."""
    left, read = list(codes), images.read_bytes

    def fails(path):
        if left:
            code = left.pop(0)
            raise OSError(code, os.strerror(code), str(path))
        return read(path)

    monkeypatch.setattr(images, "read_bytes", fails)
    return left


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_errors_that_may_be_over_soon_are_no_damage(make_folder, png, monkeypatch, code):
    source = open_source(str(make_folder({"a.png": png(1), "b.png": png(2)})), "train",
                         caption_key="")  # fmt: skip
    for codes in ([code], [errno.ENOENT, code]):
        left = fail_reads(monkeypatch, *codes)
        with pytest.raises(OSError) as raised:
            source[0]
        assert raised.value.errno == code and not isinstance(raised.value, ValueError)
        assert not left
    assert level(source[0]) in (1, 2)


def test_a_mount_that_is_back_when_its_folder_is_looked_at_gives_the_image(
    make_folder, png, monkeypatch
):
    source = open_source(str(make_folder({"a.png": png(1), "b.png": png(2)})), "train",
                         caption_key="")  # fmt: skip
    fail_reads(monkeypatch, errno.ENOENT)
    assert level(source[0]) in (1, 2)
    for code in (errno.ENOENT, errno.EACCES):  # at both tries
        fail_reads(monkeypatch, code, code)
        with pytest.raises(RecordError, match=os.strerror(code)):
            source[0]


@pytest.mark.parametrize("how", ["removed", "unmounted"])
def test_a_folder_that_vanishes_is_no_damaged_record(make_folder, how):
    folder = make_folder(many(2))
    source = open_source(str(folder), "train")
    shutil.rmtree(folder)
    if how == "unmounted":  # its mount point stays, empty
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"\.png"):
        source[0]


def test_images_that_no_table_lists_are_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    for i in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) + "\n" for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    assert len(open_source(str(tmp_path), "train", holdout_share=0.0)) == 2
    assert said and "1 images" in said[0] and "3.png" in said[0]


# Without captions, and arrays.


def test_images_without_captions(make_folder, png):
    folder = make_folder(
        {f"sub/{i}.png": png(i) for i in range(20)}
        | {"metadata.jsonl": GOOD_ROW, "sub/1.txt": "one", "notes.md": "no image"}
    )
    options = {"caption_key": "", "caption_template": "a photo of {}", "holdout_share": 0.3}
    found = [everything(open_source(str(folder), s, **options)) for s in ("train", "test")]
    assert all(found)
    records = found[0] + found[1]
    assert sorted(level(record) for record in records) == list(range(20))
    assert all(record["captions"] == [""] for record in records)


@pytest.mark.parametrize(
    "prefixes", [("train/", "test/"), ("train/",), ("test/", "")], ids=["both", "train", "test"]
)
def test_split_subfolders_without_captions(make_folder, prefixes):
    for prefix in prefixes:
        folder = make_folder({f"{prefix}{i}.png": None for i in range(30)})
    train, test = (
        captions(folder, split, caption_key="", holdout_share=0.3) for split in ("train", "test")
    )
    assert len(train) + len(test) == 30 * len(prefixes) and not train.keys() & test.keys()
    if len(prefixes) == 2:  # the share is of a folder without test/ alone
        assert all(name.startswith("test/") for name in test) and len(test) == 30
    else:
        assert 0 < len(test) < 20


def test_the_way_without_captions_is_told(make_folder):
    folder = make_folder({"a.png": None, "b.png": None})
    with raises_user_error("2 of 2", "data.caption_key=''"):
        open_source(str(folder), "train")


def test_empty_folder_where_no_captions_are_asked_for(make_folder):
    folder = make_folder({"readme.md": "nothing here"})
    with raises_user_error(f"{folder} has no images for split 'train': expected image files"):
        open_source(str(folder), "train", caption_key="")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_folder_of_arrays(make_folder):
    arrays = {f"{i}.npy": np.full((4, 6, 5), i, np.uint8) for i in range(3)}
    folder = make_folder({name: npy(array) for name, array in arrays.items()})
    records = [
        record
        for split in ("train", "test")
        for record in everything(open_source(str(folder), split, caption_key=""))
    ]
    assert len(records) == 3
    for record in records:
        found = images.decode(record["image"], 5)
        np.testing.assert_array_equal(found, arrays[pathlib.Path(record["name"]).name])


def test_arrays_beside_images_are_not_images(make_folder):
    files = {f"{i}.{kind}": None for i in range(4) for kind in ("png", "npy")}
    folder = make_folder(files)
    found = captions(folder, "train", caption_key="") | captions(folder, "test", caption_key="")
    assert sorted(found) == ["0.png", "1.png", "2.png", "3.png"]


def test_captions_with_control_characters_are_refused(make_folder):
    line = json.dumps({"file_name": "a.png", "text": "a \x1b[2J duck"})
    folder = make_folder({"a.png": None, "metadata.jsonl": line})
    with raises_user_error(f"{folder / 'metadata.jsonl'}, line 1: text has the control character"):
        open_source(str(folder), "train")
    folder = make_folder({"b/b.png": None, "b/b.txt": "a \x00 duck"}) / "b"
    with raises_user_error(f"caption file {folder / 'b.txt'} has the control character"):
        open_source(str(folder), "train")


def test_what_is_no_picture_is_a_damaged_record(make_folder, png):
    folder = make_folder({"a.png": png(1), "b.png": png(2), "c.png": png(3)})
    source = open_source(str(folder), "train", caption_key="")
    path = pathlib.Path(source[0]["name"])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecordError, match="it is no ordinary file") as raised:
        source[0]
    assert raised.value.name == str(path)


def test_names_of_classes_with_control_characters_are_refused(make_folder, png):
    folder = make_folder({"cat/a.png": png(1), "d\x1bog/b.png": png(2)})
    with raises_user_error("the name of the class folder", "has the control character"):
        open_source(str(folder), "train", caption_key="")


def test_identity_is_of_names_order_and_split(make_folder, monkeypatch):
    folder = make_folder(many(20))

    def found(name=folder, split="train", **options):
        return open_source(str(name), split, **options).identity

    one = found()
    assert re.fullmatch("[0-9a-f]{16}", one) and found() == one
    (folder / "0003.png").write_bytes(b"other")  # images are not read
    shutil.copytree(folder, folder.parent / "elsewhere")
    monkeypatch.chdir(folder)
    assert found(folder.parent / "elsewhere") == found(".") == one
    source = open_source(str(folder), "train")
    source._paths.reverse()
    others = {one, source.identity, found(split="test"), found(holdout_share=0.5)}
    make_folder({"more.png": None, "more.txt": "more"})
    assert len(others | {found()}) == 5


def test_identity_of_many_images_is_cheap():
    source = folders.FolderSource.__new__(folders.FolderSource)
    source._root, source._split = pathlib.Path("/data/images"), "train"
    source._paths = [source._root / f"{i % 1000}/{i}.jpg" for i in range(100_000)]
    start = time.perf_counter()
    assert source.identity
    assert time.perf_counter() - start < 5
