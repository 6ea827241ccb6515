"""Where the jobs of a grid are carried out: processes of this machine, a Ray cluster, or Slurm."""

from rmoe.compare.engines.choose import engine_of as engine_of
from rmoe.compare.engines.config import EngineConfig as EngineConfig
from rmoe.compare.engines.engine import Answer as Answer
from rmoe.compare.engines.engine import Engine as Engine
from rmoe.compare.engines.engine import Job as Job
from rmoe.compare.engines.engine import Wants as Wants
