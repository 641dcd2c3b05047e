"""What this machine has for cdvideo, each thing tried out: what scripts/doctor.py runs.

Nothing but Python is taken for granted here, so that the doctor speaks where an import of torch fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdvideo.errors import EXIT_FAILURE
from cdvideo.install import numbers_of, torchvision_fault

if TYPE_CHECKING:
    import torch

# As in pyproject.toml, which a test holds them to: package -> least version.
REQUIRED = {
    "torch": "2.10",
    "diffusers": "0.36",
    "transformers": "4.57",
    "peft": "0.17",
    "accelerate": "1.0",
    "safetensors": "0.4.5",
    "numpy": "1.26",
    "pillow": "10.3",
    "einops": "0.8",
    "imageio": "2.34",
    "imageio-ffmpeg": "0.5",
    "pyyaml": "6.0",
    "tqdm": "4.66",
    "filelock": "3.13",
}
# package -> least version, extra of cdvideo that brings it, what it is for.
OPTIONAL = {
    "opencv-python-headless": ("4.10", "eval", "optical flow in scripts/evaluate.py"),
    "matplotlib": ("3.9", "eval", "plots of the study"),
    "bitsandbytes": ("0.45", "gpu", "optim.optimizer=adamw8bit, on CUDA alone"),
}


@dataclass(frozen=True)
class Finding:
    """One line. `state`: "ok"; "missing" and "broken" are to be mended; "optional" and "unused" do no harm."""

    group: str
    name: str
    state: Literal["ok", "missing", "broken", "optional", "unused"]
    detail: str
    mend: str = ""


def main(argv: Sequence[str]) -> None:
    """Prints what was found, and a command for whatever is to be mended; ends with 1 where something is."""
    parser = ArgumentParser(description="Tries out what cdvideo needs on this machine.", allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    args = parser.parse_args(argv)
    findings: list[Finding] = []
    for finding in examine():
        if not findings or findings[-1].group != finding.group:
            print(f"\n{finding.group}")
        print(f"  {finding.state:<8}  {finding.name:<24}  {finding.detail}".rstrip())
        if finding.mend:
            print(f"  {'':<8}  {'':<24}  -> {finding.mend}")
        findings.append(finding)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n", encoding="utf-8")
    wrong = [finding.name for finding in findings if finding.state in ("missing", "broken")]
    print(f"\n{'to be mended: ' + ', '.join(wrong) if wrong else 'all in order'}")
    if wrong:
        raise SystemExit(EXIT_FAILURE)


def examine() -> Iterator[Finding]:
    """All findings, as they come."""
    system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("versions", "cdvideo", "ok", f"{importlib.import_module('cdvideo').__version__}, {system}")
    yield from packages()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its own that can not be loaded
        yield Finding("devices", "torch", "broken", f"torch can not be imported: {error}", "pip install torch")
        return  # nothing below can be tried without it
    yield from devices()
    yield from attention([torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))])
    yield from codecs()
    yield tried("base", "embedded base", load_embedded_base, mend="git checkout -- cdvideo/base/tiny")


def packages() -> Iterator[Finding]:
    """Versions of what cdvideo is built on."""
    for name, least in REQUIRED.items():
        yield _package(name, least, "missing", "", f"pip install '{name}>={least}'")
    for name, (least, extra, purpose) in OPTIONAL.items():
        yield _package(name, least, "optional", f" (for {purpose})", f"pip install 'cdvideo[{extra}]'")

    if (fault := torchvision_fault()) is not None:
        yield Finding("versions", "torchvision", "broken", fault.given, fault.do)


def _package(name: str, least: str, if_missing: Literal["missing", "optional"], purpose: str, mend: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("versions", name, if_missing, f"not installed{purpose}", mend)
    if numbers_of(found) < numbers_of(least):
        return Finding("versions", name, if_missing, f"{found}, at least {least} is needed{purpose}", mend)
    return Finding("versions", name, "ok", found)


def devices() -> Iterator[Finding]:
    """CPU and GPUs with their memory, and which of them is taken."""
    import torch

    from cdvideo.device import pick_dtype, use_device

    auto = use_device("auto")
    dtype = str(pick_dtype("auto", auto)).removeprefix("torch.")
    yield Finding("devices", "auto", "ok", f"without --device and --dtype: {auto}, {dtype}")
    yield tried("devices", "cpu", _cpu, mend="pip install accelerate psutil")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        has_bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        told = f"{torch.cuda.get_device_name(index)}, {total / 1e9:.1f} GB memory, {free / 1e9:.1f} GB free"
        yield Finding("devices", f"cuda:{index}", "ok", f"{told}, {'bf16' if has_bf16 else 'fp16'}")
    if torch.cuda.is_available():
        return
    if shutil.which("nvidia-smi") is None:
        yield Finding("devices", "cuda", "unused", "no GPU: everything runs on the CPU")
    elif torch.version.cuda is None:
        mend = "pip install --force-reinstall torch, in the build for CUDA that pytorch.org names for this system"
        yield Finding("devices", "cuda", "broken", f"there is a GPU, and torch {torch.__version__} knows none", mend)
    else:
        mend = "nvidia-smi, to see the driver's state; then update the driver"
        yield Finding("devices", "cuda", "broken", f"torch for CUDA {torch.version.cuda} finds no GPU", mend)


def _cpu() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{os.cpu_count()} cores, {memory.total / 1e9:.1f} GB memory, {memory.available / 1e9:.1f} GB free"


def attention(found: Sequence[torch.device]) -> Iterator[Finding]:
    """Every way to compute attention (cdvideo/attention.py), against the formula."""
    import torch

    from cdvideo.attention import BACKENDS, check_backend

    for device in found:
        dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [torch.float16, torch.bfloat16]
        for dtype in dtypes:
            name = f"SDPA {device} {str(dtype).removeprefix('torch.')}"
            yield tried("attention", name, partial(check_backend, "sdpa", device, dtype), mend="pip install -U torch")
        kernels = [name for name in BACKENDS if name not in ("sdpa", "xformers")]
        for kernel in kernels if device.type == "cuda" else []:
            finding = tried("attention", f"  {kernel}", partial(check_backend, kernel, device, dtypes[0]))
            # SDPA takes another kernel where one of them does not run.
            yield finding if finding.state == "ok" else Finding("attention", finding.name, "unused", finding.detail)
    yield _xformers([device for device in found if device.type == "cuda"])


def _xformers(gpus: Sequence[torch.device]) -> Finding:
    if not gpus:
        return Finding("attention", "xformers", "unused", "has kernels for CUDA alone")
    if importlib.util.find_spec("xformers") is None:
        return Finding("attention", "xformers", "optional", "not installed; SDPA serves", "pip install 'cdvideo[gpu]'")
    import torch

    from cdvideo.attention import check_backend

    return tried(
        "attention",
        f"xformers {version('xformers')}",
        partial(check_backend, "xformers", gpus[0], torch.float16),
        mend="pip install -U xformers, in the release made for this torch; or pip uninstall xformers",
    )


_FORMATS = {".mp4": "imageio-ffmpeg", ".webm": "imageio-ffmpeg", ".gif": "pillow", ".webp": "pillow"}


def codecs() -> Iterator[Finding]:
    """Writes a film in each format and reads it back."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix, packages_of in _FORMATS.items():
            film = Path(folder) / f"film{suffix}"
            mend = f"pip install --force-reinstall imageio {packages_of}"
            yield tried("codecs", suffix[1:], partial(write_and_read, film), mend=mend)
        film = Path(folder) / "film.mp4"
        if importlib.util.find_spec("decord") is None:
            told = "not installed; imageio's ffmpeg reads clips"
            yield Finding("codecs", "decord", "optional", told, "pip install decord (x86-64 Linux and Windows alone)")
        elif film.exists():
            yield tried(
                "codecs", "decord", partial(read_with_decord, film), mend="pip install --force-reinstall decord"
            )


def write_and_read(path: Path) -> str:
    """Eight grey frames that grow brighter; raises ValueError where they do not come back so."""
    import imageio.v3 as iio
    import numpy as np

    from cdvideo.media.export import write_video

    frames_FHWC = np.repeat(np.arange(20, 244, 28, dtype=np.uint8), 64 * 64 * 3).reshape(8, 64, 64, 3)
    write_video(frames_FHWC, path, fps=8, metadata={})
    plugin = "FFMPEG" if _FORMATS[path.suffix] == "imageio-ffmpeg" else "pillow"
    read_FHWC = np.stack([frame[..., :3] for frame in iio.imiter(path, plugin=plugin)])
    if read_FHWC.shape != frames_FHWC.shape or np.abs(read_FHWC.astype(int) - frames_FHWC).max() > 8:
        raise ValueError(f"frames of {read_FHWC.shape} came back, and differ from those written")
    return "8 frames written and read back"


def read_with_decord(path: Path) -> str:
    """Raises ValueError where decord does not see the eight frames."""
    from decord import VideoReader

    reader = VideoReader(str(path))
    brightness = [int(reader[index].asnumpy().mean()) for index in range(len(reader))]
    if len(brightness) != 8 or brightness != sorted(brightness):
        raise ValueError(f"{len(brightness)} of 8 frames read")
    return "8 frames of the mp4 read"


def load_embedded_base() -> str:
    """Loads the base that ships with cdvideo and lets its UNet predict once."""
    import torch

    from cdvideo.base.loader import load_base

    base = load_base("tiny", device=torch.device("cpu"))
    latents_BCHW = torch.zeros(1, base.unet.config["in_channels"], 16, 16)
    text_BLD = torch.zeros(1, 2, base.unet.config["cross_attention_dim"])
    with torch.inference_mode():
        predicted_BCHW = base.unet(latents_BCHW, 500, text_BLD, return_dict=False)[0]
    if not predicted_BCHW.isfinite().all():
        raise ValueError("it predicts numbers that are not finite")
    return f"loads and predicts, weights {base.hash}"


def tried(group: str, name: str, trial: Callable[[], str], *, mend: str = "") -> Finding:
    """The finding of a trial, which tells what it saw, or raises."""
    try:
        return Finding(group, name, "ok", trial())
    except Exception as error:  # whatever a broken installation raises is the finding
        reason = str(error).strip().split("\n")[0] or "no reason given"
        return Finding(group, name, "broken", f"{type(error).__name__}: {reason}", mend)
