"""Parameters, multiply-accumulates, bytes and latency."""

from lowrank_nn.cost._cost import Cost as Cost
from lowrank_nn.cost._dense import conv_output_size as conv_output_size
from lowrank_nn.cost._dense import dense_cost as dense_cost
from lowrank_nn.cost._dense import dense_macs as dense_macs
from lowrank_nn.cost._dense import tensor_cost as tensor_cost
from lowrank_nn.cost.latency import Timing as Timing
from lowrank_nn.cost.latency import compare_speed as compare_speed
