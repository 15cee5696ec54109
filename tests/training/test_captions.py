from pathlib import Path

import pytest

from components.training.captions import all_captions, caption, train_tokenizer
from components.training.pictures import Picture

APPLE = Picture("noto-1f34e.png", "apple", ("fruit", "red apple"), "noto", "red", True, "1f34e")
PLAIN = Picture("fluent-1f680.png", "rocket", (), "fluent", None, True, "1f680")


def test_a_caption_is_a_function_of_the_numbers_drawn_for_it():
    assert caption(APPLE, 0.9, 0.9) == "apple, noto style"
    assert caption(APPLE, 0.9, 0.05) == "apple"
    assert caption(APPLE, 0.1, 0.9) == "red apple, noto style"


def test_captions_use_every_word_that_is_known_about_a_picture():
    captions = {caption(APPLE, wording / 200, styling / 10) for wording in range(200) for styling in range(10)}
    assert {"fruit, noto style", "apple fruit", "red apple", "apple red apple, noto style"} <= captions


def test_a_picture_without_colour_and_synonyms_is_called_by_its_name():
    assert {caption(PLAIN, wording / 50, 0.9) for wording in range(50)} == {"rocket, fluent style"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(all_captions([APPLE, PLAIN] * 5), folder, vocab_size=400, max_length=12)


def test_frequent_words_are_single_tokens(tokenizer):
    assert len(tokenizer("rocket, fluent style").input_ids) == 6  # begin, rocket, comma, fluent, style, end


@pytest.mark.parametrize("prompt", ["zebra", "naïve café!", "你好", "rocket #7 😀", "ROCKET"])
def test_no_word_is_invisible_and_prompts_come_back_in_lower_case(tokenizer, prompt: str):
    tokens = tokenizer(prompt).input_ids
    assert tokens.count(tokenizer.eos_token_id) == 1, "an unknown letter would show as the end token"
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == prompt.lower().replace(" ", "")
