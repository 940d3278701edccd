"""Adapters of peft, by name or by their configuration file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hosfl.files import read_small
from hosfl.halves.adapters import input_rows
from hosfl.halves.inputs import Inputs, call, mask_of


def import_peft() -> Any:
    """Import peft. Raises ImportError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'hosfl[hf]'") from error
    return peft


def peft_config(name_or_file: str) -> Any:
    """Return a configuration of peft, from a name of a peft type, in any case, or from a file "....json".

    A name gives peft's defaults. The file is what peft's save_pretrained calls adapter_config.json. Raises ValueError
    for unknown names, for files that are no configuration, and for methods that put no adapters into layers.
    """
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields: Mapping[str, Any] = {}
    if name_or_file.lower().endswith(".json"):
        try:
            fields = json.loads(read_small(Path(name_or_file)))
        except OSError as error:
            raise ValueError(f"{name_or_file} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name_or_file} is no JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
            raise ValueError(f"{name_or_file} is no configuration of peft: it has no peft_type")
    name = fields["peft_type"] if fields else name_or_file
    configs = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.upper() not in configs:
        raise ValueError(f"peft has no {name!r}: it has {', '.join(sorted(configs)).lower()}, or give a FILE.json")
    settings = {key: value for key, value in fields.items() if key != "peft_type"}
    if fields:  # peft saves inference_mode=True, with which no adapter would be trained
        settings["inference_mode"] = False
    try:
        config = configs[name.upper()](**settings)
    except Exception as error:  # whatever peft raises
        raise ValueError(f"peft refuses the configuration: {error}") from error
    _refuse_unsupported(config, name)
    return config


def _refuse_unsupported(config: Any, name: str) -> None:
    """Raise ValueError, with the reason, for methods of peft that put no adapters into layers."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    reason = ""
    if config.is_prompt_learning:
        reason = "it learns virtual tokens, which do not cross a cut"
    elif config.is_adaption_prompt:
        reason = "it learns prompts inside the attention of whole models"
    elif name.upper() in ("XLORA", "POLY"):
        reason = "its layers need to be told the task or the mixture in every forward pass"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "adapters that begin at certain tokens do not cross a cut"
    else:
        kind = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if kind is None or not issubclass(kind, BaseTuner):
            reason = "it puts no adapters into layers"
    if reason:
        raise ValueError(f"{name} cannot be used: {reason}")


def add_peft(half: nn.Module, config: Any, seed: int, public: Inputs | None) -> None:
    """Put adapters into a half's layers by peft's `config`. Only the parameters that peft trains stay trainable.

    The configuration's names of layers are those in the transformer inside the half. In a half without one they are
    those in the half, and a configuration without names means all linear layers. Fixed tensors of adapters become
    buffers: see `hosfl.halves.adapters.fixed_factors`.

    seed: for the random numbers that peft draws from torch's generator. public: samples for LoRA with EVA, which
    computes A from the layers' inputs; A is then fixed, and only B is trained.

    Raises ValueError for what peft refuses, for adapters without trainable parameters and for EVA without public
    samples, before anything is changed.
    """
    _inject(copy.deepcopy(half), copy.deepcopy(config), seed, public)  # a trial: peft may fail after some layers
    _inject(half, config, seed, public)


def _inject(half: nn.Module, config: Any, seed: int, public: Inputs | None) -> None:
    """Do what `add_peft` does, without protection against an error half way."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    transformer = next((m for m in half.modules() if hasattr(getattr(m, "config", None), "model_type")), half)
    if transformer is half and getattr(config, "target_modules", "") is None:
        config.target_modules = [name for name, m in half.named_modules() if isinstance(m, nn.Linear)]
        if getattr(config, "feedforward_modules", "") is None:
            config.feedforward_modules = []
    old_ids = {id(t) for t in (*half.parameters(), *half.buffers())}
    half.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        factors = _eva_factors(half, transformer, config, public)
        try:
            # Not by inject_adapter_in_model: it refuses adapters that share tensors, which only peft's own wrapper can
            # merge and save. Here their layers hold these tensors, too, and the wrapper is not needed.
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](transformer, config, "default")
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"peft refuses: {error}") from error
        if factors is not None:
            _load_eva(tuner, factors)
    if not any(p.requires_grad and p.numel() for p in half.parameters()):
        raise ValueError("these adapters have no trainable parameters: choose others")
    disable_fused_encoder(half)
    _register_fixed_tensors(half, old_ids)


def disable_fused_encoder(half: nn.Module) -> None:
    """Make torch's encoder layers with adapters call their sublayers in eval mode, too.

    By default a fused operation reads the sublayers' weights in eval mode, so that adapters would do nothing. torch
    decides by the two attributes set here. Nested tensors, which only the fused operation takes, stop working.
    """
    for module in half.modules():
        if not any("base_layer" in inner._modules for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _register_fixed_tensors(half: nn.Module, old_ids: set[int]) -> None:
    """Register the fixed tensors of adapters, such as random projections, as buffers, so that base files have them.

    old_ids: those of the half's tensors before it had adapters. Raises ValueError for tensors in plain attributes of a
    module: no base file would have them, and another machine might compute different ones.
    """
    for path, module in half.named_modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) not in old_ids and not p.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, p.detach())
        new = {name for name, b in module._buffers.items() if b is not None and id(b) not in old_ids}
        module._non_persistent_buffers_set -= new
        for name, attribute in vars(module).items() if "base_layer" in module._modules else ():
            is_plain_dict = isinstance(attribute, dict) and name not in ("_parameters", "_buffers")
            if any(isinstance(value, Tensor) for value in (attribute.values() if is_plain_dict else [attribute])):
                raise ValueError(f"{path}.{name} holds tensors outside of the state dict: no base file would have them")


def _eva_factors(
    half: nn.Module, transformer: nn.Module, config: Any, public: Inputs | None
) -> dict[str, Tensor] | None:
    """Compute peft's A of every layer from its inputs, by name; None if the configuration does not ask for EVA."""
    if getattr(config, "init_lora_weights", None) != "eva":
        return None
    if public is None:
        raise ValueError("EVA needs public samples, and the task has none: give it some, Task(public=...)")
    from peft import get_eva_state_dict

    mask = mask_of(public)
    rows = next(len(x) for x in tree_leaves(public) if isinstance(x, Tensor)) if mask is None else int(mask.sum())
    needed = max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho
    if rows < needed:  # peft would loop for ever
        raise ValueError(f"EVA with this rank needs {needed:g} public tokens or samples, and there are {rows}")
    # peft runs the transformer whose layers it names; here the half runs, with the transformer inside.
    try:
        return get_eva_state_dict(
            transformer,
            [public],
            peft_config=config,
            forward_fn=lambda _, inputs: call(half, inputs),
            prepare_model_inputs_fn=lambda inputs, _: mask_of(inputs),
            prepare_layer_inputs_fn=lambda args, mask, _: input_rows(nn.Identity(), args[0], mask),
            show_progress_bar=False,
        )
    except (ValueError, TypeError, RuntimeError, LookupError) as error:
        raise ValueError(f"EVA from the public samples: {error}") from error


def _load_eva(tuner: nn.Module, factors: dict[str, Tensor]) -> None:
    """Load the factors of `_eva_factors` into the adapters, and freeze them."""
    from peft import initialize_lora_eva_weights

    state = {f"model.{name}": factor for name, factor in factors.items()}
    initialize_lora_eva_weights(tuner, eva_state_dict=state)
    for name, p in tuner.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
