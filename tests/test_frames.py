"""`postprocess_video` of diffusers' pipelines: the same frames, or diffusers' own method with a reason."""

from __future__ import annotations

import copy
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers.pipelines.ltx2")
from diffusers import LTX2VideoTransformer3DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

import bitfuse
from bitfuse.hosts import diffusers_frames
from bitfuse.hosts.site import NotFused
from bitfuse.run.audit import BitfuseWarning
from bitfuse.tools import seeded

SITE = "video_processor"
SIZE = (2, 3, 5, 6, 8)


class Pipeline:
    """What `accelerate` looks at of one."""

    def __init__(self, transformer, processor=None):
        self.components = {"transformer": transformer}
        self.video_processor = processor or VideoProcessor(vae_scale_factor=32)


@pytest.fixture(scope="module")
def transformer():
    geometry, _ = seeded.geometry_for(torch.device("cpu"), 1)
    return seeded.build(geometry, torch.device("cpu"), 0)


@pytest.fixture
def pipe(transformer):
    return Pipeline(transformer)


def video_of(dtype, device, size=SIZE, seed=0):
    """Values within and beyond -1 to 1, where the bytes are ties among them, in the strides of a decoder's video."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.7
    drawn.view(-1)[:96] = (torch.arange(96) + 0.5) / 127.5 - 1
    return drawn.to(device, dtype)


def site_of(handle):
    (found,) = (site for site in handle.report().sites if site.name == SITE)
    return found


def as_arrays(found):
    """[B, F, H, W, C] of what either output type gives."""
    return found if isinstance(found, np.ndarray) else np.stack([np.stack([*map(np.asarray, one)]) for one in found])


@pytest.mark.parametrize("output_type", ["np", "pil"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("staged", [1, 2 * 3 * 6 * 8 * 2, 1 << 20])
def test_the_frames_are_diffusers_own(pipe, device, output_type, dtype, staged, monkeypatch):
    monkeypatch.setattr(diffusers_frames, "_STAGED", staged)
    for size in (SIZE, (1, 3, 1, 6, 8), (1, 3, 5, 1, 8)):
        video = video_of(dtype, device, size)
        stock = pipe.video_processor.postprocess_video(video, output_type=output_type)
        with bitfuse.accelerated(pipe) as handle:
            ours = pipe.video_processor.postprocess_video(video, output_type=output_type)
            assert site_of(handle).fused == 1
        assert type(ours) is type(stock)
        assert bitfuse.compare(*(torch.from_numpy(as_arrays(found)) for found in (stock, ours))) is None
        if output_type == "np":
            assert (ours.dtype, ours.shape) == (stock.dtype, stock.shape)
            assert [n for n, m in zip(ours.strides, ours.shape, strict=True) if m > 1] == [
                n for n, m in zip(stock.strides, stock.shape, strict=True) if m > 1
            ]
            assert ours.flags.writeable
            assert ours.flags.owndata
        else:
            assert {(type(f), f.mode, f.size) for one in ours for f in one} == {
                (type(f), f.mode, f.size) for one in stock for f in one
            }


def test_a_nan_stays_where_it_is(pipe, device):
    video = video_of(torch.bfloat16, device)
    video[0, 1, 2, 3, 4] = float("nan")
    stock = pipe.video_processor.postprocess_video(video, output_type="np")
    with bitfuse.accelerated(pipe) as handle:
        ours = pipe.video_processor.postprocess_video(video, output_type="np")
        assert bitfuse.compare(torch.from_numpy(stock), torch.from_numpy(ours)) is None
        assert np.isnan(ours).sum() == 1
        with np.errstate(invalid="ignore"):
            pipe.video_processor.postprocess_video(video, output_type="pil")
        found = site_of(handle)
        assert (found.fused, found.reasons) == (1, ["the video has a NaN, of which no byte can be made"])


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_a_wrong_frame_is_seen(pipe, device, output_type, monkeypatch):
    """What the look at the last frames is worth: the channels in another order."""
    video = video_of(torch.bfloat16, device)
    stock = as_arrays(pipe.video_processor.postprocess_video(video, output_type=output_type))
    right = diffusers_frames._bring
    monkeypatch.setattr(diffusers_frames, "_bring", lambda image, *more: right(image.flip(-1), *more))
    with bitfuse.accelerated(pipe) as handle:
        with pytest.warns(BitfuseWarning, match="the last frame was not the one"):
            ours = as_arrays(pipe.video_processor.postprocess_video(video, output_type=output_type))
        assert np.array_equal(stock, ours)
        assert np.array_equal(stock, as_arrays(pipe.video_processor.postprocess_video(video, output_type=output_type)))
        found = site_of(handle)
        assert (found.fused, sum(found.fallen.values())) == (0, 2)


def test_what_stays_on_the_device_is_no_fall(pipe, device):
    video = video_of(torch.bfloat16, device)
    stock = pipe.video_processor.postprocess_video(video, output_type="pt")
    with bitfuse.accelerated(pipe, strict=True) as handle:
        assert bitfuse.compare(stock, pipe.video_processor.postprocess_video(video, output_type="pt")) is None
        assert site_of(handle).state == "not called yet"
        with pytest.raises(ValueError, match="does not exist"):
            pipe.video_processor.postprocess_video(video, output_type="png")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"do_denormalize": [True] * 5}, "do_denormalize is given"),
        ({"video": torch.zeros(1, 3, 2, 4, 4).transpose(3, 4)[..., :2]}, "video is not contiguous"),
        ({"video": torch.zeros(1, 1, 2, 4, 4)}, r"video is \[1, 1, 2, 4, 4\]; accepted: \[B, 3, F, H, W\]"),
        ({"video": torch.zeros(1, 3, 2, 4, 4, dtype=torch.float64)}, r"video is torch.float64 \[1, 3, 2, 4, 4\]"),
    ],
)
def test_what_can_not_be_is_diffusers_own(pipe, given, reason):
    given = {"video": video_of(torch.bfloat16, "cpu"), **given}
    stock = pipe.video_processor.postprocess_video(**given)
    with bitfuse.accelerated(pipe) as handle:
        assert np.array_equal(stock, pipe.video_processor.postprocess_video(**given))
        (found,) = site_of(handle).reasons
    assert re.search(reason, found)
    with bitfuse.accelerated(pipe, require=[SITE]), pytest.raises(NotFused, match=reason):
        pipe.video_processor.postprocess_video(**given)


def test_a_processor_that_is_not_diffusers_own_is_left_alone(transformer):
    class Mine(VideoProcessor):
        def postprocess_video(self, video, output_type="np", **kwargs):
            return "mine"

    derived, patched = Mine(), VideoProcessor()
    patched.pt_to_numpy = lambda images: "mine"
    for processor, reason in ((derived, "Mine, not diffusers' own"), (patched, "a method of the video processor")):
        pipe = Pipeline(transformer, processor)
        before = dict(vars(processor))
        with bitfuse.accelerated(pipe) as handle:
            assert reason in site_of(handle).declined
            assert vars(processor) == before


def test_what_is_replaced_behind_its_back_runs(pipe, monkeypatch):
    video = video_of(torch.bfloat16, "cpu")
    with bitfuse.accelerated(pipe) as handle:
        monkeypatch.setattr(VaeImageProcessor, "denormalize", staticmethod(lambda images: images * 0))
        assert not pipe.video_processor.postprocess_video(video).any()
        assert "VaeImageProcessor.denormalize was replaced" in site_of(handle).reasons[0]


def test_nothing_is_left_after_restore_nor_in_copies(pipe):
    processor = pipe.video_processor
    before = dict(vars(processor))
    handle = bitfuse.accelerate(pipe)
    for copied in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert vars(copied).keys() == before.keys()
    handle.restore()
    assert vars(processor) == before


def test_two_pipelines_of_one_transformer(transformer):
    """Each has a processor of its own; the second call gives the handle in force."""
    first, second = Pipeline(transformer), Pipeline(transformer)
    handle = bitfuse.accelerate(first)
    try:
        assert bitfuse.accelerate(second) is handle
        assert bitfuse.accelerate(second) is handle
        for pipe in (first, second):
            pipe.video_processor.postprocess_video(video_of(torch.bfloat16, "cpu"))
        found = [site for site in handle.report().sites if site.name == SITE]
        assert [site.fused for site in found] == [1, 1]
    finally:
        handle.restore()
    assert not any("postprocess_video" in vars(pipe.video_processor) for pipe in (first, second))


def test_only_a_pipeline_has_one(transformer):
    assert isinstance(transformer, LTX2VideoTransformer3DModel)
    with bitfuse.accelerated(transformer) as handle:
        assert SITE not in {site.name for site in handle.report().sites}
    with bitfuse.accelerated(SimpleNamespace(components={"transformer": transformer})) as handle:
        assert SITE not in {site.name for site in handle.report().sites}
