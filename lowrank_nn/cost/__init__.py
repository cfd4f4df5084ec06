"""Parameters, multiply-accumulates, bytes and latency."""

from lowrank_nn.cost._cost import Cost as Cost
from lowrank_nn.cost._dense import conv_output_size as conv_output_size
from lowrank_nn.cost._dense import dense_cost as dense_cost
from lowrank_nn.cost._dense import dense_macs as dense_macs
from lowrank_nn.cost._dense import fourier_macs as fourier_macs
from lowrank_nn.cost._dense import tensor_cost as tensor_cost
from lowrank_nn.cost.latency import Timing as Timing
from lowrank_nn.cost.latency import compare_speed as compare_speed
from lowrank_nn.cost.latency_model import LatencyModel as LatencyModel
from lowrank_nn.cost.latency_model import LeafCall as LeafCall
from lowrank_nn.cost.latency_model import between_stages as between_stages
from lowrank_nn.cost.latency_model import leaf_call as leaf_call
from lowrank_nn.cost.latency_model import vector_width as vector_width
from lowrank_nn.cost.timing_cache import TimingCache as TimingCache
from lowrank_nn.cost.timing_cache import clear_timing_cache as clear_timing_cache
from lowrank_nn.cost.timing_cache import describe_machine as describe_machine
