"""Frames to an mp4 while they arrive, and back; pictures to frames.

Writing goes through the ffmpeg that imageio-ffmpeg brings or finds. The file under way is a
fragmented mp4 (every frame is readable once it is on disk, so even a killed run leaves a video);
when complete it is repackaged, without encoding again, into a plain mp4 with its index in front,
which every player and browser takes.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

_LOG = logging.getLogger("lightforcing")
_WAIT_SECONDS = 120  # for ffmpeg to encode what it still holds
_LOOKAHEAD_FRAMES = 12  # about one chunk: more would keep finished chunks out of the file
_SECONDS_PER_KEYFRAME = 2
# ffmpeg in a group of its own: Ctrl-C is for the program, which then closes the file in order.
_APART = {
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


def _ffmpeg() -> str:
    """Path of the ffmpeg program; UserError where there is none."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise UserError(
            "writing and reading video needs imageio-ffmpeg: pip install imageio-ffmpeg"
        ) from error
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(
            "no ffmpeg program found: install ffmpeg, or set IMAGEIO_FFMPEG_EXE to its path"
        ) from error


def _run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg to its end; it stays quiet and out of reach of Ctrl-C."""
    command = [_ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostdin", *arguments]
    return subprocess.run(command, capture_output=True, check=False, **_APART)


def frames_to_uint8(frames: Tensor) -> np.ndarray:
    """Decoded frames as a video file takes them.

    Args:
        frames: [t, 3, H, W] or [1, t, 3, H, W] in [0, 1], any float dtype, any device.

    Returns:
        uint8 [t, H, W, 3].

    Raises:
        UserError: there is NaN or infinity in the frames.
        ValueError: the shape is not as above.
    """
    if frames.ndim == 5 and frames.shape[0] == 1:
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(
            f"frames must be [t, 3, H, W] or [1, t, 3, H, W], got {list(frames.shape)}"
        )
    # As numbers a file takes before they travel, and with the question about NaN asked meanwhile.
    finite = torch.isfinite(frames).all()
    scaled = frames.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = scaled.permute(0, 2, 3, 1).contiguous()
    if pixels.device.type == "cuda":
        host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        pixels = host.copy_(pixels, non_blocking=True)
    if not finite:  # waits for the copy too
        raise UserError(
            "the decoded video holds NaN or infinity: the model or the VAE overflowed or its file "
            "is damaged; use bfloat16 or float32 instead of float16, or fetch the file again"
        )
    return pixels.numpy()


class VideoWriter:
    """Context manager that writes an h264 mp4 (yuv420p, no audio) frame by frame.

    While it runs the video is `NAME.partial.mp4`. When the block ends without an exception it
    becomes `NAME.mp4`, in place of an older one. When the block is left by an exception, Ctrl-C
    included, what was written becomes `NAME.interrupted.mp4`; without a frame nothing is left.

    Args:
        path: the final file, with the suffix .mp4; its folder must exist.
        width: pixels, even.
        height: pixels, even.
        fps: playback rate, frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; 18 is visually lossless.

    Raises:
        UserError: (here, on entering, and from `write`) the file cannot be written; says why.
        ValueError: a size, rate or quality out of range.
    """

    def __init__(
        self, path: str | Path, width: int, height: int, fps: float, *, crf: int = 18
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"{self.path} must end in .mp4, the only video format written")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even and positive, got {width}x{height}")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be 0 to 51, got {crf}")
        # ffmpeg reads "-name" as an option and "a:name" as a protocol.
        self._absolute = self.path.absolute()
        self.width = width
        self.height = height
        self.fps = fps
        self.crf = crf
        self._frames_written = 0
        self._saved_path: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None

    @property
    def frames_written(self) -> int:
        """Frames given to the encoder so far."""
        return self._frames_written

    @property
    def partial_path(self) -> Path:
        """The file while the video is under way."""
        return self._absolute.with_suffix(".partial.mp4")

    @property
    def interrupted_path(self) -> Path:
        """Where the playable part stays when the video was not completed."""
        return self._absolute.with_suffix(".interrupted.mp4")

    @property
    def saved_path(self) -> Path | None:
        """The file that was left in the end, complete or not; None before the end or if none."""
        return self._saved_path

    def __enter__(self) -> VideoWriter:
        command = self._command()
        self._check_target()
        messages = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=messages, **_APART
            )
        except OSError as error:
            messages.close()
            self.partial_path.unlink(missing_ok=True)
            raise UserError(
                f"cannot start ffmpeg ({error}): install ffmpeg, or set IMAGEIO_FFMPEG_EXE to its "
                "path"
            ) from error
        self._messages = messages
        return self

    def _check_target(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise UserError(f"cannot write {self.path}: the folder {folder} does not exist")
        if self.path.is_dir():
            raise UserError(f"cannot write {self.path}: it is a folder")
        try:
            self.partial_path.write_bytes(b"")
        except OSError as error:
            raise UserError(
                f"cannot write in {folder}: {error.strerror}; choose another folder or free it"
            ) from error

    def _command(self) -> list[str]:
        size = f"{self.width}x{self.height}"
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(self.fps), "-i", "-"]
        # Say which matrix made the colours: players guess by size otherwise, and disagree.
        colours = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        convert = [
            "-vf",
            f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams={colours}",
        ]
        keyframes = max(1, round(self.fps * _SECONDS_PER_KEYFRAME))
        codec = ["-c:v", "libx264", "-preset", "fast", "-crf", str(self.crf)]
        codec += ["-g", str(keyframes), "-x264-params", f"rc-lookahead={_LOOKAHEAD_FRAMES}"]
        container = ["-movflags", "empty_moov+default_base_moof+frag_every_frame"]
        container += ["-flush_packets", "1", "-f", "mp4", "-y", str(self.partial_path)]
        quiet = ["-hide_banner", "-loglevel", "error"]
        return [_ffmpeg(), *quiet, *source, *convert, *codec, *container]

    def write(self, frames: np.ndarray | Tensor) -> None:
        """Append frames.

        Args:
            frames: uint8 [t, H, W, 3], a numpy array or a torch tensor.

        Raises:
            UserError: the encoder ended (a full disk, for example).
            ValueError: another shape or dtype, or outside the `with` block.
        """
        if self._process is None or self._process.stdin is None:
            raise ValueError("write() works only inside the with block of a VideoWriter")
        pixels = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
        expected = (self.height, self.width, 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(
                f"frames must be uint8 [t, {self.height}, {self.width}, 3], got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        try:
            for frame in np.ascontiguousarray(pixels):
                self._process.stdin.write(frame.data)
                self._frames_written += 1
            self._process.stdin.flush()
        except OSError as error:
            raise self._encoder_error() from error

    def _encoder_error(self) -> UserError:
        """Why ffmpeg ended, from what it said."""
        self._close_encoder()
        said = ""
        if self._messages is not None:
            self._messages.seek(0)
            lines = self._messages.read().decode(errors="replace").strip().splitlines()
            said = "; ".join(line.strip() for line in lines[:2])
        if "No space left" in said:
            return UserError(
                f"cannot write {self.path}: the disk is full; free some space or choose another "
                "folder"
            )
        return UserError(
            f"cannot write {self.path}: ffmpeg stopped ({said or 'it gave no reason'}); check the "
            "disk and that this ffmpeg has libx264 (IMAGEIO_FFMPEG_EXE names another one)"
        )

    def _close_encoder(self) -> bool:
        """Let ffmpeg finish what it holds; whether it ended well."""
        if self._process is None:
            return False
        if self._process.stdin is not None and not self._process.stdin.closed:
            # Flushing to a dead ffmpeg fails; its exit status tells the same.
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            return self._process.wait(_WAIT_SECONDS) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            ended_well = self._close_encoder()
            if kind is not None:
                return
            if not self._frames_written:
                raise UserError(f"no frame was made, so {self.path} was not written")
            if not ended_well:
                raise self._encoder_error()
            self._publish(self.path)
        finally:
            if self._saved_path is None:
                self._keep_playable_part()
            if self._messages is not None:
                self._messages.close()
            self._process = None

    def _publish(self, target: Path) -> None:
        """Repackage the partial file as a plain mp4 under its last name."""
        packed = self._absolute.with_suffix(".packing.mp4")
        try:
            result = _run(
                "-i", str(self.partial_path), "-c", "copy", "-movflags", "+faststart", "-y",
                str(packed),
            )  # fmt: skip
            if result.returncode:
                said = result.stderr.decode(errors="replace").strip().splitlines()
                raise UserError(
                    f"cannot write {target}: {said[0] if said else 'ffmpeg failed'}; the disk may "
                    "be full"
                )
            packed.replace(target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from error
        finally:
            packed.unlink(missing_ok=True)
        self.partial_path.unlink(missing_ok=True)
        self._saved_path = target

    def _keep_playable_part(self) -> None:
        """Leave what plays under the interrupted name, or nothing."""
        partial = self.partial_path
        # This runs while another error is on its way to the user and must not hide it.
        try:
            if not partial.exists():
                return
            if not self._frames_written or not _has_a_frame(partial):
                partial.unlink()
                return
            try:
                self._publish(self.interrupted_path)
            except UserError:
                # No room for a second copy: the fragmented file plays too.
                partial.replace(self.interrupted_path)
                self._saved_path = self.interrupted_path
            _LOG.info("the part of %s made so far is %s", self.path, self.interrupted_path)
        except (OSError, UserError) as error:
            _LOG.warning("could not keep the part made so far of %s: %s", self.path, error)


def _has_a_frame(path: Path) -> bool:
    result = _run("-i", str(path), "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray", "-")
    return bool(result.stdout)


def iterate_video(path: str | Path) -> Iterator[np.ndarray]:
    """Frames of a video, uint8 [H, W, 3], one by one; raises UserError as `read_video` does."""
    for frame, _ in _read_frames(Path(path)):
        yield frame


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """A whole video.

    Returns:
        (uint8 [T, H, W, 3], frames per second).

    Raises:
        UserError: no such file, or ffmpeg finds no video in it.
    """
    frames = []
    fps = 0.0
    for frame, rate in _read_frames(Path(path)):
        frames.append(frame)
        fps = rate
    if not frames:
        raise UserError(f"{path} holds no video frame; give a playable video")
    return np.stack(frames), fps


def _read_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    if not path.is_file():
        raise UserError(f"no such video: {path}; check the path")
    _ffmpeg()
    import imageio_ffmpeg

    # Passthrough: neither repeat nor drop frames to even out time stamps.
    reader = imageio_ffmpeg.read_frames(str(path), output_params=["-fps_mode", "passthrough"])
    try:
        facts = next(reader)
        width, height = facts["size"]
        for data in reader:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3), float(facts["fps"])
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise UserError(f"{path} is not a video that ffmpeg can read; give another file") from error
    finally:
        reader.close()


def load_image(path: str | Path, width: int, height: int) -> Tensor:
    """A picture at exactly the given size: cropped around its centre, then resized.

    Args:
        path: any picture that Pillow reads; its orientation tag is obeyed, transparency dropped.
        width: pixels.
        height: pixels.

    Returns:
        RGB, float32 [1, 3, height, width] in [0, 1].

    Raises:
        UserError: no such file, or not a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such picture: {path}; check the path")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from error
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255
