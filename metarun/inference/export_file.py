"""A program of a trained run as a file: torch's `.pt2`, or ONNX."""

import io
import json
import logging
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from metarun.errors import ConfigError, RunError
from metarun.inference.export import INPUTS, OUTPUTS
from metarun.system.files import write_atomically

ABOUT = "metarun.json"
"""Names, in both formats, what the file says of itself."""

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def refuse_foreign(path: Path) -> None:
    """Refuse to overwrite a file that is no export.

    Raises:
        ConfigError: there is one.
    """
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: name a file, e.g. out=model.pt2")
    if not path.exists():
        return
    with open(path, "rb") as file:
        known = path.stat().st_size > 0
        if known:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                known = content.find(ABOUT.encode()) >= 0
    if not known:
        raise ConfigError(f"{path} is no file of metarun export: choose another out=")


def refuse_without_onnx() -> None:
    """Refuse ONNX where what makes and runs it is not installed.

    Raises:
        ConfigError: says how to install it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"out=….onnx needs {error.name}, which is not installed: pip install "
            "'metarun[export]', or choose out=….pt2, which needs torch alone"
        ) from error


def as_pt2(program: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Run]:
    """The content of a file for `torch.export.load`, and what such a file computes."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={ABOUT: _json(about)})
    content = file.getvalue()
    loaded: Run = torch.export.load(io.BytesIO(content)).module()
    return content, loaded


def as_onnx(program: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Run]:
    """The content of an ONNX file, and what onnxruntime makes of it.

    Raises:
        ConfigError: ONNX has no operation for one of the program.
    """
    import onnxruntime

    from metarun.inference.onnx_solve import SOLVE

    for name in ("onnxscript", "onnx_ir"):  # they tell of each node that they simplify
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            # What sizes are called. The exporter warns of a name that is given twice.
            dynamic_shapes={"support": {0: "examples"}, "labels": None, "queries": {0: "queries"}},
            custom_translation_table=SOLVE,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"ONNX has no operation for one that this run needs ({_missing(error)}): choose "
            "out=….pt2, which torch runs"
        ) from error
    assert made is not None
    model = made.model_proto
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "classes"
    model.metadata_props.add(key=ABOUT, value=_json(about))
    content: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        fed = {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)}
        return tuple(map(torch.from_numpy, session.run(list(OUTPUTS), fed)))

    return content, run


def write(path: Path, content: bytes) -> None:
    """Write the file, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose out=…") from error


def _missing(error: BaseException) -> str:
    """The operation that the exporter stumbled over."""
    text = str(error)
    cause = error.__cause__
    while cause is not None:
        text, cause = text + str(cause), cause.__cause__
    found = re.search(r"torch\.ops\.(aten\.\w+)|overload='?(aten\.\w+)", text)
    return next(filter(None, found.groups()), "unknown") if found else "unknown"


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=1)
