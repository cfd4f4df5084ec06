import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_nn.storage import inspect
from lowrank_nn.storage._coders import CODERS
from tests.storage.forge import put_together, take_apart
from tests.storage.fuzz import DAMAGES, FORGERIES, attempt, honest

SLOW_FILES = 400  # of each kind; `python -m tests.storage.fuzz --files N` tries more


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "bad.lrnn"


def test_the_honest_file_is_stored_in_every_way(path):
    path.write_bytes(honest()[0])
    ways = {tensor.encoding for tensor in inspect(path).tensors}
    words = {"whole", "bitmap", "where the mask is", "1 bits", "3 bits", *(f"gaps ({coder})" for coder in CODERS)}
    words |= {f"{kind} ({coder})" for kind in ("12 bits", "8 bits", "where the mask is, 4 bits") for coder in CODERS}
    assert words <= ways
    header, listed, structure, gathered = take_apart(honest()[0])
    assert len(header) == 4  # two large tensors, one of them coded
    assert attempt(put_together(header, listed, structure, gathered), path, forged=False)


@pytest.mark.parametrize("kind", DAMAGES)
@given(seed=st.integers(0, 2**64))
def test_damaged_files(kind, seed, path):
    data = honest()[0]
    broken = DAMAGES[kind](random.Random(seed), data)
    assert attempt(broken, path, forged=False) == (broken == data)


@pytest.mark.parametrize("kind", FORGERIES)
@settings(max_examples=settings.default.max_examples // 2)  # each takes twice as long
@given(seed=st.integers(0, 2**64))
def test_forged_files(kind, seed, path):
    attempt(FORGERIES[kind](random.Random(seed), honest()[0]), path, forged=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES | FORGERIES)
def test_many_files(kind, path):
    rng = random.Random(1)
    for _ in range(SLOW_FILES):
        data = (DAMAGES | FORGERIES)[kind](rng, honest()[0])
        loaded = attempt(data, path, forged=kind in FORGERIES)
        assert not loaded or kind in FORGERIES or data == honest()[0]
