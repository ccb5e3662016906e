"""Files this program writes: checked before the work, whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError


def check_output(path: Path, inputs: Sequence[Path | None] = ()) -> None:
    """Refuse an output that cannot be written or would overwrite something that is being used.

    Args:
        path: the file to write.
        inputs: files and other outputs of the same run; None entries are skipped.

    Raises:
        UserError: says which and why.
    """
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is a device or a pipe; give a file name")
    for other in inputs:
        if other is not None and other.resolve() == path.resolve():
            raise UserError(f"{path} would overwrite a file of the same run; give another name")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and is gone when it does not.

    Raises:
        UserError: it cannot be written.
    """
    # A name that nobody else uses: what lies there under another one is not ours to delete.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        # Through a link, so that the link stays one.
        temporary.replace(path.resolve())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; choose another place or free it") from error
    finally:
        temporary.unlink(missing_ok=True)
