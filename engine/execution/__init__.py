"""How a forward pass runs: eager, through compiled layers, or as captured CUDA graphs.

Executor ── asks ──> Dispatcher ── the only truth about what is prepared ──> eager | compiled | graphs
   │
   ├── Preparation   compiles in a child process and loads from disk, beside the running engine
   └── GraphCapture  captures one bucket between two steps
"""

from engine.execution.base import Answer, Step, TokenRange
from engine.execution.dispatcher import Dispatcher
from engine.execution.executor import Executor

__all__ = ["Answer", "Dispatcher", "Executor", "Step", "TokenRange"]
