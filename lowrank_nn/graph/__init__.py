"""Layers of a model as they are really called: finding, measuring and replacing them."""

from lowrank_nn.graph.attributes import register_attributes as register_attributes
from lowrank_nn.graph.chains import chain_quantized as chain_quantized
from lowrank_nn.graph.costs import model_cost as model_cost
from lowrank_nn.graph.costs import site_cost as site_cost
from lowrank_nn.graph.equalization import equalize as equalize
from lowrank_nn.graph.fold import fold_batchnorm as fold_batchnorm
from lowrank_nn.graph.groups import ChannelGroup as ChannelGroup
from lowrank_nn.graph.groups import find_groups as find_groups
from lowrank_nn.graph.inputs import call_model as call_model
from lowrank_nn.graph.links import Link as Link
from lowrank_nn.graph.links import find_links as find_links
from lowrank_nn.graph.rules import register_rule as register_rule
from lowrank_nn.graph.sites import Call as Call
from lowrank_nn.graph.sites import Recording as Recording
from lowrank_nn.graph.sites import Site as Site
from lowrank_nn.graph.sites import find_sites as find_sites
from lowrank_nn.graph.sites import record as record
from lowrank_nn.graph.special import release_fast_path as release_fast_path
from lowrank_nn.graph.split import split_attention as split_attention
from lowrank_nn.graph.swap import replace_module as replace_module
