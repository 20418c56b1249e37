"""Rows: strict reading, the template, cutting, ends and padding; and the shipped ones, whose answers are worked out again."""

import json
import re

import numpy as np
import pytest
import torch

from m2helpers.data import load_dataset, split
from m2helpers.files import UserError
from m2helpers.instruct.questions import EVERY, FILES, ROWS, draw_rows, write_questions
from m2helpers.instruct.rows import Collator, Row, end_and_pad, read_rows, tokenise_rows
from m2helpers.models import embedded_tokenizer
from m2helpers.paths import INSTRUCTIONS

GOOD = b'{"instruction": "Add.", "input": "1, 2", "output": "3"}\n'
BAD = {
    "not JSON": (b"instruction: Add.", "is not JSON"),
    "cut short": (GOOD[:20], "is not JSON"),
    "two objects": (GOOD.strip() * 2, "is not JSON"),
    "a list": (b'["Add.", "1, 2", "3"]', "is a list"),
    "a string": (b'"Add."', "is a string"),
    "no output": (b'{"instruction": "Add.", "input": ""}', "lacks 'output'"),
    "another name": (GOOD.strip()[:-1] + b', "Output": "3"}', "has 'Output'"),
    "the same name twice": (GOOD.strip()[:-1] + b', "output": "4"}', "a name stands twice"),
    "a number": (b'{"instruction": "Add.", "input": "1, 2", "output": 3}', "output is a number"),
    "null": (b'{"instruction": "Add.", "input": null, "output": "3"}', "input is null"),
    "an empty output": (b'{"instruction": "Add.", "input": "1, 2", "output": " "}', "output is empty"),
    "an empty instruction": (b'{"instruction": "", "input": "1, 2", "output": "3"}', "instruction is empty"),
    "Latin-1": ('{"instruction": "Zähle.", "input": "", "output": "3"}'.encode("latin-1"), "is not UTF-8"),
    "half a pair": (b'{"instruction": "Add.", "input": "\\ud83d", "output": "3"}', "half a surrogate pair"),
}


@pytest.mark.parametrize("line, says", BAD.values(), ids=BAD)
def test_a_bad_line_is_refused_in_one_line_with_file_and_number(line, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as refused:
        read_rows(path)
    assert str(refused.value).startswith(f"{path}, line 3: ") and says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_good_files_are_read_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [Row("Add.", "", "3"), Row("Say it:\n\nall.", "ü\u2028{input}", "Ж😀")]
    lines = [json.dumps(row._asdict(), ensure_ascii=ascii) for row, ascii in zip(rows, (True, False), strict=True)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_rows(path) == rows
    assert rows[1].prompt == "### Instruction:\nSay it:\n\nall.\n\n### Input:\nü\u2028{input}\n\n### Response:\n"
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no rows"):
            read_rows(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path)


def test_the_end_is_learnt_and_padding_is_not():
    tokenizer = embedded_tokenizer()  # its padding is its end
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end, pad = end_and_pad(tokenizer)
    rows = tokenise_rows([Row("A", "1", "23"), Row("A", "", "4")], tokenizer, 512, "rows")
    batch = Collator(pad)(rows)
    assert {tuple(part.shape) for part in batch.values()} == {(2, len(rows[0].ids))}
    assert batch["attention_mask"].sum(1).tolist() == [len(row.ids) for row in rows]
    assert batch["input_ids"][1, len(rows[1].ids) :].tolist() == [pad] * 2 and pad != end
    scored = [part[part != -100].tolist() for part in batch["labels"]]
    assert scored == [[*tokenizer("23")["input_ids"], end], [*tokenizer("4")["input_ids"], end]]
    whole = Collator(pad)([row._replace(prompt=0) for row in rows])["labels"]
    assert torch.equal(whole, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def test_cutting_leaves_the_tail_of_the_prompt_and_a_response():
    tokenizer = embedded_tokenizer()
    short, input_too_long, all_too_long = Row("A", "", "b"), Row("A", "x" * 600, "bc"), Row("A", "x" * 600, "y" * 600)
    with pytest.warns(UserWarning, match=r"^train: 2 of 3 rows were cut to 128 tokens$"):
        rows = tokenise_rows([short, input_too_long, all_too_long], tokenizer, 128, "train")
    assert [len(row.ids) for row in rows] == [len(short.prompt) + 2, 128, 128]
    texts = [tokenizer.decode(row.ids) for row in rows]
    assert texts[1].startswith("### Instruction:\nA\n\n### Input:\nxx")
    assert texts[1].endswith("x\n\n### Response:\nbc<|endoftext|>")
    assert texts[2].endswith("x\n\n### Response:\n" + "y" * 64)  # it does not end here


def test_the_shipped_rows_are_what_the_generator_writes(tmp_path):
    write_questions(load_dataset(), tmp_path)
    for name in FILES.values():
        assert (tmp_path / name).read_bytes() == (INSTRUCTIONS / name).read_bytes()


@pytest.mark.parametrize("part", FILES)
def test_every_shipped_answer_follows_from_what_is_shown(part):
    rows = read_rows(INSTRUCTIONS / FILES[part])
    assert len(rows) == ROWS[part]
    counts = {}
    for row in rows:
        counts.setdefault(row.instruction, []).append(row.output)
        steps = [[float(value) for value in step.split(",")] for step in row.input.rstrip(";").split(";")]
        prey, predator = zip(*steps, strict=True)
        if row.instruction.startswith("What is the largest"):
            assert float(row.output) == max(prey + predator) and (prey + predator).count(float(row.output)) == 1
        elif row.instruction.startswith("Which peaks first"):
            order = prey.index(max(prey)) < predator.index(max(predator))
            assert row.output == ("1" if order else "2")
        elif row.instruction.startswith("Is the predator gone"):
            assert row.output == ("1" if predator[-1] == 0 else "0")
        else:
            assert re.fullmatch(r"\d+\.\d,\d+\.\d", row.output)
    assert {len(outputs) for outputs in counts.values()} == {ROWS[part] // 4}
    assert all(len(set(outputs)) > 1 for outputs in counts.values())


def test_next_steps_are_those_of_the_series_and_parts_share_none():
    data = load_dataset()
    scale = 10 / np.percentile(data.part("train").astype(float), 99.7)
    for part in FILES:
        texts = [
            ";".join(f"{prey:.1f},{predator:.1f}" for prey, predator in series[start::EVERY])
            for series in (data.part(part).astype(float) * scale).round(1)
            for start in range(EVERY)
        ]
        for row in draw_rows(data, part, 40):
            if row.instruction == "What comes next?":
                assert any(row.input + row.output in text for text in texts)
    parts = split(len(data.trajectories))
    assert not set(parts["train"]) & set(parts["validation"])
