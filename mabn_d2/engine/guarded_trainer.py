"""One training iteration: mixed precision on CUDA and CPU, and batches that must not be learned from."""

import contextlib
import logging
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from ..layers import MABN2d

MAX_REJECTED = 20  # in a row: then it is not the batch


def guarded_forward(model, data):
    """Return model(data); where Detectron2 gives up on values that are not finite, losses of NaN.

    Detectron2's RPN raises FloatingPointError. One rank that left the iteration there would leave
    the others waiting for its gradients, so it takes part with gradients of NaN, which all reject.
    """
    try:
        return model(data)
    except FloatingPointError as error:
        logging.getLogger(__name__).warning(f"the forward gave up: {error}")
        params = [p for p in model.parameters() if p.requires_grad]
        return {"loss_not_finite": sum((p.flatten()[:1] * torch.nan).sum() for p in params)}


class GuardedDDP(DistributedDataParallel):
    """DistributedDataParallel around `guarded_forward`, so that the ranks stay in step."""

    def _run_ddp_forward(self, data):
        with self._inside_ddp_forward():
            return guarded_forward(self.module, data)


class GuardedTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, that skips batches with bad gradients.

    - A batch whose gradients are not all finite (after their average over the ranks, so that all
      ranks agree) moves no parameter; the scalar `rejected_batches` counts them. MABN layers keep
      statistics that are not finite out of their state themselves.
    - With `amp`, forwards run in float16 on CUDA, under a GradScaler, and in bfloat16, which needs
      none, elsewhere. MABN's gradient windows hold statistics of scaled gradients, so they follow
      the scale when it changes.

    Args:
        model: the module, or the GuardedDDP around it.
        data_loader, optimizer: as in SimpleTrainer.
    """

    def __init__(self, model, data_loader, optimizer, amp=False, **kwargs):
        super().__init__(model, data_loader, optimizer, **kwargs)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms = [module for module in model.modules() if isinstance(module, MABN2d)]
        self.rejected = self.rejected_in_a_row = self.bad_images = 0
        device = self.params[0].device.type
        self.grad_scaler = torch.amp.GradScaler(device, enabled=amp and device == "cuda")
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
        self.autocast = torch.autocast(device, dtype) if amp else contextlib.nullcontext()

    def run_step(self):
        """Take one optimizer step, or none.

        Raises:
            FloatingPointError: after MAX_REJECTED batches in a row that had to be skipped.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.bad_images += sum(len(record.get("bad_images", ())) for record in data)
        forward = self.model
        if not isinstance(forward, GuardedDDP):
            forward = lambda data: guarded_forward(self.model, data)  # noqa: E731
        with self.autocast:
            losses = forward(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()

        self.grad_scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        # The iteration's one synchronization beside those of the metrics.
        if torch.stack(torch._foreach_norm(grads)).isfinite().all().item():
            self._write_metrics(losses, data_time)
            self.rejected_in_a_row = 0
        else:
            self._reject(losses)
        if self.grad_scaler.is_enabled():
            scale = self.grad_scaler.get_scale()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            self._rescale(self.grad_scaler.get_scale() / scale)
        elif self.rejected_in_a_row == 0:
            self.optimizer.step()
        storage = get_event_storage()
        storage.put_scalar("rejected_batches", self.rejected, smoothing_hint=False)
        storage.put_scalar("bad_images", self.bad_images, smoothing_hint=False)

    def _reject(self, losses):
        self.rejected += 1
        self.rejected_in_a_row += 1
        values = {name: loss.item() for name, loss in losses.items()}
        message = f"gradients are not finite at iteration {self.iter}, losses {values}"
        logging.getLogger(__name__).warning(f"{message}: this batch is skipped")
        if self.rejected_in_a_row >= MAX_REJECTED:
            raise FloatingPointError(f"{message}, the {MAX_REJECTED}th batch in a row")

    def _rescale(self, factor):
        if factor != 1 and self.norms:
            torch._foreach_mul_([norm.buffer_gz for norm in self.norms], factor)

    def state_dict(self):
        state = super().state_dict()
        return {**state, "grad_scaler": self.grad_scaler.state_dict(), "rejected": self.rejected}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # Absent in a checkpoint of another trainer, empty in that of a run without a scaler.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.rejected = state_dict.get("rejected", 0)
