"""The halves of a transformer of Hugging Face.

The server half runs the model's own forward pass, in which its first layer gets the cut instead of its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.follow import CutError
from hosfl.halves.modules import copy_module


class ClientHalf(nn.Module):
    """The trunk up to the cut. It takes the model's arguments and returns the cut, [batch, length, width].

    inputs: the name of the model's first argument. classifier_pad: the padding token by which a decoder's classifier
    finds a text's end, or None.

    Raises ValueError for arguments, other than the attention mask, that the server half would need, too.
    """

    ACROSS = ("attention_mask", "token_type_ids", "interpolate_pos_encoding", "bool_masked_pos")

    def __init__(self, trunk: nn.Module, inputs: str, classifier_pad: int | None = None) -> None:
        super().__init__()
        self.trunk, self.inputs, self.classifier_pad = trunk, inputs, classifier_pad

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        if len(args) + (self.inputs in inputs) != 1:
            raise ValueError(f"the client half takes {self.inputs}, and all else by name")
        unknown = [n for n, value in inputs.items() if n not in (self.inputs, *self.ACROSS) and value is not None]
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: only inputs and an attention mask cross the cut")
        if self.inputs == "input_ids":
            self._check_text(args[0] if args else inputs[self.inputs], inputs.get("attention_mask"))
        cut: Tensor = self.trunk(*args, **inputs).last_hidden_state
        return cut

    def _check_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError for other shapes than [batch, length], and where the server half would find another end."""
        if tokens.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], got {[*tokens.shape]}")
        if mask is not None:
            _check_mask(mask)
        pad = self.classifier_pad
        if pad is None or tokens.device.type == "meta":
            return
        # The whole model takes the output at the last token that is not padding; the server half sees only the mask.
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        ends = (positions * (tokens != pad)).argmax(1)
        mask_ends = (
            ends.new_full(ends.shape, tokens.shape[1] - 1) if mask is None else (positions * (mask != 0)).argmax(1)
        )
        for sample in (ends != mask_ends).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"sample {sample} ends at token {int(ends[sample])} by its padding tokens ({pad}), and at "
                f"{int(mask_ends[sample])} by its attention mask{' (there is none)' if mask is None else ''}: give a "
                "mask that is 0 where padding is, since the server half sees nothing else"
            )


class ServerHalf(nn.Module):
    """The model from the cut on. It takes the cut and the attention mask, and returns the model's output as one tensor.

    That is the logits or, of a model without a head, the last hidden state. The logits of a head for question answering
    are those of start and end, [batch, length, 2].
    """

    def __init__(self, model: nn.Module, holder: CutHolder, inputs: str) -> None:
        super().__init__()
        self.model, self.holder, self.inputs = model, holder, inputs

    def forward(self, cut: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        named: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        if attention_mask is not None:
            _check_mask(attention_mask)
        named[self.inputs] = self._tokens(cut, attention_mask) if self.inputs == "input_ids" else cut
        self.holder.cut = cut
        try:
            output = self.model(**named, return_dict=True)
        finally:
            self.holder.cut = None
        return output_tensor(output)

    def _tokens(self, cut: Tensor, mask: Tensor | None) -> Tensor:
        """Placeholder tokens, since tokens do not cross the cut: classifiers only look for padding among them."""
        pad = getattr(self.model.config, "pad_token_id", None)
        tokens = torch.full(cut.shape[:2], 1 if pad == 0 else 0, device=cut.device)
        return tokens if pad is None or mask is None else tokens.masked_fill(mask == 0, pad)


def _check_mask(mask: Tensor) -> None:
    """Raise ValueError for a mask that is not [batch, length]."""
    if mask.dim() != 2:
        raise ValueError(f"an attention mask that crosses the cut must be [batch, length], got {[*mask.shape]}")


def output_tensor(output: Any) -> Tensor:
    """Return a transformer's output as one tensor; start and end logits as [batch, length, 2].

    Raises CutError for an output that is not one tensor.
    """
    if isinstance(output, Tensor):
        return output
    named = output if isinstance(output, Mapping) else {}
    if "start_logits" in named:
        return torch.stack([named["start_logits"], named["end_logits"]], -1)
    for name in ("logits", "last_hidden_state"):
        if name in named:
            result: Tensor = named[name]
            return result
    if len(named) == 1 and isinstance(only := next(iter(named.values())), Tensor):  # such as a reconstruction
        return only
    parts = ", ".join(named) or f"a {type(output).__name__}"
    raise CutError(f"the model makes {parts}, and a server half makes one tensor: take a model of one head")


class CutHolder:
    """Holds the cut during a pass of the server half, for the modules that get it instead of their input."""

    def __init__(self) -> None:
        self.cut: Tensor | None = None

    def feed(self, module: nn.Module, name: str, instead_of: str | None = None) -> nn.Module:
        """Return a copy of a module whose calls get the cut: see `CutInput`."""
        fed = copy_module(module)
        fed.__class__ = _cut_input_class(type(module))  # type: ignore[arg-type]
        fed._cut_input = CutInput(self, name, instead_of)  # type: ignore[assignment]
        return fed


@cache
def _cut_input_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's class whose calls get the cut, by the module's `_cut_input`.

    A hook would not do: older transformers (5.20) run hooks again in the backward pass of a checkpointed module, when
    the cut is gone.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._cut_input.insert(args, kwargs)
        return kind.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:  # a pickle cannot name a class that is made here
        return _new, (kind,), self.__dict__

    return type(kind.__name__, (kind,), {"__call__": call, "__reduce_ex__": reduce, "__module__": kind.__module__})


def _new(kind: type[nn.Module]) -> nn.Module:
    """An object of the subclass that gets the cut, for unpickling."""
    subclass = _cut_input_class(kind)  # type: ignore[arg-type]
    return subclass.__new__(subclass)


@dataclass
class CutInput:
    """Puts the cut into the arguments of a module. Each copy of a server half has its own, with its own holder.

    name: the argument that gets the cut; the first positional argument gets it if there is one. instead_of: if given,
    the cut is always passed by `name`, and this argument, which is the first, is left out or None.
    """

    holder: CutHolder
    name: str
    instead_of: str | None

    def insert(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments with the cut."""
        cut = self.holder.cut
        if self.instead_of is not None:
            others = {name: value for name, value in kwargs.items() if name != self.instead_of}
            return (None, *args[1:]) if args else (), {**others, self.name: cut}
        if args:
            return (cut, *args[1:]), kwargs
        return (), {**kwargs, self.name: cut}


class ClientOnly(nn.Module):
    """Takes the place of a module that only the client has, and returns the cut.

    The first layer ignores that value. Without layers, and without modules after them, it is the trunk's output.
    """

    def __init__(self, holder: CutHolder, name: str) -> None:
        super().__init__()
        self.holder, self.name = holder, name

    def forward(self, *args: Any, **inputs: Any) -> Tensor | None:
        return self.holder.cut

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            message = f"the server half reads {name} of {self.name}, which only the client half has"
            raise AttributeError(message) from None

    @property
    def patch_embeddings(self) -> ClientOnly:
        """The object itself: vision transformers read `patch_embeddings.projection.weight.dtype`."""
        return self

    projection = patch_embeddings

    @property
    def weight(self) -> Tensor | None:
        return self.holder.cut


class PassThrough(nn.Module):
    """An identity in place of a layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None
