"""Hugging Face's Trainer with forward passes only. Needs `pip install hosfl[hf]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hosfl.optim import ZOSGD


class ZOTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer for the optimizers of `hosfl.optim`; everything else is the Trainer's.

        optimizer = ZOSGD(model.named_parameters(), lr=1e-3)
        ZOTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()

    The step is measured at the last of `gradient_accumulation_steps` micro-batches, all of them at the same moved
    weights, and taken when the Trainer asks the optimizer to. Their losses are added or averaged by the Trainer's rule:
    a `loss_is_scaled_for_ga` that is set decides. The model is in train mode, and all evaluations of a step have the
    same dropout. The logged loss is the step's; grad_norm is always 0, and max_grad_norm without effect. Learning rates
    come from the scheduler and the optimizer's groups, not from the arguments' `learning_rate`. bf16 is autocast as
    usual. With torch_compile the optimizer's `model` becomes the compiled one. A run that is resumed from a checkpoint
    holds the bits of one that was not interrupted. Across processes losses are averaged, as `process_group` of `ZOSGD`
    says.

    Raises in the first step: TypeError where the optimizer is none of `hosfl.optim`, or is wrapped by DeepSpeed;
    ValueError for fp16=True, which scales gradients.
    """

    _micro_batches: tuple[dict[str, Any], ...] = ()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches = ()  # of a loop that was interrupted, or ran out of memory and begins again
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The step's loss at its last micro-batch, 0 at the others: the Trainer adds them up."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, ZOSGD):
            raise TypeError(f"ZOTrainer takes optimizers=(ZOSGD(...), None), got {type(optimizer).__name__}")
        if self.accelerator.scaler is not None:
            raise ValueError("fp16=True scales gradients, and there are none: use bf16=True, or neither")
        if optimizer.model is not None and getattr(model, "_orig_mod", None) is optimizer.model:
            optimizer.model = model  # the Trainer has compiled it: see `model` of `ZOSGD`
        batches = (*self._micro_batches, self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            self._micro_batches = batches
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        self._micro_batches = ()
        summed = getattr(self, "loss_is_scaled_for_ga", None)
        if summed is None:  # the Trainer's rule: losses over the number of items of all micro-batches add up
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            summed = by_model or self.compute_loss_func is not None
        model.train()

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                # compute_loss may take labels out of the mapping that it is given
                losses = [self.compute_loss(model, {**b}, num_items_in_batch=num_items_in_batch) for b in batches]
            total = torch.stack([value.mean().double() for value in losses]).sum()
            return total if summed else total / len(batches)

        return optimizer.measure(loss).to(self.args.device, torch.float32)
