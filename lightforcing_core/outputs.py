"""Files this program writes: checked before the work, whole or not there."""

from __future__ import annotations

import contextlib
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
    for other in inputs:
        if other is not None and other.resolve() == path.resolve():
            raise UserError(f"{path} would overwrite a file of the same run; give another name")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and is gone when it does not.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; choose another place or free it") from error
    finally:
        temporary.unlink(missing_ok=True)
