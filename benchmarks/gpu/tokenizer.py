#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer of Llama 3's size on Python's standard library: ``tokenizer.py FOLDER``.

Load tools make prompts of random token ids. With a small vocabulary the prefix cache would know the prompts, and the
server would spend no time on text. This command needs no model hub.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 128_000


def main() -> int:
    folder = Path(sys.argv[1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    tokenizer.train_from_iterator((path.read_text(errors="ignore") for path in sources), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    print(f"{tokenizer.get_vocab_size()} tokens from {len(sources)} files in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
