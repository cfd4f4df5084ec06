"""Damaged and hostile files, made from honest ones: ``python -m tests.storage.fuzz --files 10000``.

Every file must either be refused with a FileFormatError, by `load` and by `inspect`, or load: damaged ones then hold
what was saved, forged ones (whose checksums are right) tensors of the shapes that the model has. Nothing may take long,
or more than twice the memory that the honest file takes.
"""

import argparse
import copy
import functools
import json
import random
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

from lowrank_nn.errors import FileFormatError
from lowrank_nn.storage import inspect, load, save
from tests.storage.forge import INDEX, header_end, put_together, take_apart
from tests.storage.models import EveryEncoding, assert_same_state, every_encoding

CODINGS = ["auto", "max", "huffman"]
SECONDS = 20  # for files that take a tenth of a second on an idle machine
SLACK = 2_000_000  # bytes: a structure may inflate to 64 kB, whatever the size of the file
NUMBERS = [-1, 0, 1, 2, 7, 8, 64, 255, 4096, 65535, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64, 10**400, -(2**63)]
VALUES = [*NUMBERS, None, True, 0.5, 1e308, "", "rans", "F32", "I8", "BOOL", "\0", "x" * 9999, [], {}, [[]], [8, 8]]


@functools.cache
def honest(coding="auto"):
    """The bytes of an honest file, the model in it, and the memory that loading it takes."""
    net = every_encoding()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "honest.lrnn"
        save(net, path, coding=coding)
        load(path, EveryEncoding())  # what is imported and cached on first use
        tracemalloc.start()
        load(path, EveryEncoding())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return path.read_bytes(), net, peak


def flipped(rng, data):
    """A few bits differ."""
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 100])):
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def truncated(rng, data):
    """The end is missing, or there is more."""
    cut = rng.randrange(len(data))
    return data[:cut] if rng.random() < 0.7 else data + rng.randbytes(rng.choice([1, 8, 5000]))


def spliced(rng, data):
    """A part is left out, repeated, overwritten, or moved."""
    begin = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(header_end(data) + 2000)
    end = min(len(data), begin + rng.choice([1, 8, 100, 5000]))
    part, to = data[begin:end], rng.randrange(len(data))
    return rng.choice(
        [
            data[:begin] + data[end:],
            data[:begin] + part * rng.choice([2, 50]) + data[end:],
            data[:begin] + rng.randbytes(len(part)) + data[end:],
            data[:begin] + bytes(len(part)) + data[end:],
            data[:to] + part + data[to + len(part) :],
        ]
    )


def resized_header(rng, data):
    """The header announces another length."""
    length = rng.choice([*range(9), len(data) - 8, len(data), header_end(data) - 9, 2**31, 10**8, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + data[8:]


def nested(rng, data):
    """Header or structure is JSON that is deep, long, or inflates to a lot."""
    header, listed, _, gathered = take_apart(data)
    depth = rng.choice([10, 31, 32, 33, 500, 990, 2000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    deep = opening * depth + b"1" + closing * rng.choice([depth, depth, 0])
    wide = b"[" + rng.choice([b"[],", b"0,", b'"ab",', b"0.5,", b"{},"]) * 100_000 + b"0]"
    text = rng.choice([deep, wide, b'{"layers":[],"tied":{},"tensors":%b}' % deep])
    if rng.random() < 0.5:
        return put_together(text, listed, b"", gathered)
    return put_together(header, listed, zlib.compress(text, 9), gathered)


def places(value):
    """All (container, key) pairs within JSON."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def reworded(rng, data):
    """Header or structure say something else, under right checksums."""
    header, listed, structure, gathered = take_apart(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        container, key = rng.choice([*places(header if rng.random() < 0.2 else structure)] or [({}, 0)])
        other_container, other = rng.choice([*places(structure)] or [({0: 0}, 0)])
        if rng.random() < 0.15:
            del container[key]
            continue
        choices = [rng.choice(VALUES), copy.deepcopy(other_container[other])]
        if type(container[key]) is int:
            choices += [container[key] + rng.choice([-1, 1, 8, 255]), rng.choice(NUMBERS)]
        container[key] = rng.choice(choices)
    if isinstance(header.get(INDEX), dict) and not isinstance(header[INDEX].get("data_offsets"), list):
        header = json.dumps(header).encode()
    try:
        return put_together(header, listed, structure, gathered)
    except (IndexError, TypeError):
        return put_together(json.dumps(header).encode(), listed, structure, gathered)


def recoded(rng, data):
    """The bytes of tensors differ, under right checksums: tables, numbers of lanes, coded streams, gaps, values."""
    header, listed, structure, gathered = take_apart(data)
    listed, gathered = bytearray(listed), bytearray(gathered)
    for _ in range(rng.choice([1, 2, 4])):
        key = rng.choice([key for key, entry in structure["tensors"].items() if "coder" in entry or "gaps" in entry])
        begin, end = place_of(header, structure, key)
        target = listed if key in header else gathered
        near = begin + min(rng.choice([4, 16, 16, 60, 10**6]), end - begin)
        for _ in range(rng.choice([1, 1, 3])):
            target[rng.randrange(begin, near)] = rng.choice([0, 1, 8, 14, 255, rng.randrange(256)])
    for key, entry in structure["tensors"].items():
        if key in header:
            begin, end = header[key]["data_offsets"]
            checksum = f"{zlib.crc32(listed[begin:end]):08x}"
            if isinstance(entry, dict):
                entry["checksum"] = checksum
            else:
                structure["tensors"][key] = checksum
    return put_together(header, bytes(listed), structure, bytes(gathered))


def place_of(header, structure, key):
    """Where the bytes of a tensor are, among the listed ones or the gathered ones."""
    if key in header:
        return header[key]["data_offsets"]
    sizes = {name: entry["bytes"] for name, entry in structure["tensors"].items() if name not in header}
    names = list(sizes)
    begin = sum(sizes[name] for name in names[: names.index(key)])
    return begin, begin + sizes[key]


DAMAGES = {f.__name__: f for f in (flipped, truncated, spliced, resized_header)}
FORGERIES = {f.__name__: f for f in (nested, reworded, recoded)}


def attempt(data, path, *, forged):
    """Load and inspect a bad file; returns whether it loaded, and raises AssertionError where a promise is broken."""
    honest_data, net, honest_peak = honest()
    path.write_bytes(data)
    fresh = EveryEncoding()
    allowed = 2 * honest_peak * max(1, len(data) / len(honest_data)) + SLACK
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        try:
            loaded = load(path, fresh)
        except FileFormatError:
            loaded = None
        try:
            str(inspect(path))
        except FileFormatError:
            assert loaded is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < allowed, f"{peak} bytes, an honest file of this size takes {allowed}"
    assert time.perf_counter() - begin < SECONDS
    if loaded is None:
        return False
    if forged:
        state, expected = loaded.state_dict(), net.state_dict()
        assert {key: value.shape for key, value in state.items() if key in expected}.items() <= {
            key: value.shape for key, value in expected.items()
        }.items()
    else:
        assert_same_state(loaded, net)
    return True


def main():
    """Read the command line, try that many files of each kind, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    begin, outcomes = time.perf_counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.lrnn"
        for name, make in (DAMAGES | FORGERIES).items():
            for _ in range(arguments.files):
                data = make(rng, honest(rng.choice(CODINGS))[0])
                try:
                    outcomes[name, "loaded" if attempt(data, path, forged=name in FORGERIES) else "refused"] += 1
                except BaseException:
                    path.rename(Path.cwd() / f"broken_{name}.lrnn")
                    raise
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name}: {count} {outcome}")  # noqa: T201
    print(f"{outcomes.total()} files, {time.perf_counter() - begin:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
