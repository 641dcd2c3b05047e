"""The flags of scripts/animate.py (no torch)."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from cdvideo.cli import add_common_flags
from cdvideo.sampling.config import FORMATS


def animate_parser() -> ArgumentParser:
    """All flags of scripts/animate.py; each sets a field of `AnimateConfig`."""
    parser = ArgumentParser(
        description="Films a prompt, with the concept whose token stands in it.", allow_abbrev=False
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help='what is to be seen; a concept\'s token brings the concept in; "0: TEXT | 24: TEXT" changes along the way',
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what is to be avoided")
    parser.add_argument("--frames", type=int, metavar="N", help="length of the film, as long as you like (16)")
    parser.add_argument("--fps", type=float, metavar="N", help="frames in a second (8)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (25, or as the motion modules ask)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="how closely to follow the prompt; 1 is off (5, or as the motion modules ask)",
    )
    parser.add_argument("--scheduler", choices=["auto", "ddim", "dpm++", "euler", "lcm"], help="the sampler (auto)")
    parser.add_argument("--speed", choices=["exact", "balanced", "fast"], help="what may differ to be faster (exact)")
    parser.add_argument("--compare", action="store_true", help="also make the exact film, and tell the distance to it")
    parser.add_argument("--compile", action="store_true", help="compile the UNet first, for GPUs: takes minutes")
    parser.add_argument("--num-videos", type=int, metavar="N", help="films with seed, seed + 1, ... (1)")
    parser.add_argument("--batch", type=int, metavar="N", help="films that go through the model at once (1)")
    parser.add_argument("--still", action="store_true", help="a picture instead of a film")
    parser.add_argument("--also-still", action="store_true", help="a picture beside each film, from the same seed")
    parser.add_argument("--offload", action="store_true", help="keep in RAM what is not at work: less GPU memory")
    parser.add_argument("--format", metavar="LIST", help=f"some of {','.join(FORMATS)} (mp4,gif)")
    parser.add_argument("--codec", choices=["h264", "hevc", "av1"], help="of the mp4 (h264)")
    parser.add_argument("--dither", choices=["none", "ordered", "diffusion"], help="of the gif (none)")
    backends = ["sdpa", "flash", "cudnn", "efficient", "xformers"]
    parser.add_argument("--attention", choices=backends, help="what computes attention (sdpa)")
    parser.add_argument(
        "--concept",
        metavar="FILE[:WEIGHT][,FILE...]",
        help="a concept, a LoRA, a textual inversion, several of them, or none (the newest one that fits the prompt)",
    )
    parser.add_argument(
        "--base", metavar="NAME", help="tiny, a diffusers folder, a .safetensors or .ckpt file, or a hub id (tiny)"
    )
    parser.add_argument(
        "--motion", metavar="PATH", help="motion modules: a folder, or AnimateDiff's .ckpt or .safetensors (the base's)"
    )
    parser.add_argument("--motion-lora", metavar="FILE[:X][,...]", help="motion LoRAs, each with its strength (none)")
    _add_length_flags(parser)
    _add_control_flags(parser)
    add_common_flags(parser, resume=False)
    return parser


def _add_length_flags(parser: ArgumentParser) -> None:
    """Flags of the groups `windows` and `noise`."""
    group = parser.add_argument_group("long films and loops")
    schedule = group.add_mutually_exclusive_group()
    schedule.add_argument(
        "--loop", action="store_const", const="looped", dest="windows.schedule", help="the end flows into the beginning"
    )
    add = group.add_argument
    add("--window-size", type=int, metavar="N", dest="windows.size", help="frames of a window (16)")
    add("--window-overlap", type=int, metavar="N", dest="windows.overlap", help="frames that two windows share (4)")
    schedule.add_argument(
        "--window-schedule",
        choices=["uniform", "static", "looped"],
        dest="windows.schedule",
        help="moved at every step, never moved, or moved around the film's end (uniform)",
    )
    add("--window-blend", choices=["pyramid", "flat"], dest="windows.blend", help="how windows are averaged (pyramid)")
    add("--noise", choices=["fresh", "freenoise"], dest="noise.kind", help="freenoise: long films of one piece (fresh)")
    add("--freeinit", type=int, metavar="N", dest="noise.freeinit", help="times the film is made anew, steadier (0)")


def _add_control_flags(parser: ArgumentParser) -> None:
    """Flags of the groups `control` and `start`."""
    add = parser.add_argument_group("what a film begins from, and how strongly motion and concept act").add_argument
    add("--motion-strength", metavar="X", dest="control.motion_strength", help='1, or over frames "0: 0.5 | 15: 1.2"')
    add(
        "--concept-strength", metavar="X", dest="control.concept_strength", help='1, or over steps "0%%: 0.2 | 40%%: 1"'
    )
    add("--concept-frames", metavar="X", dest="control.concept_frames", help='1, or over frames "0: 0 | 15: 1"')
    add("--init-video", type=Path, metavar="FILE", dest="start.video", help="a film to remake")
    add("--init-image", type=Path, metavar="FILE", dest="start.image", help="a picture to begin with")
    add(
        "--strength",
        type=float,
        metavar="X",
        dest="start.strength",
        help="how much is made anew (0.6; 0.7 for an image)",
    )
