"""A recurrent router on a pretrained MoE.

Importing this makes grafted folders known to transformers' Auto classes.
"""

from rmoe.graft.adapter import move_adapter, save_adapter
from rmoe.graft.attach import attach, routed_stack
from rmoe.graft.auto import GraftConfig, graft
from rmoe.graft.folder import GraftReport, graft_folder
from rmoe.graft.modules import GraftedGate, GraftedLayer, RecurrentOffset, RouterStream
from rmoe.graft.spec import GraftSpec
from rmoe.graft.undo import UndoReport, keep_originals, undo_folder
from rmoe.graft.upcycle import upcycle, upcycle_folder

__all__ = [
    "GraftConfig",
    "GraftReport",
    "GraftSpec",
    "GraftedGate",
    "GraftedLayer",
    "RecurrentOffset",
    "RouterStream",
    "UndoReport",
    "attach",
    "graft",
    "graft_folder",
    "keep_originals",
    "move_adapter",
    "routed_stack",
    "save_adapter",
    "undo_folder",
    "upcycle",
    "upcycle_folder",
]
