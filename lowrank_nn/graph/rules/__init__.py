"""What functions do with units: one rule for each."""

from lowrank_nn.graph.rules import elementwise as elementwise
from lowrank_nn.graph.rules import mixing as mixing
from lowrank_nn.graph.rules import movement as movement
from lowrank_nn.graph.rules import parts as parts
from lowrank_nn.graph.rules import products as products
from lowrank_nn.graph.rules import recurrent as recurrent
from lowrank_nn.graph.rules._call import RULES as RULES
from lowrank_nn.graph.rules._call import Call as Call
from lowrank_nn.graph.rules._call import Outcome as Outcome
from lowrank_nn.graph.rules._call import Planes as Planes
from lowrank_nn.graph.rules._call import Rule as Rule
from lowrank_nn.graph.rules._call import full_name as full_name
from lowrank_nn.graph.rules._call import functions as functions
from lowrank_nn.graph.rules._call import normal_dims as normal_dims
from lowrank_nn.graph.rules._call import register_rule as register_rule
from lowrank_nn.graph.rules._call import short_name as short_name
