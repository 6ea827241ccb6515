"""Any Mixture-of-Experts model as stacks of routed layers: found, read, checked, recorded, replayed."""

from rmoe.moe.callback import RoutingCallback
from rmoe.moe.check import check_reading
from rmoe.moe.layers import RoutedLayer, require_layers, routed_layers, routed_stacks
from rmoe.moe.matrices import expert_matrices, expert_vectors, scorer_matrix
from rmoe.moe.reading import Reader
from rmoe.moe.recorder import Recorder, listen
from rmoe.moe.recording import RecordedSequence, Recording
from rmoe.moe.records import RoutingBatch, RoutingRecord
from rmoe.moe.replaying import record, replay
from rmoe.results.analysis import ExpertCheck, ReadingCheck

__all__ = [
    "ExpertCheck",
    "Reader",
    "ReadingCheck",
    "RecordedSequence",
    "Recorder",
    "Recording",
    "RoutedLayer",
    "RoutingBatch",
    "RoutingCallback",
    "RoutingRecord",
    "check_reading",
    "expert_matrices",
    "expert_vectors",
    "listen",
    "record",
    "replay",
    "require_layers",
    "routed_layers",
    "routed_stacks",
    "scorer_matrix",
]
