"""One file per compressed model, without pickle."""

from lowrank_nn.storage._inspect import FileSummary as FileSummary
from lowrank_nn.storage._inspect import inspect as inspect
from lowrank_nn.storage._load import load as load
from lowrank_nn.storage._save import packed_size as packed_size
from lowrank_nn.storage._save import save as save
from lowrank_nn.storage._save import stored_bytes as stored_bytes
from lowrank_nn.storage._save import tensor_bytes as tensor_bytes
