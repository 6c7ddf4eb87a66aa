"""Generate a tiny chat model with random weights: ``generators/tiny_model.py OUT_DIR``.

It is a 4-layer Llama with a byte-level tokenizer and a chat template. Its files are identical on every machine. It lets
you try and test serving without access to a model hub. Its answers are random letters.
"""

from __future__ import annotations

import sys
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

OUTPUT_TOKENS = set("abcdefghijklmnopqrstuvwxyzĠ")
"""The only tokens that the model generates: letters and the space (Ġ in byte-level vocabularies). They are safe for a
terminal, and without an end token an answer always has the requested length."""


def main(out: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into ``out``."""
    import torch  # noqa: TID251, PLC0415 - a development script; the engine is installed
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    specials = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",  # noqa: S106 - not a password
        eos_token="<|eos|>",  # noqa: S106 - not a password
        additional_special_tokens=specials[2:],
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    allowed = torch.tensor([token in OUTPUT_TOKENS for token in vocabulary])
    with torch.no_grad():
        # Dimension 0 is equal for all tokens. Only the output rows of OUTPUT_TOKENS weight it, so only they win.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight.normal_(std=0.08)
        model.lm_head.weight[:, 0] = 1.3 * allowed.float()
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(out)
    model.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors lets only the owner read, but vLLM in a container is another user


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.exit("usage: generators/tiny_model.py OUT_DIR")
    main(Path(sys.argv[1]))
