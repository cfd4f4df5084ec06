"""Files taken apart and put together again, with right checksums, as a hostile writer would."""

import hashlib
import json
import struct
import zlib

INDEX = "__lowrank_nn__"


def header_end(data):
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length


def take_apart(data):
    """Header, bytes of the listed tensors, structure, bytes of the gathered tensors."""
    end = header_end(data)
    header = json.loads(data[8:end])
    begin, finish = header[INDEX]["data_offsets"]
    index = data[end + begin : end + finish]
    (length,) = struct.unpack("<I", index[16:20])
    structure = json.loads(zlib.decompress(index[20 : 20 + length]))
    return header, data[end : end + begin], structure, index[20 + length :]


def put_together(header, listed, structure, gathered):
    """A file of these parts; a structure given as bytes is put in as it is."""
    deflated = structure if isinstance(structure, bytes) else zlib.compress(json.dumps(structure).encode())
    index = struct.pack("<I", len(deflated)) + deflated + gathered
    if isinstance(header, dict) and INDEX in header:
        begin, size = header[INDEX]["data_offsets"][0], 16 + len(index)
        header = header | {INDEX: {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    front = struct.pack("<Q", len(text)) + text
    return front + listed + hashlib.blake2b(front + index, digest_size=16).digest() + index


def forged(data, edit):
    """The file after ``edit(header, structure)`` under right checksums."""
    header, listed, structure, gathered = take_apart(data)
    edit(header, structure)
    return put_together(header, listed, structure, gathered)
