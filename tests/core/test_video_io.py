"""Videos appear under their final name only when whole, and a stopped run leaves what plays."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightforcing.lightforcing_core.errors import Cancelled, UserError
from lightforcing.lightforcing_core.video_io import (
    VideoWriter,
    frames_to_uint8,
    iterate_video,
    load_image,
    read_video,
)

WIDTH, HEIGHT = 64, 32


def flat_frames(count: int, *, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """One colour per frame, another in every frame."""
    steps = np.arange(count) * (200 // max(count, 1)) + 20
    colours = np.stack([steps, 240 - steps, np.full_like(steps, 128)], -1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [(64, 32), (256, 128), (48, 80), (30, 18)])
def test_a_video_reads_back_with_its_size_count_rate_order_and_colours(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    width, height = size
    frames = flat_frames(17, width=width, height=height)
    with VideoWriter(tmp_path / "clip.mp4", width, height, 16) as writer:
        for start in range(0, 17, 4):
            writer.write(frames[start : start + 4])
        assert writer.frames_written == 17
    assert names(tmp_path) == ["clip.mp4"]
    assert writer.saved_path == tmp_path / "clip.mp4"
    back, fps = read_video(tmp_path / "clip.mp4")
    assert fps == 16
    assert back.shape == frames.shape
    # 4:2:0 limited range at this quality: a few steps of 255 on flat colours.
    assert np.abs(back.astype(int) - frames).max() <= 4


def test_the_finished_file_is_a_plain_mp4_with_its_index_in_front(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16) as writer:
        writer.write(flat_frames(5))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert b"moof" not in data


def test_the_file_grows_while_chunks_arrive_and_plays_before_it_is_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16) as writer:
        writer.write(noise)
        deadline = time.monotonic() + 20
        while writer.partial_path.stat().st_size < 20_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert names(tmp_path) == ["clip.partial.mp4"]
        shutil.copy(writer.partial_path, tmp_path / "glance.mp4")
    assert 1 <= len(list(iterate_video(tmp_path / "glance.mp4"))) < 60


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Cancelled, RuntimeError, GeneratorExit])
def test_a_stopped_run_leaves_its_frames_under_a_name_that_says_so(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    frames = flat_frames(7)
    writer = VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16)
    with pytest.raises(stop), writer:
        writer.write(frames)
        raise stop
    assert names(tmp_path) == ["clip.interrupted.mp4"]
    assert writer.saved_path == writer.interrupted_path
    assert len(read_video(writer.interrupted_path)[0]) == 7


def test_a_run_stopped_before_its_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "c.mp4", WIDTH, HEIGHT, 16):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_run_without_frames_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no frame was made"),
        VideoWriter(tmp_path / "c.mp4", WIDTH, HEIGHT, 16),
    ):
        pass
    assert names(tmp_path) == []


def test_an_older_video_survives_a_stopped_run_and_is_replaced_by_a_whole_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "clip.mp4"
    for count, stop in ((3, False), (4, True), (5, False)):
        try:
            with VideoWriter(path, WIDTH, HEIGHT, 16) as writer:
                writer.write(flat_frames(count))
                if stop:
                    raise Cancelled
        except Cancelled:
            assert len(read_video(path)[0]) == 3
    assert len(read_video(path)[0]) == 5


@pytest.mark.parametrize("name", ["-y.mp4", "a b:c%d.mp4", "two.dots.mp4"])
def test_odd_names_are_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, WIDTH, HEIGHT, 16) as writer:
        writer.write(flat_frames(2))
    assert names(tmp_path) == [name]
    assert len(read_video(name)[0]) == 2


SCRIPT = """
import signal, sys, time
import numpy as np
from lightforcing.lightforcing_core.video_io import VideoWriter
noise = np.random.default_rng(0).integers(0, 256, (60, 32, 64, 3), dtype=np.uint8)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs behind ignores it
with VideoWriter(sys.argv[1], 64, 32, 16) as writer:
    writer.write(noise)
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_leave_a_playable_file(tmp_path: Path, number: signal.Signals) -> None:
    # A session of its own, and the signal to all of it: what a terminal does on Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "clip.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    os.killpg(process.pid, number)
    process.wait(60)
    killed = number == signal.SIGKILL
    left = tmp_path / ("clip.partial.mp4" if killed else "clip.interrupted.mp4")
    # A killed parent closes ffmpeg's input; ffmpeg then ends by itself.
    deadline = time.monotonic() + 20
    while killed and len(list(iterate_video(left))) < 60 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert names(tmp_path) == [left.name]
    assert len(read_video(left)[0]) == 60


def fake_ffmpeg(folder: Path, script: str) -> Path:
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(os.name == "nt", reason="shell script")
@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("av_interleaved_write_frame(): No space left on device", "the disk is full; free some"),
        ("Unknown encoder 'libx264'", r"Unknown encoder 'libx264'.*IMAGEIO_FFMPEG_EXE"),
        ("", "it gave no reason"),
    ],
)
def test_an_encoder_that_gives_up_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, message: str
) -> None:
    (tmp_path / "out").mkdir()
    program = fake_ffmpeg(tmp_path, f'echo "{says}" >&2; exit 1')
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with (
        pytest.raises(UserError, match=message),
        VideoWriter(tmp_path / "out" / "clip.mp4", WIDTH, HEIGHT, 16) as writer,
    ):
        for _ in range(100):
            writer.write(flat_frames(8))
    assert names(tmp_path / "out") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits of POSIX")
def test_a_disk_that_fills_up_leaves_the_part_that_fitted(tmp_path: Path) -> None:
    # A limit on file size ends ffmpeg in the middle of the file, as a full disk does.
    script = """
    import resource, signal, sys
    import numpy as np
    from lightforcing.lightforcing_core.errors import UserError
    from lightforcing.lightforcing_core.video_io import VideoWriter
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rng = np.random.default_rng(0)
    try:
        with VideoWriter(sys.argv[1], 64, 32, 16) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            resource.prlimit(writer._process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
            for _ in range(400):
                writer.write(rng.integers(0, 256, (4, 32, 64, 3), dtype=np.uint8))
    except UserError as error:
        print(error)
    """
    path = tmp_path / "clip.mp4"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write" in result.stdout
    assert names(tmp_path) == ["clip.interrupted.mp4"]
    assert len(list(iterate_video(tmp_path / "clip.interrupted.mp4"))) >= 1


def test_targets_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    cases = {
        tmp_path / "absent" / "clip.mp4": r"the folder .*absent does not exist",
        tmp_path / "clip.avi": r"must end in \.mp4",
        tmp_path / "folder.mp4": "it is a folder",
    }
    (tmp_path / "folder.mp4").mkdir()
    for path, message in cases.items():
        with pytest.raises(UserError, match=message), VideoWriter(path, WIDTH, HEIGHT, 16):
            pass
    assert names(tmp_path) == ["folder.mp4"]


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    # By hand, because the tests may run as root, whom no permission stops.
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with (
        pytest.raises(UserError, match=r"cannot write in .*: Permission denied; choose another"),
        VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16),
    ):
        pass


def test_a_missing_ffmpeg_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
        with (
            pytest.raises(UserError, match=r"cannot start ffmpeg.*install ffmpeg"),
            VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16),
        ):
            pass
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with (
        pytest.raises(UserError, match="pip install imageio-ffmpeg"),
        VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((2, WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    ],
)
def test_frames_of_another_shape_or_type_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match="frames must be uint8"),
        VideoWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 16) as writer,
    ):
        writer.write(frames)


@pytest.mark.parametrize(
    "settings", [{"width": 63}, {"height": 0}, {"fps": 0}, {"fps": float("nan")}, {"crf": 52}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, float]) -> None:
    values = {"width": WIDTH, "height": HEIGHT, "fps": 16} | settings
    with pytest.raises(ValueError, match="must be"):
        VideoWriter(tmp_path / "clip.mp4", **values)


def test_frames_become_bytes_by_rounding_and_clamping() -> None:
    values = torch.tensor([-0.1, 0.0, 0.5, 0.999, 1.0, 1.3])
    frames = values.reshape(1, 6, 1, 1, 1).expand(1, 6, 3, 2, 2)
    assert frames_to_uint8(frames)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert frames_to_uint8(frames.bfloat16()[0]).shape == (6, 2, 2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_frames_are_an_error_not_a_black_video(bad: float) -> None:
    frames = torch.zeros(1, 2, 3, 4, 4)
    frames[0, 1, 2, 3, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        frames_to_uint8(frames)


def test_reading_what_is_no_video_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such video"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"text\.mp4 is not a video"):
        read_video(tmp_path / "text.mp4")


def test_a_picture_is_cropped_around_its_centre_and_resized(tmp_path: Path) -> None:
    picture = np.zeros((50, 200, 3), np.uint8)
    picture[:, 50:150] = (255, 128, 0)  # the middle 2:1 part
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 64, 32)
    assert image.shape == (1, 3, 32, 64)
    assert image.dtype == torch.float32
    middle = image[0, :, 16, 32]
    torch.testing.assert_close(middle, torch.tensor([1.0, 128 / 255, 0.0]))
    # The black sides are cut away, but for the resampling at the border.
    assert image[0, 0, :, 3:-3].min() == 1.0


def test_a_picture_is_turned_upright_and_its_transparency_dropped(tmp_path: Path) -> None:
    tall = Image.new("RGB", (10, 20), (0, 255, 0))
    exif = tall.getexif()
    exif[0x0112] = 6  # turn by a quarter to show
    tall.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", 20, 10)[0, 1].min() > 0.95
    Image.new("RGBA", (8, 8), (255, 0, 0, 10)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", 8, 8)[0, 0].min() == 1.0


def test_what_is_no_picture_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such picture"):
        load_image(tmp_path / "absent.png", 8, 8)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="not a picture"):
        load_image(tmp_path / "text.png", 8, 8)
