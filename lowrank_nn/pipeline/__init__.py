"""Steps, recipes, plan() and compress_model()."""

from lowrank_nn.pipeline.accounts import compare as compare
from lowrank_nn.pipeline.apply import Apply as Apply
from lowrank_nn.pipeline.codebook import Codebook as Codebook
from lowrank_nn.pipeline.compress import compress_model as compress_model
from lowrank_nn.pipeline.compress import plan as plan
from lowrank_nn.pipeline.compress import sweep as sweep
from lowrank_nn.pipeline.equalize import Equalize as Equalize
from lowrank_nn.pipeline.finetune import FineTune as FineTune
from lowrank_nn.pipeline.fold import FoldBatchNorm as FoldBatchNorm
from lowrank_nn.pipeline.lowrank import LowRank as LowRank
from lowrank_nn.pipeline.prune import Prune as Prune
from lowrank_nn.pipeline.quantize import Quantize as Quantize
from lowrank_nn.pipeline.recipes import RECIPES as RECIPES
from lowrank_nn.pipeline.recipes import deep_compression as deep_compression
from lowrank_nn.pipeline.regularizers import ChannelLasso as ChannelLasso
from lowrank_nn.pipeline.regularizers import GroupLasso as GroupLasso
from lowrank_nn.pipeline.regularizers import ScaleL1 as ScaleL1
from lowrank_nn.pipeline.result import Probe as Probe
from lowrank_nn.pipeline.result import Result as Result
from lowrank_nn.pipeline.state import Decision as Decision
from lowrank_nn.pipeline.state import State as State
from lowrank_nn.pipeline.state import Step as Step
