"""What is written is whole, or as it was."""

import os

import pytest

from trl_opsd.files import LineFile, whole_folder, write_whole


def test_file_is_replaced_in_one_go(tmp_path, monkeypatch):
    file = tmp_path / "new" / "results.json"
    write_whole(file, "before ü")
    assert file.read_text(encoding="utf-8") == "before ü"

    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "after")
    assert file.read_text(encoding="utf-8") == "before ü"
    assert list(file.parent.iterdir()) == [file]


def test_folder_gets_its_name_when_it_is_whole(tmp_path):
    folder, leftover = tmp_path / "model", tmp_path / "model.partial"
    leftover.mkdir()
    (leftover / "of a run that was killed").touch()
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("first")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["weights"]

    with pytest.raises(FileNotFoundError), whole_folder(folder) as partial:
        (partial / "missing" / "weights").touch()
    assert (folder / "weights").read_text() == "first"

    with whole_folder(folder) as partial:
        (partial / "others").write_text("third")
    assert [path.name for path in folder.iterdir()] == ["others"]
    assert list(tmp_path.iterdir()) == [folder]


def test_lines_go_on_after_the_last_whole_one(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    file = LineFile(path)
    file.append("ü")
    assert path.read_text(encoding="utf-8") == "ü\n"  # also while it is open
    file.close()
    with path.open("a", encoding="utf-8") as killed:
        killed.write("cut o")

    file = LineFile(path)
    file.append("second")
    file.close()
    assert path.read_text(encoding="utf-8") == "ü\nsecond\n"
