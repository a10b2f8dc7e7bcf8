"""What is wrong with one run record or a file of it: all others are sent nevertheless."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from components.images.decoding import ImageUndecodable, read_rgb
from flows.records.records import MAKER_TAG, Record
from flows.tracking.store_problems import mlflow_command

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""How MLflow says that a value of the record, or the run that it names, is not as it should be."""


class FileFault(ValueError):
    """A file that cannot be sent; one line that names it."""


def picture(path: Path, longest_px: int) -> tuple[Image.Image, bool]:
    """A picture for the image grid, and whether it was larger.

    Raises:
        FileFault: it cannot be read.
    """
    try:
        image = Image.fromarray(read_rgb(path).pixels)
    except ImageUndecodable as problem:
        raise FileFault(f"{path}: no picture ({problem})") from None
    is_large = max(image.size) > longest_px
    image.thumbnail((longest_px, longest_px))
    return image, is_large


def lost_run(record: Record, client: MlflowClient) -> str | None:
    """What is said where a run that the record's upload writes to was deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    for name in (record.record_id, record.run.parent, record.run.tags.get(MAKER_TAG)):
        run_id = Record(record.folder.parent / name).mlflow_run_id if name else None
        if run_id is None:
            continue
        try:
            if client.get_run(run_id).info.lifecycle_stage != "deleted":
                continue
            back = mlflow_command(client.tracking_uri, f"runs restore --run-id {run_id}") + ", or "
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            back = ""
        anew = f"remove runs/records/{name}/mlflow.json to send it anew"
        return f"run {run_id} was deleted in MLflow: {back}{anew}"
    return None


def fault_of(record: Record, problem: Exception, client: MlflowClient) -> str | None:
    """One line on what is wrong with a record; None: the problem is the server's or the disk's."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(problem, MlflowException):
        is_its_own = problem.error_code in _REFUSED
        if is_its_own and (lost := lost_run(record, client)):
            return f"{record.record_id}: not sent whole: {lost}"
    elif isinstance(problem, RequestException):
        is_its_own = False
    elif isinstance(problem, OSError):
        # Of a connection there is no file name.
        is_its_own = problem.filename is not None and problem.errno not in _OF_THE_DISK
    else:
        is_its_own = isinstance(problem, ValueError)
    if not is_its_own:
        return None
    said = " ".join(str(problem).split())[:300]
    if isinstance(problem, OSError):
        said = f"{problem.filename}: {problem.strerror}"
    return f"{record.record_id}: not sent whole: {said}; mend it or move it aside"
