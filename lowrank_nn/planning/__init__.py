"""Candidates per layer, their errors, and their allocation under a budget."""

from lowrank_nn.planning.allocation import allocate as allocate
from lowrank_nn.planning.budget import Budget as Budget
from lowrank_nn.planning.candidates import Candidate as Candidate
from lowrank_nn.planning.candidates import SiteCandidates as SiteCandidates
from lowrank_nn.planning.candidates import low_rank_candidates as low_rank_candidates
from lowrank_nn.planning.choices import Choices as Choices
from lowrank_nn.planning.clock import Clock as Clock
from lowrank_nn.planning.fisher import BatchLoss as BatchLoss
from lowrank_nn.planning.fisher import diagonal_fisher as diagonal_fisher
from lowrank_nn.planning.importance import unit_importance as unit_importance
from lowrank_nn.planning.latency import TimedCandidates as TimedCandidates
from lowrank_nn.planning.latency import present_layers as present_layers
from lowrank_nn.planning.layer_choices import LayerChoices as LayerChoices
from lowrank_nn.planning.metrics import collect_metrics as collect_metrics
from lowrank_nn.planning.ranges import collect_ranges as collect_ranges
