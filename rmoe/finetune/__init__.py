"""Fine-tuning: instructions or labels, with the router frozen, alone in training, or through LoRA.

The work is in `rmoe.finetune.run`, which imports torch; the configuration does not.
"""

from rmoe.finetune.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
