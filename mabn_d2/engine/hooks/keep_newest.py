"""The checkpoints of every period, of which the newest stay."""

import re
from pathlib import Path

from detectron2.engine import hooks


class KeepNewest(hooks.PeriodicCheckpointer):
    """Detectron2's PeriodicCheckpointer, which also counts the checkpoints of a run that is resumed.

    Without that, each part of a run would leave `max_to_keep` checkpoints.
    """

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is None or self.trainer.start_iter == 0:
            return
        number = re.compile(rf"{re.escape(self.file_prefix)}_(\d{{7,}})\.pth")
        found = {
            int(match[1]): path
            for path in self.checkpointer.get_all_checkpoint_files()
            if (match := number.fullmatch(Path(path).name))
        }
        # Later ones are written again.
        before = [found[i] for i in sorted(found) if i < self.trainer.start_iter]
        self.recent_checkpoints = before[-self.max_to_keep :]
