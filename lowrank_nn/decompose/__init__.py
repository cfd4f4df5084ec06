"""Decompositions as pure functions: tensors in, factors out."""

from lowrank_nn.decompose.cp import cp as cp
from lowrank_nn.decompose.cp import cp_als as cp_als
from lowrank_nn.decompose.cp import cp_full_rank as cp_full_rank
from lowrank_nn.decompose.cp import cp_sensitivity as cp_sensitivity
from lowrank_nn.decompose.cp import cp_tensor as cp_tensor
from lowrank_nn.decompose.epc import cp_epc as cp_epc
from lowrank_nn.decompose.kmeans import kmeans_1d as kmeans_1d
from lowrank_nn.decompose.kmeans import nearest_centroid as nearest_centroid
from lowrank_nn.decompose.metric import Metric as Metric
from lowrank_nn.decompose.metric import square_root as square_root
from lowrank_nn.decompose.svd import singular_values as singular_values
from lowrank_nn.decompose.svd import truncated_svd as truncated_svd
from lowrank_nn.decompose.tucker import TuckerFactors as TuckerFactors
from lowrank_nn.decompose.tucker import tucker2 as tucker2
from lowrank_nn.decompose.tucker import tucker2_errors as tucker2_errors
from lowrank_nn.decompose.vbmf import EVBMF as EVBMF
from lowrank_nn.decompose.vbmf import evbmf as evbmf
from lowrank_nn.decompose.vbmf import evbmf_rank as evbmf_rank
from lowrank_nn.decompose.weighted import weighted_svd as weighted_svd
from lowrank_nn.decompose.weighted import weighted_svd_errors as weighted_svd_errors
from lowrank_nn.decompose.weighted_cp import weighted_cp as weighted_cp
from lowrank_nn.decompose.weighted_cp import weighted_cp_errors as weighted_cp_errors
from lowrank_nn.decompose.weighted_tucker import weighted_tucker1 as weighted_tucker1
from lowrank_nn.decompose.weighted_tucker import weighted_tucker1_errors as weighted_tucker1_errors
from lowrank_nn.decompose.weighted_tucker import weighted_tucker2 as weighted_tucker2
from lowrank_nn.decompose.weighted_tucker import weighted_tucker2_errors as weighted_tucker2_errors
