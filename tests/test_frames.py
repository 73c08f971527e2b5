"""`postprocess_video` of diffusers' pipelines: the same frames, or diffusers' own method with a reason."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers.pipelines.ltx2")
from diffusers import LTX2VideoTransformer3DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from torch.multiprocessing.reductions import StorageWeakRef

import bitfuse
from bitfuse.hosts import diffusers_frames
from bitfuse.hosts.site import NotFused
from bitfuse.run.audit import BitfuseWarning
from bitfuse.tools import seeded
from bitfuse.tools.bench import run
from test_ctrl_c import interrupted, lines_of

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
    with bitfuse.accelerated(pipe, require=[SITE]) as handle:
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
        ({"video": torch.nn.Parameter(torch.zeros(1, 3, 2, 4, 4), False)}, "Parameter, not a plain tensor"),
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
    for processor, reason in (
        (derived, "Mine, not diffusers' own"),
        (patched, "the video processor's pt_to_numpy was replaced"),
    ):
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


def marked(images):
    """A mark on the first of several frames, which the look at the last one does not see."""
    found = VideoProcessor.pt_to_numpy(images)
    found[: len(found) - 1] = 0
    return found


class Marking(VideoProcessor):
    pt_to_numpy = staticmethod(marked)


def replace_method(processor):
    processor.pt_to_numpy = marked


def replace_class(processor):
    processor.__class__ = Marking


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (replace_method, "the video processor's pt_to_numpy was replaced"),
        (replace_class, "Marking, not diffusers' own"),
    ],
)
def test_what_is_replaced_in_the_processor_itself_runs(pipe, replace, reason):
    video = video_of(torch.bfloat16, "cpu")
    with bitfuse.accelerated(pipe) as handle:
        replace(pipe.video_processor)
        assert not pipe.video_processor.postprocess_video(video)[:, 0].any()
        assert reason in site_of(handle).reasons[0]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((torch.zeros(1, 3, 2, 4, 4), "np"), {"output_type": "np"}),
        ((torch.zeros(1, 3, 2, 4, 4), "np", None), {}),
        ((torch.zeros(1, 3, 2, 4, 4),), {"processor": None}),
        ((None,), {}),
    ],
)
def test_wrong_arguments_get_the_error_of_diffusers(pipe, args, kwargs):
    with pytest.raises((TypeError, AttributeError)) as stock:
        pipe.video_processor.postprocess_video(*args, **kwargs)
    with bitfuse.accelerated(pipe), pytest.raises(stock.type, match=f"^{re.escape(str(stock.value))}$"):
        pipe.video_processor.postprocess_video(*args, **kwargs)


def test_a_sample_is_gone_before_the_next_one_is_made(pipe):
    """As in diffusers' own loop: of the denormalized samples one is on the device at a time."""
    found, earlier = [], []

    def trace(frame, event, arg):
        if frame.f_code is VaeImageProcessor.denormalize.__code__ and len(frame.f_locals["images"]) > 1:
            if event == "call":
                found.append([seen.expired() for seen in earlier])
            elif event == "return":
                earlier.append(StorageWeakRef(arg.untyped_storage()))

    with bitfuse.accelerated(pipe) as handle:
        for output_type in ("np", "pil"):
            sys.setprofile(trace)
            try:
                pipe.video_processor.postprocess_video(video_of(torch.float32, "cpu", (3, 3, 2, 6, 8)), output_type)
            finally:
                sys.setprofile(None)
        assert site_of(handle).fused == 2
    assert len(found) == 2 * 3
    assert all(map(all, found))


def test_a_report_times_it(pipe):
    with bitfuse.accelerated(pipe) as handle:
        video = video_of(torch.float32, "cpu", (1, 3, 9, 64, 64))
        report = handle.report(time_share_of=lambda: pipe.video_processor.postprocess_video(video, "pil"))
        assert report.times.sites[SITE] > 0.2 * report.times.total
        assert site_of(handle).timer is None


# -- the copy from a device, with a stream of ours in CUDA's place -----------------------------------------------------


class Stream:
    """What a GPU does with the work that is queued: at once, or only when an event after it is waited for."""

    def __init__(self, late):
        self.late, self.queued, self.done = late, [], 0

    def add(self, work):
        self.queued.append(work)
        if not self.late:
            self.wait_for(len(self.queued))

    def wait_for(self, count):
        for work in self.queued[self.done : count]:
            work()
        self.done = max(self.done, count)


class OnDevice(torch.Tensor):
    is_cuda = True


class Pinned(torch.Tensor):
    stream: Stream

    def copy_(self, other, non_blocking=False):
        assert non_blocking
        self.stream.add(lambda: self.as_subclass(torch.Tensor).copy_(other.as_subclass(torch.Tensor)))
        return self


@pytest.fixture(params=["early", "late"])
def stream(request, monkeypatch):
    stream = Stream(request.param == "late")
    empty = torch.empty
    with torch.device("cpu"):
        empty(0)  # PyTorch notes once in a process, at the first such call, what `torch.empty` is

    class Event:
        def record(self):
            self.count = len(stream.queued)

        def synchronize(self):
            stream.wait_for(self.count)

    def pinned(*args, pin_memory, **kwargs):
        assert pin_memory
        return empty(*args, **kwargs).as_subclass(Pinned)

    monkeypatch.setattr(Pinned, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", pinned)
    return stream


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_each_part_arrives_through_two_buffers(stream, count, at_once, monkeypatch):
    """Whether the GPU is ahead or behind, no buffer is read before it is filled, nor filled before it is read."""
    image = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(diffusers_frames, "_STAGED", at_once * image[0].numel() * 4)
    expected = diffusers_frames._bytes(image.clone())
    for make, into in ((torch.Tensor.contiguous, torch.zeros(image.shape)), (diffusers_frames._bytes, expected * 0)):
        given = image.clone().as_subclass(OnDevice)
        with torch.device("meta"):  # torch.set_default_device("cuda"), say: the buffers are on the CPU regardless
            diffusers_frames._bring(given, into, make)
        assert torch.equal(into, image if into.is_floating_point() else expected)


def test_where_no_memory_can_be_pinned(pipe, stream, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch, "empty", refuse)
    bring = diffusers_frames._bring
    monkeypatch.setattr(diffusers_frames, "_bring", lambda image, *more: bring(image.as_subclass(OnDevice), *more))
    video = video_of(torch.bfloat16, "cpu")
    for output_type in ("np", "pil"):
        stock = as_arrays(pipe.video_processor.postprocess_video(video, output_type))
        with bitfuse.accelerated(pipe) as handle:
            assert np.array_equal(stock, as_arrays(pipe.video_processor.postprocess_video(video, output_type)))
            (reason,) = site_of(handle).reasons
            assert reason == "0 MiB of pinned memory could not be allocated: CUDA error: out of memory"


# -- who stands there, and when ----------------------------------------------------------------------------------------


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


def test_what_is_left_alone_is_said_once(transformer):
    pipe = Pipeline(transformer, Marking())
    handle = bitfuse.accelerate(pipe)
    try:
        assert bitfuse.accelerate(pipe) is handle
        assert "Marking, not diffusers' own" in site_of(handle).declined
    finally:
        handle.restore()


def test_a_pipeline_that_is_refused_leaves_nothing(transformer):
    pipe, refused = Pipeline(transformer), Pipeline(transformer, Marking())
    handle = bitfuse.accelerate(pipe, require=[SITE])
    try:
        for _ in range(2):
            with pytest.raises(NotFused, match="Marking"):
                bitfuse.accelerate(refused, require=[SITE])
        assert site_of(handle).declined is None
        handle.insist()
    finally:
        handle.restore()


def test_a_wrapper_around_ours_is_no_other_method(pipe):
    handle = bitfuse.accelerate(pipe, require=[SITE])
    ours = pipe.video_processor.postprocess_video
    try:
        pipe.video_processor.postprocess_video = lambda *args, **kwargs: ours(*args, **kwargs)
        assert bitfuse.accelerate(pipe, require=[SITE]) is handle
        pipe.video_processor.postprocess_video(video_of(torch.bfloat16, "cpu"))
        assert site_of(handle).fused == 1
    finally:
        handle.restore()


def test_the_clock_of_the_benchmark_puts_ours_back(pipe):
    """`bitfuse bench --only run` wraps the method in an accelerated pipeline and in a stock one."""
    clock = SimpleNamespace(enter=lambda stage: None)
    with bitfuse.accelerated(pipe) as handle:
        ours = vars(pipe.video_processor)["postprocess_video"]
        for processor in (pipe.video_processor, VideoProcessor()):
            before = dict(vars(processor))
            with contextlib.ExitStack() as undo:
                run._wrap(undo, processor, "postprocess_video", clock, "postprocess", "rest")
                processor.postprocess_video(video_of(torch.bfloat16, "cpu"))
            assert vars(processor) == before
        assert vars(pipe.video_processor)["postprocess_video"] is ours
        assert site_of(handle).fused == 1


def test_one_that_was_put_back_after_its_restore_makes_room(pipe):
    video = video_of(torch.bfloat16, "cpu")
    handle = bitfuse.accelerate(pipe)
    ours = pipe.video_processor.postprocess_video
    pipe.video_processor.postprocess_video = lambda *args, **kwargs: ours(*args, **kwargs)
    handle.restore()
    stock = pipe.video_processor.postprocess_video(video)
    assert site_of(handle).state == "not called yet"
    pipe.video_processor.postprocess_video = ours
    with bitfuse.accelerated(pipe) as again:
        assert np.array_equal(stock, pipe.video_processor.postprocess_video(video))
        assert site_of(again).fused == 1


def test_a_processor_of_two_pipelines_with_a_model_each(pipe):
    geometry, _ = seeded.geometry_for(torch.device("cpu"), 1)
    other = Pipeline(seeded.build(geometry, torch.device("cpu"), 0), pipe.video_processor)
    with bitfuse.accelerated(pipe) as first, bitfuse.accelerated(other) as second:
        assert first is not second
        assert site_of(second).declined == "the video processor is accelerated already, with another pipeline"
        assert site_of(first).declined is None
    assert "postprocess_video" not in vars(pipe.video_processor)


def test_another_processor_in_its_place_is_told(pipe):
    with bitfuse.accelerated(pipe) as handle:
        pipe.video_processor = VideoProcessor()
        (found,) = (site for site in handle.report().sites if site.name == "VideoProcessor")
        assert "came into the target after that was accelerated" in found.declined


def test_an_interrupt_while_a_second_pipeline_is_taken_over(transformer):
    """Ctrl-C before each line: what is in force stays as it is, and the next call has all of it."""
    first = Pipeline(transformer)
    handle = bitfuse.accelerate(first)
    try:
        before = dict(vars(first.video_processor))
        count = lines_of(lambda: bitfuse.accelerate(Pipeline(transformer)))
        assert count > 60
        for number in range(0, count, 3):
            known = len(handle.sites)
            pipe = Pipeline(transformer)
            interrupted(lambda pipe=pipe: bitfuse.accelerate(pipe), number)
            assert vars(first.video_processor) == before
            assert bitfuse.accelerate(pipe) is handle
            assert len(handle.sites) == known + 1, number
            assert isinstance(vars(pipe.video_processor)["postprocess_video"], diffusers_frames.PostprocessVideo)
            pipe.video_processor.postprocess_video(video_of(torch.bfloat16, "cpu"))
            assert handle.sites[-1].fused == 1
    finally:
        handle.restore()
    assert "postprocess_video" not in vars(pipe.video_processor)


def test_only_a_pipeline_has_one(transformer):
    assert isinstance(transformer, LTX2VideoTransformer3DModel)
    with bitfuse.accelerated(transformer) as handle:
        assert SITE not in {site.name for site in handle.report().sites}
    with bitfuse.accelerated(SimpleNamespace(components={"transformer": transformer})) as handle:
        assert SITE not in {site.name for site in handle.report().sites}
