import pytest

from dpt_t2i.errors import InputError
from dpt_t2i.scenes.prompts import FOLDER, load_suite, write_suites
from tests.scenes import reading
from tests.scenes.test_language import _claim

SIZES = {"dev": 300, "test_seen": 1020, "test_heldout": 400}


def test_the_files_are_what_the_code_writes(tmp_path):
    write_suites(tmp_path)
    for suite in SIZES:
        assert (tmp_path / f"{suite}.jsonl").read_bytes() == (FOLDER / f"{suite}.jsonl").read_bytes()


def test_suites_are_disjoint_and_complete():
    texts = [p.text for suite in SIZES for p in load_suite(suite)]
    assert len(texts) == len(set(texts)) == sum(SIZES.values())
    assert {suite: len(load_suite(suite)) for suite in SIZES} == SIZES


@pytest.mark.parametrize("suite", SIZES)
def test_prompts_claim_what_they_say(suite):
    for prompt in load_suite(suite):
        assert [_claim(fact) for fact in prompt.facts] == reading.claims(prompt.text)
        assert reading.held_out_words(prompt.text) == (suite == "test_heldout"), prompt.text


def test_an_unknown_suite_is_refused():
    with pytest.raises(InputError, match="dev, test_seen, test_heldout"):
        load_suite("validation")
