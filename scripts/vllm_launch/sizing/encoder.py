"""Memory of a multimodal model's encoder and of the cache of its output, in bytes. Pure.

The encoder turns an item (one image, video or audio clip) into tokens of output.

vLLM's profile runs the encoder on the largest items and keeps their output while it runs the language model. The
scheduler keeps at most ``encoder_cache_size`` tokens of output while vLLM serves. Source:
multimodal/encoder_budget.py:MultiModalBudget, v1/core/encoder_cache_manager.py:compute_mm_encoder_budget,
v1/worker/gpu/mm/encoder_runner.py:profile_encoder_cache.
"""

from __future__ import annotations

import msgspec

from vllm_launch.model.model import Media, MediaItem, Model
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import RunConfig

DEFAULT_LIMIT = 999
"""Items of one modality in a prompt, without --limit-mm-per-prompt (config/multimodal.py:get_limit_per_prompt)."""


class EncoderMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the encoder on the first pipeline rank, in bytes.

    ``profiled_peak`` and ``profiled_output``: the encoder's peak and its output in vLLM's profile. ``peak`` and
    ``cache``: the largest peak and the full cache while vLLM serves. A peak includes the output. ``buffers`` stay
    allocated.
    """

    tokens: int  # the number of tokens in a full encoder cache
    buffers: int
    profiled_peak: int
    profiled_output: int
    peak: int
    cache: int


def active_items(model: Model, run: RunConfig) -> tuple[MediaItem, ...]:
    """Return the items that requests may contain, or () for a text model or if all modalities are disabled."""
    if model.media is None or run.language_model_only:
        return ()
    return tuple(item for item in model.media.items if item.modality not in run.disabled_modalities)


def largest_item(model: Model, run: RunConfig) -> tuple[str, int]:
    """Return the modality and the tokens of the largest item, ("", 0) without items."""
    sizes = ((item.tokens_within(run.max_model_len), item.modality) for item in active_items(model, run))
    tokens, modality = max(sizes, default=(0, ""))
    return modality, tokens


def encoder_memory(placement: Placement) -> EncoderMemory | None:
    """Return the memory of the encoder, or None if requests cannot contain items."""
    model, run, media = placement.model, placement.run_config, placement.model.media
    modality, item_tokens = largest_item(model, run)
    if media is None or not item_tokens:
        return None
    budget = max(run.max_num_batched_tokens, item_tokens)
    items = _profiled_items(model, run, modality, item_tokens, budget)
    row = media.output_copies * model.hidden_size * run.activation_bytes
    profiled = 0 if run.skip_mm_profiling else items * item_tokens
    return EncoderMemory(
        tokens=budget,
        buffers=run.max_num_batched_tokens * row,  # of a batch; several copies with deepstack
        profiled_peak=_peak(placement, media, profiled),
        profiled_output=profiled * row,
        peak=_peak(placement, media, budget),
        cache=budget * row,
    )


def profiled_encoder(placement: Placement, forward: int, peak: int) -> tuple[int, int]:
    """Return the bytes that the encoder adds to ``peak``, with its buffers, and what it can need beyond them.

    ``forward`` is the peak of the language model, which runs after the encoder while the encoder's output is kept.
    """
    encoder = encoder_memory(placement)
    if encoder is None:
        return 0, 0
    counted = max(0, max(encoder.profiled_peak, encoder.profiled_output + forward) - peak)
    needed = max(encoder.peak, encoder.cache + forward)
    return counted + encoder.buffers, max(0, needed - peak - counted)


def _profiled_items(model: Model, run: RunConfig, modality: str, tokens: int, budget: int) -> int:
    """Return the number of items in vLLM's profile (multimodal/encoder_budget.py:_get_max_items)."""
    limits = [run.item_limits.get(modality, DEFAULT_LIMIT), run.max_model_len // tokens]
    limits += [item.per_prompt for item in active_items(model, run) if item.modality == modality and item.per_prompt]
    per_prompt = max(1, min(limits))
    return max(1, min(budget // tokens, run.max_num_seqs * per_prompt))


def _peak(placement: Placement, media: Media, tokens: int) -> int:
    """Return the most bytes that are alive in the encoder while it makes ``tokens`` tokens of output.

    vLLM can split an encoder over the ranks of tensor parallelism. The plan counts the peak of one rank.
    """
    run = placement.run_config
    total = tokens * media.bytes_per_token * run.activation_bytes // 2
    if media.share_of_gpu is None or placement.gpu is None:
        return total
    part = max(item.tokens for item in media.items) * media.bytes_per_token
    return min(total, max(part, int(media.share_of_gpu * placement.gpu.memory_total)))
