"""One training iteration: accumulated gradients, mixed precision, and batches with bad gradients."""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from ..data.batches import micro_batches
from ..data.seeding import mix
from ..layers import MABN2d, rescale_mabn_windows
from .errors import DivergedError
from .resume import parameter_names, with_current_settings

# What Detectron2's RetinaNet and FCOS average over the iterations; their state dicts lack it.
LOSS_NORMALIZER = "loss_normalizer"

# Training stops after this many rejected iterations in a row: the cause is then not one bad batch.
MAX_REJECTED = 20


def guarded_forward(
    model: torch.nn.Module, data: Sequence[dict[str, Any]]
) -> Mapping[str, torch.Tensor]:
    """Return model(data), or losses of NaN if Detectron2 stops at values that are not finite.

    Detectron2's RPN raises FloatingPointError. If one rank left the iteration there, the others would
    wait for its gradients. So it takes part with gradients of NaN, and all ranks reject the iteration.
    """
    try:
        return model(data)
    except FloatingPointError as error:
        logging.getLogger(__name__).warning(f"the forward gave up: {error}")
        params = [p for p in model.parameters() if p.requires_grad]
        return {"loss_not_finite": torch.cat([p.flatten()[:1] for p in params]).sum() * torch.nan}


class GuardedDDP(DistributedDataParallel):
    """DistributedDataParallel around `guarded_forward`, so that the ranks stay in step."""

    def _run_ddp_forward(self, data: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        with self._inside_ddp_forward():
            return guarded_forward(self.module, data)


class GuardedTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, with accumulation and a check of gradients.

    - With `accumulation_steps` n, what the loader yields is cut into n micro-batches. Their gradients
      are averaged, as DistributedDataParallel averages those of n processes. Processes exchange
      gradients once, in the last backward; gradient clipping, the GradScaler and the optimizer act
      once. Losses in the log are the mean over the micro-batches.
    - If any gradient of an iteration is not finite, no parameter moves, and the scalar
      `rejected_batches` is increased. Gradients are checked after their average over the ranks, so
      that all ranks decide the same; one bad micro-batch rejects the whole iteration. The statistics
      of MABN follow another rule: even in a rejected iteration, micro-batches with finite statistics
      are counted, and the others are not.
    - With `amp`, forwards run in float16 on CUDA, under a GradScaler, and elsewhere in bfloat16, which
      needs none. MABN's gradient windows hold statistics of scaled gradients, so they are rescaled
      when the scale changes, in a run or between a checkpoint and the run that resumes it.

    Args:
        model: the module, or the GuardedDDP around it.
        data_loader: yields lists of records, those of this process in one iteration.
        optimizer: as in SimpleTrainer.
        amp: use mixed precision.
        accumulation_steps: micro-batches in one iteration.
        seed: seeds all generators before each micro-batch, together with the iteration and the
            micro-batch's number over all processes. A resumed run then makes the same random draws
            (samples of anchors and RoIs, dropout) as an uninterrupted one, and a process with n
            micro-batches the same as n processes. None: generators are left alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        amp: bool = False,
        accumulation_steps: int = 1,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, data_loader, optimizer, **kwargs)
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be positive, got {accumulation_steps}")
        self.accumulation_steps, self.seed = accumulation_steps, seed
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms = [module for module in model.modules() if isinstance(module, MABN2d)]
        self.window_scale = 1.0  # the loss scale of what is in their gradient windows
        self.rejected = self.rejected_in_a_row = self.bad_images = 0
        device = self.params[0].device.type
        self.grad_scaler = torch.amp.GradScaler(device, enabled=amp and device == "cuda")
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
        self.autocast = torch.autocast(device, dtype) if amp else contextlib.nullcontext()

    def run_step(self) -> None:
        """Take one optimizer step, or none if gradients are not finite.

        Raises:
            DivergedError: after MAX_REJECTED rejected iterations in a row.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self._rescale_windows()  # a run that is resumed may have another scale
        self.bad_images += sum(len(record.get("bad_images", ())) for record in data)
        losses = self._accumulate_gradients(data)
        self.after_backward()

        self.grad_scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        # The iteration's only host synchronization apart from those of the metrics and the scaler.
        if torch.stack(torch._foreach_norm(grads)).isfinite().all().item():
            self._write_metrics(losses, data_time)
            self.rejected_in_a_row = 0
        else:
            self._reject(losses)
        if self.grad_scaler.is_enabled():
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            self._rescale_windows()
        elif self.rejected_in_a_row == 0:
            self.optimizer.step()
        storage = get_event_storage()
        storage.put_scalar("rejected_batches", self.rejected, smoothing_hint=False)
        storage.put_scalar("bad_images", self.bad_images, smoothing_hint=False)

    def _accumulate_gradients(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Set the gradients to the mean over the micro-batches of `data`; return the mean losses."""
        steps = self.accumulation_steps
        total: dict[str, torch.Tensor] = {}
        self.optimizer.zero_grad()
        for number, batch in enumerate(micro_batches(data, steps)):
            if self.seed is not None:
                seed_all_rng(mix(self.seed, comm.get_rank() * steps + number, self.iter))
            with self._synchronized(number == steps - 1):
                with self.autocast:
                    losses = self._forward(batch)
                loss: Any = sum(losses.values())  # for mypy, a sum may be the number 0
                self.grad_scaler.scale(loss / steps).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / steps
        return total

    def _forward(self, data: Sequence[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        if isinstance(self.model, GuardedDDP):
            return self.model(data)
        return guarded_forward(self.model, data)

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context in which only the last backward of an iteration exchanges gradients."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _reject(self, losses: Mapping[str, torch.Tensor]) -> None:
        self.rejected += 1
        self.rejected_in_a_row += 1
        values = {name: loss.item() for name, loss in losses.items()}
        message = f"gradients are not finite at iteration {self.iter}, losses {values}"
        logging.getLogger(__name__).warning(f"{message}: this batch is skipped")
        if self.rejected_in_a_row >= MAX_REJECTED:
            raise DivergedError(
                f"{message}, the {MAX_REJECTED}th batch in a row: lower SOLVER.BASE_LR, lengthen "
                "SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True (in a LazyConfig the "
                "same of optimizer and lr_multiplier)"
            )

    def _rescale_windows(self) -> None:
        self.window_scale = rescale_mabn_windows(self.model, self.grad_scaler, self.window_scale)

    def _bare_model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.model
        return getattr(model, "module", model)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {
            **state,
            "grad_scaler": self.grad_scaler.state_dict(),
            "rejected": self.rejected,
            "accumulation_steps": self.accumulation_steps,
            LOSS_NORMALIZER: getattr(self._bare_model(), LOSS_NORMALIZER, None),
            "parameter_names": parameter_names(self.model, self.optimizer),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        optimizer = with_current_settings(
            self.optimizer,
            state_dict["optimizer"],
            state_dict.get("parameter_names"),
            parameter_names(self.model, self.optimizer),
        )
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        # Absent in a checkpoint of another trainer, empty in that of a run without a scaler.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.window_scale = (state_dict.get("grad_scaler") or {}).get("scale", 1.0)
        self.rejected = state_dict.get("rejected", 0)
        if state_dict.get(LOSS_NORMALIZER) is not None:
            setattr(self._bare_model(), LOSS_NORMALIZER, state_dict[LOSS_NORMALIZER])
        before = state_dict.get("accumulation_steps", 1)
        if before != self.accumulation_steps:
            logging.getLogger(__name__).warning(
                f"SOLVER.ACCUMULATION_STEPS is {self.accumulation_steps}, the checkpoint was written "
                f"with {before}: the norms count micro-batches, so their schedules (warm-up, "
                f"clipping) go on from another iteration; set it to {before} to go on exactly"
            )
