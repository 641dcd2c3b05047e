from __future__ import annotations

from pathlib import Path

import pytest

from cdvideo.concept.config import ConceptConfig
from cdvideo.config import load_config, to_yaml
from cdvideo.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "concept"


def test_the_tiny_config_file_is_the_defaults() -> None:
    assert load_config(ConceptConfig, file=CONFIGS / "tiny.yaml") == ConceptConfig()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_file_loads_and_comes_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(ConceptConfig, file=file)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(ConceptConfig, file=tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "override",
    [
        "token=two words",
        "token=",
        "token=7up",
        "class_word= ",
        "class_word=big sks",
        "resolution=63",
        "steps=0",
        "seed=-1",
        "checkpoint_every=0",
        "data.variants=0",
        "data.rescale=1.5",
        "data.smallest_scale=0.1",
        "data.largest_scale=0.5",
        "adapter.num_rows=0",
        "adapter.kind=hypernetwork",
        "adapter.keys=frozen",
        "adapter.rank=0",
        "adapter.alpha=0",
        "adapter.targets=[]",
        "semantic.weight=-1",
        "semantic.phrases=0",
        "semantic.variant=pooled",
        "semantic.form=circle",
        "semantic.margin=-0.1",
        "preserve.prior_weight=-1",
        "preserve.prior_images=0",
        "preserve.output_weight=-1",
        "preserve.anchor_weight=-1",
        "others=[{images: photos, token: two words, class_word: cat}]",
        "others=[{images: photos, token: SKS, class_word: cat}]",
        "optim.batch_size=0",
        "optim.optimizer=sgd",
        "optim.lr=0",
        "optim.token_lr=-1",
        "optim.weight_decay=-1",
        "optim.grad_clip=0",
        "sample.every=-1",
        "sample.prompts=[]",
        "sample.prompts=[a dog]",
        "sample.steps=0",
        "sample.guidance=0.5",
    ],
)
def test_what_can_not_work_is_refused_by_name(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_config(ConceptConfig, overrides=[override])


def test_a_class_of_several_words_makes_one_phrase() -> None:
    assert ConceptConfig(token="sks", class_word="stuffed animal").phrase == "sks stuffed animal"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["adapter.kind=lora", "adapter.keys=locked"], "keys=locked"),
        (["adapter.kind=token", "adapter.train_rows=false"], "train_rows=false"),
        (["adapter.train_rows=false", "semantic.weight=0"], "train_rows=false: needs an initialiser"),
        (["adapter.train_rows=false", "adapter.initialiser=ktn"], r"semantic\.weight, preserve\.keep_norm: must be 0"),
        (
            ["adapter.train_rows=false", "adapter.initialiser=ktn", "semantic.weight=0", "preserve.keep_norm=true"],
            r"semantic\.weight, preserve\.keep_norm: must be 0",
        ),
        (["adapter.kind=token", "preserve.output_weight=1"], r"preserve\.output_weight"),
        (["data.focus=picture"], r"preserve\.background_weight=1: needs data\.focus=subject"),
        (["semantic.variant=released", "semantic.form=relation"], "form=relation"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(ConceptConfig, overrides=overrides)


def test_several_subjects_have_their_own_names() -> None:
    config = load_config(ConceptConfig, overrides=["others=[{images: photos/tom, token: tom, class_word: cat}]"])
    assert config.phrases == {"sks": "sks dog", "tom": "tom cat"}
    assert config.class_words == {"sks": "dog", "tom": "cat"} and config.others[0].images == Path("photos/tom")


def test_only_what_counts_is_a_term_of_the_loss() -> None:
    config = load_config(ConceptConfig, overrides=["semantic.weight=0", "preserve.anchor_weight=3"])
    assert config.loss_weights == {"denoise": 1.0, "background": 1.0, "anchor": 3.0}
