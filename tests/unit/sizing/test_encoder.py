"""Tests of the memory of encoders. An image has 1,024 tokens, and its encoder has 100,000 bytes alive for each."""

from __future__ import annotations

import msgspec
import pytest
from builders import GIB, IMAGES, MIB, gpu, model, placed, run, tensor

from vllm_launch.model.model import Media, MediaItem, TowerPart
from vllm_launch.sizing.encoder import EncoderMemory, encoder_memory
from vllm_launch.sizing.memory import cpu_memory, memory_by_rank
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.weights import weights

POOLING = {"task": "pooling"}  # no sampler
VIDEO = MediaItem(modality="video", tokens=1000, parts=7)
TEXT = model()


def media(*items, **changes):
    return msgspec.structs.replace(IMAGES, items=items or IMAGES.items, **changes)


def encoder(batch=None, **changes) -> EncoderMemory:
    result = encoder_memory(placed(model(media=media(**changes)), batch or run(), on=gpu()))
    assert result is not None
    return result


def test_the_cache_holds_a_batch_or_the_largest_item() -> None:
    assert encoder(run(max_num_batched_tokens=8192)).tokens == 8192
    assert encoder(run(max_num_batched_tokens=512)).tokens == 1024
    assert encoder(run(max_num_batched_tokens=512)).cache == 1024 * 4096 * 2


def test_the_output_has_more_channels_with_deepstack() -> None:
    assert encoder(output_copies=4).cache == 4 * encoder().cache
    assert encoder(output_copies=4).buffers == 4 * 8192 * 4096 * 2


def test_the_profile_runs_as_many_of_the_largest_items_as_the_cache_holds() -> None:
    assert encoder(run(max_num_batched_tokens=4000)).profiled_peak == 3 * 1024 * 100_000
    assert encoder(run(max_num_batched_tokens=4000)).peak == 4000 * 100_000
    assert encoder(run(max_num_batched_tokens=4000, max_num_seqs=1, item_limits={"image": 1})).profiled_peak == (
        1024 * 100_000
    )
    limited = Media(items=(MediaItem(modality="image", tokens=1024, per_prompt=2),), bytes_per_token=100_000)
    one = placed(model(media=limited), run(max_num_batched_tokens=8192, max_num_seqs=1), on=gpu())
    assert (result := encoder_memory(one)) is not None
    assert result.profiled_peak == 2 * 1024 * 100_000


@pytest.mark.parametrize(("length", "tokens"), [(500, 1000), (2500, 2000), (100_000, 7000)])
def test_a_video_has_as_many_frames_as_the_model_is_long(length: int, tokens: int) -> None:
    video = model(media=media(VIDEO))
    result = encoder_memory(placed(video, run(max_model_len=length, max_num_batched_tokens=16), on=gpu()))
    assert result is not None
    assert result.tokens == tokens


def test_an_encoder_can_limit_itself_to_a_share_of_the_gpu() -> None:
    assert encoder(share_of_gpu=0.01).peak == 8192 * 100_000  # less than the share
    assert encoder(share_of_gpu=0.001).peak == int(0.001 * 140 * GIB)
    assert encoder(share_of_gpu=1e-9).peak == 1024 * 100_000  # one item in any case


@pytest.mark.parametrize("batch", [run(language_model_only=True), run(item_limits={"image": 0})])
def test_disabled_items_need_no_memory(batch) -> None:
    pictures = model(media=IMAGES)
    assert encoder_memory(placed(pictures, batch, on=gpu())) is None
    text = msgspec.structs.replace(batch, language_model_only=False, item_limits={})
    assert memory_by_rank(placed(pictures, batch, on=gpu())) == memory_by_rank(placed(TEXT, text, on=gpu()))


def test_the_first_stage_counts_what_the_encoder_adds_to_the_peak() -> None:
    pictures, batch = (
        model(media=media(bytes_per_token=1_000_000), **POOLING),
        run(compiled=False, cudagraph_mode="NONE"),
    )
    first, last = memory_by_rank(placed(pictures, batch, Layout(pipeline=2), gpu()))
    buffers = 8192 * 4096 * 2
    assert first.activation_peak + first.encoder == 8192 * 1_000_000 + buffers
    assert last.encoder == 0
    small = model(media=media(bytes_per_token=1), **POOLING)
    (only,) = memory_by_rank(placed(small, batch, on=gpu()))
    assert only.encoder == 2 * buffers  # the encoder's output is alive while the language model runs


def test_without_profiling_the_plan_keeps_the_memory_free() -> None:
    pictures, batch = model(media=media(bytes_per_token=1_000_000)), run(skip_mm_profiling=True)
    (profiled,) = memory_by_rank(placed(pictures, run(), on=gpu()))
    (skipped,) = memory_by_rank(placed(pictures, batch, on=gpu()))
    assert skipped.encoder == 8192 * 4096 * 2
    assert skipped.safety > profiled.safety
    assert skipped.safety + skipped.encoder + skipped.activation_peak > 8192 * 1_000_000


def test_a_cpu_worker_holds_the_encoder_too() -> None:
    pictures = model(media=media(bytes_per_token=1_000_000))
    assert cpu_memory(placed(pictures, run())) > cpu_memory(placed(TEXT, run())) + 8192 * 800_000


@pytest.mark.parametrize(
    ("batch", "layout", "size"),
    [
        (run(), Layout(), 3 * MIB),
        (run(), Layout(tensor=2), 2 * MIB),  # half of the part that is split, and all of the other
        (run(mm_encoder_tp_mode="data"), Layout(tensor=2), 3 * MIB),
        (run(item_limits={"image": 0}), Layout(), 3 * MIB),  # videos need it
        (run(item_limits={"image": 0, "video": 0}), Layout(), MIB),
        (run(language_model_only=True), Layout(), MIB),
    ],
)
def test_towers_are_loaded_for_any_of_their_modalities_and_split_unless_data_parallel(batch, layout, size) -> None:
    split = msgspec.structs.replace(
        tensor("visual.fc.weight", 1024, 1024), tower=TowerPart(modalities=("image", "video"), split=True)
    )
    whole = msgspec.structs.replace(tensor("projector.weight", 1024, 512), tower=TowerPart(modalities=(), split=False))
    tensors = (split, whole)
    pictures = model(layers=(), tensors=tensors, media=media(encoder_tp_data=True))
    assert weights(placed(pictures, batch, layout, gpu())) == size
