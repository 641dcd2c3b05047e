"""What all tests share: seeds, few threads, no network, and tiny models of the real classes.

The tiny models have random weights: they are for contracts and maths. What must mean something uses the embedded base.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers and transformers are imported
# Before torch is imported, as scripts have it (cdvideo/cpu.py): beside other work, tests take a thirtieth of the time.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "10000")
# Processes of pytest-xdist share the cores by tests. With more threads than cores each would wait for the others'.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cdvideo.base.loader import Base, load_base
from tests import sdxl

# Words that are one token of the tiny vocabulary; any other text falls to pieces, down to bytes.
TINY_WORDS = "a photo of the dog cat robot stuffed animal in on snow wearing headphones surfing".split()
TEXT_WIDTH = 32
MAX_TOKENS = 24

# A shell starts background jobs with Ctrl-C ignored; tests of interrupts need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases", type=int, metavar="N", help="hostile inputs for each reader (tests/fuzz), drawn anew each time"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch with two threads at least, without which the halves of guidance are not computed at once."""
    former = torch.get_num_threads()
    torch.set_num_threads(max(2, former))
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level CLIP vocabulary in CLIP's own files, so that any text tokenises."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bytes_and_ends = [*_byte_symbols(), *(symbol + "</w>" for symbol in _byte_symbols())]
    learned = Tokenizer(BPE())
    learned.pre_tokenizer = WhitespaceSplit()
    learned.train_from_iterator([" ".join(TINY_WORDS)], BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [" ".join(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    vocabulary = [*bytes_and_ends, *(merge.replace(" ", "") for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>"})
    )
    return folder


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """The tiny models as a folder in diffusers' layout: 64 pixels, 8x8 latents, v-prediction, zero terminal SNR."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    _make_unet().save_pretrained(folder / "unet")
    _make_vae().save_pretrained(folder / "vae")
    _make_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """4 latent channels; cross-attention of width 32 in the outer down and up block and in the middle."""
    return _make_unet().eval()


@pytest.fixture
def tiny_vae() -> AutoencoderTiny:
    """Eight pixels to one latent, 4 latent channels."""
    return _make_vae().eval()


@pytest.fixture
def tiny_text_encoder(tiny_tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return _make_text_encoder(tiny_tokenizer).eval()


@pytest.fixture
def tiny_base(tiny_base_folder: Path) -> Base:
    """The tiny models as the sampler and the trainer get them; fresh for each test, so it may be changed."""
    return load_base(str(tiny_base_folder), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """SDXL at a small width, as a folder in diffusers' layout."""
    return sdxl.save_folder(tmp_path_factory.mktemp("sdxl"), tiny_tokenizer_folder)


@pytest.fixture
def tiny_sdxl(sdxl_folder: Path) -> Base:
    return load_base(str(sdxl_folder), device=torch.device("cpu"))


def _make_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )


def _make_vae() -> AutoencoderTiny:
    torch.manual_seed(2)
    return AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def _make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _byte_symbols() -> list[str]:
    """The 256 printable characters by which GPT-2 and CLIP write bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + index) for index in range(256 - len(printable))]
