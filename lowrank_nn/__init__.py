"""Drop-in compressed PyTorch layers, and one call that compresses a trained network with them.

Layers by hand: ``TuckerConv2d.from_pretrained_layer(conv, rank=(24, 16))``. A whole network:
``compress_model(model, example_inputs, budget=Budget(params=0.2))``. See the README for a tour.
"""

from lowrank_nn.cost import Cost as Cost
from lowrank_nn.cost import clear_timing_cache as clear_timing_cache
from lowrank_nn.distill import FeatureTap as FeatureTap
from lowrank_nn.distill import Guidance as Guidance
from lowrank_nn.distill import distill_loss as distill_loss
from lowrank_nn.errors import BudgetError as BudgetError
from lowrank_nn.errors import CalibrationError as CalibrationError
from lowrank_nn.errors import FileFormatError as FileFormatError
from lowrank_nn.errors import LowRankError as LowRankError
from lowrank_nn.errors import MissingExtraError as MissingExtraError
from lowrank_nn.errors import OptionError as OptionError
from lowrank_nn.errors import PlanError as PlanError
from lowrank_nn.errors import RankError as RankError
from lowrank_nn.errors import TrainingError as TrainingError
from lowrank_nn.errors import UnsupportedLayerError as UnsupportedLayerError
from lowrank_nn.graph import ChannelGroup as ChannelGroup
from lowrank_nn.graph import chain_quantized as chain_quantized
from lowrank_nn.graph import equalize as equalize
from lowrank_nn.graph import find_groups as find_groups
from lowrank_nn.graph import fold_batchnorm as fold_batchnorm
from lowrank_nn.graph import register_attributes as register_attributes
from lowrank_nn.graph import register_rule as register_rule
from lowrank_nn.graph import split_attention as split_attention
from lowrank_nn.layers import LAYERS as LAYERS
from lowrank_nn.layers import VBMF as VBMF
from lowrank_nn.layers import BFloat16Conv2d as BFloat16Conv2d
from lowrank_nn.layers import BFloat16Linear as BFloat16Linear
from lowrank_nn.layers import BinaryConv2d as BinaryConv2d
from lowrank_nn.layers import BinaryLinear as BinaryLinear
from lowrank_nn.layers import CodebookConv2d as CodebookConv2d
from lowrank_nn.layers import CodebookLinear as CodebookLinear
from lowrank_nn.layers import CompressedLayer as CompressedLayer
from lowrank_nn.layers import CPConv2d as CPConv2d
from lowrank_nn.layers import Energy as Energy
from lowrank_nn.layers import FixedPoint as FixedPoint
from lowrank_nn.layers import HashedConv2d as HashedConv2d
from lowrank_nn.layers import HashedLinear as HashedLinear
from lowrank_nn.layers import LowRankLayer as LowRankLayer
from lowrank_nn.layers import NarrowMultiheadAttention as NarrowMultiheadAttention
from lowrank_nn.layers import NarrowWindowAttention as NarrowWindowAttention
from lowrank_nn.layers import NarrowWindowAttentionV2 as NarrowWindowAttentionV2
from lowrank_nn.layers import Params as Params
from lowrank_nn.layers import PrunedConv2d as PrunedConv2d
from lowrank_nn.layers import PrunedLinear as PrunedLinear
from lowrank_nn.layers import QuantConv2d as QuantConv2d
from lowrank_nn.layers import QuantLinear as QuantLinear
from lowrank_nn.layers import RankRule as RankRule
from lowrank_nn.layers import SpatialSVDConv2d as SpatialSVDConv2d
from lowrank_nn.layers import SpeedUp as SpeedUp
from lowrank_nn.layers import SplitMultiheadAttention as SplitMultiheadAttention
from lowrank_nn.layers import SVDConv2d as SVDConv2d
from lowrank_nn.layers import SVDLinear as SVDLinear
from lowrank_nn.layers import TuckerConv2d as TuckerConv2d
from lowrank_nn.layers import register_layer as register_layer
from lowrank_nn.layers import register_narrow_form as register_narrow_form
from lowrank_nn.pipeline import Apply as Apply
from lowrank_nn.pipeline import ChannelLasso as ChannelLasso
from lowrank_nn.pipeline import Codebook as Codebook
from lowrank_nn.pipeline import Equalize as Equalize
from lowrank_nn.pipeline import FineTune as FineTune
from lowrank_nn.pipeline import FoldBatchNorm as FoldBatchNorm
from lowrank_nn.pipeline import GroupLasso as GroupLasso
from lowrank_nn.pipeline import LowRank as LowRank
from lowrank_nn.pipeline import Prune as Prune
from lowrank_nn.pipeline import Quantize as Quantize
from lowrank_nn.pipeline import Result as Result
from lowrank_nn.pipeline import ScaleL1 as ScaleL1
from lowrank_nn.pipeline import Step as Step
from lowrank_nn.pipeline import compare as compare
from lowrank_nn.pipeline import compress_model as compress_model
from lowrank_nn.pipeline import deep_compression as deep_compression
from lowrank_nn.pipeline import plan as plan
from lowrank_nn.pipeline import sweep as sweep
from lowrank_nn.planning import Budget as Budget
from lowrank_nn.planning import unit_importance as unit_importance
from lowrank_nn.report import Report as Report
from lowrank_nn.report import plot_sweep as plot_sweep
from lowrank_nn.storage import inspect as inspect
from lowrank_nn.storage import load as load
from lowrank_nn.storage import save as save

__version__ = "0.1.0"
