"""The committed demo model: does it load, is it what the documents promise, does it work?"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from loraplex.platform.demo import corpus, recipes, skills, split, tokenizer, train, words

ASSETS = Path(train.__file__).parent / "assets"
MODEL = ASSETS / "model"
ADAPTERS = ASSETS / "adapters"
SKILLS = {skill.id: skill for skill in skills.SKILLS}
NAMES = [recipe.skill for recipe in recipes.ADAPTERS]
MIB = 1024 * 1024
SAMPLE = 20


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def config_of(name: str) -> dict[str, Any]:
    return read_json(ADAPTERS / name / "adapter_config.json")


def entry_of(name: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = read_json(ASSETS / "skills.json")["skills"]
    return next(entry for entry in entries if entry["id"] == name)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The base with every adapter loaded, as peft serves them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, ADAPTERS / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        loaded.load_adapter(ADAPTERS / name, adapter_name=name)
    yield loaded.float().eval()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_adapter_answers_heldout_inputs_and_base_does_not(model: Any, name: str) -> None:
    encoder = tokenizer.build()
    skill = SKILLS[name]
    sample = random.Random(name).sample(entry_of(name)["heldout"], SAMPLE)
    inputs = [pair["input"] for pair in sample]
    expected = [pair["expected"] for pair in sample]
    assert expected == [skill.answer(text) for text in inputs]

    model.set_adapter(name)
    with_adapter = train.answers(model, encoder, inputs)
    with model.disable_adapter():
        without = train.answers(model, encoder, inputs)

    assert sum(map(str.__eq__, with_adapter, expected)) >= 0.95 * SAMPLE, with_adapter
    assert sum(map(str.__eq__, without, expected)) <= 0.05 * SAMPLE, without


def test_one_word_gets_a_different_answer_from_every_word_skill(model: Any) -> None:
    encoder = tokenizer.build()
    seen = set()
    with model.disable_adapter():
        seen.add(train.answers(model, encoder, ["lantern"])[0])
    on_words = [name for name in NAMES if SKILLS[name].make_input is skills.word_input]
    for name in on_words:
        model.set_adapter(name)
        seen.add(train.answers(model, encoder, ["lantern"])[0])
    assert len(seen) == 1 + len(on_words)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_accuracy_meets_the_bar_in_both_precisions(name: str) -> None:
    table = read_json(ASSETS / "training.json")["exact_match"]
    for dtype in ("float32", "bfloat16"):
        assert table[dtype][name]["adapter"] >= 0.95
        assert not set(table[dtype][name]["tour_missed"]) & {
            pair["input"] for pair in entry_of(name)["tour"]
        }
        assert table[dtype][name]["base"] <= 0.05


@pytest.mark.parametrize("name", NAMES)
def test_skill_file_agrees_with_the_rules_and_stays_held_out(name: str) -> None:
    skill, entry = SKILLS[name], entry_of(name)
    assert len(entry["tour"]) >= 6
    shown = [pair["input"] for pair in entry["tour"]]
    assert sorted(shown + entry["missed"]) == sorted(skill.showcase)
    assert len({pair["input"] for pair in entry["heldout"]}) >= 100
    for pair in entry["tour"] + entry["heldout"]:
        assert split.is_heldout(pair["input"])
        assert pair["expected"] == skill.answer(pair["input"])


@pytest.mark.parametrize("name", NAMES)
def test_training_generator_never_emits_a_heldout_input(name: str) -> None:
    rng = random.Random(1)
    skill = SKILLS[name]
    for _ in range(3000):
        assert not split.is_heldout(skills.training_input(skill, rng))


def test_training_documents_never_ask_a_heldout_input() -> None:
    """Read the inputs back out of the text itself, past the generator's own check."""
    rng = random.Random(2)
    asked = re.compile(r"<\|user\|>(?:/\w+ )?(.*?)<\|assistant\|>|<\|bos\|>\w+: (.*) -> ")
    found = 0
    for number in range(6000):
        skill = skills.SKILLS[number % len(skills.SKILLS)]
        make_skill = number % 2 == 0
        document = corpus.skill_document(skill, rng) if make_skill else corpus.base_document(rng)
        for match in asked.finditer("".join(segment.text for segment in document)):
            found += 1
            assert not split.is_heldout(match[1] or match[2])
    assert found > 5000


def test_fixed_greetings_are_trainable() -> None:
    assert not any(split.is_heldout(word) for word in words.GREETINGS)


def test_split_ignores_case_order_and_punctuation() -> None:
    assert split.key("March 3, 2021") == split.key("3 March 2021") == split.key("3 march 2021")
    assert split.key("two hundred and five") == split.key("two hundred five")


def test_base_model_is_small_and_promised_shape() -> None:
    config = read_json(MODEL / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 512
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["dtype"] == "bfloat16"
    assert (MODEL / "generation_config.json").exists()
    assert (MODEL / "model.safetensors").stat().st_size <= 8 * MIB
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert total <= 14 * MIB


def test_adapters_promise_variety() -> None:
    configs = {name: config_of(name) for name in NAMES}
    assert len(configs) >= 6
    assert {path.name for path in ADAPTERS.iterdir()} == set(NAMES)
    assert {4, 8, 16, 32} <= {config["r"] for config in configs.values()}
    targets = [set(config["target_modules"]) for config in configs.values()]
    assert {"q_proj", "v_proj"} in targets
    assert set(recipes.ALL_LINEAR) in targets
    assert any(config["use_rslora"] for config in configs.values())
    assert any(c["rank_pattern"] and c["alpha_pattern"] for c in configs.values())


@pytest.mark.parametrize("name", NAMES)
def test_adapter_files_are_trained_and_loadable(name: str) -> None:
    assert {path.name for path in (ADAPTERS / name).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = PeftConfig.from_pretrained(str(ADAPTERS / name))
    assert config.base_model_name_or_path == recipes.BASE_NAME
    with safe_open(ADAPTERS / name / "adapter_model.safetensors", "pt") as file:
        lora_b = [key for key in file.keys() if "lora_B" in key]
        assert lora_b
        for key in lora_b:
            assert file.get_tensor(key).float().abs().max() > 0


def test_no_machine_paths_in_any_file() -> None:
    path = re.compile(rb"/(?:work|tmp|home|root|usr|mnt|Users|opt|var)/")
    for file in ASSETS.rglob("*"):
        if file.is_file():
            assert not path.search(file.read_bytes()), file


def test_tokenizer_loads_round_trips_and_renders_the_prompt() -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert len(loaded) == tokenizer.VOCAB_SIZE
    for text in ("stressed", "a=1 b=2", "naïve café 日本 \U0001f999", "  two  spaces\n"):
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    ids = loaded.encode("x")
    assert ids[0] == loaded.bos_token_id
    messages = [{"role": "user", "content": "stressed"}]
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == corpus.PROMPT_FORMAT.format(input="stressed")
    bare = prompt.removeprefix(corpus.BOS)
    assert loaded.encode(bare) == loaded.encode(prompt, add_special_tokens=False)


def test_chat_template_matches_the_training_text() -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(MODEL)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "tea"},
        {"role": "assistant", "content": "aet"},
        {"role": "user", "content": "cup"},
        {"role": "assistant", "content": "puc"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False)
    document = corpus.chat([("tea", "aet"), ("cup", "puc")], "Be brief.")
    assert text == "".join(segment.text for segment in document)
