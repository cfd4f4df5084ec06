"""Tables of what compression did and what it cost."""

from lowrank_nn.report.report import Latency as Latency
from lowrank_nn.report.report import Report as Report
from lowrank_nn.report.report import Row as Row
from lowrank_nn.report.report import make_report as make_report
from lowrank_nn.report.sweep_plot import plot_sweep as plot_sweep
