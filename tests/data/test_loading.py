import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_opsd.data import load_rows


ROWS = [{"problem": f"{i} + {i}?", "solution": f"{2 * i}"} for i in range(4)]


def write(path, rows=ROWS):
    dataset = Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        dataset.to_json(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path, index=False)
    else:
        dataset.to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_file(tmp_path, suffix, streaming):
    dataset = load_rows(str(write(tmp_path / f"rows{suffix}")), streaming=streaming)

    assert isinstance(dataset, IterableDataset) is streaming
    assert [row["problem"] for row in dataset] == [row["problem"] for row in ROWS]


def test_folder_tells_splits_apart_by_file_name(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])

    assert len(load_rows(str(tmp_path))) == 4
    assert len(load_rows(str(tmp_path), split="test")) == 1
    assert len(load_rows(str(tmp_path), split="train[:50%]")) == 2


def test_relative_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "data").mkdir(parents=True)
    write(tmp_path / "org" / "data" / "rows.parquet")
    monkeypatch.chdir(tmp_path)

    assert len(load_rows("org/data")) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_to_disk(tmp_path, streaming):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(
        tmp_path / "both"
    )
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")

    assert len(list(load_rows(str(tmp_path / "both"), split="test", streaming=streaming))) == 1
    assert len(list(load_rows(str(tmp_path / "single"), streaming=streaming))) == 4
    with pytest.raises(ValueError, match=r"has no split 'validation', only: train, test"):
        load_rows(str(tmp_path / "both"), split="validation", streaming=streaming)


@pytest.mark.parametrize("name", ["rows.jsonl", "./data", "data/deeper/still", "rows.txt.jsonl"])
def test_missing_path_names_what_exists(tmp_path, monkeypatch, name):
    write(tmp_path / "row.jsonl")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=r"There is no file or folder .* holds: row\.jsonl"):
        load_rows(name)


def test_unreachable_hub_id_says_what_was_tried():
    with pytest.raises(ValueError, match=r"'org/nowhere' is not a file or folder in .*, and loading it from the Hub"):
        load_rows("org/nowhere")


def test_unknown_file_type(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")

    with pytest.raises(ValueError, match=r"rows\.xlsx: expected one of \.json, \.jsonl, \.csv, \.parquet"):
        load_rows(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split_of_a_file(tmp_path, streaming):
    path = write(tmp_path / "rows.jsonl")

    with pytest.raises(ValueError, match=r"has no split 'test'.*\['train'\].*one folder"):
        load_rows(str(path), split="test", streaming=streaming)


def test_unknown_config(tmp_path):
    write(tmp_path / "rows.jsonl")

    with pytest.raises(ValueError, match=r"has no configuration 'main', only: default"):
        load_rows(str(tmp_path), config="main")


def test_folder_of_mixed_formats(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.csv")

    with pytest.raises(ValueError, match=r"mixes formats \(1 csv, 1 json\)"):
        load_rows(str(tmp_path))


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")

    with pytest.raises(ValueError, match=r"no file in one of the formats .*holds: notes\.txt"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "problem,solution\n")])
def test_no_rows(tmp_path, name, text, streaming):
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=r"split 'train', has no rows"):
        load_rows(str(tmp_path / name), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_file(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"problem": "1"}\n{"problem": \n')

    with pytest.raises(ValueError, match=r"Cannot read .*a\.jsonl: JSON parse error"):
        load_rows(str(tmp_path / "a.jsonl"), streaming=streaming)


def test_revision_of_a_hub_dataset(monkeypatch, tmp_path):
    asked = []
    rows = Dataset.from_list([{"problem": "1"}])
    monkeypatch.setattr("trl_opsd.data.loading.load_dataset", lambda **source: asked.append(source) or rows)
    (tmp_path / "rows.jsonl").write_text('{"problem": "1"}\n')

    load_rows("org/rows", revision="v2")
    load_rows(str(tmp_path / "rows.jsonl"), revision="v2")

    assert [source.get("revision") for source in asked] == ["v2", None]
