import pytest

from dpt_t2i.errors import InputError
from dpt_t2i.sampling.prompts_file import PromptLine, read_prompts_file


def read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    return read_prompts_file(tmp_path / name)


def test_a_line_a_prompt(tmp_path):
    assert read(tmp_path, "a.txt", "\ufeffa star\r\n\r\n  two stars \n") == [
        PromptLine("a star"),
        PromptLine("two stars"),
    ]
    assert read(tmp_path, "a.txt", "") == []


def test_the_benchmarks_own_files(tmp_path):
    geneval = '{"tag": "counting", "include": [{"class": "cow"}], "prompt": "two cows"}\n{"prompt": "a\u2028cow"}\n'
    assert read(tmp_path, "g.jsonl", geneval) == [PromptLine("two cows", "counting"), PromptLine("a\u2028cow")]
    # PartiPrompts: the first letter of a column is a capital, and a quote is a quote
    parti = 'Prompt\tCategory\tChallenge\n"G I G" on a wall\tIllustrations\tSymbols\n\nbond\tAbstract\tBasic\n'
    assert read(tmp_path, "p.tsv", parti) == [
        PromptLine('"G I G" on a wall', "Illustrations"),
        PromptLine("bond", "Abstract"),
    ]
    nss = "index\tcategory\tcoco_img_id\tcaption\r\n0\tnumerical \t8665\tOne bird.\r\n"
    assert read(tmp_path, "n.TSV", nss) == [PromptLine("One bird.", "numerical")]
    assert read(tmp_path, "z.jsonl", '{"text": "a bus", "category": 0}\n') == [PromptLine("a bus", "0")]
    assert read(tmp_path, "t.csv", 'category,prompt\ncolors,"a red, round bus"\n,a bus\n') == [
        PromptLine("a red, round bus", "colors"),
        PromptLine("a bus"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\nno', "line 2: no JSON"),
        ("a.jsonl", '\n{"prompt": 3}', "line 2: no text under `prompt`"),
        ("a.jsonl", '["a star"]', "line 1: no object with `prompt`"),
        ("a.tsv", "id\tkind\n1\tx\n", "no column is called prompt, caption, text; there are id, kind"),
        ("a.tsv", "", "no column is called .* there are none"),
        ("a.json", '[{"prompt": "a star"}]', "give .jsonl|as .jsonl"),
        ("a.csv", "prompt\na red, round bus\n", "line 2: 2 cells in 1 columns; in a .csv a text with a comma"),
        ("a.csv", 'prompt,tag\n"a red bus,x\na star,y\n', "line 4: unexpected end of data"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: "),
        ("a.csv", "prompt\n" + "a" * 200_000, "line 2: field larger"),
        ("a.csv", "prompt,Prompt\na,b\n", "two columns are called prompt"),
        ("a.tsv", "prompt\tkind\na star\tx\n \ty\n", "line 3: no text under `prompt`"),
    ],
)
def test_what_has_no_prompt_is_one_line_that_names_it(tmp_path, name, content, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, name, content)


def test_a_file_that_is_none_is_one_line(tmp_path):
    with pytest.raises(InputError, match="missing.txt cannot be read"):
        read_prompts_file(tmp_path / "missing.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00star")
    with pytest.raises(InputError, match="b.txt cannot be read"):
        read_prompts_file(tmp_path / "b.txt")
