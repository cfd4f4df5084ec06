"""Timings on disk: kept, merged, bounded, and never the reason of an error."""

import json
import logging
import os

import pytest
import torch

from lowrank_nn.cost import TimingCache, clear_timing_cache, describe_machine, timing_cache

CONTEXT = {"processor": "one", "threads": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_NN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_round_trip_and_merge(folder):
    assert TimingCache(CONTEXT).load() == {}
    TimingCache(CONTEXT).store({"a": 1.5, "b": 2.0})
    TimingCache(CONTEXT).store({"b": 3.0, "c": 0.25})
    assert TimingCache(CONTEXT).load() == {"a": 1.5, "b": 3.0, "c": 0.25}


def test_machines_are_kept_apart(folder):
    TimingCache(CONTEXT).store({"a": 1.0})
    assert TimingCache(CONTEXT | {"threads": 1}).load() == {}
    assert len(list(folder.iterdir())) == 1


def test_nothing_to_store_writes_nothing(folder):
    TimingCache(CONTEXT).store({})
    assert not folder.exists()


def damaged():
    good = {"format": 1, "context": CONTEXT, "milliseconds": {"a": 1.0}}
    yield "empty", ""
    yield "cut off", json.dumps(good)[:-5]
    yield "binary", b"\xff\x00\xfe"
    yield "a list", "[1]"
    yield "deep", "[" * 100_000
    yield "another format", json.dumps(good | {"format": 2})
    yield "another machine", json.dumps(good | {"context": {}})
    yield "no timings", json.dumps(good | {"milliseconds": [1]})
    for value in ('"1"', "true", "null", "NaN", "Infinity", "-1", "0"):
        yield f"a time of {value}", json.dumps(good).replace("1.0", value)


@pytest.mark.parametrize(("content"), [content for _, content in damaged()], ids=[name for name, _ in damaged()])
def test_a_damaged_file_is_logged_and_replaced(folder, caplog, content):
    cache = TimingCache(CONTEXT)
    folder.mkdir()
    cache.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        assert cache.load() == {}
    assert "is not usable" in caplog.text
    cache.store({"b": 2.0})
    assert cache.load() == {"b": 2.0}


def test_a_folder_that_cannot_be_made_is_logged(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOWRANK_NN_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        TimingCache(CONTEXT).store({"a": 1.0})
    assert "cannot be written" in caplog.text
    assert TimingCache(CONTEXT).load() == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch, caplog):
    cache = TimingCache(CONTEXT)
    cache.store({"a": 1.0})

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with caplog.at_level(logging.WARNING):
        cache.store({"b": 1.0})
    assert "disk full" in caplog.text
    assert cache.load() == {"a": 1.0}
    assert list(folder.iterdir()) == [cache.path]


def test_the_oldest_entries_go_first(folder, monkeypatch):
    monkeypatch.setattr(timing_cache, "_MOST_ENTRIES", 3)
    cache = TimingCache(CONTEXT)
    cache.store({"a": 1.0, "b": 1.0, "c": 1.0})
    cache.store({"a": 2.0, "d": 1.0})
    assert cache.load() == {"c": 1.0, "a": 2.0, "d": 1.0}


def test_the_oldest_files_go_first(folder, monkeypatch):
    monkeypatch.setattr(timing_cache, "_MOST_FILES", 2)
    caches = [TimingCache({"threads": n}) for n in range(3)]
    for age, cache in enumerate(caches):
        cache.store({"a": 1.0})
        os.utime(cache.path, (age, age))
    caches[1].store({"b": 1.0})
    assert [cache.path.exists() for cache in caches] == [False, True, True]


def test_clearing_removes_timings_and_nothing_else(folder):
    TimingCache(CONTEXT).store({"a": 1.0})
    (folder / "of the user.json").write_text("{}")
    clear_timing_cache()
    assert [path.name for path in folder.iterdir()] == ["of the user.json"]
    clear_timing_cache()


@pytest.mark.parametrize("word", ["off", "OFF"])
def test_off_keeps_nothing(monkeypatch, word):
    monkeypatch.setenv("LOWRANK_NN_CACHE", word)
    cache = TimingCache(CONTEXT)
    cache.store({"a": 1.0})
    assert cache.path is None
    assert cache.load() == {}
    clear_timing_cache()


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", ("lowrank_nn",)),
        ("win32", "LOCALAPPDATA", ("lowrank_nn", "cache")),
        ("linux", None, (".cache", "lowrank_nn")),
        ("darwin", None, ("Library", "Caches", "lowrank_nn")),
    ],
)
def test_the_folder_is_the_platforms(monkeypatch, tmp_path, platform, variable, tail):
    for name in ("LOWRANK_NN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    start = tmp_path / ("home" if variable is None else "elsewhere")
    assert timing_cache.cache_folder() == start.joinpath(*tail)


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("LOWRANK_NN_CACHE", raising=False)

    def nowhere():
        raise RuntimeError("no home")

    monkeypatch.setattr("pathlib.Path.home", nowhere)
    assert TimingCache(CONTEXT).path is None


def test_a_machine_is_described_by_what_timings_depend_on(monkeypatch):
    before = describe_machine(torch.device("cpu"))
    assert before["processor"]
    assert json.loads(json.dumps(before)) == before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert describe_machine(torch.device("cpu")) != before
