import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_nn.storage import inspect
from lowrank_nn.storage._save import CODER_OF
from tests.storage.forge import put_together, take_apart
from tests.storage.fuzz import CODINGS, DAMAGES, FORGERIES, attempt, honest

SLOW_FILES = 400  # of each kind; `python -m tests.storage.fuzz --files N` tries more


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "bad.lrnn"


@pytest.mark.parametrize("coding", ["auto", "huffman"])
def test_the_honest_file_is_stored_in_every_way(coding, path):
    data, coder = honest(coding)[0], CODER_OF[coding]
    path.write_bytes(data)
    ways = {tensor.encoding for tensor in inspect(path).tensors}
    words = {"whole", "bitmap", "where the mask is", "1 bits", "3 bits", f"gaps ({coder})"}
    assert ways >= words | {f"{kind} ({coder})" for kind in ("12 bits", "8 bits", "where the mask is, 4 bits")}
    header, listed, structure, gathered = take_apart(data)
    assert len(header) == 4  # two large tensors, one of them coded
    assert attempt(put_together(header, listed, structure, gathered), path, forged=False)


@pytest.mark.parametrize("kind", DAMAGES)
@given(seed=st.integers(0, 2**64))
def test_damaged_files(kind, seed, path):
    rng = random.Random(seed)
    data = honest(rng.choice(CODINGS))[0]
    broken = DAMAGES[kind](rng, data)
    assert attempt(broken, path, forged=False) == (broken == data)


@pytest.mark.parametrize("kind", FORGERIES)
@settings(max_examples=settings.default.max_examples // 2)  # each takes twice as long
@given(seed=st.integers(0, 2**64))
def test_forged_files(kind, seed, path):
    rng = random.Random(seed)
    attempt(FORGERIES[kind](rng, honest(rng.choice(CODINGS))[0]), path, forged=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES | FORGERIES)
def test_many_files(kind, path):
    rng = random.Random(1)
    for _ in range(SLOW_FILES):
        data = honest(rng.choice(CODINGS))[0]
        broken = (DAMAGES | FORGERIES)[kind](rng, data)
        loaded = attempt(broken, path, forged=kind in FORGERIES)
        assert not loaded or kind in FORGERIES or broken == data
