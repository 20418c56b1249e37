"""The live page's model, held against PyTorch: logits, text, price."""

import json
import subprocess

import numpy as np
import pytest
import torch

from m2helpers.data import load_dataset
from m2helpers.evaluation.protocols import P5_STEPS, make_cases
from m2helpers.flops import generation_flops
from m2helpers.flops.architecture import QWEN_05B
from m2helpers.forecasting import generate
from m2helpers.ledger import Ledger
from m2helpers.report import live
from m2helpers.text import Codec, tokenise
from tests.browser import built_site, chromium
from tools.notebooks import ROOT

MODEL = ROOT / "docs" / "_static" / "live" / "qwen2.js"
WINDOWS = {128: 46, 512: 3, 768: 1}  # context → how many
_RUN = """
({script, rules, contexts, separators}) => contexts.map((context) => {
  const model = new Qwen2.Model(script), grammar = new Qwen2.Grammar(rules);
  const finish = (steps) => { for (;;) { const step = steps.next(); if (step.done) return step.value; each(step.value); } };
  let text = "", each = () => {};
  const hidden = finish(Qwen2.readText(model, grammar, context));
  const logits = model.score(hidden);
  each = (token) => { text += token.text; };
  const read = finish(Qwen2.write(model, grammar, context, hidden, separators));
  return {logits, text, read};
})
"""


def _logits(base, context):
    (ids,) = tokenise([context], base.tokenizer)
    with torch.inference_mode():
        return base.model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()


def _compare(found, base, contexts, texts):
    """What JavaScript found against PyTorch with the same weights."""
    assert [one["text"] for one in found] == [text.text for text in texts]
    for one, context in zip(found, contexts, strict=True):
        assert np.abs(np.array(one["logits"]) - _logits(base, context)).max() < 1e-3


@pytest.mark.slow
def test_javascript_computes_what_pytorch_does(tiny_base, tmp_path):
    """On a model of random weights, with other sizes than the shipped one's; in the Node that Playwright brings."""
    from playwright._impl._driver import compute_driver_executable

    base, codec = tiny_base(), Codec(1.2)
    live.round_weights(base.model)
    whole = codec.encode(np.random.default_rng(0).uniform(0, 9, (30, 2)))
    contexts = [whole[3:50], whole[:201], whole[7:9]]  # the first begins inside a number, the last ends inside one
    given = {
        "script": live.model_script(base.model),
        "rules": live.grammar_script(codec, base.tokenizer, 2),
        "contexts": contexts,
        "separators": P5_STEPS + 1,
    }
    script = f"const {{Qwen2}} = require({json.dumps(str(MODEL))}); console.log(JSON.stringify(({_RUN})({json.dumps(given)})))"
    (tmp_path / "run.js").write_text(script, encoding="utf-8")
    node = compute_driver_executable()[0]
    done = subprocess.run([node, tmp_path / "run.js"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    texts = generate(base, codec, contexts, P5_STEPS + 1, 2, constrained=True, batch_size=1, ledger=ledger)
    _compare(found, base, contexts, texts)
    price = live.price_script(base.model.config, len(codec.alphabet))
    for one, context, text in zip(found, contexts, texts, strict=True):
        prompt = sum(c * len(context) ** power for power, c in enumerate(price["prompt"]))
        rest = sum(price["token"][0] + price["token"][1] * (len(context) + i) for i in range(one["read"]))
        assert prompt + rest == text.flops


@pytest.mark.parametrize("n", [1, 7, 768, 4000])
def test_the_price_is_the_accounts(n):
    price = live.price_script(QWEN_05B, 14)
    assert sum(c * n**power for power, c in enumerate(price["prompt"])) == generation_flops(
        QWEN_05B, 1, n, 1, vocabulary=14
    )
    two = generation_flops(QWEN_05B, 1, n, 2, vocabulary=14) - generation_flops(QWEN_05B, 1, n, 1, vocabulary=14)
    assert price["token"][0] + price["token"][1] * n == two


def test_the_scripts_hold_nothing_of_this_machine(tiny_base, tiny_folder):
    script = live.model_script(tiny_base().model)
    assert str(tiny_folder) not in json.dumps(script) and script["config"]["vocab_size"] == 259
    lengths = sum(length for _, length in script["tensors"])
    assert lengths == sum(p.numel() for p in tiny_base().model.parameters())


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
def test_the_page_writes_what_pytorch_writes(tmp_path):
    """Fifty test windows, in the reader's browser, from a file: the shipped run with its weights as the page has them."""
    run, test, ledger = live.live_run(), load_dataset().part("test"), Ledger(tmp_path / "ledger.sqlite")
    contexts, texts = [], []
    for context, n in WINDOWS.items():
        cases = make_cases(test, run.codec, "P5", context)
        some = [cases[i].context for i in np.linspace(0, len(cases) - 1, n).round().astype(int)]
        contexts += some
        texts += generate(run.base, run.codec, some, P5_STEPS + 1, 2, constrained=True, ledger=ledger)
    with chromium() as browser:
        page = browser.new_page()
        page.add_init_script("window.setTimeout = () => 0")  # the page's own forecast would only take time
        page.goto((built_site() / "live.html").as_uri())
        given = {"contexts": contexts, "separators": P5_STEPS + 1}
        found = page.evaluate(f"(given) => ({_RUN})({{script: LIVE_MODEL, rules: LIVE.grammar, ...given}})", given)
        _compare(found, run.base, contexts, texts)
        # Every position of one of them, and all of its vocabulary.
        context = contexts[-1]
        every = page.evaluate(
            """(context) => {
              const model = new Qwen2.Model(LIVE_MODEL), grammar = new Qwen2.Grammar(LIVE.grammar);
              const ids = grammar.encode(context), hidden = model.read(ids), n = model.hidden;
              return ids.map((_, i) => model.score(hidden.subarray(i * n, (i + 1) * n)));
            }""",
            context,
        )
    (ids,) = tokenise([context], run.base.tokenizer)
    with torch.inference_mode():
        logits = run.base.model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(np.array(every) - logits).max() < 1e-3
